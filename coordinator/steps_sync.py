"""The steps before the first round: survey, hold, original off and fenced."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Connection

from coordinator import registry
from coordinator.agents import QUESTION_TIMEOUT_S, ask
from coordinator.called_off import ORIGINAL_IS_OFF, counts
from coordinator.context import PROTECT_ORIGINAL, SURVEY, RunContext
from coordinator.entries import EntryKind, Phase
from coordinator.errors import STALE_EPOCH, AgentRefused, CoordinatorError, HostUnreachable, is_silent
from coordinator.hooks import Hook
from coordinator.machine import carries_state
from coordinator.moving import is_overwritten, removed
from coordinator.pair_memory import remember_pair
from coordinator.plain import from_json
from coordinator.records import (
    DiskSizes,
    FenceRecord,
    HooksRecord,
    Nothing,
    PowerOffRecord,
    ProtectRecord,
    Record,
    ReleaseRecord,
    SurveyRecord,
)
from coordinator.steps import (
    IS_OFF,
    NOT_DONE,
    Finding,
    Step,
    StepFailed,
    Verdict,
    ask_power,
    fence_record,
    inspect,
    operator_needed,
    prove_off,
    settle_flag,
    take_fence,
)
from coordinator.steps_home import CreateHome
from coordinator.steps_machine import CreateMissing, MapMissing, missing_in
from coordinator.steps_move import FenceFormer
from protocol.messages import (
    Condition,
    DescribeHost,
    Done,
    EndTracking,
    HostDescription,
    ImageDescription,
    LiftDescription,
    LiftFence,
    OnTimeout,
    Power,
    PoweredOff,
    PowerOff,
    Protect,
    Protected,
    Side,
    Tracking,
    Unprotect,
    VmDescription,
)

POWER_OFF_GRACE_S = 120.0
"""On top of the guest's own deadline: forcing a VM off, and the answer's way back."""
END_TRACKING_TIMEOUT_S = 3600.0
"""A live overlay is merged into its base meanwhile: as long as the guest has written to it."""
TRACKING = "tracking"
READ_TRACKING = "read_tracking"
RECORDS_LEFT = "records_left"
"""Name of the note that records could not be removed while the replica was off."""
FORBIDDEN = "forbidden"
"""Code of an agent that does not know an order, or does not take it."""
OPERATOR_SAID_GO_ON = "operator_said_go_on"
"""Name of the note that a person resumed the run out of *Needs operator*."""


class Survey(Step):
    """Who the agents are, what both VMs do, how large their disks are."""

    harmless = "it asks and changes nothing"
    name = SURVEY
    sentence = "look at both VMs and their hosts"
    lasts_until = "verify"
    of_switchover = True  # what was seen inside one, the replica off, is not so once it is back in service

    async def do(self, context: RunContext) -> SurveyRecord:
        """Ask both sides; nothing is changed but the registry's memory of the hosts, and theirs of the pair."""
        hosts: list[HostDescription] = []
        for agent in (context.target, context.source):
            hosts.append(await ask(agent, DescribeHost(), HostDescription, timeout_s=QUESTION_TIMEOUT_S))
        at_s = context.clock.wall_s()

        def remember(connection: Connection) -> None:
            for host in hosts:
                registry.see_host(connection, host, at_s)

        await context.store.write(remember)
        await remember_pair(context.directory, context.pair, context.run.id)
        original, replica = await inspect(context, Side.ORIGINAL), await inspect(context, Side.REPLICA)
        self._ask_if_it_stopped(context, replica.power)
        return SurveyRecord(
            original_power=original.power,
            replica_power=replica.power,
            original_fingerprint=hosts[0].fingerprint,
            replica_fingerprint=hosts[1].fingerprint,
            bulk_port=hosts[0].bulk_port,
            disks=tuple(
                self._sizes(context, disk.original, original, disk.replica, replica) for disk in context.pair.disks
            ),
            carries_state=carries_state(original, replica),
        )

    def _ask_if_it_stopped(self, context: RunContext, power: Power) -> None:
        stopped = context.replica_was_running and power in IS_OFF and not context.log.stands("replica_off")
        if stopped and not _told_to_go_on(context):
            raise stopped_by_itself(context)

    def _sizes(
        self, context: RunContext, original: str, production: VmDescription, replica: str, dr: VmDescription
    ) -> DiskSizes:
        source = _size(dr, replica, context.source.host)
        missing = {disk.original for disk in missing_in(context)} - {disk.target for disk in production.disks}
        target = source if original in missing else _size(production, original, context.target.host)
        if target < source or (target > source and not context.options.allow_larger_target):
            raise StepFailed(
                f"the disk {original} of the original has {target} bytes, {replica} of the replica {source}: they were "
                "resized since the plan; cancel, then plan again",
                code="size-changed",
            )
        return DiskSizes(
            original=original,
            replica=replica,
            source_size_bytes=source,
            target_size_bytes=target,
            source_format=_top(dr, replica, context.source.host).format,
        )


def stopped_by_itself(context: RunContext) -> CoordinatorError:
    """The question to a person about a replica that went off while it was to serve."""
    name = context.pair.name
    return operator_needed(
        f"the replica on {context.source.host} was running and is off now, stopped by itself or by hand: start "
        f"it and `failback resume {name}`, or resume with it off (switchover at once), or cancel",
        "resume",
        "cancel",
    )


def _told_to_go_on(context: RunContext) -> bool:
    """Whether a person resumed the run after the replica was last found in use."""
    for entry in reversed(context.log.entries):
        if entry.kind is EntryKind.NOTE and entry.step == OPERATOR_SAID_GO_ON:
            return True
        surveyed = entry.kind is EntryKind.DONE and entry.step == SURVEY
        if surveyed and from_json(entry.result or "", SurveyRecord).replica_power not in IS_OFF:
            return False
    return False


def _size(vm: VmDescription, target: str, host: str) -> int:
    return _top(vm, target, host).virtual_size_bytes


def _top(vm: VmDescription, target: str, host: str) -> ImageDescription:
    for disk in vm.disks:
        if disk.target == target and disk.chain:
            return disk.chain[0]
    raise StepFailed(
        f"the VM {vm.name} on {host} has no readable disk {target} any more: put it back, or cancel and plan again",
        code="disk-gone",
    )


class HoldReplication(Step):
    """The administrator's executables that stop whatever copies the original over the replica. Not taken back by
    anything but a commit: resumed replication would copy a torn original over the serving replica."""

    harmless = "the executables must bear being run again"
    name = "hold_replication"
    sentence = "put replication of the pair on hold"

    async def do(self, context: RunContext) -> HooksRecord:
        """Run ``hooks.d/hold``."""
        return HooksRecord(names=await context.hooks.run(Hook.HOLD, context.pair, context.run.id))


class OriginalOff(Step):
    """The original must be off before anything is written to it. Not taken back: it never comes up beside the
    replica."""

    name = "original_off"
    sentence = "make sure the original is off"

    async def do(self, context: RunContext) -> PowerOffRecord:
        """Power it off if that was asked for: gracefully, with a deadline, then forced."""
        answer = await ask_power(context, Side.ORIGINAL)
        if answer.power in IS_OFF:
            await prove_off(context, Side.ORIGINAL)
            return PowerOffRecord(was_running=False, forced=False, guest_s=0.0)
        if not context.options.power_off_original or context.pair.former is not None:
            name = context.pair.name
            raise StepFailed(
                f"the original on {context.target.host} is {answer.power.value}: power it off and `failback resume "
                f"{name}`, or `failback cancel {name}` and start with --power-off-original",
                code="original-runs",
            )
        return await power_off(context, Side.ORIGINAL, OnTimeout.FORCE)

    async def probe(self, context: RunContext) -> Finding:
        """Done when it is off."""
        return await found_off(context, Side.ORIGINAL)


async def power_off(context: RunContext, side: Side, on_timeout: OnTimeout) -> PowerOffRecord:
    """Power that side's VM off; no-op when it is off."""
    agent = context.target if side is Side.ORIGINAL else context.source
    vm = context.pair.original if side is Side.ORIGINAL else context.pair.replica
    timeout_s = context.options.shutdown_timeout_s
    kill_after_s = context.options.kill_after_s
    order = PowerOff(
        order=context.order, vm_uuid=vm.uuid, timeout_s=timeout_s, on_timeout=on_timeout, kill_after_s=kill_after_s
    )
    answer = await ask(agent, order, PoweredOff, timeout_s=timeout_s + kill_after_s + POWER_OFF_GRACE_S)
    return PowerOffRecord(
        was_running=answer.was_running, forced=answer.forced, guest_s=answer.elapsed_s, killed=answer.killed
    )


async def end_tracking(context: RunContext) -> None:
    """Nothing of ours stays in the replica: no checkpoint, no bitmap, no live overlay.

    An agent that does not know the order cannot have recorded anything.
    """
    order = EndTracking(order=context.order, vm_uuid=context.pair.replica.uuid, targets=context.replica_targets)
    try:
        await ask(context.source, order, Done, timeout_s=END_TRACKING_TIMEOUT_S)
    except AgentRefused as error:
        if error.code != FORBIDDEN:
            raise


async def found_off(context: RunContext, side: Side) -> Finding:
    """Whether that side's VM went off, as a finding."""
    if (await ask_power(context, side)).power not in IS_OFF:
        return NOT_DONE
    return Finding(verdict=Verdict.DONE, record=PowerOffRecord(was_running=True, forced=False, guest_s=0.0))


def lifted_words(lifted: LiftDescription, host: str) -> str:
    """That a person lifted the fence of the original by hand."""
    when = datetime.fromtimestamp(lifted.at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return (
        f"the fence of the original on {host} was lifted by hand at {when} by {lifted.by} ({lifted.reason}), when its "
        f"disks were {lifted.condition.value}; nothing is known of what was written to them since"
    )


class FenceOriginal(Step):
    """Autostart off and image locks, held by the agent."""

    harmless = "a fence that stands stays, with the autostart of before"
    name = "fence_original"
    sentence = "fence the original: autostart off, images locked"
    undo_sentence = "release the original if it is whole, keep it fenced if it is torn"
    lasts_until = "verify"

    async def do(self, context: RunContext) -> FenceRecord:
        """Take the fence, remember the autostart of before, and make both flags agree."""
        found = await inspect(context, Side.ORIGINAL)
        before = found.fence
        if found.lifted is not None and before is None:
            await context.notice(lifted_words(found.lifted, context.target.host))
        fence = await take_fence(context, Side.ORIGINAL)
        await context.remember_autostart(fence.autostart_before)
        condition, _ = await settle_flag(context, before, fence)
        return fence_record(fence, condition)

    async def undo(self, context: RunContext) -> Record:
        """A torn original stays fenced; a whole one may be started by hand, its autostart stays off."""
        host = context.target.host
        try:
            before = (await inspect(context, Side.ORIGINAL)).fence
            if before is None and context.pair.flag.condition != Condition.TORN.value:
                return ReleaseRecord(kept=False, condition=context.pair.flag.condition, why="there was no fence")
            fence = await take_fence(context, Side.ORIGINAL)
            condition, _ = await settle_flag(context, before, fence)
            if context.pair.former is not None and is_overwritten(context.log):
                if not removed(context.log):
                    await context.notice(
                        f"{context.pair.original.name} on {host}, where the run was to go, is overwritten: it stays "
                        "off and fenced"
                    )
                return ReleaseRecord(kept=True, condition=condition.value, why="overwritten")
            if condition is not Condition.TORN:
                lift = LiftFence(order=context.order, vm_uuid=context.pair.original.uuid, restore_autostart=False)
                await ask(context.target, lift, Done)
                await context.notice(
                    f"the original on {host} is whole ({condition.value}); it is off, its autostart stays off until a "
                    "commit, and it must not be started beside the replica"
                )
                return ReleaseRecord(kept=False, condition=condition.value, why="whole")
        except (HostUnreachable, AgentRefused) as error:
            if not is_silent(error) and (error.code == STALE_EPOCH or not await counts(context, error)):
                raise
            if context.log.notes(ORIGINAL_IS_OFF):
                return ReleaseRecord(kept=False, condition=context.pair.flag.condition, why="called off, fenced later")
            await context.notice(f"the fence of the original stays as it is: {error.sentence}")
            return ReleaseRecord(kept=True, condition=context.pair.flag.condition, why="host unreachable")
        await context.notice(f"the original on {host} is torn and stays fenced until a run verifies it")
        return ReleaseRecord(kept=True, condition=condition.value, why="torn")


class ProtectOriginal(Step):
    """The working snapshot of the original: from here on passes write to overlays, and the disks of before stay."""

    harmless = "a snapshot that stands stays"
    name = PROTECT_ORIGINAL
    sentence = "take the working snapshot of the original"
    undo_sentence = "drop the working snapshot: the original is what it was before the run"

    def applies(self, context: RunContext) -> bool:
        """Only if that was chosen."""
        return context.options.protect_original is True

    async def do(self, context: RunContext) -> ProtectRecord:
        """Take it; nothing has been written yet."""
        order = Protect(
            order=context.order,
            vm_uuid=context.pair.original.uuid,
            targets=context.original_targets,
            snapshot=context.snapshot,
            side=Side.ORIGINAL,
        )
        protected = await ask(context.target, order, Protected)
        return ProtectRecord(snapshot=protected.snapshot, overlays=tuple(disk.overlay for disk in protected.disks))

    async def undo(self, context: RunContext) -> Record:
        """Drop it, with all that was written. A host that is away is left as it is: its agent drops the snapshot when
        the next run fences the original."""
        try:
            await take_fence(context, Side.ORIGINAL)
            drop = Unprotect(
                order=context.order,
                vm_uuid=context.pair.original.uuid,
                snapshot=context.snapshot,
                side=Side.ORIGINAL,
            )
            await ask(context.target, drop, Done)
        except (HostUnreachable, AgentRefused) as error:
            if not is_silent(error) and (error.code == STALE_EPOCH or not await counts(context, error)):
                raise
            await context.notice(f"the working snapshot of the original stays until the next run: {error.sentence}")
        return Nothing()


class ClearTracking(Step):
    """From the first view on, what the replica writes is recorded. Nothing of ours may be there before, and nothing
    stays when the run is taken back."""

    harmless = "what is gone already is no error"
    name = TRACKING
    sentence = "clear what earlier runs recorded of the replica's writes"
    undo_sentence = "forget what was recorded of the replica's writes"

    def applies(self, context: RunContext) -> bool:
        """Only while it runs, and only if anything is to be recorded."""
        return context.survey.replica_power not in IS_OFF and context.options.track is not Tracking.NONE

    async def do(self, context: RunContext) -> Nothing:
        """Remove whatever is there under our names."""
        await end_tracking(context)
        return Nothing()

    async def undo(self, context: RunContext) -> Record:
        """Remove it while it runs, unless that was done while it was off."""
        if not context.log.is_done(READ_TRACKING, Phase.UNDO) or context.log.notes(RECORDS_LEFT):
            await end_tracking(context)
        return Nothing()


SYNC_STEPS: tuple[Step, ...] = (
    CreateHome(),
    MapMissing(),
    Survey(),
    HoldReplication(),
    FenceFormer(),
    OriginalOff(),
    CreateMissing(),
    FenceOriginal(),
    ProtectOriginal(),
    ClearTracking(),
)
