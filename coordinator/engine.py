"""The engine: takes one run through its steps until it rests.

Before a step acts its intent is durable, after it its result. Whoever takes the run over probes what was intended and
not finished. A failure while the replica serves leaves the run where it is; inside the switchover it puts the replica
back into service; after the point of no return it waits for a person.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import trio
from sqlalchemy import Connection

from coordinator import journal, registry
from coordinator.audit import AuditState, audit_status, failback_words
from coordinator.context import RunContext
from coordinator.entries import EntryKind, JournalEntry
from coordinator.errors import CoordinatorError, DatabaseError, ExitCode, NeedsOperator
from coordinator.events import Outcome, StateChanged
from coordinator.holding import held
from coordinator.model import Newest, OnFailure, OperatorCall, OriginalFlag, Pair, State
from coordinator.moving import give_back, leave_behind
from coordinator.reports import closing_report
from coordinator.serving import Serving
from coordinator.stepping import Interrupted, Stepper, exits_of, is_ours_no_more
from coordinator.steps_check import AUDIT_STEP
from coordinator.steps_commit import COMMIT_STEPS
from coordinator.steps_round import all_rounds
from coordinator.steps_switch import SWITCH_STEPS, ReplicaOff
from coordinator.steps_sync import SYNC_STEPS
from coordinator.switching import ReturnedToService, Switching

OUTCOMES = {State.ROLLING_BACK: "rolled-back", State.CANCELLING: "cancelled", State.UNDOING: "undone"}


class Engine:
    """Works on one run. `stop`: see `coordinator.runs.Coordinator.execute_run`."""

    def __init__(self, context: RunContext, stop: trio.Event | None = None) -> None:
        self._context = context
        self._stepper = Stepper(context, trio.Event() if stop is None else stop)
        self._serving = Serving(context, self._stepper, self.move)
        self._switching = Switching(context, self._stepper, self.move)
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
                    case State.SYNCING | State.READY_TO_SWITCH:
                        await self._serving.work()
                    case State.SWITCHING:
                        await self._switch()
                    case State.COMMITTING:
                        await self._stepper.run(COMMIT_STEPS)
                        await self._finish_commit()
                    case State.FAILBACK if self._audit_is_due():
                        await self._stepper.again(AUDIT_STEP)
                    case State.ROLLING_BACK | State.CANCELLING | State.UNDOING:
                        await self._walk_back()
                    case _:
                        return await self._outcome()
            except Interrupted as interrupted:
                if not interrupted.cancel:
                    return await self._outcome("stopped at a safe boundary")
                await self.take_back(State.CANCELLING, "cancelled by the administrator")
            except ReturnedToService:
                continue
            except DatabaseError as error:
                raise self._unwritten(error) from error
            except CoordinatorError as error:
                if is_ours_no_more(error):
                    raise
                if not await self._after_failure(error):
                    return await self._outcome()

    # --- the states -----------------------------------------------------------------------------------------------

    async def _switch(self) -> None:
        await self._switching.work()
        reason = "the original was proven equal to the replica's final view, and is in use"
        if not self._context.options.power_on:
            reason = "the original was proven equal to the replica's final view, and may be powered on"
        await self.move(State.FAILBACK, reason=reason, change=self._original_is_newest)

    def _audit_is_due(self) -> bool:
        """Once for each process; one that differed before is repeated where somebody asks for it."""
        context, begun = self._context, self._audited
        self._audited = True
        found = audit_status(context.pair.name, context.options, context.log)
        return not begun and found.state not in (AuditState.OFF, AuditState.CLEAN)

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
        for step in reversed((*SYNC_STEPS, *all_rounds(context.log), *SWITCH_STEPS, AUDIT_STEP)):
            if step.undo_sentence and context.log.stands(step.name):
                await self._stepper.take_back(step)
        outcome = OUTCOMES[context.pair.state]
        reason = f"{outcome}: the replica holds the newest data and is as it was"
        await self.move(State.FAILOVER, reason=reason, outcome=outcome, change=self._taken_back)

    # --- journal --------------------------------------------------------------------------------------------------

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

    def _taken_back(self, connection: Connection) -> None:
        self._replica_is_newest(connection)
        context = self._context
        give_back(connection, context.pair.name, context.run.id, context.log, context.clock.wall_s())

    async def _finish_commit(self) -> None:
        context = self._context

        def change(connection: Connection) -> None:
            self._original_is_newest(connection)
            registry.set_flag(connection, context.pair.name, context.epoch, OriginalFlag())
            registry.set_original_autostart(connection, context.pair.name, context.epoch, None)
            leave_behind(connection, context.pair.name, context.run.id, context.clock.wall_s())

        reason = "committed: the original is in use, the replica stands by"
        await self.move(State.READY, reason=reason, outcome="committed", change=change)

    # --- failures -------------------------------------------------------------------------------------------------

    def _unwritten(self, error: DatabaseError) -> DatabaseError:
        """Nothing is done any more that the journal cannot say: the run stops here, and the journal, once it can be
        written, is compared with reality. Nor is anything taken back: that would have to be journalled as well."""
        context = self._context
        name, state = context.pair.name, context.pair.state
        served = ""
        if state in (State.SWITCHING, State.ROLLING_BACK, State.UNDOING) and context.log.stands(ReplicaOff.name):
            served = ", and nobody may be served until then"
        return DatabaseError(
            f"the run of {name} stopped in {state.value}, for its journal comes before everything it does: "
            f"{error.sentence}; then `failback resume {name}` goes on{served}",
            code=error.code,
            pair=name,
            state=state.value,
        )

    async def _after_failure(self, error: CoordinatorError) -> bool:
        """What follows a failure in the present state; True: the engine goes on in another state."""
        context = self._context
        state = context.pair.state
        self._failure = error
        if state is State.FAILBACK:
            return False  # the audit alone failed: the failback stands
        if state is State.SWITCHING and not context.past_no_return:
            if context.options.on_failure is OnFailure.HOLD and context.log.stands(ReplicaOff.name):
                call = await held(context, error)
                await self.move(State.NEEDS_OPERATOR, reason=call.sentence, operator=call)
                return False
            await self.take_back(State.ROLLING_BACK, error.sentence)
            return True
        if isinstance(error, NeedsOperator) or state is State.SWITCHING:
            exits = str(error.facts.get("exits", "")) or exits_of(state)
            call = OperatorCall(sentence=error.sentence, exits=tuple(exits.split(",")), before=state)
            await self.move(State.NEEDS_OPERATOR, reason=error.sentence, operator=call)
        return False

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
            case State.FAILOVER if self._stepper.cancel_claimed:
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
