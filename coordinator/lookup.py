"""Finding out about VMs before any run: what a registration needs, and the proof of a failover."""

from __future__ import annotations

from coordinator.agents import QUESTION_TIMEOUT_S, Agent, AgentDirectory, NamingAgent, ask
from coordinator.errors import Refused, UsageError
from coordinator.findings import held_images
from coordinator.mapping import map_disks
from coordinator.model import (
    PAIR_NAME,
    Newest,
    OriginalFlag,
    Pair,
    PairRequest,
    State,
    VmRef,
)
from coordinator.steps import IS_OFF
from protocol.messages import (
    AskPower,
    InspectVm,
    Power,
    PowerAnswer,
    VmDescription,
)


async def look_up_pair(agents: AgentDirectory, request: PairRequest) -> Pair:
    """Inspect both VMs and map their disks; the registry is not asked.

    Raises:
        UsageError: a bad name, a disk that does not exist, a mapping that leaves a disk out.
        Refused: `in_failover` was said and is not so.
    """
    if not PAIR_NAME.fullmatch(request.name):
        raise UsageError(
            f"{request.name!r} is no name for a pair: use lower-case letters, digits and hyphens, at most 63",
            code="pair-name",
        )
    original = await _inspect(agents.agent(request.original_host), request.original_vm)
    replica = await _inspect(agents.agent(request.replica_host), request.replica_vm)
    if (request.original_host, original.uuid) == (request.replica_host, replica.uuid):
        raise UsageError(f"original and replica are the same VM {original.name}: name two", code="same-vm")
    pair = Pair(
        name=request.name,
        original=VmRef(host=request.original_host, name=original.name, uuid=original.uuid),
        replica=VmRef(host=request.replica_host, name=replica.name, uuid=replica.uuid),
        disks=map_disks(request, original, replica),
        excluded=request.excluded,
        state=State.READY,
        newest=Newest.ORIGINAL,
        flag=OriginalFlag(),
        epoch=0,
        run=None,
    )
    if request.in_failover:
        await prove_failover(agents, pair)
    return pair


async def prove_failover(agents: AgentDirectory, pair: Pair) -> None:
    """Raise `Refused` unless the original is off and the replica on, told by their agents now."""
    original = await _power(agents, pair.original)
    replica = await _power(agents, pair.replica)
    held = held_images(original, {disk.original for disk in pair.disks})
    if original.power not in IS_OFF or held:
        what = original.power.value
        if original.power in IS_OFF:
            what = f"off, but another process holds the image of {', '.join(held)}"
        raise Refused(
            f"the original {pair.original.name} on {pair.original.host} is {what}: a failover needs it off; power it "
            "off, then repeat",
            code="original-not-off",
        )
    if replica.power is not Power.RUNNING:
        raise Refused(
            f"the replica {pair.replica.name} on {pair.replica.host} is {replica.power.value}: a failover needs it "
            "running; start it, then repeat",
            code="replica-not-on",
        )


async def _inspect(agent: Agent, vm: str) -> VmDescription:
    return await ask(agent, InspectVm(vm=vm), VmDescription, timeout_s=QUESTION_TIMEOUT_S)


async def _power(agents: AgentDirectory, vm: VmRef) -> PowerAnswer:
    agent = NamingAgent(agents.agent(vm.host), vm)
    return await ask(agent, AskPower(vm_uuid=vm.uuid), PowerAnswer, timeout_s=QUESTION_TIMEOUT_S)
