"""The steps of the switchover that read what the replica recorded of its writes, while it is off and fenced."""

from __future__ import annotations

from coordinator import rounds
from coordinator.agents import ask
from coordinator.context import RunContext
from coordinator.entries import EntryKind
from coordinator.errors import STALE_EPOCH, AgentRefused, is_silent
from coordinator.records import CheckpointsRecord, Nothing, Record, TrackingRecord
from coordinator.steps import SwitchStep
from coordinator.steps_sync import READ_TRACKING, RECORDS_LEFT, end_tracking
from protocol.messages import DiskTracking, Done, DropCheckpoints, ReadTracking, TrackingRead, ViewSince


class ReadRecords(SwitchStep):
    """What the replica's disks recorded until it went off: how much is left to copy, and whether that is proven."""

    harmless = "it asks and changes nothing"
    name = READ_TRACKING
    sentence = "read what the replica wrote since the last view"
    undo_sentence = "forget what was recorded of the replica's writes"

    def applies(self, context: RunContext) -> bool:
        """Only where something is recorded."""
        return rounds.ever_tracked(context.log)

    async def do(self, context: RunContext) -> TrackingRecord:
        """Ask since the view that the target proves of each disk."""
        views = rounds.latest_views(context.log)
        since = tuple(ViewSince(target=target, view=view) for target, view in views.items())
        order = ReadTracking(order=context.order, vm_uuid=context.pair.replica.uuid, since=since)
        try:
            read = await ask(context.source, order, TrackingRead)
        except AgentRefused as error:
            if is_silent(error) or error.code == STALE_EPOCH:
                raise
            # A record that cannot be read proves nothing; the rung below needs none.
            why = error.sentence.rstrip(".")
            return TrackingRecord(
                disks=tuple(DiskTracking(target=t, since=None, dirty_bytes=0, why_not=why) for t in views)
            )
        return TrackingRecord(disks=read.disks)

    async def undo(self, context: RunContext) -> Record:
        """Remove the records while the replica is off and fenced; what cannot be removed must not keep it off, and is
        removed once it serves."""
        try:
            await end_tracking(context)
        except AgentRefused as error:
            if is_silent(error) or error.code == STALE_EPOCH or not context.replica_was_running:
                raise
            sentence = f"{error.sentence.rstrip('.')}: tried again when the replica is back in service"
            await context.write(EntryKind.NOTE, RECORDS_LEFT, sentence=sentence)
            await context.notice(sentence)
        return Nothing()


class DropLastCheckpoints(SwitchStep):
    """libvirt refuses the snapshot of a domain that has checkpoints; the bitmaps stay in the images."""

    harmless = "what is gone already is no error"
    name = "drop_checkpoints"
    sentence = "drop the replica's checkpoints, keep what they recorded"

    def applies(self, context: RunContext) -> bool:
        """Only where there may be any."""
        return rounds.ever_tracked(context.log)

    async def do(self, context: RunContext) -> CheckpointsRecord:
        """Drop them."""
        await ask(context.source, DropCheckpoints(order=context.order, vm_uuid=context.pair.replica.uuid), Done)
        return CheckpointsRecord(kept=())
