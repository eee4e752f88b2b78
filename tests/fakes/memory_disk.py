"""`MemoryDisk`: a disk of the tests, in memory, that passes the same conformance suite as the real ones.

The storage outlives the disks opened over it, as a file does. It can be made to fail, to be too small for what is
written to it, and to rot where only a read past the cache sees it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from agent.disk.gate import Gate, RunFailed
from agent.disk.seam import Extent

CLUSTER_BYTES = 4096


class MemoryStorage:
    """Bytes that any number of `MemoryDisk` may be opened over.

    Args:
        size_bytes: need not be a multiple of anything.
        capacity_bytes: how much can be allocated; writing more fails with ENOSPC. None: the whole size.
    """

    def __init__(self, size_bytes: int, *, capacity_bytes: int | None = None) -> None:
        self.size_bytes = size_bytes
        self.content = bytearray(size_bytes)
        self.capacity_bytes = size_bytes + CLUSTER_BYTES if capacity_bytes is None else capacity_bytes
        self.allocated = np.zeros(-(-size_bytes // CLUSTER_BYTES), dtype=bool)
        self.lock = threading.Lock()
        self.rotten: dict[int, int] = {}
        self._failures: dict[str, list[int]] = {}

    def fail_next(self, doing: str, number: int = errno.EIO) -> None:
        """Let the next request of that kind (``reading``, ``writing``, ``zeroing``, ``flushing``, ``mapping``,
        ``reading back``) fail with that error number; repeated calls queue up."""
        self._failures.setdefault(doing, []).append(number)

    def rot(self, offset_bytes: int, flipped_bits: int = 1) -> None:
        """Flip bits at rest: reads through the cache do not see it, reading back does, until it is written anew."""
        self.rotten[offset_bytes] = flipped_bits

    def trip(self, doing: str) -> None:
        """Raise the failure that is queued for this kind of request, if any."""
        queued = self._failures.get(doing)
        if queued:
            number = queued.pop(0)
            raise OSError(number, os.strerror(number))

    def allocate(self, offset_bytes: int, length_bytes: int) -> None:
        """Give the run storage, or raise ENOSPC."""
        clusters = slice(offset_bytes // CLUSTER_BYTES, -(-(offset_bytes + length_bytes) // CLUSTER_BYTES))
        missing = int((~self.allocated[clusters]).sum())
        if (int(self.allocated.sum()) + missing) * CLUSTER_BYTES > self.capacity_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.allocated[clusters] = True

    def forget_rot(self, offset_bytes: int, length_bytes: int) -> None:
        """What is written anew does not rot any more."""
        for rotten in [at for at in self.rotten if offset_bytes <= at < offset_bytes + length_bytes]:
            del self.rotten[rotten]


class MemoryDisk:
    """A `Disk` over a `MemoryStorage`."""

    access = "memory"

    def __init__(self, name: str, storage: MemoryStorage, *, writable: bool = True) -> None:
        self.storage = storage
        self._gate = Gate(name, "memory", storage.size_bytes, writable=writable)

    @property
    def name(self) -> str:
        return self._gate.name

    @property
    def size_bytes(self) -> int:
        return self._gate.size_bytes

    @property
    def reads_back_past_cache(self) -> bool:
        return True

    @property
    def readers(self) -> int:
        return 2

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading", offset_bytes, buffer.nbytes), self.storage.lock:
            self._read(offset_bytes, buffer)

    def _read(self, offset_bytes: int, buffer: memoryview) -> None:
        self.storage.trip("reading")
        buffer[:] = self.storage.content[offset_bytes : offset_bytes + buffer.nbytes]

    def write(self, offset_bytes: int, data: memoryview) -> None:
        with self._gate.request("writing", offset_bytes, data.nbytes, writes=True), self.storage.lock:
            self._write(offset_bytes, data)

    def _write(self, offset_bytes: int, data: memoryview) -> None:
        self.storage.trip("writing")
        self.storage.allocate(offset_bytes, data.nbytes)
        self.storage.content[offset_bytes : offset_bytes + data.nbytes] = data
        self.storage.forget_rot(offset_bytes, data.nbytes)

    def read_runs(self, runs: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        with self._gate.batch("reading", runs, buffer.nbytes), self.storage.lock:
            self._each(runs, buffer, self._read)

    def write_runs(self, runs: Sequence[tuple[int, int]], data: memoryview) -> None:
        with self._gate.batch("writing", runs, data.nbytes, writes=True), self.storage.lock:
            self._each(runs, data, self._write)

    @staticmethod
    def _each(runs: Sequence[tuple[int, int]], data: memoryview, move: Callable[[int, memoryview], None]) -> None:
        done = 0
        for offset_bytes, length_bytes in runs:
            try:
                move(offset_bytes, data[done : done + length_bytes])
            except OSError as error:
                raise RunFailed(error, offset_bytes, length_bytes) from error
            done += length_bytes

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        with self._gate.request("zeroing", offset_bytes, length_bytes, writes=True), self.storage.lock:
            self.storage.trip("zeroing")
            end = offset_bytes + length_bytes
            self.storage.content[offset_bytes:end] = bytes(length_bytes)
            self.storage.forget_rot(offset_bytes, length_bytes)
            last = len(self.storage.allocated) if end == self.size_bytes else end // CLUSTER_BYTES
            self.storage.allocated[-(-offset_bytes // CLUSTER_BYTES) : last] = False

    def flush(self) -> None:
        with self._gate.request("flushing", 0, 0, writes=self._gate.writable):
            try:
                self.storage.trip("flushing")
            except OSError:
                self._gate.poison("an earlier flush failed")
                raise

    def extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
        self._gate.check("mapping", offset_bytes, length_bytes)
        return self._extents(offset_bytes, offset_bytes + length_bytes)

    def _extents(self, offset_bytes: int, end: int) -> Iterator[Extent]:
        while offset_bytes < end:
            with self._gate.request("mapping", offset_bytes, end - offset_bytes), self.storage.lock:
                self.storage.trip("mapping")
                cluster = offset_bytes // CLUSTER_BYTES
                data = bool(self.storage.allocated[cluster])
                others = np.flatnonzero(self.storage.allocated[cluster:] != data)
            stop = min(end, (cluster + int(others[0])) * CLUSTER_BYTES if len(others) else end)
            yield Extent(offset_bytes, stop - offset_bytes, zero=not data)
            offset_bytes = stop

    def read_back(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading back", offset_bytes, buffer.nbytes), self.storage.lock:
            self._read_back(offset_bytes, buffer)

    def read_back_runs(self, runs: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        with self._gate.batch("reading back", runs, buffer.nbytes), self.storage.lock:
            self._each(runs, buffer, self._read_back)

    def _read_back(self, offset_bytes: int, buffer: memoryview) -> None:
        self.storage.trip("reading back")
        buffer[:] = self.storage.content[offset_bytes : offset_bytes + buffer.nbytes]
        for at, flipped_bits in self.storage.rotten.items():
            if offset_bytes <= at < offset_bytes + buffer.nbytes:
                buffer[at - offset_bytes] ^= flipped_bits

    def close(self) -> None:
        self._gate.close()
