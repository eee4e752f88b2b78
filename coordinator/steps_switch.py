"""The steps of the switchover, from the replica's power-off to the original's power-on, and how each is taken back."""

from __future__ import annotations

from coordinator import rounds
from coordinator.agents import ask
from coordinator.called_off import go_on_by_word
from coordinator.context import LIFT_ORIGINAL_FENCE, RunContext
from coordinator.errors import STALE_EPOCH, AgentRefused, HostUnreachable, is_silent
from coordinator.model import ShutdownPolicy
from coordinator.passes import run_pass
from coordinator.records import (
    FenceRecord,
    Nothing,
    PassRecord,
    PowerOffRecord,
    ProtectRecord,
    Record,
    TrackingRecord,
    VerifyRecord,
    ViewRecord,
)
from coordinator.steps import (
    IS_OFF,
    NOT_DONE,
    Finding,
    Step,
    StepFailed,
    SwitchStep,
    Verdict,
    ask_power,
    fence_record,
    inspect,
    operator_needed,
    prove_off,
    settle_flag,
    take_fence,
    unclear,
)
from coordinator.steps_check import RememberMaps, VerifyFull, require_untouched
from coordinator.steps_machine import ApplyConfig, CarryState, prove_state
from coordinator.steps_records import DropLastCheckpoints, ReadRecords
from coordinator.steps_round import ViewStep
from coordinator.steps_sync import READ_TRACKING, found_off, power_off
from protocol.messages import (
    Condition,
    Done,
    LiftFence,
    OnTimeout,
    Power,
    PowerOn,
    Protect,
    Protected,
    Side,
    Tracking,
    Unprotect,
    ViewSince,
)

UNCLEAR = frozenset({Power.PAUSED, Power.SUSPENDED})
SHUTDOWN_TIMEOUT = "shutdown-timeout"
"""Code of an agent whose guest still runs at the end of its time (`protocol.messages.PowerOff`)."""


async def hold_original(context: RunContext) -> bool:
    """Make sure that the original cannot run beside the replica: off, and its fence back, under this epoch.

    Returns False where its host does not answer and need not: before the point of no return the fence that this run
    took was never lifted (its autostart is off, its agent takes the locks again when it starts), nothing of ours can
    start it, and people wait for the replica. After it, only where a person has called the original off.

    Raises:
        NeedsOperator: it may run.
    """
    name = context.pair.name
    try:
        await prove_off(context, Side.ORIGINAL)
        await take_fence(context, Side.ORIGINAL)
    except (HostUnreachable, AgentRefused) as error:
        if error.code == STALE_EPOCH or not (context.past_no_return or is_silent(error)):
            raise
        if context.past_no_return:
            await go_on_by_word(context, error)
        return False
    except StepFailed as error:
        raise operator_needed(
            f"the replica stays off, for the original may run beside it: {error.sentence} "
            f"with `failback resume {name}`",
            "resume",
        ) from error
    return True


async def prove_verified(context: RunContext) -> str:
    """The final view, if everything says now that the original equals it and cannot have changed since.

    Both flags must name that view, the original's fence must stand, the replica must be off and fenced.

    Raises:
        StepFailed: something says otherwise.
    """
    final = context.log.result(LastPass.name, PassRecord)
    if final is None:
        raise StepFailed("the journal has no complete last pass: the switchover cannot go on", code="not-verified")
    fence = await take_fence(context, Side.ORIGINAL)
    flag = context.pair.flag
    said = (fence.condition, fence.view)
    if said != (Condition.EQUALS_VIEW, final.view) or (flag.condition, flag.view) != (
        Condition.EQUALS_VIEW.value,
        final.view,
    ):
        raise StepFailed(
            f"the original on {context.target.host} is not proven equal to view {final.view} (its agent says "
            f"{'nothing' if fence.condition is None else fence.condition.value}): it must not start",
            code="not-verified",
        )
    await prove_off(context, Side.REPLICA)
    await take_fence(context, Side.REPLICA)
    await prove_state(context)
    return final.view


class ReplicaOff(SwitchStep):
    """Downtime begins."""

    name = "replica_off"
    sentence = "power the replica off"
    undo_sentence = "put the replica back into service"

    async def do(self, context: RunContext) -> PowerOffRecord:
        """Shut it down, within the administrator's deadline."""
        force = context.options.shutdown_policy is ShutdownPolicy.FORCE
        try:
            return await power_off(context, Side.REPLICA, OnTimeout.FORCE if force else OnTimeout.ABORT)
        except AgentRefused as error:
            if error.code != SHUTDOWN_TIMEOUT:
                raise
            vm = context.pair.replica
            raise StepFailed(
                f"{error.sentence}; the request cannot be taken back, so {vm.name} may still power off later: look "
                f"with `virsh domstate {vm.name}` on {vm.host}, and start it again there if it did",
                code=SHUTDOWN_TIMEOUT,
            ) from error

    async def probe(self, context: RunContext) -> Finding:
        """Done when it is off."""
        return await found_off(context, Side.REPLICA)

    async def undo(self, context: RunContext) -> Record:
        """Power the replica on if the run found it in use, after proving that the original cannot run beside it."""
        if not context.replica_was_running:
            return Nothing()
        if not await hold_original(context):
            host = context.target.host
            if not context.past_no_return:
                await context.notice(f"the original on {host} is fenced by this run; its host does not answer now")
        await ask(context.source, PowerOn(order=context.order, vm_uuid=context.pair.replica.uuid), Done)
        return Nothing()


class ProveReplicaOff(SwitchStep):
    """Off, and nobody else holds its images."""

    harmless = "it asks and changes nothing"
    name = "prove_replica_off"
    sentence = "prove that the replica is off"
    lasts_until = LIFT_ORIGINAL_FENCE

    async def do(self, context: RunContext) -> Nothing:
        """Ask its agent."""
        await prove_off(context, Side.REPLICA)
        return Nothing()


class FenceReplica(SwitchStep):
    """From here to commit or undo the replica cannot start, and nobody writes to its disks."""

    harmless = "a fence that stands stays, with the autostart of before"
    name = "fence_replica"
    sentence = "fence the replica: autostart off, images locked"
    undo_sentence = "lift the fence of the replica"
    lasts_until = LIFT_ORIGINAL_FENCE

    async def do(self, context: RunContext) -> FenceRecord:
        """Take the fence."""
        return fence_record(await take_fence(context, Side.REPLICA))

    async def undo(self, context: RunContext) -> Record:
        """Release it, with its autostart as before: not before the original is held, for its host might start it."""
        await hold_original(context)
        lift = LiftFence(order=context.order, vm_uuid=context.pair.replica.uuid, restore_autostart=True)
        await ask(context.source, lift, Done)
        return Nothing()


class ProtectReplica(SwitchStep):
    """The protective snapshot."""

    harmless = "the snapshot of this run's name is taken once"
    name = "protect_replica"
    sentence = "take the protective snapshot of the replica"
    undo_sentence = "drop the protective snapshot of the replica"

    async def do(self, context: RunContext) -> ProtectRecord:
        """Take it; one that stands already under this run's name is the same."""
        order = Protect(
            order=context.order,
            vm_uuid=context.pair.replica.uuid,
            targets=context.replica_targets,
            snapshot=context.snapshot,
        )
        protected = await ask(context.source, order, Protected)
        return ProtectRecord(snapshot=protected.snapshot, overlays=tuple(disk.overlay for disk in protected.disks))

    async def undo(self, context: RunContext) -> Record:
        """The replica's disks are what they were when it went off."""
        drop = Unprotect(order=context.order, vm_uuid=context.pair.replica.uuid, snapshot=context.snapshot)
        await ask(context.source, drop, Done)
        return Nothing()


class OpenLastView(SwitchStep, ViewStep):
    """The images of the replica that is off."""

    name = "open_last_view"
    sentence = "open the final view of the replica"
    undo_sentence = "close the final view of the replica"
    lasts_until = rounds.LAST_PASS

    def number_in(self, context: RunContext) -> int:
        """The one after the rounds."""
        return rounds.last_round(context.log) + 1

    async def do(self, context: RunContext) -> ViewRecord:
        """Open it with what was found recorded, and insist that the replica is off."""
        tracking = context.log.result(READ_TRACKING, TrackingRecord)
        since = tuple(
            ViewSince(target=disk.target, view=disk.since)
            for disk in (tracking.disks if tracking is not None else ())
            if disk.since is not None
        )
        opened = await self.open(context, track=Tracking.NONE, since=since)
        if opened.live:
            raise StepFailed(
                f"the replica on {context.source.host} runs again in the middle of the switchover: power it off",
                code="not-off",
            )
        return opened


class LastPass(SwitchStep):
    """The last-minute changes."""

    harmless = "each attempt is a pass of its own and compares anew; agents end one of a lower epoch"
    name = rounds.LAST_PASS
    sentence = "last pass: copy the last-minute changes"

    async def do(self, context: RunContext) -> PassRecord:
        """Run the pass; until it is complete the original is torn."""
        opened = context.log.result(OpenLastView.name, ViewRecord)
        assert opened is not None  # the step before this one
        return await run_pass(context, self.name, opened)


class CloseLastView(SwitchStep):
    """Nothing reads the replica any more."""

    harmless = "a view that is closed already is no error"
    name = "close_last_view"
    sentence = "close the final view"

    async def do(self, context: RunContext) -> ViewRecord:
        """Close it."""
        return await OpenLastView().close_last(context)


class Verify(SwitchStep):
    """The last moment before the point of no return: is everything proven?"""

    harmless = "it asks, and takes fences that stand already"
    name = "verify"
    sentence = "verify that the original equals the replica's final view"
    lasts_until = LIFT_ORIGINAL_FENCE

    def applies(self, context: RunContext) -> bool:
        """Until the point of no return: a failure here still rolls back."""
        return not context.past_no_return

    async def do(self, context: RunContext) -> VerifyRecord:
        """Ask both agents once more."""
        view = await prove_verified(context)
        await require_untouched(context, view)
        return VerifyRecord(view=view)


class LiftOriginalFence(SwitchStep):
    """The point of no return is the journalled intent of this step."""

    name = LIFT_ORIGINAL_FENCE
    sentence = "lift the fence of the original"
    undo_sentence = "power the original off and fence it"

    async def do(self, context: RunContext) -> Nothing:
        """Release the images; give autostart back as it was before the first run that took it.

        What an earlier process verified holds only as long as the fence stood: it is proven again.
        """
        verified = context.log.last(Verify.name)
        if verified is None or verified.epoch != context.epoch:
            await prove_verified(context)
        lift = LiftFence(
            order=context.order,
            vm_uuid=context.pair.original.uuid,
            restore_autostart=True,
            autostart=context.pair.original_autostart,
        )
        await ask(context.target, lift, Done)
        return Nothing()

    async def probe(self, context: RunContext) -> Finding:
        """Done when it is in use already. An original that is off is fenced, proven and released once more: a fence
        that is not there may also have been lost before this step, and then nobody knows what was done to the disks.
        """
        vm = await inspect(context, Side.ORIGINAL)
        if vm.fence is not None or vm.power in IS_OFF:
            return NOT_DONE
        return Finding(verdict=Verdict.DONE, record=Nothing())

    async def undo(self, context: RunContext) -> Record:
        """Off, fenced; whole as its own guest left it, if it was ever out of our hands."""
        try:
            await power_off(context, Side.ORIGINAL, OnTimeout.FORCE)
            before = (await inspect(context, Side.ORIGINAL)).fence
            fence = await take_fence(context, Side.ORIGINAL)
            condition, _ = await settle_flag(context, before, fence)
        except (HostUnreachable, AgentRefused) as error:
            if error.code == STALE_EPOCH:
                raise
            await go_on_by_word(context, error)
            await context.set_flag(Condition.INTACT)  # as its own guest left it, as far as anybody can know
            return Nothing()
        return fence_record(fence, condition)


class OriginalOn(SwitchStep):
    """Downtime ends."""

    name = "original_on"
    sentence = "power the original on"

    def applies(self, context: RunContext) -> bool:
        """Only if that was chosen."""
        return context.options.power_on

    async def do(self, context: RunContext) -> Nothing:
        """Start it, after proving once more that the replica is off and fenced (I1)."""
        await prove_off(context, Side.REPLICA)
        await take_fence(context, Side.REPLICA)
        await ask(context.target, PowerOn(order=context.order, vm_uuid=context.pair.original.uuid), Done)
        return Nothing()

    async def probe(self, context: RunContext) -> Finding:
        """Done when it runs."""
        power = (await ask_power(context, Side.ORIGINAL)).power
        if power in UNCLEAR:
            return unclear(context, Side.ORIGINAL, power)
        return Finding(verdict=Verdict.DONE, record=Nothing()) if power is Power.RUNNING else NOT_DONE


SWITCH_STEPS: tuple[Step, ...] = (
    ReplicaOff(),
    ProveReplicaOff(),
    FenceReplica(),
    ReadRecords(),
    DropLastCheckpoints(),
    ProtectReplica(),
    OpenLastView(),
    LastPass(),
    VerifyFull(),
    CloseLastView(),
    ApplyConfig(),
    CarryState(),
    Verify(),
    RememberMaps(),
    LiftOriginalFence(),
    OriginalOn(),
)
