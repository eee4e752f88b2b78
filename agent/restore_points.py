"""Restore points: protective snapshots that stay after commit. Their bases are read-only; the oldest can be merged.

A restore point is what the VM's disks held when its run ended: the base of each disk, under the overlay that the VM
writes to from then on. Bases lose their write bits (block devices have none of their own), so that a copying tool which
is not root fails instead of ruining every layer above; QEMU opens them read-only in any case.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from agent.disk.commit import commit_overlays, stand_on
from agent.disk.lock import hold_frozen
from agent.errors import DiskError, HypervisorError
from agent.fences import FenceKeeper
from agent.ledger import Ledger, ProtectedImage, ProtectionRecord
from agent.overlay_chain import chain_of
from agent.overlays import MERGE_TIMEOUT_S, STAND_ON_TIMEOUT_S
from agent.virt.seam import Domain, Hypervisor, Image, Overlay, TrackOverlay

WRITE_BITS = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class RestorePointDesk:
    """Keeps and merges the restore points of this host's VMs. Everything may block and is harmless when repeated."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        fences: FenceKeeper,
        ledger: Ledger,
        *,
        commit: Callable[..., None] = commit_overlays,
        stand: Callable[..., None] = stand_on,
    ) -> None:
        self._hypervisor = hypervisor
        self._fences = fences
        self._ledger = ledger
        self._commit = commit
        self._stand = stand

    def keep(self, vm_uuid: str, snapshot: str) -> ProtectionRecord:
        """Make the bases of that snapshot read-only; what their modes were is durable before.

        Raises:
            HypervisorError: this agent knows of no such snapshot.
            DiskError: a mode cannot be changed.
        """
        known = self._known(vm_uuid, snapshot)
        if known is None:
            raise HypervisorError(
                f"the agent knows of no snapshot {snapshot} of the VM {vm_uuid} that could be kept: commit with "
                "`--restore-point drop`",
                snapshot=snapshot,
            )
        modes = {image.target: _mode(image.base) for image in known.images}
        kept = replace(
            known,
            images=tuple(i if i.mode is not None else replace(i, mode=modes[i.target]) for i in known.images),
        )
        self._ledger.put_protection(kept)
        for image in kept.images:
            if image.mode is not None:
                _set_mode(image.base, image.mode & ~WRITE_BITS)
        return kept

    def give_back(self, images: tuple[ProtectedImage, ...]) -> None:
        """Bases that were kept have the mode again that they had."""
        for image in images:
            if image.mode is not None:
                _set_mode(image.base, image.mode)

    def merge(self, vm_uuid: str, snapshot: str) -> None:
        """Merge the oldest restore point of the VM, which is off and fenced, away: what was written after it goes into
        its base, and whatever stands on it stands on the base. The VM's disks read the same before and after.

        Raises:
            HypervisorError: an older restore point stands below it, or something that is not ours on it.
            DiskError: its storage failed; the disks read the same, and it can be repeated.
        """
        known = self._known(vm_uuid, snapshot)
        if known is None:
            return
        domain = self._hypervisor.inspect(vm_uuid)
        self._check(domain, known)
        for image in known.images:
            if image.mode is not None:
                _set_mode(image.base, image.mode)  # qemu-img opens it for writing, whoever the agent runs as
            self._merge_disk(domain, image)
        self._inherit(known)
        overlays = [
            Overlay(target=i.target, base=i.base, base_format=i.base_format, overlay=i.overlay) for i in known.images
        ]
        self._hypervisor.unprotect(vm_uuid, snapshot, overlays)
        self._fences.refresh(vm_uuid)
        self._ledger.drop_protection(vm_uuid, snapshot)

    def _known(self, vm_uuid: str, snapshot: str) -> ProtectionRecord | None:
        return self._ledger.protection(vm_uuid, snapshot)

    def _others(self, known: ProtectionRecord) -> list[ProtectionRecord]:
        records = self._ledger.contents.protections
        return [r for r in records if r.vm_uuid == known.vm_uuid and r.snapshot != known.snapshot]

    def _check(self, domain: Domain, known: ProtectionRecord) -> None:
        """Before anything is written: nothing of ours below it, nothing but ours above it, on any disk."""
        ours = {i.overlay for record in self._others(known) for i in record.images}
        for image in known.images:
            if any(i.overlay == image.base for record in self._others(known) for i in record.images):
                raise HypervisorError(
                    f"VM {domain.name}: the restore point {known.snapshot} is not its oldest: prune from the oldest on",
                    vm=domain.name,
                    snapshot=known.snapshot,
                )
            above, _ = _around(chain_of(domain, image.target), image)
            foreign = next((member.path for member in above if member.path not in ours), None)
            if foreign is not None:
                raise HypervisorError(
                    f"VM {domain.name}: {foreign}, which failback did not make, stands on the restore point "
                    f"{known.snapshot}: remove or merge that snapshot first, then prune again",
                    vm=domain.name,
                    path=str(foreign),
                )

    def _merge_disk(self, domain: Domain, image: ProtectedImage) -> None:
        chain = chain_of(domain, image.target)
        above, standing = _around(chain, image)
        if not standing:
            return  # an earlier attempt has done this disk
        with ExitStack() as locks:
            for member in chain:
                if self._fences.held(member.path) is None:
                    locks.callback(hold_frozen(member.path).close)
            self._commit(image.target, [image.overlay], image.base, image.base_format, timeout_s=MERGE_TIMEOUT_S)
            if above:
                top = above[-1].path
                self._stand(image.target, top, image.base, image.base_format, timeout_s=STAND_ON_TIMEOUT_S)

    def _inherit(self, known: ProtectionRecord) -> None:
        """What stood on the merged overlays stands on their bases: by libvirt's metadata, and by the ledger."""
        overlays = {image.overlay: image for image in known.images}
        for record in self._others(known):
            if not any(image.base in overlays for image in record.images):
                continue
            for image in record.images:
                below = overlays.get(image.base)
                if below is not None:
                    track = TrackOverlay(
                        target=image.target,
                        below=below.base,
                        base=below.base,
                        base_format=below.base_format,
                        overlay=below.overlay,
                        definition=f"<disk><target dev='{image.target}'/></disk>",
                    )
                    self._hypervisor.forget_overlays(known.vm_uuid, [below.overlay], below.base, track)
                    if below.mode is not None and image.mode is not None:
                        _set_mode(below.base, below.mode & ~WRITE_BITS)
            self._ledger.put_protection(replace(record, images=tuple(_on_base(i, overlays) for i in record.images)))


def _on_base(image: ProtectedImage, merged: dict[Path, ProtectedImage]) -> ProtectedImage:
    below = merged.get(image.base)
    if below is None:
        return image
    return replace(image, base=below.base, base_format=below.base_format, mode=below.mode)


def _around(chain: tuple[Image, ...], image: ProtectedImage) -> tuple[tuple[Image, ...], bool]:
    """What stands on the image's overlay (the top first), and whether the disk reads through that overlay at all."""
    at = next((number for number, member in enumerate(chain) if member.path == image.overlay), None)
    return ((), False) if at is None else (chain[:at], True)


def _mode(path: Path) -> int | None:
    """The permission bits of a file; None of a device, or what is no file here."""
    try:
        status = path.stat()
    except OSError:
        return None
    return stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else None


def _set_mode(path: Path, mode: int) -> None:
    try:
        path.chmod(mode)
    except OSError as error:
        raise DiskError(
            f"the mode of {path} cannot be changed: {error.strerror}; the agent must own it or be root", path=str(path)
        ) from error
