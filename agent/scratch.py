"""The scratch watch: a live view is given up before its scratch files fill their file system.

What the guest overwrites while a view is open, QEMU copies to a scratch file first. When that fails for want of room,
QEMU makes the guest's own write fail, and libvirt's usual policy pauses the guest. So somebody looks all the time, and
ends the backup job while there is room left for what the guest can write until the job is gone.

The numbers: a look costs two system calls (some µs), so `LOOK_EVERY_S` can be short; ending a job takes 10 to 20 ms
(measured, libvirt 9.0, QEMU 7.2). Until then the guest has at most 45 ms, in which 64 MiB, the room that is kept at
least, last for 1.4 GB/s of first writes to blocks; and a rate that was seen counts for `LOOKS_OF_ROOM` looks of it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from agent.errors import AgentError, SyncError

log = structlog.get_logger("failback.agent")

LOOK_EVERY_S = 0.025
LOOKS_OF_ROOM = 4
"""What was written from one look to the next, at its highest so far, must fit in so many times: the job takes about
one look to end, the guest may speed up, and looks may come late."""
STALL_EVERY_LOOKS = 10
"""Whether the guest is paused all the same costs a call to libvirt, so it is asked less often."""


class ScratchFull(SyncError):
    """A view of a running VM was given up before its scratch files would have filled their file system."""

    code = "scratch-full"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchLimits:
    """When a view is given up.

    Attributes:
        used_percent: so much of what was free when it was opened is used.
        reserve_bytes: less than this is free.
    """

    used_percent: int = 85
    reserve_bytes: int = 64 * 1024 * 1024


@dataclass
class Room:
    """The room of one file system while a view's scratch files grow on it; a value with a memory, no I/O.

    Attributes:
        at_opening_bytes: what was free when the view was opened.
        free_bytes: what is free now.
        steepest_bytes: the most that was used from one look to the next.
    """

    limits: ScratchLimits
    at_opening_bytes: int
    free_bytes: int = field(init=False)
    steepest_bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.free_bytes = self.at_opening_bytes

    @property
    def kept_bytes(self) -> int:
        """So much must stay free."""
        share = self.at_opening_bytes * (100 - self.limits.used_percent) // 100
        return max(share, self.limits.reserve_bytes, LOOKS_OF_ROOM * self.steepest_bytes)

    def is_short(self, free_bytes: int) -> bool:
        """Look: `free_bytes` are free now. Whether the view must be given up."""
        self.steepest_bytes = max(self.steepest_bytes, self.free_bytes - free_bytes)
        self.free_bytes = free_bytes
        return free_bytes < self.kept_bytes


@dataclass
class Watched:
    """What is watched of one VM."""

    view: str
    worst_case_bytes: int
    rooms: dict[Path, Room]
    looks: int = 0
    reason: ScratchFull | None = None


class ScratchWatch:
    """Watches the live views of this host, in a thread of its own that lives while there is one.

    Args:
        limits: when a view is given up.
        give_up: ends the view of a VM's UUID; blocks until the job is gone.
        has_stalled: whether the VM is paused by an I/O error.
    """

    def __init__(
        self, limits: ScratchLimits, give_up: Callable[[str, str], None], has_stalled: Callable[[str], bool]
    ) -> None:
        self._limits = limits
        self._give_up = give_up
        self._has_stalled = has_stalled
        self._watched: dict[str, Watched] = {}
        self._turn = threading.RLock()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, vm_uuid: str, view: str, scratch: Iterable[Path], worst_case_bytes: int) -> None:
        """Watch the scratch files of a view just opened. `worst_case_bytes`: what they take at most.

        Raises:
            ScratchFull: there is too little room from the start; the caller closes the view.
        """
        folders = {_file_system(path.parent): path.parent for path in scratch}
        rooms = {folder: Room(self._limits, free_bytes(folder)) for folder in folders.values()}
        watched = Watched(view, worst_case_bytes, rooms)
        for folder, room in rooms.items():
            if room.is_short(room.free_bytes):
                raise _full(vm_uuid, watched, folder, room)
        with self._turn:
            self._watched[vm_uuid] = watched
            self._changed.clear()
            if self._thread is None and rooms:
                self._thread = threading.Thread(target=self._run, name="scratch-watch", daemon=True)
                self._thread.start()

    def end(self, vm_uuid: str) -> None:
        """Watch that VM no longer; when this returns, nothing of the watch touches it any more."""
        with self._turn:
            self._watched.pop(vm_uuid, None)
            if not self._watched:
                self._changed.set()

    def reason(self, vm_uuid: str, view: str) -> ScratchFull | None:
        """Why that view was given up; None when it was not."""
        watched = self._watched.get(vm_uuid)
        return watched.reason if watched is not None and watched.view == view else None

    def look(self) -> None:
        """Look once at every view."""
        with self._turn:
            for vm_uuid, watched in self._watched.items():
                if watched.reason is None:
                    watched.reason = self._look_at(vm_uuid, watched)
                    if watched.reason is not None:
                        self._end_view(vm_uuid, watched)

    def _look_at(self, vm_uuid: str, watched: Watched) -> ScratchFull | None:
        watched.looks += 1
        for folder, room in watched.rooms.items():
            if room.is_short(free_bytes(folder)):
                return _full(vm_uuid, watched, folder, room)
        if watched.looks % STALL_EVERY_LOOKS:
            return None
        try:
            stalled = self._has_stalled(vm_uuid)
        except AgentError:
            return None  # libvirt is away: it is asked again
        return _stalled(vm_uuid, watched) if stalled else None

    def _end_view(self, vm_uuid: str, watched: Watched) -> None:
        assert watched.reason is not None
        log.warning("a view is given up", vm=vm_uuid, view=watched.view, reason=watched.reason.sentence)
        try:
            self._give_up(vm_uuid, watched.view)
        except AgentError as error:
            log.error("the view could not be given up and is tried again", vm=vm_uuid, reason=error.sentence)
            watched.reason = None

    def _run(self) -> None:
        while True:
            with self._turn:
                if not self._watched:
                    self._thread = None
                    self._changed.clear()
                    return
            try:
                self.look()
            except OSError as error:
                log.error("the room of a scratch file cannot be asked for", reason=str(error))
            self._changed.wait(LOOK_EVERY_S)


def free_bytes(folder: Path) -> int:
    """Room in the file system of `folder`."""
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def _file_system(folder: Path) -> int:
    return folder.stat().st_dev


def _full(vm_uuid: str, watched: Watched, folder: Path, room: Room) -> ScratchFull:
    return ScratchFull(
        f"the view {watched.view} was given up lest its scratch files fill {folder}: {room.free_bytes} bytes are free "
        f"there, {room.kept_bytes} must stay free for what the guest may still write (the scratch files can take "
        f"{watched.worst_case_bytes} bytes in all); free some room there, or let the pass run while the guest writes "
        "less",
        vm=vm_uuid,
        folder=str(folder),
        free_bytes=room.free_bytes,
        needed_bytes=watched.worst_case_bytes + room.kept_bytes,
    )


def _stalled(vm_uuid: str, watched: Watched) -> ScratchFull:
    return ScratchFull(
        f"the view {watched.view} was given up because the guest was paused by an I/O error while it was open, "
        "and goes on now: look for a quota or thin pool under "
        f"{', '.join(str(folder) for folder in watched.rooms)} and at the "
        "disks of the VM",
        vm=vm_uuid,
        needed_bytes=watched.worst_case_bytes,
    )
