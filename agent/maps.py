"""The digest maps of this host's originals: one file for each disk, and what makes it worth believing.

What a map knows counts only if nobody can have written to the image since it was put away: the lock under which it was
put away has been held ever since, or the image's file is, to the nanosecond, the one that was left.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import structlog

from agent.disk.lock import HeldImage
from agent.disk.stamp import Stamp, stamp_of
from agent.errors import SyncError
from agent.fences import FenceKeeper
from agent.sync.map_file import Header, MapFile, NoMap, map_bytes, remove_map
from agent.sync.pass_map import PassMap
from protocol.messages import GrantedDisk

log = structlog.get_logger("failback.agent")

FOLDER = "maps"
SPARE_BYTES = 64 << 20
"""Room that a map leaves in the state folder: the ledger lives there as well."""


@dataclass(frozen=True, slots=True)
class MapEvidence:
    """What is known of a disk without reading it.

    Attributes:
        seed: to be used for the digests of the next pass.
        known_bytes: how much of the disk is known.
        why_not: a sentence, where nothing is.
    """

    seed: int
    known_bytes: int
    why_not: str


@dataclass
class MapDesk:
    """All maps of this host. Its methods block and may be called from several threads; one pass of a VM at a time."""

    state_dir: Path
    fences: FenceKeeper
    _locks: dict[Path, HeldImage] = field(default_factory=dict)
    """The lock under which each map was put away, by the map's path."""

    def path_of(self, vm_uuid: str, target: str) -> Path:
        """The file of that disk's map."""
        return self.state_dir / FOLDER / f"{quote(vm_uuid, safe='')}-{quote(target, safe='')}.map"

    def told(self, vm_uuid: str, target: str) -> MapEvidence:
        """What the map of that disk is worth now. Changes nothing."""
        path = self.path_of(vm_uuid, target)
        seed = secrets.randbits(64)
        try:
            found = MapFile.open(path, writable=False)
            try:
                # A map that proves nothing any more keeps its seed: an audit against it may still be to come.
                seed = found.header.seed
                self._require_untouched(path, found.header, self._held(vm_uuid, target))
                known_bytes = found.known_bytes
            finally:
                found.close()
        except NoMap as why:
            return MapEvidence(seed, 0, f"{why.sentence}: the target is read beside the source")
        except OSError as error:
            return MapEvidence(seed, 0, f"the digest map {path} cannot be read ({error.strerror})")
        nothing = "the digest map of the disk knows nothing yet: the target is read beside the source"
        return MapEvidence(seed, known_bytes, "" if known_bytes else nothing)

    # --- passes that write ----------------------------------------------------------------------------------------

    def begin(self, vm_uuid: str, granted: GrantedDisk) -> tuple[PassMap | None, str]:
        """The map for a pass that makes that disk equal a view, or None and why, a sentence.

        What cannot be used is removed: after the pass it would be wrong. Never an error.
        """
        path, held = self.path_of(vm_uuid, granted.target), self._held(vm_uuid, granted.target)
        try:
            if granted.digest_seed is None or held is None:
                self._locks.pop(path, None)
                remove_map(path)
                return None, "the pass was granted without the seed of a digest map"
            file, why = self._reopened(path, granted, held)
            if file is None:
                log.info("a digest map is made anew", disk=granted.target, reason=why)
                file = self._created(path, granted, held)
        except NoMap as problem:
            return None, problem.sentence
        except OSError as error:
            # Left where it is it would be believed afterwards, as long as the same lock is held.
            self._locks.pop(path, None)
            return None, f"the digest map {path} cannot be written ({error.strerror}): look at its file system"
        self._locks.pop(path, None)
        return PassMap(file), ""

    def _reopened(self, path: Path, granted: GrantedDisk, held: HeldImage) -> tuple[MapFile | None, str]:
        try:
            file = MapFile.open(path, writable=True)
        except NoMap as why:
            return None, why.sentence
        try:
            header = file.header
            if (header.seed, header.size_bytes) != (granted.digest_seed, granted.source_size_bytes):
                raise NoMap("the digest map is of another seed or size")
            self._require_untouched(path, header, held)
        except NoMap as why:
            file.close()
            return None, why.sentence
        return file, ""

    def _created(self, path: Path, granted: GrantedDisk, held: HeldImage) -> MapFile:
        assert granted.digest_seed is not None
        remove_map(path)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        room = os.statvfs(path.parent)
        free_bytes, needed_bytes = room.f_bavail * room.f_frsize, map_bytes(granted.source_size_bytes) + SPARE_BYTES
        if free_bytes < needed_bytes:
            raise NoMap(
                f"a digest map of the disk {granted.target} may need {needed_bytes} bytes in {path.parent}, where "
                f"{free_bytes} are free: free some room there"
            )
        return MapFile.create(
            path,
            Header(seed=granted.digest_seed, size_bytes=granted.source_size_bytes, image=str(held.path)),
        )

    def end(self, vm_uuid: str, target: str, digest_map: PassMap, *, view: str | None) -> None:
        """The pass is over and the disk closed. `view`: what it equals now; None: the pass was not completed."""
        path, held = self.path_of(vm_uuid, target), self._held(vm_uuid, target)
        if held is None:
            digest_map.give_up("the lock of the image was lost before the map could be put away")
            return
        if digest_map.settle(view, stamp_of(held.fd)):
            self._locks[path] = held

    # --- passes that compare --------------------------------------------------------------------------------------

    def for_audit(self, vm_uuid: str, granted: GrantedDisk, view: str) -> PassMap:
        """The map as it stood when the disk was last made equal to that view, for looking up alone.

        Raises:
            SyncError: there is none, or it does not know the whole disk.
        """
        disk = granted.target
        try:
            file = MapFile.open(self.path_of(vm_uuid, disk), writable=False)
        except NoMap as why:
            raise SyncError(f"disk {disk} cannot be audited: {why.sentence}", disk=disk) from why
        header = file.header
        if (header.seed, header.size_bytes, header.view) != (granted.digest_seed, granted.source_size_bytes, view):
            problem = f"its digest map does not stand for the view {view} with that seed and size"
        elif file.known_bytes != header.size_bytes:
            problem = "its digest map does not know the whole disk"
        else:
            return PassMap(file)
        file.close()
        raise SyncError(f"disk {disk} cannot be audited: {problem}; verify both sides in full instead", disk=disk)

    # --- worth believing ------------------------------------------------------------------------------------------

    def _held(self, vm_uuid: str, target: str) -> HeldImage | None:
        """The lock that this process holds on the image that is that disk now; what the disk is now stands first."""
        fence = self.fences.fence_of(vm_uuid)
        image = next((i for i in (fence.images if fence else ()) if i.target == target), None)
        held = None if image is None else self.fences.held(image.path)
        return held if held is not None and held.exclusive and held.is_named() else None

    def _require_untouched(self, path: Path, header: Header, held: HeldImage | None) -> None:
        """Raises `NoMap` unless nobody can have written to the image since the map was put away."""
        if held is not None and str(held.path) != header.image:
            raise NoMap(f"the digest map is about the image {header.image}, and the disk is {held.path} now")
        under_lock = held is not None and self._locks.get(path) is held
        try:
            now = _stamp(header.image) if held is None else stamp_of(held.fd)
        except OSError as error:
            raise NoMap(f"the image {header.image} of the digest map cannot be found ({error.strerror})") from error
        if header.stamp is None:
            if under_lock:
                return
            raise NoMap(
                f"the lock of {header.image} has not been held since its digest map was put away, if it ever was, and "
                "nothing else tells whether the image was written to"
            )
        changed = ("kind",) if now is None else header.stamp.changed_to(now)
        if changed:
            raise NoMap(
                f"the file {header.image} was changed, or may have been, since its digest map was put away "
                f"({', '.join(changed)})"
            )


def _stamp(image: str) -> Stamp | None:
    descriptor = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return stamp_of(descriptor)
    finally:
        os.close(descriptor)
