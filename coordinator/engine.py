"""The engine: takes one run through its steps until it rests.

Before a step acts its intent is durable, after it its result. Whoever takes the run over probes what was intended and
not finished. A failure while the replica serves leaves the run where it is; inside the switchover it puts the replica
back into service; after the point of no return it waits for a person.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import trio
from sqlalchemy import Connection

from coordinator import journal, registry
from coordinator.audit import END_AUDIT, AuditState, audit_status, failback_words
from coordinator.context import RunContext
from coordinator.entries import EntryKind, JournalEntry, Phase
from coordinator.errors import STALE_EPOCH, AgentRefused, CoordinatorError, ExitCode, NeedsOperator
from coordinator.events import Outcome, StateChanged, StepDone, StepFailed, StepStarted
from coordinator.model import Newest, OperatorCall, OriginalFlag, Pair, State
from coordinator.records import Record
from coordinator.registry import Superseded
from coordinator.reports import closing_report
from coordinator.steps import Finding, Step, Verdict
from coordinator.steps_check import AUDIT_STEP
from coordinator.steps_commit import COMMIT_STEPS
from coordinator.steps_switch import SWITCH_STEPS
from coordinator.steps_sync import SYNC_STEPS

INTERRUPT_POLL_S = 0.3
"""How often a pass looks for requests in the database."""
RUN_STEPS = (*SYNC_STEPS, *SWITCH_STEPS, AUDIT_STEP)
RENEWED_IN_SWITCHOVER = tuple(step for step in SYNC_STEPS if step.lasts_until == "verify")
"""What a process that takes over inside the switchover must set up again."""
OUTCOMES = {State.ROLLING_BACK: "rolled-back", State.CANCELLING: "cancelled", State.UNDOING: "undone"}


class _Interrupted(Exception):
    """Stop or cancel was asked for, and the run is at a safe boundary."""

    def __init__(self, *, cancel: bool) -> None:
        super().__init__()
        self.cancel = cancel


def is_ours_no_more(error: CoordinatorError) -> bool:
    """Whether another process has taken the run over."""
    return isinstance(error, Superseded) or (isinstance(error, AgentRefused) and error.code == STALE_EPOCH)


class Engine:
    """Works on one run. `stop`: see `coordinator.runs.Coordinator.execute_run`."""

    def __init__(self, context: RunContext, stop: trio.Event | None = None) -> None:
        self._context = context
        self._stop = trio.Event() if stop is None else stop
        self._stop_answered = False
        self._cancel_claimed = False
        self._failure: CoordinatorError | None = None
        self._audited = False

    async def work(self) -> Outcome:
        """Go on until the run rests.

        Raises:
            Superseded: another process has taken the run over; this one has stopped acting.
        """
        context = self._context
        while True:
            try:
                match context.pair.state:
                    case State.SYNCING:
                        await self._sync()
                    case State.READY_TO_SWITCH:
                        await self._begin_switchover()
                    case State.SWITCHING:
                        await self._switch()
                    case State.COMMITTING:
                        await self._run_steps(COMMIT_STEPS)
                        await self._finish_commit()
                    case State.FAILBACK if self._audit_is_due():
                        await self._run_step(AUDIT_STEP)
                    case State.ROLLING_BACK | State.CANCELLING | State.UNDOING:
                        await self._walk_back()
                    case _:
                        return await self._outcome()
            except _Interrupted as interrupted:
                if not interrupted.cancel:
                    return await self._outcome("stopped at a safe boundary")
                await self.take_back(State.CANCELLING, "cancelled by the administrator")
            except CoordinatorError as error:
                if is_ours_no_more(error):
                    raise
                if not await self._after_failure(error):
                    return await self._outcome()

    # --- the states -----------------------------------------------------------------------------------------------

    async def _sync(self) -> None:
        await self._run_steps(SYNC_STEPS, boundary=self._boundary)
        await self._boundary()
        await self.move(State.READY_TO_SWITCH)

    async def _begin_switchover(self) -> None:
        await self._boundary()
        await self.move(State.SWITCHING)

    async def _switch(self) -> None:
        await self._run_steps((*RENEWED_IN_SWITCHOVER, *SWITCH_STEPS), boundary=self._answer_in_switchover)
        await self.move(State.FAILBACK, change=self._original_is_newest)

    async def _run_steps(
        self, steps: tuple[Step, ...], *, boundary: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        for step in steps:
            if boundary is not None:
                await boundary()
            if self._is_settled(step) or not step.applies(self._context):
                continue
            await self._run_step(step)

    def _is_settled(self, step: Step) -> bool:
        """Done, and what it set up still holds."""
        log = self._context.log
        last = log.last(step.name)
        if last is None or last.kind is not EntryKind.DONE:
            return False
        return last.epoch == self._context.epoch or step.lasts_until is None or log.is_done(step.lasts_until)

    async def _run_step(self, step: Step) -> None:
        context = self._context
        last = context.log.last(step.name)
        started_s = context.clock.monotonic_s()
        finding = Finding(verdict=Verdict.NOT_DONE)
        try:
            if last is not None and last.kind is not EntryKind.DONE:
                finding = await step.probe(context)
            if finding.verdict is Verdict.UNKNOWN:
                raise NeedsOperator(
                    f"{finding.sentence}, then `failback resume {context.pair.name}`", exits=self._exits()
                )
            context.observer(StepStarted(step=step.name, sentence=step.sentence, undoing=False))
            if finding.verdict is Verdict.NOT_DONE:
                await context.write(EntryKind.INTENT, step.name, sentence=step.sentence)
                record: Record | None = await self._act(step)
            else:
                record = finding.record
        except CoordinatorError as error:
            await self._failed(step, Phase.DO, error, started_s)
            raise
        await self._done(step, Phase.DO, record, started_s, found=finding.verdict is Verdict.DONE)

    async def _act(self, step: Step) -> Record:
        if not step.interruptible:
            return await step.do(self._context)
        record: Record | None = None
        failure: CoordinatorError | None = None
        interrupted: _Interrupted | None = None

        async def watch() -> None:
            nonlocal interrupted, failure
            while True:
                with trio.move_on_after(INTERRUPT_POLL_S):
                    await self._stop.wait()
                try:
                    await self._boundary()
                except _Interrupted as found:
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

    def _audit_is_due(self) -> bool:
        """Once for each process; one that differed before is repeated where somebody asks for it."""
        context, begun = self._context, self._audited
        self._audited = True
        found = audit_status(context.pair.name, context.options, context.log)
        return not begun and found.state not in (AuditState.OFF, AuditState.CLEAN)

    # --- stop and cancel ------------------------------------------------------------------------------------------

    async def _boundary(self) -> None:
        """While somebody is served: obey stop and cancel here, or, in an audit, who wants it to end."""
        context = self._context
        name, run = context.pair.name, context.run.id
        if context.pair.state is State.FAILBACK:
            asked = await context.store.write(lambda connection: journal.claim(connection, name, run, END_AUDIT))
            if asked is not None or self._stop.is_set():
                raise _Interrupted(cancel=False)
            return
        request = await context.store.write(lambda connection: journal.claim(connection, name, run, "cancel"))
        if request is not None:
            self._cancel_claimed = True  # kept: the step that was to be broken off may end well at this very moment
        if self._cancel_claimed:
            raise _Interrupted(cancel=True)
        if self._stop.is_set():
            raise _Interrupted(cancel=False)

    async def _answer_in_switchover(self) -> None:
        """Inside the switchover: answer, do not obey."""
        context = self._context
        sentence = f"{context.pair.name} is in the switchover, which ends in Failback or rolls back by itself"
        await context.store.write(
            lambda connection: journal.answer_all(
                connection, context.pair.name, context.run.id, sentence, verb="cancel"
            )
        )
        if self._stop.is_set() and not self._stop_answered:
            self._stop_answered = True
            await context.notice(f"not stopped: {sentence}")

    # --- taking back ----------------------------------------------------------------------------------------------

    async def take_back(self, state: State, reason: str) -> None:
        """Begin to cancel, roll back or undo: under a higher epoch, so that agents end whatever still runs."""
        context = self._context
        name = context.pair.name

        entry = context.entry(EntryKind.STATE, state.value, sentence=reason)

        def work(connection: Connection) -> tuple[Pair, JournalEntry]:
            registry.check_epoch(connection, name, context.epoch)
            epoch = registry.raise_epoch(connection, name)
            pair = registry.move(connection, name, epoch, state)
            journal.set_reason(connection, context.run.id, reason)
            return pair, journal.append(connection, replace(entry, epoch=epoch))

        context.pair, written = await context.store.write(work)
        context.epoch = context.pair.epoch
        context.log.add(written)
        context.observer(StateChanged(pair=name, state=state))

    async def _walk_back(self) -> None:
        context = self._context
        for step in reversed(RUN_STEPS):
            begun = context.log.intended(step.name)
            if not begun or not step.undo_sentence or context.log.is_done(step.name, Phase.UNDO):
                continue
            started_s = context.clock.monotonic_s()
            context.observer(StepStarted(step=step.name, sentence=step.undo_sentence, undoing=True))
            await context.write(EntryKind.INTENT, step.name, phase=Phase.UNDO, sentence=step.undo_sentence)
            try:
                record = await step.undo(context)
            except CoordinatorError as error:
                await self._failed(step, Phase.UNDO, error, started_s)
                raise
            await self._done(step, Phase.UNDO, record, started_s, found=False)
        outcome = OUTCOMES[context.pair.state]
        await self.move(State.FAILOVER, outcome=outcome, change=self._replica_is_newest)

    # --- journal --------------------------------------------------------------------------------------------------

    async def _done(self, step: Step, phase: Phase, record: Record | None, started_s: float, *, found: bool) -> None:
        elapsed_s = self._context.clock.monotonic_s() - started_s
        await self._context.write(EntryKind.DONE, step.name, phase=phase, elapsed_s=elapsed_s, record=record)
        undoing = phase is Phase.UNDO
        self._context.observer(StepDone(step=step.name, undoing=undoing, elapsed_s=elapsed_s, found_done=found))

    async def _failed(self, step: Step, phase: Phase, error: CoordinatorError, started_s: float) -> None:
        if is_ours_no_more(error):
            return
        elapsed_s = self._context.clock.monotonic_s() - started_s
        await self._context.write(
            EntryKind.FAILED, step.name, phase=phase, sentence=error.sentence, elapsed_s=elapsed_s
        )
        undoing = phase is Phase.UNDO
        self._context.observer(StepFailed(step=step.name, undoing=undoing, code=error.code, sentence=error.sentence))

    async def move(
        self,
        to: State,
        *,
        reason: str = "",
        operator: OperatorCall | None = None,
        outcome: str | None = None,
        change: Callable[[Connection], None] | None = None,
    ) -> None:
        """Move the pair, with whatever else must become true at the same instant."""
        context = self._context
        name = context.pair.name
        entry = context.entry(EntryKind.STATE, to.value, sentence=reason)

        def work(connection: Connection) -> tuple[Pair, JournalEntry]:
            registry.move(connection, name, context.epoch, to, operator=operator)
            if change is not None:
                change(connection)
            if outcome is not None:
                kept = journal.get_run(connection, context.run.id).reason
                journal.end_run(connection, context.run.id, outcome=outcome, reason=kept, at_s=context.clock.wall_s())
                journal.answer_all(connection, name, context.run.id, f"the run has ended: {outcome}")
            return registry.get_pair(connection, name), journal.append(connection, entry)

        context.pair, written = await context.store.write(work)
        context.log.add(written)
        context.observer(StateChanged(pair=name, state=to))

    def _original_is_newest(self, connection: Connection) -> None:
        registry.set_newest(connection, self._context.pair.name, self._context.epoch, Newest.ORIGINAL)

    def _replica_is_newest(self, connection: Connection) -> None:
        registry.set_newest(connection, self._context.pair.name, self._context.epoch, Newest.REPLICA)

    async def _finish_commit(self) -> None:
        context = self._context

        def change(connection: Connection) -> None:
            self._original_is_newest(connection)
            registry.set_flag(connection, context.pair.name, context.epoch, OriginalFlag())
            registry.set_original_autostart(connection, context.pair.name, context.epoch, None)

        await self.move(State.READY, outcome="committed", change=change)

    # --- failures -------------------------------------------------------------------------------------------------

    async def _after_failure(self, error: CoordinatorError) -> bool:
        """What follows a failure in the present state; True: the engine goes on in another state."""
        context = self._context
        state = context.pair.state
        self._failure = error
        if state is State.FAILBACK:
            return False  # the audit alone failed: the failback stands
        if state is State.SWITCHING and not context.past_no_return:
            await self.take_back(State.ROLLING_BACK, error.sentence)
            return True
        if isinstance(error, NeedsOperator) or state is State.SWITCHING:
            exits = str(error.facts.get("exits", "")) or self._exits()
            call = OperatorCall(sentence=error.sentence, exits=tuple(exits.split(",")), before=state)
            await self.move(State.NEEDS_OPERATOR, reason=error.sentence, operator=call)
        return False

    def _exits(self) -> str:
        match self._context.pair.state:
            case State.SYNCING:
                return "resume,cancel"
            case State.SWITCHING:
                return "resume,undo"
            case _:
                return "resume"

    async def _outcome(self, stopped: str = "") -> Outcome:
        context = self._context
        name, state = context.pair.name, context.pair.state
        run = await context.store.read(lambda connection: journal.get_run(connection, context.run.id))
        code, sentence = ExitCode.DONE, ""
        match state:
            case State.FAILBACK:
                code, sentence = failback_words(name, context.options, context.log)
            case State.READY:
                sentence = f"{name} is committed: the original is in use, the replica stands by"
            case State.FAILOVER if run.outcome == "rolled-back":
                served = "is in use again" if context.replica_was_running else "is off, as it was found"
                code, sentence = ExitCode.FAILED, f"{name} rolled back, the replica {served}: {run.reason}"
            case State.FAILOVER if self._cancel_claimed:
                # Whoever asked for the cancel is told so by `cancel`; to `start` it is a failback that did not happen.
                code, sentence = ExitCode.FAILED, f"{name} was cancelled: the replica holds the newest data, as before"
            case State.FAILOVER:
                sentence = f"{name} is {run.outcome}: the replica holds the newest data and is as it was"
            case State.NEEDS_OPERATOR:
                call = context.pair.operator
                code, sentence = ExitCode.NEEDS_OPERATOR, call.sentence if call else "only a person can go on"
            case _:
                why = stopped or (self._failure.sentence if self._failure else "not finished")
                ways = f"`failback resume {name}`"
                if state in (State.SYNCING, State.READY_TO_SWITCH):
                    ways += f" goes on, `failback cancel {name}` gives up"
                else:
                    ways += " goes on"
                code, sentence = ExitCode.FAILED, f"{name} is in {state.value}: {why}; {ways}"
        return Outcome(
            pair=name,
            run=context.run.id,
            state=state,
            exit_code=code,
            sentence=sentence,
            report=closing_report(run, context.pair.disks, context.log),
        )
