"""The switchover, and the way back into service where evidence fell after the replica went off."""

from __future__ import annotations

from coordinator.context import RunContext
from coordinator.entries import EntryKind
from coordinator.model import LateEvidence, State
from coordinator.prediction import measure, predict
from coordinator.records import PowerOffRecord, Prediction, TrackingRecord
from coordinator.rounds import PREDICTED
from coordinator.serving import Move, known_now
from coordinator.stepping import Stepper
from coordinator.steps_switch import SWITCH_STEPS, FenceReplica, ReplicaOff
from coordinator.steps_sync import READ_TRACKING, SYNC_STEPS
from coordinator.timing import LATE_RETURN

RENEWED_IN_SWITCHOVER = tuple(step for step in SYNC_STEPS if step.lasts_until == "verify")
"""What a process that takes over inside the switchover must set up again."""
BEFORE_PROTECT = next(index for index, step in enumerate(SWITCH_STEPS) if step.name == READ_TRACKING) + 1
"""So many steps of the switchover until everything is known that may send the replica back into service."""
WEIGHED = "weighed"
"""Name of the note with the prediction after the power-off."""
AGREED_TIMES, AGREED_MORE_S = 2.0, 60.0
"""Without --max-downtime what was predicted is agreed, up to this many times and at least this much more."""


class ReturnedToService(Exception):
    """The replica serves again; the pair is in *Syncing*."""


class Switching:
    """The state Switching, in the hands of one process."""

    def __init__(self, context: RunContext, stepper: Stepper, move: Move) -> None:
        self._context = context
        self._stepper = stepper
        self._move = move

    async def work(self) -> None:
        """Carry the switchover out, to the original's power-on.

        Raises:
            ReturnedToService: it was given up before anything was protected; `CoordinatorError`: a step failed.
        """
        context, stepper = self._context, self._stepper
        answer = stepper.answer_in_switchover
        if self._has_begun_to_return():
            await self._return()
        await stepper.run((*RENEWED_IN_SWITCHOVER, *SWITCH_STEPS[:BEFORE_PROTECT]), boundary=answer)
        if context.log.is_done(READ_TRACKING) and not self._since(WEIGHED):
            await self._weigh()
        await stepper.run(SWITCH_STEPS[BEFORE_PROTECT:], boundary=answer)

    def _since(self, note: str) -> bool:
        """Whether that note was written in this switchover."""
        log = self._context.log
        return any(entry.seq > log.seq_of_state(State.SYNCING.value) for entry in log.notes(note))

    def _has_begun_to_return(self) -> bool:
        return self._since(LATE_RETURN)

    async def _weigh(self) -> None:
        """Once what the replica recorded is known: is the downtime still what was agreed?"""
        context = self._context
        tracking = context.log.result(READ_TRACKING, TrackingRecord)
        assert tracking is not None  # the step before
        known = await known_now(context)
        measured = measure(context.log, known)
        lost = [d for d in tracking.disks if d.since is None and d.target in measured.tracked]
        prediction = predict(context.log, known, measured, read=tracking)
        if not lost:
            await context.write(EntryKind.NOTE, WEIGHED, record=prediction, sentence=_left(prediction))
            return
        agreed_s = self._agreed_s()
        off = context.log.result(ReplicaOff.name, PowerOffRecord)
        killed = "QEMU had to be killed; " if off is not None and off.killed else ""
        sentence = (
            f"{killed}the evidence of {', '.join(disk.target for disk in lost)} fell "
            f"({lost[0].why_not.rstrip('.')}): about {prediction.total_s:.0f} s of downtime are expected now"
        )
        if prediction.total_s > agreed_s and context.options.late_evidence is LateEvidence.RETURN:
            reason = f"{sentence}, more than the {agreed_s:.0f} s agreed: the replica goes back into service"
            await context.write(EntryKind.NOTE, LATE_RETURN, record=prediction, sentence=reason)
            context.tell(reason)
            await self._return()
        await context.write(EntryKind.NOTE, WEIGHED, record=prediction, sentence=sentence)
        context.tell(f"{sentence}; the switchover goes on")

    def _agreed_s(self) -> float:
        context = self._context
        if context.options.max_downtime_s is not None:
            return context.options.max_downtime_s
        predicted = context.log.note(PREDICTED, Prediction)
        total_s = predicted.total_s if predicted is not None else 0.0
        return max(AGREED_TIMES * total_s, total_s + AGREED_MORE_S)

    async def _return(self) -> None:
        """Fence lifted, replica on, back to *Syncing*; what is still recorded stays for the next round."""
        log = self._context.log
        reason = log.notes(LATE_RETURN)[-1].sentence
        for step in (FenceReplica(), ReplicaOff()):
            if log.stands(step.name):
                await self._stepper.take_back(step)
        await self._move(State.SYNCING, reason=reason)
        raise ReturnedToService


def _left(prediction: Prediction) -> str:
    return f"{prediction.delta_bytes / (1 << 20):.1f} MiB are left to copy"
