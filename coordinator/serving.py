"""While the replica serves: rounds, as long as they are worth it, and the wait for the moment to switch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from sqlalchemy import Connection

from coordinator import journal, registry, rounds
from coordinator.agents import QUESTION_TIMEOUT_S, ask
from coordinator.context import RunContext
from coordinator.convergence import Decision, Next, Situation, decide
from coordinator.entries import EntryKind, JournalEntry
from coordinator.errors import AgentRefused, CoordinatorError, HostUnreachable
from coordinator.limits import read_limits
from coordinator.model import State
from coordinator.prediction import DEFAULT_STEP_S, Known, Measured, measure, predict, shutdown_seen_s
from coordinator.records import Prediction, RoundFailure, TrackingRecord, ViewRecord, Waiting
from coordinator.rounds import PREDICTED, WAITING
from coordinator.stepping import INTERRUPT_POLL_S, Stepper, is_ours_no_more
from coordinator.steps import IS_OFF, StepFailed, ask_power
from coordinator.steps_round import CloseRoundView, round_steps
from coordinator.steps_sync import SYNC_STEPS, stopped_by_itself
from coordinator.timing import SWITCH, Due, Trigger, due_before, judge, order_in_force
from protocol.messages import AskWritten, Side, TrackingRead, ViewSince

STALE_S = 10.0
"""After so long a wait another round shortens the downtime again."""
Move = Callable[..., Awaitable[None]]


class Serving:
    """The states Syncing and Ready to switch, in the hands of one process."""

    def __init__(self, context: RunContext, stepper: Stepper, move: Move) -> None:
        self._context = context
        self._stepper = stepper
        self._move = move
        self._burst = 0  # complete rounds before the passes without a rest that are under way
        self._earlier_s: list[float] = []
        self._decision: Decision | None = None
        self._rested_s: float | None = None  # monotonic time of the last decision to wait
        self._round_s = 0.0  # how long the latest complete round took, everything in it

    async def work(self) -> None:
        """Go on until the run switches (the pair is in *Switching* then).

        Raises:
            Interrupted: stop or cancel was asked for; `CoordinatorError`: the run cannot go on.
        """
        context, stepper = self._context, self._stepper
        await stepper.run(SYNC_STEPS, boundary=stepper.boundary)
        await stepper.boundary()
        if context.survey.replica_power in IS_OFF:
            # Nobody is served, and nothing changes any more: one pass, after the switchover has begun.
            self._decision = Decision(next=Next.READY, key="off", sentence="the replica is off already")
        while True:
            await self._take_orders()
            if self._must_copy():
                await self._round()
            elif await self._switched():
                return
            else:
                await stepper.rest(INTERRUPT_POLL_S)
            await stepper.boundary()

    # --- rounds -----------------------------------------------------------------------------------------------------

    def _must_copy(self) -> bool:
        """Whether a round comes before anything else: none yet in this process, one that is worth it, its time, or the
        last one before the time that was set to switch."""
        context = self._context
        if context.survey.replica_power in IS_OFF:
            return False
        if self._decision is None or not rounds.is_fresh(context.log, context.epoch, context.replica_targets):
            return True
        order = order_in_force(context.options, context.log)
        if order.trigger is Trigger.NOW:
            return False
        if self._decision.next is Next.AGAIN:
            return True
        rested_s = context.clock.monotonic_s() - (self._rested_s or 0.0)
        due = due_before(order, wall_s=context.clock.wall_s(), rested_s=rested_s, takes_s=self._round_s)
        if due is Due.ROUND:
            return True
        if due is Due.REST and self._decision.next is Next.READY:
            return False
        return rested_s >= context.options.background_s

    async def _round(self) -> None:
        """One round; where it is given up for its view's sake, the next one is another round."""
        context = self._context
        if self._rested_s is not None and (await ask_power(context, Side.REPLICA)).power in IS_OFF:
            raise stopped_by_itself(context)  # while the run waited; no view of it could be opened
        number = rounds.next_round(context.log)
        steps = round_steps(number)
        began_s = context.clock.monotonic_s()
        try:
            await self._stepper.run(steps, boundary=self._stepper.boundary)
        except CoordinatorError as error:
            if is_ours_no_more(error) or error.code not in rounds.AGAIN_AFTER:
                raise
            await self._give_up(number, error)
            return
        self._round_s = context.clock.monotonic_s() - began_s
        if rounds.is_fresh(context.log, context.epoch, context.replica_targets):
            await self._decide()

    async def _give_up(self, number: int, error: CoordinatorError) -> None:
        """Close the view, note the failure, and say what follows; raises where the next round would fail as well."""
        context = self._context
        shown = rounds.next_group(context.log, context.epoch, context.replica_targets)
        opened = context.log.result(rounds.open_view(number), ViewRecord)
        if opened is not None and opened.disks and context.log.is_done(rounds.open_view(number)):
            shown = tuple(disk.target for disk in opened.disks)
        await self._stepper.run((CloseRoundView(number),))
        failure = RoundFailure(number=number, code=error.code, targets=shown)
        await context.write(EntryKind.NOTE, rounds.ROUND_FAILED, sentence=error.sentence, record=failure)
        if (await ask_power(context, Side.REPLICA)).power in IS_OFF:
            raise stopped_by_itself(context) from error  # its view went with it; another one would be refused
        row = rounds.in_a_row(context.log, context.epoch)
        if rounds.is_hopeless(rounds.failures(context.log, context.epoch), row):
            cure = "look at its log"
            if error.code == rounds.SCRATCH_FULL:
                cure = f"make room where it keeps scratch files (the view of {', '.join(shown)} alone was too large)"
            raise StepFailed(
                f"rounds of {context.pair.name} failed {rounds.MOST_FAILURES} times, the last one because "
                f"{error.sentence.rstrip('.')}; {cure} on {context.source.host}, then `failback resume "
                f"{context.pair.name}`",
                code=error.code,
            )
        size = rounds.group_size(context.log, context.epoch, len(context.replica_targets))
        smaller = ""
        if size < len(context.replica_targets):
            smaller = f", with views of {size} disk{'s' if size > 1 else ''} at a time"
        await context.notice(f"the round is given up and another one begins{smaller}: {error.sentence}")

    # --- deciding ---------------------------------------------------------------------------------------------------

    async def _decide(self) -> None:
        """After a round: predict, and choose what follows."""
        context = self._context
        measured, prediction = await predict_now(context)
        done = rounds.done_rounds(context.log)
        situation = Situation(
            rounds=tuple(round_ for round_ in done[self._burst :] if round_.epoch == context.epoch),
            measured=measured,
            prediction=prediction,
            earlier_s=tuple(self._earlier_s),
            max_downtime_s=context.options.max_downtime_s,
            pair=context.pair.name,
        )
        before, self._decision = self._decision, decide(situation)
        self._earlier_s.append(prediction.total_s)
        sentence = _round_words(done[-1], prediction)
        await context.write(EntryKind.NOTE, PREDICTED, sentence=sentence, record=prediction)
        if before is None or before.next is Next.AGAIN or before.key != self._decision.key:
            context.tell(sentence)
        if self._decision.next is not Next.AGAIN:
            self._burst, self._earlier_s = len(done), []
            self._rested_s = context.clock.monotonic_s()
        if self._decision.next is Next.READY and context.pair.state is State.SYNCING:
            await self._move(State.READY_TO_SWITCH, reason=self._decision.sentence)
        elif self._decision.next is Next.HOLD and context.pair.state is State.READY_TO_SWITCH:
            await self._move(State.SYNCING, reason=self._decision.sentence)

    async def _switched(self) -> bool:
        """Begin the switchover if its moment has come; else say what is waited for, once for each reason."""
        context = self._context
        assert self._decision is not None  # rounds come first
        order = order_in_force(context.options, context.log)
        verdict = judge(order, self._decision, wall_s=context.clock.wall_s(), pair=context.pair.name)
        if not verdict.go:
            await self._say(verdict.waiting)
            return False
        if context.pair.state is State.SYNCING:
            await self._move(State.READY_TO_SWITCH, reason=verdict.waiting.sentence)
        if context.survey.replica_power not in IS_OFF:
            if order.trigger is not Trigger.NOW and (await ask_power(context, Side.REPLICA)).power in IS_OFF:
                raise stopped_by_itself(context)
            _, prediction = await predict_now(context)
            agreed_s = context.options.max_downtime_s
            if order.trigger is not Trigger.NOW and agreed_s is not None and prediction.total_s > agreed_s:
                self._outgrown(prediction, agreed_s)
                return False
            sentence = f"about {prediction.total_s:.1f} s of downtime are expected"
            await context.write(EntryKind.NOTE, PREDICTED, sentence=sentence, record=prediction)
        await context.store.keep_room()  # while people are served: without a journal nothing would be taken back either
        await self._move(State.SWITCHING, reason=verdict.waiting.sentence)
        self._decision = None  # whatever comes back from there is another situation
        return True

    def _outgrown(self, prediction: Prediction, agreed_s: float) -> None:
        """What the guest has written since the latest round is too much now: a round first, or a wait for one."""
        if self._context.clock.monotonic_s() - (self._rested_s or 0.0) >= STALE_S:
            self._decision = None
            return
        self._decision = Decision(
            next=Next.HOLD,
            key="over-max",
            sentence=(
                f"the downtime would be about {prediction.total_s:.0f} s by now, more than the {agreed_s:.0f} s agreed "
                "(--max-downtime): passes go on"
            ),
        )

    async def _say(self, waiting: Waiting) -> None:
        context = self._context
        before = context.log.note(WAITING, Waiting)
        if before is None or before.key != waiting.key:
            await context.write(EntryKind.NOTE, WAITING, sentence=waiting.sentence, record=waiting)
            context.tell(waiting.sentence)

    # --- orders -----------------------------------------------------------------------------------------------------

    async def _take_orders(self) -> None:
        """Claim what was asked by `failback switch`: its note is in the journal already."""
        context = self._context
        name, run = context.pair.name, context.run.id
        if not await context.store.read(lambda connection: journal.is_asked(connection, name, run, SWITCH)):
            return

        def claim(connection: Connection) -> tuple[JournalEntry, ...]:
            registry.check_epoch(connection, name, context.epoch)
            while (request := journal.claim(connection, name, run, SWITCH)) is not None:
                journal.answer(connection, request.id, "")
            return journal.entries(connection, name, run)

        context.log.entries[:] = await context.store.write(claim)


def _round_words(done: rounds.DoneRound, prediction: Prediction) -> str:
    """A round in one line: on what it rested, what is left, and what the switchover would cost."""
    rested = ", ".join(f"{disk.replica} {disk.rung}" for disk in done.passed.evidence)
    left = "how fast the guest writes is not known yet"
    if prediction.dirty_bytes_s is not None:
        left = (
            f"{prediction.delta_bytes / (1 << 20):.1f} MiB are left, the guest writes "
            f"{prediction.dirty_bytes_s / (1 << 20):.1f} MiB/s"
        )
    return f"round {done.number} ({rested}): {left}; about {prediction.total_s:.1f} s of downtime are expected"


async def predict_now(context: RunContext) -> tuple[Measured, Prediction]:
    """What the run has measured, and the downtime if the switchover began now."""
    known = await known_now(context)
    measured = measure(context.log, known)
    return measured, predict(context.log, known, measured, read=await written_now(context, measured))


async def written_now(context: RunContext, measured: Measured) -> TrackingRecord | None:
    """What has been written since the latest views, of the disks of which the source can count it; None: of none. Where
    it cannot, or does not answer, the rate of the rounds before has to do: this is for predictions alone."""
    latest = {target: round_.view.view for round_ in rounds.done_rounds(context.log) for target in round_.targets}
    since = tuple(ViewSince(target=t, view=view) for t, view in sorted(latest.items()) if t in measured.tracked)
    if not since:
        return None
    question = AskWritten(vm_uuid=context.pair.replica.uuid, since=since)
    try:
        told = await ask(context.source, question, TrackingRead, timeout_s=QUESTION_TIMEOUT_S)
    except (AgentRefused, HostUnreachable):
        return None
    return TrackingRecord(disks=tuple(disk for disk in told.disks if disk.since is not None))


async def known_now(context: RunContext) -> Known:
    """What a prediction rests on beside the journal of the run."""
    run, pair = context.run.id, context.pair.name

    def read(connection: Connection) -> Known:
        return Known(
            limits=read_limits(connection, run),
            guest_s=shutdown_seen_s(journal.entries_of_step(connection, pair, "replica_off")),
            now_s=context.clock.monotonic_s(),
            epoch=context.epoch,
            step_s=journal.last_seconds(connection, pair, DEFAULT_STEP_S),
        )

    return await context.store.read(read)
