"""The room of live overlays: merged before they fill their file system, for then QEMU would pause the guest.

Unlike a scratch file an overlay lives from the first view to the end of the run, and letting go of it takes room
itself: merged into a sparse base, it may allocate there as much as it holds. So less than half of what was free at the
beginning is given to overlays: the rest takes the merge, and what the guest writes while it lasts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from agent.overlays import OverlayTracking
from agent.scratch import Room, ScratchFull, ScratchLimits, ScratchWatch, Watched, free_bytes
from agent.virt.seam import SourceKind

OVERLAYS = "overlays"
USED_PERCENT = 45


class OverlayWatch(ScratchWatch):
    """Watches the overlays of this host's VMs, view or no view.

    Args:
        limits: as those of scratch files; of what was free overlays may use 45 percent at most.
        give_up: merges the overlays of a VM's UUID; blocks until they are gone.
        has_stalled: whether the VM is paused by an I/O error.
        is_off: whether the VM is off, so that nothing grows.
    """

    def __init__(
        self,
        limits: ScratchLimits,
        give_up: Callable[[str, str], None],
        has_stalled: Callable[[str], bool],
        is_off: Callable[[str], bool],
    ) -> None:
        used_percent = min(limits.used_percent, USED_PERCENT)
        super().__init__(replace(limits, used_percent=used_percent), give_up, has_stalled)
        self._is_off = is_off

    def short(self, folders: Iterable[Path]) -> str | None:
        """Why overlays should not be begun there: a sentence, or None."""
        for folder in folders:
            free = free_bytes(folder)
            room = Room(self._limits, free)
            if room.is_short(free):
                return f"no room for an overlay in {folder}: {free} bytes are free, {room.kept_bytes} must stay free"
        return None

    def watch(self, vm_uuid: str, overlays: Iterable[Path]) -> None:
        """Watch the overlays of that VM; what is free now is what they share. Nothing where it is watched already."""
        with self._turn:
            watched = self._watched.get(vm_uuid)
            if watched is not None and watched.reason is None:
                return
            folders = {path.parent for path in overlays if path.parent.is_dir()}
            rooms = {folder: Room(self._limits, free_bytes(folder)) for folder in folders}
            self._watched[vm_uuid] = Watched(OVERLAYS, 0, rooms)
            self._changed.clear()
            if self._thread is None and rooms:
                self._thread = threading.Thread(target=self._run, name="overlay-watch", daemon=True)
                self._thread.start()

    def why(self, vm_uuid: str) -> ScratchFull | None:
        """Why the overlays of that VM were merged too early; None when they were not."""
        return self.reason(vm_uuid, OVERLAYS)

    def _look_at(self, vm_uuid: str, watched: Watched) -> ScratchFull | None:
        full = super()._look_at(vm_uuid, watched)
        if full is None or self._is_off(vm_uuid):
            return None
        rooms = ", ".join(
            f"{folder}: {room.free_bytes} bytes free, {room.kept_bytes} must stay free for merging"
            for folder, room in watched.rooms.items()
        )
        return ScratchFull(
            "the overlays that record what the guest writes were merged lest they fill their file system "
            f"({rooms}); free some room there; the next view is compared whole",
            vm=vm_uuid,
            needed_bytes=max(room.kept_bytes for room in watched.rooms.values()),
        )


def raw_disks(
    tracking: OverlayTracking,
    room: OverlayWatch,
    vm_uuid: str,
    targets: Sequence[str],
    tell: Callable[[str, str], None],
) -> tuple[str, ...]:
    """Which of these disks of the running VM get an overlay; none while there is too little room for one.

    `tell`: is told, by target, why a disk gets none, or why the overlay it had is gone.
    """
    domain = tracking.hypervisor.inspect(vm_uuid)
    raw = tuple(target for target in targets if tracking.takes(domain, target))
    early = room.why(vm_uuid)
    folders = {d.chain[0].path.parent for d in domain.disks if d.target in raw and d.kind is SourceKind.FILE}
    short = room.short(folders)
    for target in raw:
        for reason in (None if early is None else early.sentence, short):
            if reason is not None:
                tell(target, reason)
    return raw if short is None else ()
