"""Live overlays: how a disk without dirty bitmaps remembers what its guest writes.

A disk-only snapshot of the running domain freezes an image and lets the guest write on into a qcow2 overlay of ours
(https://libvirt.org/formatsnapshot.html). No snapshot metadata is kept: nothing of it would be true for long, for the
overlays are merged into the base again by block commit, while the guest writes. What is in force is read from the
domain's disks and their chains; an overlay of ours is known by its name, which says domain and disk.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import libvirt

from agent.errors import HypervisorError
from agent.virt import images
from agent.virt.connection import errors_of
from agent.virt.domain_xml import (
    DiskFacts,
    DomainFacts,
    disk_xml,
    mirror_is_ready,
    parse_domain,
    parse_snapshot,
    point_disks_at,
    point_snapshot_at,
    snapshot_xml,
    within_domain,
)
from agent.virt.inspection import facts_now, power_state, running_job
from agent.virt.names import (
    FILE_NAME_LIMIT_BYTES,
    TRACK_MARK,
    ImageRef,
    check_tag,
    is_ours,
    track_overlay_path,
)
from agent.virt.places import Places
from agent.virt.seam import Image, PowerState, TrackOverlay
from agent.virt.views import resume_stalled

_POLL_S = 0.02
_DEFINITION = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
_COMMITS = (libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT, libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT)


def plan_overlays(domain: Any, targets: Sequence[str], tag: str, places: Places) -> tuple[TrackOverlay, ...]:
    """See `agent.virt.seam.Hypervisor.plan_overlays`."""
    check_tag(tag)
    facts = facts_now(domain)
    if power_state(domain) is PowerState.OFF:
        raise HypervisorError(f"VM {facts.name} is off: a view of it is its images themselves.", vm=facts.name)
    with errors_of("reading its definition", facts.name):
        # Without its secrets: it is written down.
        definition = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE) if domain.isPersistent() else None
    if definition is None:
        raise HypervisorError(
            f"VM {facts.name} is transient: after its end nothing would remember its overlays; define it first.",
            vm=facts.name,
        )
    defined = parse_domain(definition)
    return tuple(_plan(facts, defined, definition, target, tag, places) for target in targets)


def _plan(
    facts: DomainFacts, defined: DomainFacts, definition: str, target: str, tag: str, places: Places
) -> TrackOverlay:
    disk = _disk(facts, target)
    later = defined.disk(target)
    if later is None or later.image != disk.image:
        raise HypervisorError(
            f"VM {facts.name}: its disk {target} is another image in its persistent definition than while it runs: "
            "make them the same first.",
            vm=facts.name,
            disk=target,
        )
    chain = _chain(disk, places)
    ours = list(itertools.takewhile(lambda image: is_track_overlay(image.path, facts.uuid, target), chain))
    base = chain[len(ours)] if len(ours) < len(chain) else None
    if base is None or base.format != "raw":
        raise HypervisorError(
            f"VM {facts.name}: its disk {target} is no raw image: overlays of ours go over those alone.",
            vm=facts.name,
            disk=target,
        )
    ref = ImageRef(path=base.path, format=base.format, block=base.path.is_block_device())
    path = track_overlay_path(ref, facts.uuid, target, tag, places.scratch_dir)
    if len(os.fsencode(path.name)) > FILE_NAME_LIMIT_BYTES:
        raise HypervisorError(f"VM {facts.name}: the file name {path.name} would be too long.", vm=facts.name)
    paths = [image.path for image in chain]
    below = paths[paths.index(path) + 1] if path in paths else paths[0]
    return TrackOverlay(
        target=target,
        below=below,
        base=base.path,
        base_format=base.format,
        overlay=path,
        definition=disk_xml(definition, target),
    )


def is_track_overlay(path: Path, uuid: str, target: str) -> bool:
    """Whether that is the name of an overlay of ours on that disk."""
    return f"{TRACK_MARK}{uuid}-{target}-" in path.name


def begin_overlays(domain: Any, overlays: Sequence[TrackOverlay], places: Places) -> None:
    """See `agent.virt.seam.Hypervisor.begin_overlays`."""
    facts = facts_now(domain)
    missing = [overlay for overlay in overlays if not _stands(_disk(facts, overlay.target), overlay.overlay, places)]
    if not missing:
        return
    job = running_job(domain, facts.drives)
    if job is not None:
        raise HypervisorError(
            f"VM {facts.name} has a {job} running already: wait for it or end it before a view is opened.",
            vm=facts.name,
            job=job,
        )
    for overlay in missing:
        disk = _disk(facts, overlay.target)
        if disk.image is None or disk.image.path != overlay.below:
            raise HypervisorError(
                f"VM {facts.name}: its disk {overlay.target} is not {overlay.below} any more: open the view again.",
                vm=facts.name,
                disk=overlay.target,
            )
        _clear_way(facts, overlay, places)
    paths = {overlay.target: overlay.overlay for overlay in missing}
    others = [drive for drive in facts.drives if drive not in paths]
    flags = (
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    )
    with errors_of("putting live overlays over its disks", facts.name):
        domain.snapshotCreateXML(snapshot_xml("failback-track", "made by failback", paths, others), flags)
    for path in paths.values():
        _fsync(path)
        _fsync(path.parent)


def _clear_way(facts: DomainFacts, overlay: TrackOverlay, places: Places) -> None:
    """Remove what an attempt left that was cut short before the domain was changed; refuse over anything else."""
    path = overlay.overlay
    if not os.path.lexists(path):
        return
    try:
        chain = images.backing_chain(path, "qcow2", qemu_img=places.qemu_img)
        is_stray = len(chain) > 1 and chain[1].path == overlay.below
    except images.UnreadableChain:
        # Created, but cut short before its header was written: it holds nothing.
        is_stray = path.is_file() and path.stat().st_size == 0
    if not is_stray:
        raise HypervisorError(
            f"VM {facts.name}: {path} is in the way of an overlay and not ours: move it away.",
            vm=facts.name,
            path=str(path),
        )
    path.unlink()


# --- merging while it runs -----------------------------------------------------------------------------------------


def merge_overlays(
    domain: Any, overlays: Sequence[Path], into: Path, disk: TrackOverlay, places: Places, *, timeout_s: float
) -> None:
    """See `agent.virt.seam.Hypervisor.merge_overlays`."""
    facts = facts_now(domain)
    deadline = time.monotonic() + timeout_s
    with _opened(into) as base, errors_of(f"merging overlays of {disk.target}", facts.name):
        _take_up(domain, facts, disk.target, into, deadline)
        chain = _chain(_disk(facts_now(domain), disk.target), places)
        paths = [image.path for image in chain]
        left = [path for path in overlays if path in paths]
        if left:
            at = paths.index(left[0])
            if paths[at : at + len(left) + 1] != [*left, into]:
                raise HypervisorError(
                    f"VM {facts.name}: the overlays of its disk {disk.target} do not stand on {into} one by one any "
                    "more: somebody changed its chain; merge them by hand (virsh blockcommit).",
                    vm=facts.name,
                    disk=disk.target,
                )
            _start(domain, disk.target, into, left[0], is_top=at == 0)
            _finish(domain, facts, disk.target, deadline)
            now = [image.path for image in _chain(_disk(facts_now(domain), disk.target), places)]
            if any(path in now for path in left):
                raise HypervisorError(
                    f"VM {facts.name}: the block commit of its disk {disk.target} into {into} failed; its log says "
                    "why, and nothing is lost. Try again.",
                    vm=facts.name,
                    disk=disk.target,
                )
            if at > 0:
                _fsync(paths[at - 1])  # its header names another image by now
        # QEMU does not flush what an intermediate commit writes, and the guest's own flush went to the overlay.
        _fsync_open(base, into)
        _mend_definition(domain, overlays, into, disk)
        resume_stalled(domain, facts.name)  # an overlay without room pauses its guest


def _start(domain: Any, target: str, into: Path, top: Path, *, is_top: bool) -> None:
    flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE if is_top else 0
    domain.blockCommit(target, str(into), None if is_top else str(top), 0, flags)


def _take_up(domain: Any, facts: DomainFacts, target: str, into: Path, deadline: float) -> None:
    """Wait for a merge of ours that an agent before us began."""
    job = domain.blockJobInfo(target, 0)
    if not job:
        return
    if job.get("type") not in _COMMITS:
        raise HypervisorError(
            f"VM {facts.name}: a block job that is not ours works on its disk {target}: wait for it or end it.",
            vm=facts.name,
            disk=target,
        )
    _finish(domain, facts, target, deadline)


def _finish(domain: Any, facts: DomainFacts, target: str, deadline: float) -> None:
    """Wait until the job is over; one that has caught up with the guest is told to let the guest write to the base."""
    while domain.blockJobInfo(target, 0):
        if mirror_is_ready(domain.XMLDesc(0), target):
            domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
            continue
        if time.monotonic() > deadline:
            with contextlib.suppress(libvirt.libvirtError):  # it ended in this moment
                domain.blockJobAbort(target, 0)
            raise HypervisorError(
                f"VM {facts.name}: merging the overlays of its disk {target} took too long and was ended, nothing is "
                "lost: its guest writes faster than its storage takes; try again when it writes less.",
                vm=facts.name,
                disk=target,
            )
        time.sleep(_POLL_S)


def _mend_definition(domain: Any, overlays: Sequence[Path], into: Path, disk: TrackOverlay) -> None:
    """The persistent definition must not name what is gone, be it as a disk's source or in its backing chain."""
    xml = domain.XMLDesc(_DEFINITION)
    written = disk_xml(xml, disk.target)
    if any(str(path) in written for path in overlays):
        domain.connect().defineXML(_standing_on(xml, overlays, into, disk))


def _standing_on(xml: str, overlays: Sequence[Path], into: Path, disk: TrackOverlay) -> str:
    """The definition with the disk reading through `into` instead of `overlays`; back at its own image, it is what it
    was before the first overlay."""
    now = _disk(parse_domain(xml), disk.target).image
    assert now is not None
    if now.path in overlays:
        image_format = disk.base_format if into == disk.base else "qcow2"
        now = ImageRef(path=into, format=image_format, block=into.is_block_device())
    return point_disks_at(xml, {disk.target: now}, like=within_domain(disk.definition))


# --- while it is off -----------------------------------------------------------------------------------------------


def forget_overlays(domain: Any, overlays: Sequence[Path], into: Path, disk: TrackOverlay) -> None:
    """See `agent.virt.seam.Hypervisor.forget_overlays`."""
    with errors_of("taking overlays out of its definition", domain.name()):
        if power_state(domain) is not PowerState.OFF:
            raise HypervisorError(f"VM {domain.name()} runs: its overlays are merged by a block job.", vm=domain.name())
        _mend_definition(domain, overlays, into, disk)
        for snapshot in domain.listAllSnapshots(0):
            xml = snapshot.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
            if not is_ours(snapshot.getName(), parse_snapshot(xml).description):
                continue
            ref = ImageRef(path=into, format=disk.base_format, block=into.is_block_device())
            changed = point_snapshot_at(xml, disk.target, set(overlays), ref, like=within_domain(disk.definition))
            if changed is not None:
                current = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT if snapshot.isCurrent() else 0
                domain.snapshotCreateXML(changed, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE | current)


# --- small parts ---------------------------------------------------------------------------------------------------


def _disk(facts: DomainFacts, target: str) -> DiskFacts:
    disk = facts.disk(target)
    if disk is None or disk.image is None:
        raise HypervisorError(f"VM {facts.name} has no disk {target} that is a file or a block device.", vm=facts.name)
    return disk


def _chain(disk: DiskFacts, places: Places) -> tuple[Image, ...]:
    assert disk.image is not None
    return images.backing_chain(disk.image.path, disk.image.format, qemu_img=places.qemu_img)


def _stands(disk: DiskFacts, overlay: Path, places: Places) -> bool:
    return any(image.path == overlay for image in _chain(disk, places))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor from before the writing on: only that hears of every error of writing back."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HypervisorError(f"{path} cannot be opened: {error.strerror}.", path=str(path)) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _fsync_open(descriptor: int, path: Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise HypervisorError(f"{path} cannot be made durable: {error.strerror}.", path=str(path)) from error


def _fsync(path: Path) -> None:
    with _opened(path) as descriptor:
        _fsync_open(descriptor, path)
