"""What runs leave in and beside a VM, found by looking: in the ledger, in libvirt, in images and in folders.

Only what has our mark counts. What somebody else made is never named here, so that nothing of it is ever removed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from agent.errors import AgentError, NoSuchDomain
from agent.ledger import Contents, Ledger
from agent.sources import ViewDesk
from agent.virt.names import TRACK_MARK, is_our_bitmap
from agent.virt.seam import Domain, Hypervisor
from protocol.messages import Remnant, RemnantKind

log = structlog.get_logger("failback.agent")


@dataclass
class RemnantFinder:
    """Looks for what is left; changes nothing but by `remove_files`. All methods block."""

    hypervisor: Hypervisor
    ledger: Ledger
    views: ViewDesk
    scratch_dir: Path
    runtime_dir: Path

    def of(self, vm_uuid: str) -> tuple[Remnant, ...]:
        """Everything of ours in and beside that VM, which may be gone by now.

        Raises:
            AgentError: libvirt does not answer.
        """
        try:
            domain: Domain | None = self.hypervisor.inspect(vm_uuid)
        except NoSuchDomain:
            domain = None
        known = tuple(self._recorded(vm_uuid, domain))
        if domain is None:
            return known
        return (*known, *self._unrecorded(domain), *self._files(domain))

    def _recorded(self, vm_uuid: str, domain: Domain | None) -> Iterator[Remnant]:
        contents = self.ledger.contents
        chain = _chain(domain)
        for view in contents.views:
            if view.vm_uuid == vm_uuid:
                yield _remnant(RemnantKind.VIEW, vm_uuid, view.view, in_use=self.views.is_open(vm_uuid))
        for tracking in contents.trackings:
            if tracking.vm_uuid == vm_uuid:
                yield _remnant(RemnantKind.TRACKING, vm_uuid, tracking.view)
        for overlay in contents.overlays:
            if overlay.vm_uuid == vm_uuid:
                # Removing it is merging it: what the guest wrote stays.
                name = str(overlay.overlay)
                yield _remnant(RemnantKind.OVERLAY, vm_uuid, name, in_use=overlay.overlay in chain)
        for thaw in contents.thaws:
            if thaw.vm_uuid == vm_uuid:
                yield _remnant(RemnantKind.THAW, vm_uuid, "guest file systems")
        for protection in contents.protections:
            if protection.vm_uuid == vm_uuid:
                used = any(image.overlay in chain for image in protection.images)
                yield _remnant(RemnantKind.SNAPSHOT, vm_uuid, protection.snapshot, in_use=used, removable=False)

    def _unrecorded(self, domain: Domain) -> Iterator[Remnant]:
        contents = self.ledger.contents
        recorded = {p.snapshot for p in contents.protections if p.vm_uuid == domain.uuid}
        for snapshot in domain.snapshots:
            if snapshot.ours and snapshot.name not in recorded:
                kind = RemnantKind.SNAPSHOT
                yield _remnant(kind, domain.uuid, snapshot.name, recorded=False, in_use=True, removable=False)
        bitmaps = {
            name for disk in domain.disks for image in disk.chain for name in image.bitmaps if is_our_bitmap(name)
        }
        tracked = any(t.vm_uuid == domain.uuid for t in contents.trackings)
        for name in sorted(bitmaps):
            yield _remnant(RemnantKind.BITMAP, domain.uuid, name, recorded=tracked)

    def _files(self, domain: Domain) -> Iterator[Remnant]:
        """Files whose names say that they were made for this very VM. `scratch`: nothing but what a view needs as long
        as its job runs; an overlay may hold what a guest wrote, so one that no record explains is a person's to look
        at."""
        contents = self.ledger.contents
        overlays = {record.overlay for record in contents.overlays}
        chain = _chain(domain)
        viewed = any(view.vm_uuid == domain.uuid for view in contents.views)
        for path in self._beside(domain):
            if _is_scratch(path, domain.uuid):
                busy = viewed or domain.job is not None
                kind = RemnantKind.SCRATCH
                yield _remnant(kind, domain.uuid, str(path), recorded=viewed, in_use=busy, removable=not busy)
            elif f"{TRACK_MARK}{domain.uuid}-" in path.name and path not in overlays:
                kind, used = RemnantKind.OVERLAY, path in chain
                yield _remnant(kind, domain.uuid, str(path), recorded=False, in_use=used, removable=False)

    def _beside(self, domain: Domain) -> Iterator[Path]:
        folders = {image.path.parent for disk in domain.disks for image in disk.chain} | {self.scratch_dir}
        for folder in sorted(folders):
            try:
                found = sorted(folder.iterdir())
            except OSError:
                continue
            yield from (path for path in found if "failback-" in path.name and domain.uuid in path.name)

    def remove_files(self, vm_uuid: str) -> tuple[str, ...]:
        """Remove scratch files that no view uses; their names. A VM that is gone has none that could be told."""
        try:
            domain = self.hypervisor.inspect(vm_uuid)
        except NoSuchDomain:
            return ()
        gone: list[str] = []
        for remnant in self._files(domain):
            if remnant.removable:
                Path(remnant.name).unlink(missing_ok=True)
                gone.append(remnant.name)
        return tuple(gone)

    def sockets(self) -> tuple[Remnant, ...]:
        """Sockets of disk servers whose agent is gone. They name no VM."""
        ours = f"nbd-{os.getpid()}-"
        try:
            found = sorted(self.runtime_dir.iterdir())
        except OSError:
            return ()
        return tuple(
            _remnant(RemnantKind.SOCKET, "", str(path), recorded=False)
            for path in found
            if path.name.startswith("nbd-") and not path.name.startswith(ours)
        )

    def remove_sockets(self) -> tuple[str, ...]:
        """Remove them: the runtime folder is this agent's alone. Their names."""
        found = self.sockets()
        for remnant in found:
            Path(remnant.name).unlink(missing_ok=True)
        return tuple(remnant.name for remnant in found)


def vms_of(contents: Contents) -> set[str]:
    """Every VM that the ledger speaks of."""
    return {
        *(fence.vm_uuid for fence in contents.fences),
        *(condition.vm_uuid for condition in contents.conditions),
        *(protection.vm_uuid for protection in contents.protections),
        *(view.vm_uuid for view in contents.views),
        *(overlay.vm_uuid for overlay in contents.overlays),
        *(thaw.vm_uuid for thaw in contents.thaws),
        *(tracking.vm_uuid for tracking in contents.trackings),
    }


def told_of(finder: RemnantFinder, vm_uuid: str) -> tuple[tuple[Remnant, ...], str]:
    """What is left of that VM; a sentence where it cannot be found out."""
    try:
        return finder.of(vm_uuid), ""
    except AgentError as error:
        return (), error.sentence


def _chain(domain: Domain | None) -> set[Path]:
    return {image.path for disk in (domain.disks if domain else ()) for image in disk.chain}


def _is_scratch(path: Path, uuid: str) -> bool:
    return path.name.startswith(f"failback-{uuid}-") and path.suffix == ".scratch"


def _remnant(
    kind: RemnantKind,
    vm_uuid: str,
    name: str,
    *,
    recorded: bool = True,
    in_use: bool = False,
    removable: bool = True,
) -> Remnant:
    return Remnant(kind=kind, vm_uuid=vm_uuid, name=name, recorded=recorded, in_use=in_use, removable=removable)
