"""What steps and engine work with: one run under one epoch, with its agents, its journal and its clock."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from coordinator import journal, registry
from coordinator.agents import Agent, AgentDirectory, NamingAgent
from coordinator.clock import Clock, Tokens
from coordinator.entries import EntryKind, JournalEntry, Phase, RunRecord
from coordinator.errors import CoordinatorError
from coordinator.events import Notice, Observer
from coordinator.hooks import Hooks
from coordinator.model import OriginalFlag, Pair, RunOptions
from coordinator.plain import to_json
from coordinator.records import Record, SurveyRecord
from coordinator.runlog import RunLog
from coordinator.store import Store
from protocol.messages import Condition, Order, Power

SURVEY = "survey"
PROTECT_ORIGINAL = "protect_original"
CREATE_HOME = "create_home"
LIFT_ORIGINAL_FENCE = "lift_original_fence"


@dataclass
class RunContext:
    """One run in the hands of one process. `pair` and `epoch` change as the run goes on; the rest
    stays."""

    pair: Pair
    run: RunRecord
    epoch: int
    log: RunLog
    store: Store
    directory: AgentDirectory
    hooks: Hooks
    clock: Clock
    tokens: Tokens
    observer: Observer
    actor: str

    @property
    def options(self) -> RunOptions:
        """What the administrator chose."""
        return self.run.options

    @property
    def order(self) -> Order:
        """The authority of this run's orders."""
        return Order(pair=self.pair.name, run=self.run.id, epoch=self.epoch)

    @property
    def source(self) -> Agent:
        """The agent beside the replica."""
        return NamingAgent(self.directory.agent(self.pair.replica.host), self.pair.replica)

    @property
    def target(self) -> Agent:
        """The agent beside the original."""
        return NamingAgent(self.directory.agent(self.pair.original.host), self.pair.original)

    @property
    def original_targets(self) -> tuple[str, ...]:
        """The original's disks of the pair."""
        return tuple(disk.original for disk in self.pair.disks)

    @property
    def replica_targets(self) -> tuple[str, ...]:
        """The replica's disks of the pair."""
        return tuple(disk.replica for disk in self.pair.disks)

    @property
    def snapshot(self) -> str:
        """Name of this run's protective snapshot."""
        return f"failback-{self.pair.name}-{self.run.id}"

    @property
    def survey(self) -> SurveyRecord:
        """Both sides as last surveyed."""
        record = self.log.result(SURVEY, SurveyRecord)
        if record is None:
            raise CoordinatorError(f"the journal of run {self.run.id} has no survey: it is damaged", code="journal")
        return record

    @property
    def replica_was_running(self) -> bool:
        """Whether the run found the replica in use (at any of its surveys)."""
        return any(found.replica_power is not Power.OFF for found in self.log.results(SURVEY, SurveyRecord))

    @property
    def past_no_return(self) -> bool:
        """Whether lifting the original's fence has been journalled as intended."""
        return self.log.intended(LIFT_ORIGINAL_FENCE)

    async def write(
        self,
        kind: EntryKind,
        step: str,
        *,
        phase: Phase = Phase.DO,
        sentence: str = "",
        elapsed_s: float | None = None,
        record: Record | None = None,
    ) -> None:
        """Add an entry to the journal, durably, if this process still has the newest epoch."""
        entry = self.entry(kind, step, phase=phase, sentence=sentence, elapsed_s=elapsed_s, record=record)

        def work(connection: Connection) -> JournalEntry:
            registry.check_epoch(connection, self.pair.name, self.epoch)
            return journal.append(connection, entry)

        self.log.add(await self.store.write(work))

    def entry(
        self,
        kind: EntryKind,
        step: str,
        *,
        phase: Phase = Phase.DO,
        sentence: str = "",
        elapsed_s: float | None = None,
        record: Record | None = None,
    ) -> JournalEntry:
        """An entry of this run, not written yet."""
        return JournalEntry(
            seq=0,
            pair=self.pair.name,
            run=self.run.id,
            epoch=self.epoch,
            at_s=self.clock.wall_s(),
            kind=kind,
            phase=phase,
            step=step,
            actor=self.actor,
            sentence=sentence,
            elapsed_s=elapsed_s,
            result=None if record is None else to_json(record),
        )

    async def notice(self, sentence: str) -> None:
        """Tell the administrator, and the journal."""
        await self.write(EntryKind.NOTE, "", sentence=sentence)
        self.observer(Notice(sentence=sentence))

    def tell(self, sentence: str) -> None:
        """Tell the administrator what the journal says already."""
        self.observer(Notice(sentence=sentence))

    async def set_flag(self, condition: Condition, view: str | None = None) -> None:
        """Write the registry's copy of the original's flag."""
        flag = OriginalFlag(condition=condition.value, view=view)

        def work(connection: Connection) -> Pair:
            registry.set_flag(connection, self.pair.name, self.epoch, flag)
            return registry.get_pair(connection, self.pair.name)

        self.pair = await self.store.write(work)

    async def remember_autostart(self, before: bool) -> None:
        """Keep the original's autostart from before the first run that took it away."""
        if self.pair.original_autostart is not None:
            return

        def work(connection: Connection) -> Pair:
            registry.set_original_autostart(connection, self.pair.name, self.epoch, before)
            return registry.get_pair(connection, self.pair.name)

        self.pair = await self.store.write(work)
