"""Orders about what views left behind to record writes: forget it, read it, remove it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from agent.disk.bitmaps import bitmaps_of, dirty_bytes, remove_bitmap
from agent.errors import DiskError, NoSuchDomain
from agent.fences import FenceKeeper
from agent.ledger import FenceRecord, LockKind
from agent.sources import ViewDesk
from agent.tags import tag_of
from agent.tracking import closed_record
from agent.virt.names import is_our_bitmap
from agent.virt.seam import Domain, Hypervisor, PowerState
from protocol.messages import DiskTracking, ViewSince

log = structlog.get_logger("failback.agent")


@dataclass
class TrackingDesk:
    """What the views of this host's VMs recorded. All methods block."""

    hypervisor: Hypervisor
    fences: FenceKeeper
    views: ViewDesk
    runtime_dir: Path

    def drop(self, vm_uuid: str, keep: Sequence[str]) -> None:
        """Forget the records of all views but those in `keep`; harmless when repeated, or when the VM is gone.

        Of a VM that is off only the checkpoints go: its images keep the bitmaps, which the last pass still reads.
        """
        with contextlib.suppress(NoSuchDomain):
            is_off = self.hypervisor.state(vm_uuid) is PowerState.OFF
            self.hypervisor.drop_checkpoints(vm_uuid, [tag_of(view) for view in keep])
            if not self.views.is_open(vm_uuid):  # else what it reads must stay; the next view merges as well
                self.views.overlays.drop(vm_uuid, keep)
            if is_off:
                return
        self.fences.ledger.drop_trackings(vm_uuid, keep)

    def read(self, pair: str, vm_uuid: str, since: Sequence[ViewSince]) -> tuple[DiskTracking, ...]:
        """How much was written to the disks of the shut-off, fenced VM since those views.

        Raises:
            NotFenced: nothing keeps the VM from starting in the middle of it.
        """
        fence = self.fences.required(vm_uuid, "replica", pair)
        return tuple(self._read_overlays(vm_uuid, s) or self._read(fence, s) for s in since)

    def _read_overlays(self, vm_uuid: str, wanted: ViewSince) -> DiskTracking | None:
        if not self.views.overlays.has(vm_uuid, wanted.target):
            return None
        (written,) = self.views.overlays.read(vm_uuid, {wanted.target: wanted.view})
        if written.since is None:
            log.warning(
                "what was written to a disk is not known", vm=vm_uuid, disk=wanted.target, reason=written.why_not
            )
        return DiskTracking(
            target=written.target, since=written.since, dirty_bytes=written.dirty_bytes, why_not=written.why_not
        )

    def _read(self, fence: FenceRecord, wanted: ViewSince) -> DiskTracking:
        target, view = wanted.target, wanted.view
        why_not = f"nothing was recorded of the disk {target} from the view {view} on"
        tracked = self.fences.ledger.tracked_image(fence.vm_uuid, view, target)
        image = next((i for i in fence.images if i.target == target and i.kind is LockKind.FROZEN), None)
        if tracked is not None and image is not None:
            record = closed_record(image.path, image.format, tracked, view)
            if not isinstance(record, str):
                try:
                    count = dirty_bytes(target, record.path, record.format, record.bitmap, self.runtime_dir)
                    return DiskTracking(target=target, since=view, dirty_bytes=count)
                except DiskError as error:
                    record = error.sentence
            why_not = record
        log.warning("what was written to a disk is not known", vm=fence.vm_uuid, disk=target, reason=why_not)
        return DiskTracking(target=target, since=None, dirty_bytes=0, why_not=why_not)

    def written(self, vm_uuid: str, since: Sequence[ViewSince]) -> tuple[DiskTracking, ...]:
        """About how much the running VM has written since those views; a disk of which that is not known says so."""
        counted: dict[str, dict[str, int]] = {}
        told: list[DiskTracking] = []
        for wanted in since:
            size = self.views.overlays.size_since(vm_uuid, wanted.target, wanted.view)
            if size is None:
                tag = tag_of(wanted.view)
                if tag not in counted:
                    counted[tag] = self.hypervisor.written_since(vm_uuid, tag)
                size = counted[tag].get(wanted.target)
            known = size is not None
            told.append(
                DiskTracking(
                    target=wanted.target,
                    since=wanted.view if known else None,
                    dirty_bytes=size or 0,
                    why_not="" if known else f"nothing counts what is written to the disk {wanted.target}",
                )
            )
        return tuple(told)

    def end(self, vm_uuid: str) -> None:
        """Remove everything that views of ours left in the VM; harmless when repeated.

        Raises:
            AgentError: something could not be removed; asked again, it is tried again.
        """
        self.views.close_of(vm_uuid)
        with contextlib.suppress(NoSuchDomain):
            self.views.end_overlays(vm_uuid)
        with contextlib.suppress(NoSuchDomain), self.fences.turn(vm_uuid):
            domain = self.hypervisor.inspect(vm_uuid)
            if domain.state is PowerState.OFF:
                self.hypervisor.drop_checkpoints(vm_uuid)
                self._remove_bitmaps(domain)
            else:
                self.hypervisor.drop_bitmaps(vm_uuid)
                self._tell_of_bases(domain)
        self.fences.ledger.drop_trackings(vm_uuid, ())

    def _remove_bitmaps(self, domain: Domain) -> None:
        """From every image of the chains: a protective snapshot may have put an overlay over the one that has them.

        An image that we hold is written to under our own lock, which stays where it is: so the VM cannot start
        meanwhile. One that we do not hold qemu-img locks itself."""
        for disk in domain.disks:
            for image in disk.chain:
                for bitmap in bitmaps_of(image.path, image.format):
                    if is_our_bitmap(bitmap.name):
                        held = self.fences.held(image.path)
                        locked = held is not None and held.is_named()
                        remove_bitmap(image.path, image.format, bitmap.name, locked_by_us=locked)

    @staticmethod
    def _tell_of_bases(domain: Domain) -> None:
        for disk in domain.disks:
            for image in disk.chain[1:]:
                if any(is_our_bitmap(name) for name in image.bitmaps):
                    log.warning(
                        "a backing image keeps dirty bitmaps of ours until its VM is off", image=str(image.path)
                    )
