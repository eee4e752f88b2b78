"""`SparseDisk`: a disk of the tests that may be terabytes large: only its data is in memory, and it counts its reads.

It passes the same conformance suite as the real ones. Blocks are values, so many of them may be the same bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from agent.delta.blocks import BLOCK_BYTES
from agent.disk.gate import Gate, RunFailed
from agent.disk.seam import Extent

_ZEROES = bytes(BLOCK_BYTES)


class SparseStorage:
    """Bytes by blocks of 64 KiB; what is not there reads as zero. `SparseDisk`s are opened over it.

    Attributes:
        blocks: content by number of the block, each `BLOCK_BYTES` long.
        fail_from: by kind of request (``reading``, ``reading back``, ``writing`` …): from which offset on it fails with
            which error.
    """

    def __init__(self, size_bytes: int, blocks: dict[int, bytes] | None = None) -> None:
        self.size_bytes = size_bytes
        self.blocks = {} if blocks is None else dict(blocks)
        self.lock = threading.Lock()
        self.fail_from: dict[str, tuple[int, OSError]] = {}

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """The bytes of a run."""
        return b"".join(
            self.blocks.get(number, _ZEROES)[start:end] for number, start, end in _parts(offset_bytes, length_bytes)
        )

    def write(self, offset_bytes: int, data: bytes) -> None:
        """Put bytes there."""
        at = 0
        for number, start, end in _parts(offset_bytes, len(data)):
            old = self.blocks.get(number, _ZEROES)
            self.blocks[number] = old[:start] + data[at : at + end - start] + old[end:]
            at += end - start

    def check(self, doing: str, offset_bytes: int, length_bytes: int) -> None:
        """Raise what is to be raised for that request."""
        failing = self.fail_from.get(doing)
        if failing is not None and offset_bytes + length_bytes > failing[0]:
            raise failing[1]


def _parts(offset_bytes: int, length_bytes: int) -> Iterator[tuple[int, int, int]]:
    """The parts of blocks that a run is made of: number of the block, where the part begins in it and ends."""
    end = offset_bytes + length_bytes
    for number in range(offset_bytes // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
        first = number * BLOCK_BYTES
        yield number, max(0, offset_bytes - first), min(BLOCK_BYTES, end - first)


class SparseDisk:
    """A `Disk` over a `SparseStorage`.

    Attributes:
        reads: the runs that were read (not read back), in the order of the calls.
        requests: how many calls of each kind there were.
    """

    access = "memory"

    def __init__(self, name: str, storage: SparseStorage, *, writable: bool = True) -> None:
        self.storage = storage
        self.reads: list[tuple[int, int]] = []
        self.requests: dict[str, int] = {}
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

    @property
    def read_bytes(self) -> int:
        """How much was read (not read back)."""
        return sum(length for _, length in self.reads)

    def _count(self, doing: str) -> None:
        self.requests[doing] = self.requests.get(doing, 0) + 1

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading", offset_bytes, buffer.nbytes), self.storage.lock:
            self._count("reading")
            self._read(offset_bytes, buffer)

    def _read(self, offset_bytes: int, buffer: memoryview) -> None:
        self.storage.check("reading", offset_bytes, buffer.nbytes)
        self.reads.append((offset_bytes, buffer.nbytes))
        buffer[:] = self.storage.read(offset_bytes, buffer.nbytes)

    def write(self, offset_bytes: int, data: memoryview) -> None:
        with self._gate.request("writing", offset_bytes, data.nbytes, writes=True), self.storage.lock:
            self._count("writing")
            self._write(offset_bytes, data)

    def _write(self, offset_bytes: int, data: memoryview) -> None:
        self.storage.check("writing", offset_bytes, data.nbytes)
        self.storage.write(offset_bytes, bytes(data))

    def read_runs(self, runs: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        with self._gate.batch("reading", runs, buffer.nbytes), self.storage.lock:
            self._count("reading")
            self._each(runs, buffer, self._read)

    def write_runs(self, runs: Sequence[tuple[int, int]], data: memoryview) -> None:
        with self._gate.batch("writing", runs, data.nbytes, writes=True), self.storage.lock:
            self._count("writing")
            self._each(runs, data, self._write)

    @staticmethod
    def _each(runs: Iterable[tuple[int, int]], data: memoryview, move: Callable[[int, memoryview], None]) -> None:
        done = 0
        for offset_bytes, length_bytes in runs:
            try:
                move(offset_bytes, data[done : done + length_bytes])
            except OSError as error:
                raise RunFailed(error, offset_bytes, length_bytes) from error
            done += length_bytes

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        with self._gate.request("zeroing", offset_bytes, length_bytes, writes=True), self.storage.lock:
            self._count("zeroing")
            self.storage.check("zeroing", offset_bytes, length_bytes)
            end = offset_bytes + length_bytes
            whole_end = -(-end // BLOCK_BYTES) if end == self.size_bytes else end // BLOCK_BYTES
            whole = range(-(-offset_bytes // BLOCK_BYTES), whole_end)
            for number in [number for number in self.storage.blocks if number in whole]:
                del self.storage.blocks[number]
            for number in {offset_bytes // BLOCK_BYTES, (end - 1) // BLOCK_BYTES} & self.storage.blocks.keys():
                first = max(offset_bytes, number * BLOCK_BYTES)
                self.storage.write(first, bytes(min(end, (number + 1) * BLOCK_BYTES) - first))

    def flush(self) -> None:
        with self._gate.request("flushing", 0, 0, writes=self._gate.writable):
            self._count("flushing")

    def extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
        self._gate.check("mapping", offset_bytes, length_bytes)
        return self._extents(offset_bytes, offset_bytes + length_bytes)

    def _extents(self, offset_bytes: int, end: int) -> Iterator[Extent]:
        with self._gate.request("mapping", offset_bytes, end - offset_bytes), self.storage.lock:
            self._count("mapping")
            first, last = offset_bytes // BLOCK_BYTES, -(-end // BLOCK_BYTES)
            numbers = sorted(number for number in self.storage.blocks if first <= number < last)
        edges = [offset_bytes]
        for number in numbers:
            edges += [number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES]
        edges = [min(max(edge, offset_bytes), end) for edge in [*edges, end]]
        known = set(numbers)
        for start, stop in pairwise(edges):
            if stop > start:
                yield Extent(start, stop - start, zero=start // BLOCK_BYTES not in known)

    def read_back(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading back", offset_bytes, buffer.nbytes), self.storage.lock:
            self._count("reading back")
            self._read_back(offset_bytes, buffer)

    def read_back_runs(self, runs: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        with self._gate.batch("reading back", runs, buffer.nbytes), self.storage.lock:
            self._count("reading back")
            self._each(runs, buffer, self._read_back)

    def _read_back(self, offset_bytes: int, buffer: memoryview) -> None:
        self.storage.check("reading back", offset_bytes, buffer.nbytes)
        buffer[:] = self.storage.read(offset_bytes, buffer.nbytes)

    def close(self) -> None:
        self._gate.close()
