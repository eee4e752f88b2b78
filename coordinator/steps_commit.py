"""The steps that make a failback final."""

from __future__ import annotations

from coordinator.agents import ask
from coordinator.context import PROTECT_ORIGINAL, RunContext
from coordinator.hooks import Hook
from coordinator.model import RestorePoint
from coordinator.records import FenceRecord, HooksRecord, KeptDisk, KeptRecord, Nothing, RestorePointRecord
from coordinator.steps import Step, prove_off
from coordinator.steps_check import EndAudit
from coordinator.steps_home import KeepHome
from coordinator.steps_machine import ForgetMachine
from coordinator.steps_move import KeepFormerOff
from coordinator.steps_switch import FenceReplica
from coordinator.steps_sync import TRACKING, end_tracking
from protocol.messages import Done, KeepRestorePoint, LiftFence, MergeProtection, Protected, Side, Unprotect

MERGE_TIMEOUT_S = 4 * 3600.0
"""All that the run and the original's guest wrote may have to be moved, of every disk."""

RESTORE_POINT = "restore_point"
"""Name of the note that says what commit was told to do."""


class MergeOriginal(Step):
    """The overlays of the original's working snapshot become part of its disks, while it runs or with it off."""

    harmless = "what is merged already stays so, and a merge that was cut short is taken up again"
    name = "merge_original"
    sentence = "merge the working snapshot of the original into its disks"

    def applies(self, context: RunContext) -> bool:
        """Only where one was taken."""
        return context.log.intended(PROTECT_ORIGINAL)

    async def do(self, context: RunContext) -> Nothing:
        """Merge it; from here on nobody can have the old original back."""
        merge = MergeProtection(order=context.order, vm_uuid=context.pair.original.uuid, snapshot=context.snapshot)
        await ask(context.target, merge, Done, timeout_s=MERGE_TIMEOUT_S)
        return Nothing()


class DropRestorePoint(Step):
    """The protective snapshot goes, unless it stays as a restore point."""

    harmless = "a snapshot that is gone already is no error"
    name = "drop_restore_point"
    sentence = "drop the protective snapshot of the replica"

    def applies(self, context: RunContext) -> bool:
        """Only if that was chosen."""
        chosen = context.log.note(RESTORE_POINT, RestorePointRecord)
        return chosen is not None and chosen.restore_point is RestorePoint.DROP

    async def do(self, context: RunContext) -> Nothing:
        """Drop it; the replica is still off and fenced."""
        await prove_off(context, Side.REPLICA)
        drop = Unprotect(order=context.order, vm_uuid=context.pair.replica.uuid, snapshot=context.snapshot)
        await ask(context.source, drop, Done)
        return Nothing()


class ForgetRecords(Step):
    """Nothing that the run recorded stays in the replica; it is still off and fenced."""

    harmless = "what is gone already is no error"
    name = "end_tracking"
    sentence = "forget what was recorded of the replica's writes"

    def applies(self, context: RunContext) -> bool:
        """Only where anything may have been recorded."""
        return context.log.intended(TRACKING)

    async def do(self, context: RunContext) -> Nothing:
        """Remove it."""
        await end_tracking(context)
        return Nothing()


class MakeRestorePoint(Step):
    """The protective snapshot stays: nobody writes to its bases any more, and people are told where the disks are."""

    harmless = "what is read-only already stays so"
    name = "keep_restore_point"
    sentence = "keep the protective snapshot of the replica as a restore point"

    def applies(self, context: RunContext) -> bool:
        """Only if that was chosen."""
        chosen = context.log.note(RESTORE_POINT, RestorePointRecord)
        return chosen is not None and chosen.restore_point is RestorePoint.KEEP

    async def do(self, context: RunContext) -> KeptRecord:
        """Make the bases read-only; say old and new path of every disk."""
        order = KeepRestorePoint(order=context.order, vm_uuid=context.pair.replica.uuid, snapshot=context.snapshot)
        kept = await ask(context.source, order, Protected)
        disks = tuple(
            KeptDisk(target=d.target, old=d.base, old_format=d.base_format, new=d.overlay) for d in kept.disks
        )
        for disk in disks:
            await context.notice(
                f"{context.pair.replica.name} {disk.target}: {disk.old} ({disk.old_format}, read-only from now on) → "
                f"{disk.new} (qcow2)"
            )
        return KeptRecord(snapshot=kept.snapshot, disks=disks)


class ReleaseReplica(Step):
    """The replica is a replica again."""

    harmless = "a fence that is lifted already stays so"
    name = "release_replica"
    sentence = "lift the fence of the replica, restore its autostart"

    async def do(self, context: RunContext) -> Nothing:
        """Release it; say so where its host will start it by itself from now on."""
        lift = LiftFence(order=context.order, vm_uuid=context.pair.replica.uuid, restore_autostart=True)
        await ask(context.source, lift, Done)
        fenced = context.log.result(FenceReplica.name, FenceRecord)
        if fenced is not None and fenced.autostart_before:
            vm = context.pair.replica
            await context.notice(
                f"the replica's autostart is on again, as before the run: `virsh autostart --disable {vm.name}` on "
                f"{vm.host} if it must not come up beside the original when that host boots"
            )
        return Nothing()


class ResumeReplication(Step):
    """The administrator's executables that start replication again."""

    harmless = "the executables must bear being run again"
    name = "resume_replication"
    sentence = "resume replication of the pair"

    async def do(self, context: RunContext) -> HooksRecord:
        """Run ``hooks.d/resume``."""
        return HooksRecord(names=await context.hooks.run(Hook.RESUME, context.pair, context.run.id))


COMMIT_STEPS: tuple[Step, ...] = (
    EndAudit(),
    MergeOriginal(),
    KeepFormerOff(),
    KeepHome(),
    DropRestorePoint(),
    ForgetRecords(),
    MakeRestorePoint(),
    ForgetMachine(),
    ReleaseReplica(),
    ResumeReplication(),
)
