"""The refusals that concern single disks; listed in the table of `coordinator.refusals`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from coordinator.cures import register_again
from coordinator.findings import Case, DiskCase, VmCase, clause, target_at
from protocol.messages import DiskDescription, ImageDescription, Power, Side

Objection = tuple[str, str]

MIB = 1 << 20
SCRATCH_FLOOR_BYTES = 256 * MIB
FORMATS = ("raw", "qcow2")


def room_needed_bytes(disk: DiskDescription, *, live: bool) -> int:
    """An estimate of the room a run needs beside one disk of the replica, in bytes.

    * The overlay of the protective snapshot stays empty as long as the replica is off: its tables only, taken as 1 MiB
      plus what a full qcow2 mapping of 64 KiB clusters has (8 bytes each, 1/8192 of the size).
    * While the replica serves (`live`), the scratch file of the frozen view takes the old content of whatever the guest
      overwrites during the first pass: taken as a tenth of what the disk's images store (of the disk, where that is not
      known), at least 256 MiB, at most the whole disk. What was never written has no old content.
    """
    size_bytes = disk.chain[0].virtual_size_bytes
    overlay_bytes = MIB + size_bytes // 8192
    if not live:
        return overlay_bytes
    stored_bytes = min(size_bytes, sum(image.allocated_bytes for image in disk.chain) or size_bytes)
    return overlay_bytes + min(size_bytes, max(SCRATCH_FLOOR_BYTES, stored_bytes // 10))


# --- the mapping ----------------------------------------------------------------------------------------------


def disk_missing(case: Case) -> Iterator[Objection]:
    for vm in case.vms():
        for disks in case.pair.disks:
            target = target_at(disks, vm.side)
            if vm.disk(target) is None and not (vm.side is Side.ORIGINAL and disks in case.created):
                yield (
                    f"{vm.ref.name} {target}",
                    f"The {vm.title} has no disk {target} any more though the pair maps it; attach it again, or leave "
                    f"it out: `{register_again(case, unmap=disks)}`.",
                )


def disk_not_mapped(case: Case) -> Iterator[Objection]:
    for vm in case.vms():
        mapped = {target_at(disks, vm.side) for disks in case.pair.disks}
        for disk in vm.vm.disks:
            if disk.target not in mapped and disk.target not in case.pair.excluded:
                yield (
                    f"{vm.ref.name} {disk.target}",
                    f"The {vm.title} has a disk {disk.target} that the pair does not map; register the pair again, "
                    "with --disk ORIGINAL=REPLICA for every disk, or leave this one out: "
                    f"`{register_again(case, leave_out=disk.target)}`{_or_create(vm)}.",
                )


def _or_create(vm: VmCase) -> str:
    return "; or let the run create it at the original (--create-missing)" if vm.side is Side.REPLICA else ""


def chains_share_an_image(case: Case) -> Iterator[Objection]:
    original, replica = case.vm(Side.ORIGINAL), case.vm(Side.REPLICA)
    if original is None or replica is None:
        return
    mapped = {disk.disk.target for disk in case.mapped(Side.ORIGINAL)}
    sources = {disk.disk.target for disk in case.mapped(Side.REPLICA)}
    for here in original.vm.disks:
        for there in replica.vm.disks:
            shared = _shared(here, there)
            if shared is not None and (here.target in mapped or there.target in sources):
                yield (
                    f"{original.ref.name} {here.target}",
                    f"Disk {here.target} of the original and disk {there.target} of the replica both rest on "
                    f"{shared.path}, so one would be written while the other is read; give each side an image of "
                    "its own.",
                )


def _shared(here: DiskDescription, there: DiskDescription) -> ImageDescription | None:
    known = {image.identity for image in there.chain if image.identity}
    return next((image for image in here.chain if image.identity in known), None)


# --- what a disk is -------------------------------------------------------------------------------------------


def kind_not_supported(case: Case) -> Iterator[Objection]:
    for disk in case.all_mapped():
        if disk.disk.kind not in ("file", "block"):
            yield _about(disk, f"is a {disk.disk.kind} disk, which cannot be failed back yet", _exclude(case, disk))


def shareable(case: Case) -> Iterator[Objection]:
    for disk in case.all_mapped():
        if disk.disk.shareable:
            yield _about(disk, "is shareable, so other VMs may write to it at any moment", _exclude(case, disk))


def readonly(case: Case) -> Iterator[Objection]:
    for disk in case.all_mapped():
        if disk.disk.readonly:
            yield _about(disk, "is read-only, so there is nothing to bring home", _exclude(case, disk))


def unreadable(case: Case) -> Iterator[Objection]:
    for disk in case.all_mapped():
        if disk.disk.problem is not None:
            cause = clause(disk.disk.problem)
            yield _about(disk, f"cannot be inspected: {cause}", "mend that on its host and plan again")
        elif disk.disk.kind in ("file", "block") and not disk.disk.chain:
            yield _about(disk, "has no image", "attach one on its host and plan again")


def format_not_supported(case: Case) -> Iterator[Objection]:
    for disk, image in _images(case):
        if image.format not in FORMATS:
            yield _about(
                disk,
                f"rests on {image.path} in format {image.format or 'unknown'}, which is neither raw nor qcow2",
                f"convert it with `qemu-img convert`, or {_exclude(case, disk)}",
            )


def encrypted(case: Case) -> Iterator[Objection]:
    for disk, image in _images(case):
        if image.encrypted:
            yield _about(
                disk, f"rests on the encrypted image {image.path}, which cannot be read here", _exclude(case, disk)
            )


def corrupt(case: Case) -> Iterator[Objection]:
    for disk, image in _images(case):
        if image.corrupt:
            yield _about(
                disk,
                f"rests on {image.path}, which is marked corrupt",
                f"check it with the VM off by `qemu-img check -r all {image.path}`",
            )


def dirty(case: Case) -> Iterator[Objection]:
    for disk, image in _images(case):
        if image.dirty and disk.vm.vm.power is Power.OFF:
            yield _about(
                disk,
                f"rests on {image.path}, which was not closed cleanly",
                f"mend it by `qemu-img check -r leaks {image.path}`",
            )


def external_data(case: Case) -> Iterator[Objection]:
    for disk, image in _images(case):
        if image.external_data:
            yield _about(
                disk,
                f"rests on {image.path}, which keeps its data in another file",
                "convert it with `qemu-img convert` to an image of one piece",
            )


def internal_snapshot(case: Case) -> Iterator[Objection]:
    for disk, image in _images(case):
        if image.internal_snapshots:
            yield _about(
                disk,
                f"has {image.internal_snapshots} snapshot(s) inside {image.path}, which a failback would break",
                f"delete them with the VM off by `qemu-img snapshot -d NAME {image.path}`",
            )


def backing_chain_on_original(case: Case) -> Iterator[Objection]:
    for disk in case.mapped(Side.ORIGINAL):
        if len(disk.disk.chain) > 1 and not is_left_by_us(disk, case.pair.name):
            yield _about(
                disk,
                f"is an overlay on {disk.disk.chain[1].path}, and only images without a backing file can be written",
                f"merge it on its host with `virsh blockpull {disk.vm.ref.name} {disk.disk.target}` while the VM "
                "runs, or "
                "with `qemu-img convert` while it is off",
            )


def is_left_by_us(disk: DiskCase, pair: str) -> bool:
    """Whether the disk's overlay is the working snapshot of a run that was taken back while its host was away: the next
    run's fence drops it."""
    chain = disk.disk.chain
    return len(chain) == 2 and f".failback-{pair}-" in chain[0].path


# --- sizes and room -------------------------------------------------------------------------------------------


def target_smaller(case: Case) -> Iterator[Objection]:
    for here, there in case.found_pairs():
        target_bytes, source_bytes = _size(here), _size(there)
        if target_bytes < source_bytes:
            yield _about(
                here,
                f"has {target_bytes} bytes but disk {there.disk.target} of the replica has {source_bytes}",
                f"grow it with the VM off by `qemu-img resize {here.disk.chain[0].path} {source_bytes}` or extend "
                "its volume",
            )


def target_larger(case: Case) -> Iterator[Objection]:
    for here, there in case.found_pairs():
        target_bytes, source_bytes = _size(here), _size(there)
        if target_bytes > source_bytes and not case.options.allow_larger_target:
            yield _about(
                here,
                f"has {target_bytes} bytes, more than the {source_bytes} of disk {there.disk.target} of the "
                "replica, and "
                "what is behind them would be zeroed",
                "agree with --allow-larger-target",
            )


def size_not_of_sectors(case: Case) -> Iterator[Objection]:
    for disk in case.all_mapped():
        if disk.disk.chain and disk.disk.sector_bytes > 0 and _size(disk) % disk.disk.sector_bytes:
            yield _about(
                disk,
                f"has {_size(disk)} bytes, which is not a multiple of its sectors of {disk.disk.sector_bytes} bytes",
                f"resize it with the VM off by `qemu-img resize {disk.disk.chain[0].path} SIZE`",
            )


def sector_differs(case: Case) -> Iterator[Objection]:
    for here, there in case.found_pairs():
        if here.disk.sector_bytes != there.disk.sector_bytes:
            yield _about(
                here,
                f"has sectors of {here.disk.sector_bytes} bytes but disk {there.disk.target} of the replica has "
                f"{there.disk.sector_bytes}, so the guest would not find its partitions",
                "give both the same <blockio logical_block_size=…/> with `virsh edit`",
            )


def place_of(disk: DiskDescription) -> str:
    """Where new files for this disk go: beside its top image, or the agent's own folder for a block device."""
    return "the agent's scratch folder" if disk.kind == "block" else str(PurePosixPath(disk.chain[0].path).parent)


def _size(disk: DiskCase) -> int:
    return disk.disk.chain[0].virtual_size_bytes


def _images(case: Case) -> Iterator[tuple[DiskCase, ImageDescription]]:
    for disk in case.all_mapped():
        for image in disk.disk.chain:
            yield disk, image


def _about(disk: DiskCase, cause: str, cure: str) -> Objection:
    title = disk.title[0].upper() + disk.title[1:]
    return f"{disk.vm.ref.name} {disk.disk.target}", f"{title} {cause}; {cure}."


def _exclude(case: Case, disk: DiskCase) -> str:
    mapped = next(disks for disks in case.pair.disks if target_at(disks, disk.vm.side) == disk.disk.target)
    return f"leave it out: `{register_again(case, unmap=mapped)}`"
