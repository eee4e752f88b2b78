"""The switchover, and the way back into service where evidence fell after the replica went off."""

from __future__ import annotations

from dataclasses import replace

from coordinator.context import RunContext
from coordinator.entries import EntryKind
from coordinator.model import LateEvidence, State
from coordinator.prediction import measure, predict
from coordinator.records import PowerOffRecord, Prediction, TrackingRecord, ViewRecord
from coordinator.rounds import PREDICTED
from coordinator.serving import Move, known_now
from coordinator.stepping import Stepper
from coordinator.steps_switch import SWITCH_STEPS, FenceReplica, LastPass, OpenLastView, ProtectReplica, ReplicaOff
from coordinator.steps_sync import READ_TRACKING, SYNC_STEPS
from coordinator.timing import LATE_RETURN

RENEWED_IN_SWITCHOVER = tuple(step for step in SYNC_STEPS if step.lasts_until == "verify")
"""What a process that takes over inside the switchover must set up again."""


def _steps_until(name: str) -> int:
    """So many steps of the switchover until that one is done."""
    return next(index for index, step in enumerate(SWITCH_STEPS) if step.name == name) + 1


BEFORE_PROTECT = _steps_until(READ_TRACKING)
"""So many until everything is known that may send the replica back into service."""
BEFORE_LAST_PASS = _steps_until(OpenLastView.name)
"""So many until the last view has shown whether that still holds."""
WEIGHED = "weighed"
"""Name of the note with the prediction after the power-off."""
WEIGHED_AGAIN = "weighed_again"
"""Of the one with the last view open, where evidence fell in between."""
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
            tracking = context.log.result(READ_TRACKING, TrackingRecord)
            assert tracking is not None  # the step before
            await self._weigh(tracking, WEIGHED)
        await stepper.run(SWITCH_STEPS[BEFORE_PROTECT:BEFORE_LAST_PASS], boundary=answer)
        if not self._since(WEIGHED_AGAIN):
            await self._weigh_again()
        await stepper.run(SWITCH_STEPS[BEFORE_LAST_PASS:], boundary=answer)

    def _since(self, note: str) -> bool:
        """Whether that note was written in this switchover."""
        log = self._context.log
        return any(entry.seq > log.seq_of_state(State.SYNCING.value) for entry in log.notes(note))

    def _has_begun_to_return(self) -> bool:
        return self._since(LATE_RETURN)

    async def _weigh_again(self) -> None:
        """Once the last view is open: does it know what was read a moment ago? Nothing was written to the original by
        then, so that the replica can still go back into service."""
        context = self._context
        tracking = context.log.result(READ_TRACKING, TrackingRecord)
        opened = context.log.result(OpenLastView.name, ViewRecord)
        if tracking is None or opened is None or self._begun(LastPass.name):
            return
        shown = {disk.target: disk for disk in opened.disks}
        now = tuple(
            replace(disk, since=None, dirty_bytes=0, why_not=shown[disk.target].why_not)
            if disk.target in shown and shown[disk.target].since is None
            else disk
            for disk in tracking.disks
        )
        if now != tracking.disks:
            await self._weigh(TrackingRecord(disks=now), WEIGHED_AGAIN)

    def _begun(self, step: str) -> bool:
        """Whether that step was begun in this switchover."""
        log = self._context.log
        since = log.seq_of_state(State.SYNCING.value)
        return any(entry.kind is EntryKind.INTENT and entry.seq > since for entry in log.of_step(step))

    async def _weigh(self, tracking: TrackingRecord, note: str) -> None:
        """Once what the replica recorded is known: is the downtime still what was agreed?"""
        context = self._context
        known = await known_now(context)
        measured = measure(context.log, known)
        lost = [d for d in tracking.disks if d.since is None and d.target in measured.tracked]
        prediction = predict(context.log, known, measured, read=tracking)
        if not lost:
            await context.write(EntryKind.NOTE, note, record=prediction, sentence=_left(prediction))
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
        await context.write(EntryKind.NOTE, note, record=prediction, sentence=sentence)
        context.tell(f"{sentence}; the switchover goes on")

    def _agreed_s(self) -> float:
        context = self._context
        if context.options.max_downtime_s is not None:
            return context.options.max_downtime_s
        predicted = context.log.note(PREDICTED, Prediction)
        total_s = predicted.total_s if predicted is not None else 0.0
        return max(AGREED_TIMES * total_s, total_s + AGREED_MORE_S)

    async def _return(self) -> None:
        """Last view closed, snapshot dropped, fence lifted, replica on, back to *Syncing*; what is still recorded stays
        for the next round. The original was not written to."""
        log = self._context.log
        reason = log.notes(LATE_RETURN)[-1].sentence
        for step in (OpenLastView(), ProtectReplica(), FenceReplica(), ReplicaOff()):
            if self._begun(step.name) and log.stands(step.name):
                await self._stepper.take_back(step)
        await self._move(State.SYNCING, reason=reason)
        raise ReturnedToService


def _left(prediction: Prediction) -> str:
    return f"{prediction.delta_bytes / (1 << 20):.1f} MiB are left to copy"
