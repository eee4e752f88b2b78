"""How steps are carried out: intent before, result after, probing what an earlier process left, stop and cancel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from coordinator import journal
from coordinator.audit import END_AUDIT
from coordinator.context import RunContext
from coordinator.entries import EntryKind, Phase
from coordinator.errors import HELD, STALE_EPOCH, AgentRefused, CoordinatorError, NeedsOperator
from coordinator.events import StepDone, StepFailed, StepStarted
from coordinator.model import OnFailure, State
from coordinator.records import Record
from coordinator.registry import Superseded
from coordinator.steps import Finding, Step, Verdict

INTERRUPT_POLL_S = 0.3
"""How often a pass, or a wait, looks for requests in the database."""
Boundary = Callable[[], Awaitable[None]]


class Interrupted(Exception):
    """Stop or cancel was asked for, and the run is at a safe boundary."""

    def __init__(self, *, cancel: bool) -> None:
        super().__init__()
        self.cancel = cancel


def is_ours_no_more(error: CoordinatorError) -> bool:
    """Whether another process has taken the run over, or another coordinator holds the pair."""
    return isinstance(error, Superseded) or (isinstance(error, AgentRefused) and error.code in (STALE_EPOCH, HELD))


class Stepper:
    """Carries out the steps of one run. `stop`: see `coordinator.runs.Coordinator.execute_run`."""

    def __init__(self, context: RunContext, stop: trio.Event) -> None:
        self._context = context
        self._stop = stop
        self._stop_answered = False
        self.cancel_claimed = False

    async def run(self, steps: tuple[Step, ...], *, boundary: Boundary | None = None) -> None:
        """Carry them out in order, but for those that are settled or do not apply; `boundary` before each.

        Raises:
            Interrupted: of a boundary; `CoordinatorError`: a step failed, which is in the journal.
        """
        for step in steps:
            if boundary is not None:
                await boundary()
            if self._is_settled(step) or not step.applies(self._context):
                continue
            await self._run_one(step)

    async def again(self, step: Step) -> None:
        """Carry one out, also where it was done before. Raises as `run`."""
        await self._run_one(step)

    def _is_settled(self, step: Step) -> bool:
        """Done, not taken back since, and what it set up still holds.

        What a switchover did that ended with the replica back in service was done for that one alone.
        """
        log = self._context.log
        last = log.last(step.name)
        if last is None or last.kind is not EntryKind.DONE or not log.stands(step.name):
            return False
        if step.of_switchover and last.seq < log.seq_of_state(State.SYNCING.value):
            return False
        return last.epoch == self._context.epoch or step.lasts_until is None or log.is_done(step.lasts_until)

    async def _run_one(self, step: Step) -> None:
        context = self._context
        last = context.log.last(step.name)
        started_s = context.clock.monotonic_s()
        finding = Finding(verdict=Verdict.NOT_DONE)
        try:
            if last is not None and last.kind is not EntryKind.DONE:
                finding = await step.probe(context)
            if finding.verdict is Verdict.UNKNOWN:
                raise NeedsOperator(
                    f"{finding.sentence}, then `failback resume {context.pair.name}`",
                    exits=exits_of(context.pair.state),
                )
            context.observer(StepStarted(step=step.name, sentence=step.sentence, undoing=False))
            if finding.verdict is Verdict.NOT_DONE:
                await context.write(EntryKind.INTENT, step.name, sentence=step.sentence)
                record: Record | None = await self._act(step)
            else:
                record = finding.record
        except CoordinatorError as error:
            await self.failed(step, Phase.DO, error, started_s)
            raise
        await self.done(step, Phase.DO, record, started_s, found=finding.verdict is Verdict.DONE)

    async def _act(self, step: Step) -> Record:
        if not step.interruptible:
            return await step.do(self._context)
        record: Record | None = None
        failure: CoordinatorError | None = None
        interrupted: Interrupted | None = None

        async def watch() -> None:
            nonlocal interrupted, failure
            while True:
                with trio.move_on_after(INTERRUPT_POLL_S):
                    await self._stop.wait()
                try:
                    await self.boundary()
                except Interrupted as found:
                    interrupted = found
                except CoordinatorError as error:
                    failure = error
                if interrupted is not None or failure is not None:
                    nursery.cancel_scope.cancel()
                    return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                record = await step.do(self._context)
            except CoordinatorError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if record is not None:
            return record
        assert interrupted is not None  # nothing else cancels that nursery
        raise interrupted

    # --- stop and cancel ------------------------------------------------------------------------------------------

    async def boundary(self) -> None:
        """While somebody is served: obey stop and cancel here, or, in an audit, who wants it to end."""
        context = self._context
        name, run = context.pair.name, context.run.id
        if context.pair.state is State.FAILBACK:
            asked = await context.store.write(lambda connection: journal.claim(connection, name, run, END_AUDIT))
            if asked is not None or self._stop.is_set():
                raise Interrupted(cancel=False)
            return
        request = await context.store.write(lambda connection: journal.claim(connection, name, run, "cancel"))
        if request is not None:
            self.cancel_claimed = True  # kept: the step that was to be broken off may end well at this very moment
        if self.cancel_claimed:
            raise Interrupted(cancel=True)
        if self._stop.is_set():
            raise Interrupted(cancel=False)

    async def answer_in_switchover(self) -> None:
        """Inside the switchover: answer, do not obey."""
        context = self._context
        fails = "rolls back by itself" if context.options.on_failure is OnFailure.ROLLBACK else "waits for a person"
        sentence = f"{context.pair.name} is in the switchover, which ends in Failback or {fails}"
        await context.store.write(
            lambda connection: journal.answer_all(
                connection, context.pair.name, context.run.id, sentence, verb="cancel"
            )
        )
        if self._stop.is_set() and not self._stop_answered:
            self._stop_answered = True
            await context.notice(f"not stopped: {sentence}")

    # --- journal ---------------------------------------------------------------------------------------------------

    async def done(self, step: Step, phase: Phase, record: Record | None, started_s: float, *, found: bool) -> None:
        """Say and write that a step is done."""
        elapsed_s = self._context.clock.monotonic_s() - started_s
        await self._context.write(EntryKind.DONE, step.name, phase=phase, elapsed_s=elapsed_s, record=record)
        undoing = phase is Phase.UNDO
        self._context.observer(StepDone(step=step.name, undoing=undoing, elapsed_s=elapsed_s, found_done=found))

    async def failed(self, step: Step, phase: Phase, error: CoordinatorError, started_s: float) -> None:
        """Say and write that a step failed."""
        if is_ours_no_more(error):
            return
        elapsed_s = self._context.clock.monotonic_s() - started_s
        await self._context.write(
            EntryKind.FAILED, step.name, phase=phase, sentence=error.sentence, elapsed_s=elapsed_s
        )
        undoing = phase is Phase.UNDO
        self._context.observer(StepFailed(step=step.name, undoing=undoing, code=error.code, sentence=error.sentence))

    async def take_back(self, step: Step) -> None:
        """Undo it, whatever it may have done."""
        context = self._context
        started_s = context.clock.monotonic_s()
        context.observer(StepStarted(step=step.name, sentence=step.undo_sentence, undoing=True))
        await context.write(EntryKind.INTENT, step.name, phase=Phase.UNDO, sentence=step.undo_sentence)
        try:
            record = await step.undo(context)
        except CoordinatorError as error:
            await self.failed(step, Phase.UNDO, error, started_s)
            raise
        await self.done(step, Phase.UNDO, record, started_s, found=False)

    async def rest(self, seconds: float) -> None:
        """Wait, or until stop is asked for."""
        with trio.move_on_after(seconds):
            await self._stop.wait()


def exits_of(state: State) -> str:
    """The verbs that lead out of *Needs operator*, by the state before, with commas between."""
    match state:
        case State.SYNCING | State.READY_TO_SWITCH:
            return "resume,cancel"
        case State.SWITCHING:
            return "resume,undo"
        case _:
            return "resume"
