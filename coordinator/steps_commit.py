"""The steps that make a failback final."""

from __future__ import annotations

from coordinator.agents import ask
from coordinator.context import RunContext
from coordinator.hooks import Hook
from coordinator.model import RestorePoint
from coordinator.records import FenceRecord, HooksRecord, Nothing, RestorePointRecord
from coordinator.steps import Step, prove_off
from coordinator.steps_check import EndAudit
from coordinator.steps_move import KeepFormerOff
from coordinator.steps_switch import FenceReplica
from coordinator.steps_sync import TRACKING, end_tracking
from protocol.messages import Done, LiftFence, Side, Unprotect

RESTORE_POINT = "restore_point"
"""Name of the note that says what commit was told to do."""


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
    KeepFormerOff(),
    DropRestorePoint(),
    ForgetRecords(),
    ReleaseReplica(),
    ResumeReplication(),
)
