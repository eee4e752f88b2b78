"""QEMU's image locks, held by us.

QEMU keeps open-file-description locks on two rows of bytes of every image it opens (block/file-posix.c): a read lock
on byte ``100 + p`` says "I use permission *p*", one on ``200 + p`` says "I do not share permission *p*" (0 consistent
read, 1 write, 2 write unchanged, 3 resize). Then it looks whether another process's locks contradict its own.

The locks are advisory, they bind QEMU and its tools, and they belong to the open file description: duplicates and
inherited descriptors keep them alive, the last close ends them (fcntl_locking(2), "Open file description locks").
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from agent.disk.gate import storage_error
from agent.errors import DiskBusy

_FIRST_BYTE = 100
_BYTE_COUNT = 104  # bytes 100 to 203: both rows, and nothing of QEMU's outside

_USES_READ, _USES_WRITE, _USES_RESIZE = 100, 101, 103
_KEEPS_READ, _KEEPS_WRITE, _KEEPS_RESIZE = 200, 201, 203

_FLOCK = "@hhqqi0q"  # struct flock: type, whence, start, length, pid; padded at its end like the C structure


@dataclass(slots=True)
class HeldImage:
    """An image lock, held until `close` (and as long as a descriptor duplicated or inherited from `fd` is open).

    Attributes:
        path: the image, as it was named when it was locked.
        fd: the descriptor whose open file description owns the lock; open for writing if `exclusive`.
        exclusive: nobody else may open the image; otherwise it is frozen: readable by all, writable by nobody.
    """

    path: Path
    fd: int
    exclusive: bool
    _open: bool = field(default=True, repr=False)

    def is_named(self) -> bool:
        """Whether `path` still leads to the file or device that is locked, and not to another one in its place."""
        try:
            return self._open and _same(self.path.stat(), os.fstat(self.fd))
        except OSError:
            return False

    def close(self) -> None:
        """Let go of the lock; harmless when repeated."""
        if self._open:
            self._open = False
            os.close(self.fd)


def hold_exclusive(path: Path) -> HeldImage:
    """Lock an image so that no QEMU process can open it, not even for reading, and open it for writing.

    A block device is claimed as well (O_EXCL), so that one that is mounted on this host is refused.

    Raises:
        DiskBusy: another process holds a lock on it, or this host uses the device.
        DiskError: it cannot be opened.
    """
    fd = _open_image(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        _set_lock(fd, fcntl.F_WRLCK, _FIRST_BYTE, _BYTE_COUNT)
    except OSError as error:
        os.close(fd)
        raise _lock_error(path, error) from error
    return HeldImage(path, fd, exclusive=True)


def hold_frozen(path: Path) -> HeldImage:
    """Lock an image so that everybody may read it and every writer is refused.

    Raises:
        DiskBusy: another process has it open for writing, or refuses to share it.
        DiskError: it cannot be opened.
    """
    fd = _open_image(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # First claim, then look, as QEMU does: of two that come at once, at least one sees the other.
        for byte in (_USES_READ, _KEEPS_WRITE, _KEEPS_RESIZE):
            _set_lock(fd, fcntl.F_RDLCK, byte, 1)
        contradicted = any(_locked_by_another(fd, byte) for byte in (_USES_WRITE, _USES_RESIZE, _KEEPS_READ))
    except OSError as error:
        os.close(fd)
        raise _lock_error(path, error) from error
    if contradicted:
        os.close(fd)
        raise _busy(path)
    return HeldImage(path, fd, exclusive=False)


def image_in_use(path: Path, ours: Iterable[HeldImage] = ()) -> bool:
    """Whether another process holds the image for writing.

    Args:
        path: a raw or qcow2 file, or a block device.
        ours: locks that do not count. They are told apart by the file they hold, whatever path they were taken by.

    Raises:
        DiskError: the image cannot be opened.
    """
    with _Looking(path) as looking:
        own = next((held for held in ours if _same_file(held.fd, looking.fd)), None)
        # An open file description never conflicts with itself: asked through our own lock, only others answer.
        fd = looking.fd if own is None else own.fd
        try:
            return _locked_by_another(fd, _USES_WRITE) or _locked_by_another(fd, _USES_RESIZE)
        except OSError as error:
            raise storage_error(path.name, str(path), "asking for its image lock", error.errno or 0) from error


class _Looking:
    """A descriptor for the time of a question."""

    def __init__(self, path: Path) -> None:
        self.fd = _open_image(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> _Looking:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def _open_image(path: Path, flags: int) -> int:
    try:
        if flags & os.O_RDWR and stat.S_ISBLK(path.stat().st_mode):
            flags |= os.O_EXCL
        return os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DiskBusy(
                f"Image {path} is in use by this host itself (mounted, or part of a volume group, RAID or "
                "multipath device); unmount or deactivate it here first.",
                path=str(path),
            ) from error
        raise storage_error(path.name, str(path), "opening the image", error.errno or 0) from error


def _set_lock(fd: int, kind: int, start: int, length: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0))


def _locked_by_another(fd: int, byte: int) -> bool:
    """Whether a lock of any kind on `byte` belongs to another open file description than that of `fd`."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return bool(answer[0] != fcntl.F_UNLCK)


def _same_file(fd: int, other_fd: int) -> bool:
    return _same(os.fstat(fd), os.fstat(other_fd))


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return os.path.samestat(one, other)


def _lock_error(path: Path, error: OSError) -> Exception:
    if error.errno in (errno.EAGAIN, errno.EACCES):
        return _busy(path)
    return storage_error(path.name, str(path), "taking its image lock", error.errno or 0)


def _busy(path: Path) -> DiskBusy:
    holders = _processes_with_open(path)
    who = f"by {', '.join(holders)}" if holders else "by another process"
    return DiskBusy(
        f"Image {path} is in use {who}; power that VM off or let that job end, then try again.",
        path=str(path),
        holders=", ".join(holders),
    )


def _processes_with_open(path: Path) -> list[str]:
    """Other processes that have the image open, as ``name (pid)``: locks do not say whose they are, /proc does."""
    found = []
    try:
        wanted = path.stat()
    except OSError:
        return []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            if any(_is_file(link, wanted) for link in (process / "fd").iterdir()):
                found.append(f"{(process / 'comm').read_text().strip()} ({process.name})")
        except OSError:
            continue  # it ended meanwhile, or belongs to another user
    return found


def _is_file(link: Path, wanted: os.stat_result) -> bool:
    try:
        status = link.stat()
    except OSError:
        return False
    if stat.S_ISBLK(wanted.st_mode):
        return stat.S_ISBLK(status.st_mode) and status.st_rdev == wanted.st_rdev
    return os.path.samestat(status, wanted)
