"""`RawDisk`: a raw image file or a block device, read and written through the kernel."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.disk.fallocate import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    block_device_size_bytes,
    fallocate,
    logical_sector_bytes,
)
from agent.disk.gate import Gate, RunFailed, storage_error
from agent.disk.runs import Run, joined
from agent.disk.seam import Extent
from agent.disk.storage import Part, StorageFile
from agent.errors import DiskError

READERS = max(1, min(3, len(os.sched_getaffinity(0)) // 2))
"""Threads that read a file or device at once. What is cached is copied and hashed by a processor, so no more than half
of them: on two cores a second reader only takes the caches from the first (measured: 0.49 s against 0.53)."""

_ZEROES = memoryview(bytes(1024 * 1024))
_EXTENTS_AT_ONCE = 256  # asked of the file system in one go: asking is quicker than being let in and out for each
_ZERO_STEP_BYTES = 1024 * 1024 * 1024  # one fallocate call on a block device may take its time; not for terabytes
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)

# For a file, punching makes a hole. For a block device the kernel turns punching into "zero, unmapping where that
# still reads as zero" and fails with EOPNOTSUPP where the device cannot promise it; zeroing the range then writes
# zeroes where nothing better is to be had (block/fops.c, blkdev_fallocate). A discard, which promises nothing, is
# never asked for.
_ZERO_MODES = (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE)


class RawDisk:
    """A `Disk` over a file or block device; open it with `RawDisk.open`."""

    access = "file"
    """How the content is reached, for reports."""

    def __init__(self, gate: Gate, fd: int, *, sector_bytes: int | None, idle: bool) -> None:
        self._gate = gate
        self._fd = fd
        self._is_device = sector_bytes is not None
        self._sector_bytes = sector_bytes or 1
        self._zero_modes: tuple[int, ...] = _ZERO_MODES
        self._storage = StorageFile(fd, gate.size_bytes, self._sector_bytes, idle=idle)

    @classmethod
    def open(cls, name: str, path: Path, *, writable: bool, fd: int | None = None, idle: bool = False) -> RawDisk:
        """Open the file or block device at `path`.

        Args:
            name: what messages call the disk.
            path: of the image; only for messages when `fd` is given.
            writable: whether it will be written.
            fd: a descriptor that holds the image lock. The disk works through a duplicate of it, so the lock, which
                belongs to the open file description (fcntl_locking(2)), lives at least as long as we can write.
            idle: read under idle I/O priority (see `agent.disk.priority`).

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
            size_bytes, sector_bytes = measure(name, path, own_fd)
            gate = Gate(name, str(path), size_bytes, writable=writable)
            return cls(gate, own_fd, sector_bytes=sector_bytes, idle=idle)
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
        return self._storage.reads_past_cache

    @property
    def readers(self) -> int:
        return READERS

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading", offset_bytes, buffer.nbytes):
            self._storage.read(offset_bytes, buffer)

    def read_runs(self, runs: Sequence[Run], buffer: memoryview) -> None:
        with self._gate.batch("reading", runs, buffer.nbytes):
            self._storage.read_parts(_parts(runs, buffer))

    def write(self, offset_bytes: int, data: memoryview) -> None:
        with self._gate.request("writing", offset_bytes, data.nbytes, writes=True):
            self._write(offset_bytes, data)

    def write_runs(self, runs: Sequence[Run], data: memoryview) -> None:
        with self._gate.batch("writing", runs, data.nbytes, writes=True):
            done = 0
            for offset_bytes, length_bytes in joined(runs):
                try:
                    self._write(offset_bytes, data[done : done + length_bytes])
                except OSError as error:
                    raise RunFailed(error, offset_bytes, length_bytes) from error
                done += length_bytes

    def _write(self, offset_bytes: int, data: memoryview) -> None:
        self._storage.write(offset_bytes, data)
        if self._storage.books_full:
            self._flush()

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
            self._storage.sync()
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
            found: list[Extent] = []
            with self._gate.request("mapping", offset_bytes, end - offset_bytes):
                while offset_bytes < end and len(found) < _EXTENTS_AT_ONCE:
                    data = min(self._seek(offset_bytes, os.SEEK_DATA), end)
                    if data > offset_bytes:
                        found.append(Extent(offset_bytes, data - offset_bytes, zero=True))
                    offset_bytes = data
                    if data < end:
                        offset_bytes = min(self._seek(data, os.SEEK_HOLE), end)
                        found.append(Extent(data, offset_bytes - data, zero=False))
            yield from found

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
            if self._gate.writable and not self._storage.reads_past_cache:
                self._flush()  # pages that are still dirty cannot be dropped
            self._storage.read_past_cache(offset_bytes, buffer)

    def read_back_runs(self, runs: Sequence[Run], buffer: memoryview) -> None:
        with self._gate.batch("reading back", runs, buffer.nbytes):
            if self._gate.writable and not self._storage.reads_past_cache:
                self._flush()
            self._storage.read_parts_past_cache(_parts(runs, buffer))

    def close(self) -> None:
        if self._gate.close():
            self._storage.close()


def _parts(runs: Sequence[Run], buffer: memoryview) -> list[Part]:
    """The runs with their places in the buffer; what adjoins is one part."""
    parts, done = [], 0
    for offset_bytes, length_bytes in joined(runs):
        parts.append(Part(offset_bytes, buffer[done : done + length_bytes], offset_bytes))
        done += length_bytes
    return parts


def measure(name: str, path: Path, fd: int) -> tuple[int, int | None]:
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
