"""From the agent's own words to the wire's: inspection results and fences as messages. Values in, values out."""

from __future__ import annotations

from agent.ledger import ConditionRecord, DiskCondition, FenceRecord
from agent.lift_record import LiftRecord
from agent.opened_view import OpenedView
from agent.virt.seam import Domain, DomainDisk, Image, PowerState
from protocol.messages import (
    Condition,
    DiskDescription,
    FenceDescription,
    ImageDescription,
    LiftDescription,
    Power,
    Side,
    SnapshotDescription,
    ViewedDisk,
    VmDescription,
)


def power(state: PowerState) -> Power:
    """The power state on the wire."""
    return Power(state.value)


def _image(image: Image) -> ImageDescription:
    return ImageDescription(
        path=str(image.path),
        format=image.format,
        identity=image.identity,
        virtual_size_bytes=image.virtual_size_bytes,
        internal_snapshots=image.internal_snapshots,
        bitmaps=image.bitmaps,
        dirty=image.dirty,
        corrupt=image.corrupt,
        encrypted=image.encrypted,
        external_data=image.external_data,
        modified_s=image.modified_s,
        allocated_bytes=image.allocated_bytes,
        keeps_bitmaps=image.keeps_bitmaps,
    )


def _disk(disk: DomainDisk) -> DiskDescription:
    return DiskDescription(
        target=disk.target,
        kind=disk.kind.value,
        chain=tuple(_image(image) for image in disk.chain),
        sector_bytes=disk.sector_bytes,
        shareable=disk.shareable,
        readonly=disk.readonly,
        problem=disk.problem,
        free_bytes=disk.free_bytes,
    )


def fence(
    record: FenceRecord,
    *,
    locked: tuple[str, ...],
    unlocked: tuple[str, ...],
    condition: ConditionRecord | None,
) -> FenceDescription:
    """A fence on the wire; `condition` is the flag of the VM's disks, None when we never wrote to them."""
    side = Side(record.side)
    flag = condition or ConditionRecord(vm_uuid=record.vm_uuid, condition=DiskCondition.INTACT)
    return FenceDescription(
        pair=record.pair,
        run=record.run,
        side=side,
        autostart_before=record.autostart_before,
        locked=locked,
        unlocked=unlocked,
        condition=Condition(flag.condition.value) if side is Side.ORIGINAL else None,
        view=flag.view if side is Side.ORIGINAL else None,
    )


def viewed(opened: OpenedView) -> tuple[ViewedDisk, ...]:
    """The disks of an open view on the wire."""
    return tuple(
        ViewedDisk(
            target=target,
            size_bytes=size_bytes,
            tracked=target in opened.tracked,
            since=opened.since.get(target),
            why_not="; ".join(opened.why_not.get(target, ())),
            rung=opened.dirty[target].rung if target in opened.dirty else "",
        )
        for target, size_bytes in opened.sizes.items()
    )


def _lifted(record: LiftRecord | None) -> LiftDescription | None:
    """A fence lifted by hand, on the wire."""
    if record is None:
        return None
    return LiftDescription(
        pair=record.pair,
        run=record.run,
        by=record.by,
        reason=record.reason,
        at_s=record.at_s,
        condition=Condition(record.condition),
    )


def vm(
    domain: Domain, *, job_is_ours: bool, fence: FenceDescription | None, lifted: LiftRecord | None = None
) -> VmDescription:
    """A domain on the wire."""
    return VmDescription(
        uuid=domain.uuid,
        name=domain.name,
        power=power(domain.state),
        persistent=domain.persistent,
        autostart=domain.autostart,
        managed_save=domain.managed_save,
        on_poweroff=domain.on_poweroff,
        machine=domain.machine,
        firmware=domain.firmware,
        has_tpm=domain.has_tpm,
        passthrough=domain.passthrough,
        disks=tuple(_disk(disk) for disk in domain.disks),
        snapshots=tuple(SnapshotDescription(name=s.name, ours=s.ours, external=s.external) for s in domain.snapshots),
        checkpoints=domain.checkpoints,
        job=domain.job,
        job_is_ours=job_is_ours,
        running_since_s=domain.running_since_s,
        last_started_s=domain.last_started_s,
        last_stopped_s=domain.last_stopped_s,
        fence=fence,
        lifted=_lifted(lifted),
    )
