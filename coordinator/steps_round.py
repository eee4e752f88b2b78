"""The steps of one round while the replica serves: view, pass, end of the view, and what nobody needs any more."""

from __future__ import annotations

from coordinator import rounds
from coordinator.agents import ask
from coordinator.context import RunContext
from coordinator.errors import AgentRefused
from coordinator.passes import ask_evidence, run_pass
from coordinator.records import CheckpointsRecord, PassRecord, Record, ViewRecord
from coordinator.runlog import RunLog
from coordinator.steps import Step, StepFailed
from protocol.messages import CloseView, Done, DropCheckpoints, OpenView, Tracking, ViewOpened, ViewSince

NO_VIEW = "no-view"
"""Code of an agent that has not the view any more that it was asked for again."""


def ordinal(number: int) -> str:
    """``first``, ``second``, ``third``, ``4th``: for people."""
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


class ViewStep(Step):
    """A frozen view of the replica's disks."""

    harmless = "views of earlier attempts are closed first, and each attempt has a name of its own"
    number: int

    def number_in(self, context: RunContext) -> int:
        """Number of the view within the run."""
        return self.number

    def targets_in(self, context: RunContext) -> tuple[str, ...]:
        """The replica's disks it shows."""
        return context.replica_targets

    async def open(
        self, context: RunContext, *, track: Tracking, since: tuple[ViewSince, ...], freeze_guest: bool = False
    ) -> ViewRecord:
        """Close what an earlier attempt may have left, then open a view under a name never used before."""
        attempt = context.log.attempts(self.name)
        await self._close(context, range(1, attempt))
        targets = self.targets_in(context)
        order = OpenView(
            order=context.order,
            vm_uuid=context.pair.replica.uuid,
            targets=targets,
            view=self._view(context, attempt),
            track=track,
            since=since,
            freeze_guest=freeze_guest,
        )
        at_s = context.clock.monotonic_s()
        opened = await ask(context.source, order, ViewOpened)
        sizes = {d.replica: d.source_size_bytes for d in context.survey.disks if d.replica in targets}
        if {disk.target: disk.size_bytes for disk in opened.disks} != sizes:
            raise StepFailed(
                f"the disks of the replica on {context.source.host} were resized in the middle of the run: cancel, "
                "then plan again",
                code="size-changed",
            )
        return ViewRecord(view=opened.view, live=opened.live, disks=opened.disks, opened_s=at_s)

    async def reopened(self, context: RunContext) -> ViewRecord | None:
        """The live view that an earlier process opened and did not finish the pass of, if the agent still has it: what
        the target has proven against it need not be done again."""
        before = context.log.result(self.name, ViewRecord)
        if before is None or not before.live or not before.disks or not context.log.stands(self.name):
            return None
        order = OpenView(
            order=context.order,
            vm_uuid=context.pair.replica.uuid,
            targets=tuple(disk.target for disk in before.disks),
            view=before.view,
            reopen=True,
        )
        try:
            opened = await ask(context.source, order, ViewOpened)
        except AgentRefused as error:
            if error.code != NO_VIEW:
                raise
            return None
        return ViewRecord(view=opened.view, live=opened.live, disks=opened.disks, opened_s=context.clock.monotonic_s())

    async def undo(self, context: RunContext) -> Record:
        """Close every view of this step."""
        attempts = context.log.attempts(self.name)
        await self._close(context, range(1, attempts + 1))
        return ViewRecord(view=self._view(context, attempts), live=False)

    async def close_last(self, context: RunContext) -> ViewRecord:
        """Close the view that is open."""
        opened = context.log.result(self.name, ViewRecord)
        view = self._view(context, context.log.attempts(self.name)) if opened is None else opened.view
        order = CloseView(order=context.order, vm_uuid=context.pair.replica.uuid, view=view)
        await ask(context.source, order, Done)
        return ViewRecord(view=view, live=False)

    def _view(self, context: RunContext, attempt: int) -> str:
        return f"{context.run.id}-{self.number_in(context)}" + (f".{attempt}" if attempt > 1 else "")

    async def _close(self, context: RunContext, attempts: range | tuple[int, ...]) -> None:
        for attempt in attempts:
            order = CloseView(order=context.order, vm_uuid=context.pair.replica.uuid, view=self._view(context, attempt))
            await ask(context.source, order, Done)


class OpenRoundView(ViewStep):
    """A frozen view of the serving replica; what is written from that instant on is recorded."""

    undo_sentence = "close the view of the replica"

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = rounds.open_view(number)
        self.sentence = f"freeze the {ordinal(number)} view of the running replica"
        self.lasts_until = rounds.pass_of(number)

    def targets_in(self, context: RunContext) -> tuple[str, ...]:
        """Every disk, unless their scratch files were too large together."""
        return rounds.next_group(context.log, context.epoch, context.replica_targets)

    async def do(self, context: RunContext) -> ViewRecord:
        """Open it, and ask what was written since the view that the target proves; or go on with the view of an earlier
        process."""
        again = await self.reopened(context)
        if again is not None:
            return again
        known = rounds.views_of(context.run.id, context.log)
        equals = {e.target: e.equals for e in await ask_evidence(context)} if known else {}
        wanted = self.targets_in(context)
        since = tuple(
            ViewSince(target=disk.replica, view=view)
            for disk in context.pair.disks
            if disk.replica in wanted and (view := equals.get(disk.original)) is not None and view in known
        )
        freeze = context.options.freeze_guest and self.number == 1
        opened = await self.open(context, track=context.options.track, since=since, freeze_guest=freeze)
        if not opened.live:
            raise StepFailed(
                f"the replica on {context.source.host} is off, stopped by itself or by hand: `failback resume "
                f"{context.pair.name}` asks what to do",
                code="not-running",
            )
        return opened


class RoundPass(Step):
    """Make the original equal the view, while the replica serves."""

    harmless = "each attempt is a pass of its own and compares anew; agents end one of a lower epoch"
    interruptible = True

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = rounds.pass_of(number)
        self.sentence = f"{ordinal(number)} pass: bring the original up to the view"

    async def do(self, context: RunContext) -> PassRecord:
        """Run the pass; until it is complete the original is torn."""
        opened = context.log.result(rounds.open_view(self.number), ViewRecord)
        assert opened is not None  # the step before this one
        return await run_pass(context, self.name, opened)


class CloseRoundView(Step):
    """End the view and remove its scratch files."""

    harmless = "a view that is closed already is no error"
    sentence = "close the view"

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = rounds.close_view(number)

    async def do(self, context: RunContext) -> ViewRecord:
        """Close it."""
        return await OpenRoundView(self.number).close_last(context)


class DropCheckpointsOfRound(Step):
    """The target has durably recorded the view it equals now: what was recorded since earlier ones is not needed."""

    harmless = "it names what stays; what is gone already is no error"
    sentence = "drop the records that nobody needs any more"

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = rounds.drop_checkpoints(number)

    def applies(self, context: RunContext) -> bool:
        """Only where something is recorded."""
        return rounds.ever_tracked(context.log)

    async def do(self, context: RunContext) -> CheckpointsRecord:
        """Keep what the target equals, as it says itself, and what its latest pass made of each disk."""
        known = rounds.views_of(context.run.id, context.log)
        said = {e.equals for e in await ask_evidence(context) if e.equals is not None}
        kept = tuple(sorted({*rounds.latest_views(context.log).values(), *(said & known)}))
        order = DropCheckpoints(order=context.order, vm_uuid=context.pair.replica.uuid, keep=kept)
        await ask(context.source, order, Done)
        return CheckpointsRecord(kept=kept)


def round_steps(number: int) -> tuple[Step, ...]:
    """The steps of that round, in order."""
    return (OpenRoundView(number), RoundPass(number), CloseRoundView(number), DropCheckpointsOfRound(number))


def all_rounds(log: RunLog) -> tuple[Step, ...]:
    """The steps of every round that was begun, in order."""
    return tuple(step for number in range(1, rounds.last_round(log) + 1) for step in round_steps(number))
