"""Finding out about VMs before any run: registration, the proof of a failover, what a plan needs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from coordinator.agents import QUESTION_TIMEOUT_S, Agent, AgentDirectory, ask
from coordinator.errors import AgentRefused, HostUnreachable, Refused, UsageError
from coordinator.findings import Findings, Problem, SideFindings
from coordinator.model import (
    PAIR_NAME,
    DiskPair,
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
    DescribeHost,
    HostDescription,
    InspectVm,
    Power,
    PowerAnswer,
    VmDescription,
)

T = TypeVar("T")


async def look_up_pair(agents: AgentDirectory, request: PairRequest) -> Pair:
    """Inspect both VMs and map their disks; the pair is not in the registry yet.

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
        disks=_map_disks(request, original, replica),
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


def _map_disks(request: PairRequest, original: VmDescription, replica: VmDescription) -> tuple[DiskPair, ...]:
    here = {disk.target for disk in original.disks}
    there = [disk.target for disk in replica.disks]
    for target in request.excluded:
        if target not in there:
            raise UsageError(f"the replica {replica.name} has no disk {target} to exclude", code="no-such-disk")
    wanted = [target for target in there if target not in request.excluded]
    if not request.disks:
        pairs = tuple(DiskPair(original=target, replica=target) for target in wanted)
        missing = [target for target in wanted if target not in here]
        if missing:
            raise UsageError(
                f"the original {original.name} has no disk {', '.join(missing)} as the replica {replica.name} has: "
                "map it with --disk ORIGINAL=REPLICA, or leave it out with --exclude",
                code="disk-mapping",
            )
    else:
        pairs = request.disks
        for pair in pairs:
            if pair.original not in here or pair.replica not in there:
                raise UsageError(
                    f"there is no disk {pair.original} at the original or {pair.replica} at the replica: the original "
                    f"has {', '.join(sorted(here))}, the replica {', '.join(there)}",
                    code="no-such-disk",
                )
        for side in ([pair.original for pair in pairs], [pair.replica for pair in pairs]):
            if len(set(side)) != len(side):
                raise UsageError(f"a disk is mapped twice: {', '.join(sorted(side))}", code="disk-mapping")
        left = [target for target in wanted if target not in {pair.replica for pair in pairs}]
        if left:
            raise UsageError(
                f"the replica's disk {', '.join(left)} is neither mapped nor excluded: say which", code="disk-mapping"
            )
    if not pairs:
        raise UsageError(f"the replica {replica.name} has no disk to bring home", code="no-disks")
    return pairs


async def prove_failover(agents: AgentDirectory, pair: Pair) -> None:
    """Raise `Refused` unless the original is off and the replica on, told by their agents now."""
    original = await _power(agents.agent(pair.original.host), pair.original.uuid)
    replica = await _power(agents.agent(pair.replica.host), pair.replica.uuid)
    if original.power not in IS_OFF or not original.images_free:
        what = original.power.value if original.power not in IS_OFF else "off, but its images are held by some process"
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


async def gather_findings(agents: AgentDirectory, pair: Pair, failover_since: str | None) -> Findings:
    """What a plan needs, from both sides; what cannot be learnt is a `Problem`, not an error."""
    return Findings(
        original=await _side(agents.agent(pair.original.host), pair.original),
        replica=await _side(agents.agent(pair.replica.host), pair.replica),
        failover_since=failover_since,
    )


async def _side(agent: Agent, vm: VmRef) -> SideFindings:
    host = await _or_problem(lambda: ask(agent, DescribeHost(), HostDescription, timeout_s=QUESTION_TIMEOUT_S))
    if isinstance(host, Problem):
        return SideFindings(host=host, vm=None)
    found = await _or_problem(lambda: _inspect(agent, vm.uuid))
    power = None if isinstance(found, Problem) else await _or_problem(lambda: _power(agent, vm.uuid))
    return SideFindings(host=host, vm=found, power=None if isinstance(power, Problem) else power)


async def _or_problem(question: Callable[[], Awaitable[T]]) -> T | Problem:
    try:
        return await question()
    except (AgentRefused, HostUnreachable) as error:
        return Problem(code=error.code, sentence=error.sentence)


async def _inspect(agent: Agent, vm: str) -> VmDescription:
    return await ask(agent, InspectVm(vm=vm), VmDescription, timeout_s=QUESTION_TIMEOUT_S)


async def _power(agent: Agent, uuid: str) -> PowerAnswer:
    return await ask(agent, AskPower(vm_uuid=uuid), PowerAnswer, timeout_s=QUESTION_TIMEOUT_S)
