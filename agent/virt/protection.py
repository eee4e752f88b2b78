"""Protective snapshots: the shut-off domain's disks get overlays, so that their bases stay as they are.

libvirt takes the snapshot. It cannot take an external one back before 9.9, so going back is done by hand, the same on
every version: point the domain at its bases again, forget the snapshot's metadata, remove the overlays. What is
in force is read from the domain's disks, never concluded from metadata alone, for a crash may lie between the two.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import libvirt

from agent.errors import HypervisorError
from agent.virt import images
from agent.virt.connection import errors_of
from agent.virt.domain_xml import (
    DiskFacts,
    DomainFacts,
    parse_domain,
    parse_snapshot,
    point_disks_at,
    snapshot_xml,
)
from agent.virt.inspection import power_state
from agent.virt.names import (
    FILE_NAME_LIMIT_BYTES,
    SNAPSHOT_PREFIX,
    ImageRef,
    check_snapshot,
    is_ours,
    marked,
    overlay_paths,
)
from agent.virt.places import Places
from agent.virt.seam import Overlay, PowerState


def protect(
    domain: Any, targets: Sequence[str], snapshot: str, description: str, places: Places
) -> tuple[Overlay, ...]:
    """Take the snapshot; see `agent.virt.seam.Hypervisor.protect`."""
    check_snapshot(snapshot)
    facts, _ = _facts_when_off(domain)
    known = known_overlays(domain, facts, snapshot, places)
    in_force = {target for target, overlay in known.items() if stands(facts, overlay, places)}
    if known and in_force == set(known):
        # Fewer than asked for would leave a base unprotected; all disks of one snapshot change in one step.
        if not set(targets) <= in_force:
            raise _half_done(facts, snapshot)
        return tuple(known[target] for target in known)
    if in_force:
        raise _half_done(facts, snapshot)
    bases = {target: _base(facts, target) for target in targets}
    forget(domain, facts, snapshot)
    remove([overlay.overlay for overlay in known.values()])
    paths = overlay_paths(bases, snapshot, places.scratch_dir)
    _clear_way(facts, bases, paths, places)
    others = [drive for drive in facts.drives if drive not in paths]
    with errors_of(f"taking the snapshot {snapshot}", facts.name):
        domain.snapshotCreateXML(
            snapshot_xml(snapshot, marked(description), paths, others), libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        )
    _make_durable(paths.values())
    return tuple(
        Overlay(target=target, base=bases[target].path, base_format=bases[target].format, overlay=path)
        for target, path in paths.items()
    )


def plan(domain: Any, targets: Sequence[str], snapshot: str, places: Places) -> tuple[Overlay, ...]:
    """See `agent.virt.seam.Hypervisor.plan_protection`."""
    check_snapshot(snapshot)
    facts, _ = _facts_when_off(domain)
    known = known_overlays(domain, facts, snapshot, places)
    bases = {target: _base(facts, target) for target in targets if target not in known}
    paths = overlay_paths(bases, snapshot, places.scratch_dir)
    fresh = {
        target: Overlay(target=target, base=base.path, base_format=base.format, overlay=paths[target])
        for target, base in bases.items()
    }
    return tuple((known | fresh)[target] for target in targets)


def _half_done(facts: DomainFacts, snapshot: str) -> HypervisorError:
    return HypervisorError(
        f"VM {facts.name}: the snapshot {snapshot} covers only some of its disks: undo it before it is taken again.",
        vm=facts.name,
        snapshot=snapshot,
    )


def unprotect(domain: Any, snapshot: str, overlays: Sequence[Overlay], places: Places) -> None:
    """Undo `protect`; see `agent.virt.seam.Hypervisor.unprotect`."""
    facts, xml = _facts_when_off(domain)
    known = {overlay.target: overlay for overlay in overlays} | known_overlays(domain, facts, snapshot, places)
    older = metadata_xml(domain, facts, snapshot)
    bases: dict[str, ImageRef] = {}
    for overlay in known.values():
        disk = facts.disk(overlay.target)
        if disk is None or disk.image is None or not stands(facts, overlay, places):
            continue
        if disk.image.path != overlay.overlay:
            raise HypervisorError(
                f"VM {facts.name}: {disk.image.path} was made on top of the snapshot {snapshot}: undo that first.",
                vm=facts.name,
                snapshot=snapshot,
            )
        bases[overlay.target] = base_of(overlay, older)
    if bases:
        with errors_of("pointing its disks back at their bases", facts.name):
            domain.connect().defineXML(point_disks_at(xml, bases, like=older))
    forget(domain, facts, snapshot)
    stale = {overlay.overlay for overlay in known.values()}
    remove([*stale, *_strays(facts, {**_images(facts), **bases}, snapshot, places)])


def _facts_when_off(domain: Any) -> tuple[DomainFacts, str]:
    """What a redefinition starts from, secrets included, of a domain that must be off."""
    with errors_of("reading its definition", domain.name()):
        xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
        state = power_state(domain)
    facts = parse_domain(xml)
    if state is not PowerState.OFF:
        raise HypervisorError(
            f"VM {facts.name} is {state.value}: power it off before its protective snapshot is taken or undone.",
            vm=facts.name,
        )
    return facts, xml


def _base(facts: DomainFacts, target: str) -> ImageRef:
    disk = facts.disk(target)
    if disk is None or disk.image is None:
        raise HypervisorError(f"VM {facts.name} has no disk {target} that is a file or a block device.", vm=facts.name)
    return disk.image


def base_of(overlay: Overlay, metadata: str | None) -> ImageRef:
    """The overlay's base as a disk's source; the definition of before knows best, a device may be absent right now."""
    before = None if metadata is None else parse_snapshot(metadata).domain
    disk = None if before is None else before.disk(overlay.target)
    if disk is not None and disk.image is not None and disk.image.path == overlay.base:
        return disk.image
    return ImageRef(path=overlay.base, format=overlay.base_format, block=overlay.base.is_block_device())


def _images(facts: DomainFacts) -> dict[str, ImageRef]:
    return {disk.target: disk.image for disk in facts.disks if disk.image is not None}


def metadata_xml(domain: Any, facts: DomainFacts, snapshot: str) -> str | None:
    with errors_of(f"looking up the snapshot {snapshot}", facts.name):
        for found in domain.listAllSnapshots(0):
            if found.getName() == snapshot:
                text: str = found.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
                return text
    return None


def known_overlays(domain: Any, facts: DomainFacts, snapshot: str, places: Places) -> dict[str, Overlay]:
    """The snapshot's overlays: from its metadata, or, where a crash prevented that, from the disks' present sources."""
    xml = metadata_xml(domain, facts, snapshot)
    if xml is not None:
        metadata = parse_snapshot(xml)
        if not is_ours(metadata.name, metadata.description):
            raise HypervisorError(
                f"VM {facts.name}: its snapshot {snapshot} was not made by failback: rename or delete it.",
                vm=facts.name,
                snapshot=snapshot,
            )
        before = metadata.domain
        return {
            target: Overlay(target=target, base=image.path, base_format=image.format, overlay=path)
            for target, path in metadata.overlays.items()
            if before is not None and (disk := before.disk(target)) is not None and (image := disk.image) is not None
        }
    return {
        disk.target: overlay
        for disk in facts.disks
        if (overlay := _overlay_by_name(disk, snapshot, places)) is not None
    }


def _overlay_by_name(disk: DiskFacts, snapshot: str, places: Places) -> Overlay | None:
    """The overlay of `snapshot` in the disk's chain, recognised by its file name."""
    if disk.image is None or SNAPSHOT_PREFIX not in disk.image.path.name:
        return None
    chain = images.backing_chain(disk.image.path, disk.image.format, qemu_img=places.qemu_img)
    for image, base in itertools.pairwise(chain):
        if image.path.name.endswith(f".{snapshot}.qcow2"):
            return Overlay(target=disk.target, base=base.path, base_format=base.format, overlay=image.path)
    return None


def stands(facts: DomainFacts, overlay: Overlay, places: Places) -> bool:
    """Whether the domain's disk reads through that overlay."""
    disk = facts.disk(overlay.target)
    if disk is None or disk.image is None or disk.image.path == overlay.base:
        return False
    if disk.image.path == overlay.overlay:
        return True
    chain = images.backing_chain(disk.image.path, disk.image.format, qemu_img=places.qemu_img)
    return any(image.path == overlay.overlay for image in chain)


def _clear_way(facts: DomainFacts, bases: Mapping[str, ImageRef], paths: Mapping[str, Path], places: Places) -> None:
    """Remove what an attempt left that was cut short before the domain was changed; refuse over anything else."""
    for target, path in paths.items():
        if len(os.fsencode(path.name)) > FILE_NAME_LIMIT_BYTES:
            raise HypervisorError(f"VM {facts.name}: the file name {path.name} would be too long.", vm=facts.name)
        if not os.path.lexists(path):
            continue
        if not _is_stray(path, bases[target], places):
            raise HypervisorError(
                f"VM {facts.name}: {path} is in the way of its protective snapshot and not ours: move it away.",
                vm=facts.name,
                path=str(path),
            )
        remove([path])


def _strays(facts: DomainFacts, bases: Mapping[str, ImageRef], snapshot: str, places: Places) -> list[Path]:
    """Overlays of that snapshot that libvirt had made, but not yet put into the domain, when it was cut short."""
    in_use = {disk.image.path for disk in facts.disks if disk.image is not None}
    paths = overlay_paths(bases, snapshot, places.scratch_dir)
    return [
        path
        for target, path in paths.items()
        if path not in in_use and path.exists() and _is_stray(path, bases[target], places)
    ]


def _is_stray(path: Path, base: ImageRef, places: Places) -> bool:
    try:
        chain = images.backing_chain(path, "qcow2", qemu_img=places.qemu_img)
    except images.UnreadableChain:
        # Created, but cut short before its header was written: it holds nothing.
        return path.is_file() and path.stat().st_size == 0
    return len(chain) > 1 and chain[1].path == base.path


def forget(domain: Any, facts: DomainFacts, snapshot: str) -> None:
    """Delete the snapshot's metadata; its files are ours to remove."""
    with errors_of(f"forgetting the snapshot {snapshot}", facts.name):
        for found in domain.listAllSnapshots(0):
            if found.getName() == snapshot:
                found.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)


def remove(paths: Iterable[Path]) -> None:
    folders = set()
    for path in paths:
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise HypervisorError(f"{path} cannot be removed: {error.strerror}.", path=str(path)) from error
        folders.add(path.parent)
    for folder in folders:
        _fsync(folder)


def _make_durable(paths: Iterable[Path]) -> None:
    """qemu-img does not flush what it creates, and after a power cut the domain would point at nothing."""
    paths = list(paths)
    for path in paths:
        _fsync(path)
    for folder in {path.parent for path in paths}:
        _fsync(folder)


def _fsync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise HypervisorError(f"{path} cannot be made durable: {error.strerror}.", path=str(path)) from error
