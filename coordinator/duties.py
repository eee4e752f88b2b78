"""Duties: originals that a person called off unseen, and that are fenced at the first contact with their host.

``undo --original-is-off HOST`` puts the replica back into service although nobody can prove that the original is off.
The duty is written with that word, in the same transaction. Whatever process next reaches the host's agent, for
whatever reason, first does there what the undo could not: original off, fence back. Until then nothing
else is asked about it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import trio
from sqlalchemy import Connection, Row, delete, insert, select

from coordinator import journal, registry, schema
from coordinator.agents import QUESTION_TIMEOUT_S, Agent, AgentDirectory, NamingAgent, ProgressCallback, ask
from coordinator.clock import Clock
from coordinator.entries import EntryKind, JournalEntry, Phase
from coordinator.errors import STALE_EPOCH, AgentRefused, CoordinatorError, HostUnreachable, is_silent
from coordinator.findings import NO_VM
from coordinator.model import OriginalFlag, VmRef
from coordinator.plain import from_json, to_json
from coordinator.store import Store
from protocol.messages import (
    AskPower,
    Condition,
    Done,
    FenceDescription,
    FenceVm,
    InspectVm,
    OnTimeout,
    Order,
    OrderRequest,
    Power,
    PowerAnswer,
    PoweredOff,
    PowerOff,
    Reply,
    Request,
    SetCondition,
    Side,
    VmDescription,
)

ORIGINAL_RUNS = "original-runs"
"""Code of the refusal where the agent says that such an original is not off."""
NOT_FENCED_YET = "owed-fence"
"""Code of the refusal to ask anything else about an original that a duty could not be done to."""
FENCED_AT_CONTACT = "fenced_at_first_contact"
"""Name of the note that a duty was done."""
SHUTDOWN_TIMEOUT_S, KILL_AFTER_S = 60.0, 60.0
"""For an original that came up beside the serving replica: what it writes is lost anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Duty:
    """An original to fence. `actor`, `said_s` (wall time): who called it off, and when; `epoch`: the pair's now;
    `former`: it is not the pair's original (any more)."""

    id: int
    pair: str
    run: str
    epoch: int
    vm: VmRef
    targets: tuple[str, ...]
    actor: str
    said_s: float
    former: bool = False

    @property
    def title(self) -> str:
        """What it is to the pair."""
        return "former original" if self.former else "original"

    @property
    def sentence(self) -> str:
        """What is owed, for people."""
        if self.former:
            return (
                f"the fence of {self.vm.name} on {self.vm.host}, which the pair {self.pair} moved away from unseen, is "
                f"pending: it is powered off and fenced there at the first contact with {self.vm.host}; do not start it"
            )
        return (
            f"the original {self.vm.name} on {self.vm.host}, called off by {self.actor} and proven by nobody, is "
            f"powered off and fenced there at the first contact with {self.vm.host}; do not start it"
        )


# --- in the registry ----------------------------------------------------------------------------------------------


def add(connection: Connection, duty: Duty) -> None:
    """Owe it; one that is owed to that VM already stays as it is."""
    if any(known.vm == duty.vm for known in owed(connection)):
        return
    values = {"pair": duty.pair, "run": duty.run, "actor": duty.actor, "said_s": duty.said_s}
    connection.execute(insert(schema.duties).values(**values, vm=to_json(duty.vm), targets=to_json(duty.targets)))


def owed(connection: Connection, pair: str | None = None) -> tuple[Duty, ...]:
    """What is owed, of one pair or of all, oldest first."""
    query = (
        select(schema.duties, schema.pairs.c.epoch, schema.pairs.c.original)
        .join(schema.pairs)
        .order_by(schema.duties.c.id)
    )
    if pair is not None:
        query = query.where(schema.duties.c.pair == pair)
    return tuple(_duty(row) for row in connection.execute(query))


def drop(connection: Connection, vm: VmRef, run: str) -> None:
    """It is owed no more: the run that owed it is taken back."""
    for duty in owed(connection):
        if (duty.vm, duty.run) == (vm, run):
            connection.execute(delete(schema.duties).where(schema.duties.c.id == duty.id))


def _duty(row: Row[tuple[object, ...]]) -> Duty:
    vm = from_json(row.vm, VmRef)
    return Duty(
        id=row.id,
        pair=row.pair,
        run=row.run,
        epoch=row.epoch,
        vm=vm,
        targets=from_json(row.targets, tuple[str, ...]),
        actor=row.actor,
        said_s=row.said_s,
        former=from_json(row.original, VmRef) != vm,
    )


def _settle(connection: Connection, duty: Duty, flag: OriginalFlag, entry: JournalEntry) -> None:
    """It is done: in one transaction with the flag and the journal's word."""
    connection.execute(delete(schema.duties).where(schema.duties.c.id == duty.id))
    pair = registry.get_pair(connection, duty.pair)
    if pair.original == duty.vm:
        registry.set_flag(connection, duty.pair, pair.epoch, flag)
    if pair.former is not None and pair.former.vm == duty.vm:
        registry.set_former(connection, duty.pair, pair.epoch, replace(pair.former, fenced=True))
    journal.append(connection, entry)


# --- at the host --------------------------------------------------------------------------------------------------


async def fence_original(agent: Agent, duty: Duty) -> tuple[OriginalFlag, bool]:
    """Power it off and fence it; what its disks are now, and whether it ran. Harmless when repeated."""
    agent = NamingAgent(agent, duty.vm)
    order = Order(pair=duty.pair, run=duty.run, epoch=duty.epoch)
    vm = duty.vm.uuid
    off = PowerOff(
        order=order,
        vm_uuid=vm,
        timeout_s=SHUTDOWN_TIMEOUT_S,
        on_timeout=OnTimeout.FORCE,
        kill_after_s=KILL_AFTER_S,
    )
    timeout_s = SHUTDOWN_TIMEOUT_S + KILL_AFTER_S + QUESTION_TIMEOUT_S
    went_off = await ask(agent, off, PoweredOff, timeout_s=timeout_s)
    before = (await ask(agent, InspectVm(vm=vm), VmDescription, timeout_s=QUESTION_TIMEOUT_S)).fence
    fenced = FenceVm(order=order, vm_uuid=vm, side=Side.ORIGINAL, targets=duty.targets)
    fence = await ask(agent, fenced, FenceDescription)
    missing = sorted({*fence.unlocked, *(set(duty.targets) - set(fence.locked))})
    if missing:
        raise AgentRefused(f"the image of {', '.join(missing)} is not locked: end whatever uses it", code="not-fenced")
    condition, view = fence.condition or Condition.INTACT, fence.view
    if before is None and condition is Condition.EQUALS_VIEW:
        # Out of our hands for a while: whole as its own guest left it, equal to no view.
        condition, view = Condition.INTACT, None
        await ask(agent, SetCondition(order=order, vm_uuid=vm, condition=condition, view=None), Done)
    return OriginalFlag(condition=condition.value, view=view), went_off.was_running


class DutifulAgents:
    """An `AgentDirectory` whose agents do what is owed at their host before anything else.

    Args:
        agents: the real ones.
        store, clock, actor: for the journal.
    """

    def __init__(self, agents: AgentDirectory, store: Store, clock: Clock, actor: str) -> None:
        self._agents = agents
        self._store = store
        self._clock = clock
        self._actor = actor
        self._turns: dict[str, trio.Lock] = {}

    def agent(self, host: str) -> Agent:
        """See `AgentDirectory.agent`."""
        return _DutifulAgent(self._agents.agent(host), self._do_duties)

    def bulk_endpoint(self, host: str) -> tuple[str, int | None]:
        """See `AgentDirectory.bulk_endpoint`."""
        return self._agents.bulk_endpoint(host)

    async def _do_duties(self, agent: Agent, request: Request) -> None:
        async with self._turns.setdefault(agent.host, trio.Lock()):
            for duty in await self._store.read(owed):
                if duty.vm.host == agent.host:
                    await self._do(agent, duty, request)

    async def _do(self, agent: Agent, duty: Duty, request: Request) -> None:
        try:
            flag, ran = await fence_original(agent, duty)
        except CoordinatorError as error:
            if duty.former and error.code == NO_VM:
                sentence = f"{duty.vm.name} is gone from {duty.vm.host}: there is nothing to fence"
                await self._settle(duty, OriginalFlag(), sentence)
                return
            if is_silent(error) or error.code == STALE_EPOCH:
                raise
            if not _concerns(request, duty):
                return  # other pairs of that host must not wait for it; the next contact tries again
            runs = await _is_on(agent, duty)
            raise AgentRefused(
                f"the {duty.title} {duty.vm.name} on {duty.vm.host}, called off by {duty.actor}, must be fenced before "
                f"anything else and cannot be: {error.sentence.rstrip('.')}; power it off and repeat",
                code=ORIGINAL_RUNS if runs else NOT_FENCED_YET,
                host=agent.host,
            ) from error
        found = "it was running beside the replica and was powered off" if ran else "it was off"
        vm = f"the {duty.title} {duty.vm.name} on {duty.vm.host}"
        since = "the pair moved away from it" if duty.former else "it was called off"
        await self._settle(duty, flag, f"{vm} is fenced at the first contact since {since}: {found}")

    async def _settle(self, duty: Duty, flag: OriginalFlag, sentence: str) -> None:
        entry = JournalEntry(
            seq=0,
            pair=duty.pair,
            run=duty.run,
            epoch=duty.epoch,
            at_s=self._clock.wall_s(),
            kind=EntryKind.NOTE,
            phase=Phase.DO,
            step=FENCED_AT_CONTACT,
            actor=self._actor,
            sentence=sentence,
            elapsed_s=None,
            result=None,
        )
        await self._store.write(lambda connection: _settle(connection, duty, flag, entry))


async def _is_on(agent: Agent, duty: Duty) -> bool:
    """Whether its agent says that it is not off; False: it is, or nobody knows."""
    try:
        question = AskPower(vm_uuid=duty.vm.uuid)
        return (await ask(agent, question, PowerAnswer, timeout_s=QUESTION_TIMEOUT_S)).power is not Power.OFF
    except (HostUnreachable, AgentRefused):
        return False


class _DutifulAgent:
    """One of them."""

    def __init__(self, agent: Agent, first: Callable[[Agent, Request], Awaitable[None]]) -> None:
        self._agent = agent
        self._first = first

    @property
    def host(self) -> str:
        """The host's name."""
        return self._agent.host

    async def ask(
        self, request: Request, *, timeout_s: float | None, on_progress: ProgressCallback | None = None
    ) -> Reply:
        """See `Agent.ask`."""
        await self._first(self._agent, request)
        return await self._agent.ask(request, timeout_s=timeout_s, on_progress=on_progress)


def _concerns(request: Request, duty: Duty) -> bool:
    """Whether the request is about that VM or its pair."""
    named = {getattr(request, "vm_uuid", None), getattr(request, "vm", None)}
    if named & {duty.vm.uuid, duty.vm.name}:
        return True
    return isinstance(request, OrderRequest) and request.order.pair == duty.pair
