"""Asks both agents everything a plan needs; changes nothing. An agent that gives no answer is a finding, no error."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

import trio

from coordinator.agents import QUESTION_TIMEOUT_S, Agent, AgentDirectory, NamingAgent, ask
from coordinator.clock import Clock, SystemClock
from coordinator.entries import EntryKind, JournalEntry
from coordinator.errors import AgentRefused, HostUnreachable, UsageError
from coordinator.findings import NO_VM, VERSION, Findings, Problem, SideFindings
from coordinator.machine import describe
from coordinator.model import Pair, State, VmRef
from protocol.errors import PeerEnded
from protocol.messages import (
    AskEvidence,
    AskPower,
    DescribeHost,
    Evidence,
    HostDescription,
    InspectVm,
    MachineDescription,
    PowerAnswer,
    TargetEvidence,
    VmDescription,
)


async def survey(
    agents: AgentDirectory, pair: Pair, clock: Clock | None = None, *, failover_s: float | None = None
) -> Findings:
    """What both agents say of their host and VM, asked at the same time.

    Args:
        clock: this host's, which the original's is compared with; None: the system's.
        failover_s: when the pair entered its present *Failover*, seconds since 1970.

    Raises:
        UsageError: our own certificates cannot be read.
    """
    answers: dict[str, SideFindings] = {}
    clock = clock or SystemClock()
    ahead: dict[str, float | None] = {}
    ours: list[UsageError] = []

    async def take(name: str, ref: VmRef) -> None:
        try:
            targets = tuple(disk.original for disk in pair.disks) if name == "original" else ()
            answers[name] = await survey_side(agents.agent(ref.host), ref, fenced_targets=targets)
        except UsageError as error:
            ours.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, "original", pair.original)
        nursery.start_soon(take, "replica", pair.replica)
    if ours:
        raise ours[0]
    for name, answer in answers.items():
        told = isinstance(answer.host, HostDescription) and answer.host.clock_s
        ahead[name] = told - clock.wall_s() if told else None
    since = None if failover_s is None else datetime.fromtimestamp(failover_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Findings(
        original=answers["original"],
        replica=answers["replica"],
        failover_since=since,
        failover_s=failover_s,
        original_ahead_s=ahead["original"],
        replica_ahead_s=ahead["replica"],
    )


async def survey_side(agent: Agent, ref: VmRef, *, fenced_targets: tuple[str, ...] = ()) -> SideFindings:
    """What one agent says of its host and of that VM; and, where it fences the VM, of these of its disks."""
    agent = NamingAgent(agent, ref)
    try:
        host = await ask(agent, DescribeHost(), HostDescription, timeout_s=QUESTION_TIMEOUT_S)
    except (HostUnreachable, AgentRefused) as error:
        return SideFindings(host=_host_problem(error), vm=None)
    vm = await _inspect(agent, ref.uuid)
    if isinstance(vm, Problem) and vm.code == NO_VM:
        namesake = await _inspect(agent, ref.name)  # the same name under another UUID: redefined, not gone
        vm = vm if isinstance(namesake, Problem) else namesake
    power = None if isinstance(vm, Problem) else await _power(agent, vm.uuid)
    fenced = isinstance(vm, VmDescription) and vm.fence is not None
    evidence = await _evidence(agent, ref.uuid, fenced_targets) if fenced and fenced_targets else ()
    machine = None if isinstance(vm, Problem) else await _machine(agent, vm.uuid)
    return SideFindings(host=host, vm=vm, power=power, evidence=evidence, machine=machine)


def failover_since(history: Iterable[JournalEntry]) -> float | None:
    """When the pair last entered *Failover* by the journal, in seconds since 1970; None where it does not say."""
    times = [entry.at_s for entry in history if entry.kind is EntryKind.STATE and entry.step == State.FAILOVER.value]
    return times[-1] if times else None


def _host_problem(error: HostUnreachable | AgentRefused) -> Problem:
    cause = error.__cause__
    if isinstance(cause, PeerEnded) and cause.goodbye_code == VERSION:
        return Problem(code=VERSION, sentence=cause.sentence)
    return Problem(code=error.code, sentence=error.sentence)


async def _inspect(agent: Agent, vm: str) -> VmDescription | Problem:
    try:
        return await ask(agent, InspectVm(vm=vm), VmDescription, timeout_s=QUESTION_TIMEOUT_S)
    except (HostUnreachable, AgentRefused) as error:
        return Problem(code=error.code, sentence=error.sentence)


async def _power(agent: Agent, uuid: str) -> PowerAnswer | None:
    try:
        return await ask(agent, AskPower(vm_uuid=uuid), PowerAnswer, timeout_s=QUESTION_TIMEOUT_S)
    except (HostUnreachable, AgentRefused):
        return None


async def _machine(agent: Agent, uuid: str) -> MachineDescription | Problem:
    try:
        return await describe(agent, uuid)
    except (HostUnreachable, AgentRefused) as error:
        return Problem(code=error.code, sentence=error.sentence)


async def _evidence(agent: Agent, uuid: str, targets: tuple[str, ...]) -> tuple[TargetEvidence, ...]:
    try:
        question = AskEvidence(vm_uuid=uuid, targets=targets)
        return (await ask(agent, question, Evidence, timeout_s=QUESTION_TIMEOUT_S)).disks
    except (HostUnreachable, AgentRefused):
        return ()
