"""`RawDisk`: a raw image file or a block device, read and written through the kernel."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from agent.disk.direct import DirectReader
from agent.disk.fallocate import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    block_device_size_bytes,
    fallocate,
    logical_sector_bytes,
)
from agent.disk.gate import Gate, storage_error
from agent.disk.seam import Extent
from agent.errors import DiskError

_ZEROES = memoryview(bytes(1024 * 1024))
_ZERO_STEP_BYTES = 1024 * 1024 * 1024  # one fallocate call on a block device may take its time; not for terabytes
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)

# For a file, punching makes a hole. For a block device the kernel turns punching into "zero, unmapping where that
# still reads as zero" and fails with EOPNOTSUPP where the device cannot promise it; zeroing the range then writes
# zeroes where nothing better is to be had (block/fops.c, blkdev_fallocate). A discard, which promises nothing, is
# never asked for.
_ZERO_MODES = (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE)


class RawDisk:
    """A `Disk` over a file or block device; open it with `RawDisk.open`."""

    def __init__(self, gate: Gate, fd: int, *, sector_bytes: int | None) -> None:
        self._gate = gate
        self._fd = fd
        self._is_device = sector_bytes is not None
        self._sector_bytes = sector_bytes or 1
        self._zero_modes: tuple[int, ...] = _ZERO_MODES
        self._direct = DirectReader.of(fd, gate.size_bytes, self._sector_bytes)

    @classmethod
    def open(cls, name: str, path: Path, *, writable: bool, fd: int | None = None) -> RawDisk:
        """Open the file or block device at `path`.

        Args:
            name: what messages call the disk.
            path: of the image; only for messages when `fd` is given.
            writable: whether it will be written.
            fd: a descriptor that holds the image lock. The disk works through a duplicate of it, so the lock, which
                belongs to the open file description (fcntl_locking(2)), lives at least as long as we can write.

        Raises:
            DiskError: it cannot be opened, or is neither a file nor a block device.
        """
        try:
            if fd is None:
                own_fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
            else:
                own_fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        except OSError as error:
            raise storage_error(name, str(path), "opening", error.errno or 0) from error
        try:
            if writable and fcntl.fcntl(own_fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
                raise storage_error(name, str(path), "opening for writing", errno.EBADF)
            size_bytes, sector_bytes = _measure(name, path, own_fd)
            return cls(Gate(name, str(path), size_bytes, writable=writable), own_fd, sector_bytes=sector_bytes)
        except OSError as error:
            os.close(own_fd)
            raise storage_error(name, str(path), "opening", error.errno or 0) from error
        except DiskError:
            os.close(own_fd)
            raise

    @property
    def name(self) -> str:
        return self._gate.name

    @property
    def size_bytes(self) -> int:
        return self._gate.size_bytes

    @property
    def reads_back_past_cache(self) -> bool:
        return self._direct is not None

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading", offset_bytes, buffer.nbytes):
            self._read(offset_bytes, buffer)

    def _read(self, offset_bytes: int, buffer: memoryview) -> None:
        done = 0
        while done < buffer.nbytes:
            got = os.preadv(self._fd, [buffer[done:]], offset_bytes + done)
            if got == 0:
                raise OSError(0, f"the storage ends before byte {offset_bytes + done}: it was made smaller meanwhile")
            done += got

    def write(self, offset_bytes: int, data: memoryview) -> None:
        with self._gate.request("writing", offset_bytes, data.nbytes, writes=True):
            self._write(offset_bytes, data)

    def _write(self, offset_bytes: int, data: memoryview) -> None:
        done = 0
        while done < data.nbytes:
            done += os.pwritev(self._fd, [data[done:]], offset_bytes + done)

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        with self._gate.request("zeroing", offset_bytes, length_bytes, writes=True):
            # A device zeroes whole sectors; what is left on either side is written.
            first = -(-offset_bytes // self._sector_bytes) * self._sector_bytes
            end = (offset_bytes + length_bytes) // self._sector_bytes * self._sector_bytes
            if first >= end:
                self._write_zero_bytes(offset_bytes, length_bytes)
                return
            self._write_zero_bytes(offset_bytes, first - offset_bytes)
            for start in range(first, end, _ZERO_STEP_BYTES):
                self._release(start, min(_ZERO_STEP_BYTES, end - start))
            self._write_zero_bytes(end, offset_bytes + length_bytes - end)

    def _release(self, offset_bytes: int, length_bytes: int) -> None:
        """Zero whole sectors by the best means the storage has, forgetting means that it turns out not to have."""
        for mode in self._zero_modes:
            try:
                fallocate(self._fd, mode, offset_bytes, length_bytes)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self._zero_modes = tuple(other for other in self._zero_modes if other != mode)
            else:
                return
        self._write_zero_bytes(offset_bytes, length_bytes)

    def _write_zero_bytes(self, offset_bytes: int, length_bytes: int) -> None:
        for start in range(0, length_bytes, len(_ZEROES)):
            self._write(offset_bytes + start, _ZEROES[: length_bytes - start])

    def flush(self) -> None:
        with self._gate.request("flushing", 0, 0, writes=self._gate.writable):
            self._flush()

    def _flush(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._gate.poison(f"an earlier flush failed ({os.strerror(error.errno or 0)})")
            raise

    def extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
        self._gate.check("mapping", offset_bytes, length_bytes)
        if self._is_device:
            return iter([Extent(offset_bytes, length_bytes, zero=False)] if length_bytes else [])
        return self._seek_extents(offset_bytes, offset_bytes + length_bytes)

    def _seek_extents(self, offset_bytes: int, end: int) -> Iterator[Extent]:
        """Walk data and holes; lseek(2): a hole reads as zero. Only lseek's answers are used, never the position it
        leaves behind, which is shared with every duplicate of the descriptor."""
        while offset_bytes < end:
            with self._gate.request("mapping", offset_bytes, end - offset_bytes):
                data = self._seek(offset_bytes, os.SEEK_DATA)
            if data > offset_bytes:
                yield Extent(offset_bytes, min(data, end) - offset_bytes, zero=True)
            if data >= end:
                return
            with self._gate.request("mapping", data, end - data):
                hole = self._seek(data, os.SEEK_HOLE)
            yield Extent(data, min(hole, end) - data, zero=False)
            offset_bytes = hole

    def _seek(self, offset_bytes: int, whence: int) -> int:
        try:
            return os.lseek(self._fd, offset_bytes, whence)
        except OSError as error:
            # "No data from here on"; or the file was truncated, and then reading is what must fail, not be skipped.
            if error.errno != errno.ENXIO or os.fstat(self._fd).st_size < self.size_bytes:
                raise
            return self.size_bytes

    def read_back(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading back", offset_bytes, buffer.nbytes):
            if self._direct is not None:
                self._direct.read_into(offset_bytes, buffer)
                return
            if self._gate.writable:
                self._flush()  # pages that are still dirty cannot be dropped
            first = offset_bytes - offset_bytes % mmap.PAGESIZE  # pages that are covered in part only would stay
            length_bytes = offset_bytes + buffer.nbytes - first + mmap.PAGESIZE
            os.posix_fadvise(self._fd, first, length_bytes, os.POSIX_FADV_DONTNEED)
            self._read(offset_bytes, buffer)

    def close(self) -> None:
        if self._gate.close():
            if self._direct is not None:
                self._direct.close()
            os.close(self._fd)


def _measure(name: str, path: Path, fd: int) -> tuple[int, int | None]:
    """Size in bytes, and the logical sector in bytes of a block device or None for a file."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return status.st_size, None
    if stat.S_ISBLK(status.st_mode):
        return block_device_size_bytes(fd), logical_sector_bytes(fd)
    raise DiskError(
        f"Disk {name}: {path} is neither a file nor a block device; point the disk at its image.",
        disk=name,
    )
