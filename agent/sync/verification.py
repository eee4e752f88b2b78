"""Proof of what was written: read back past the page cache, compare with what the source said it sent.

The flush comes before; it is the caller's.
"""

from __future__ import annotations

import mmap
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3

from agent.delta.blocks import Ranges
from agent.disk.seam import Disk
from agent.errors import VerificationFailed
from agent.sync.payloads import PROOF_BYTES
from agent.sync.rehash import Rehash

READ_BYTES = 4 << 20
"""How much is read back at once."""
BRIDGED_BYTES = 64 << 10
"""What lies between two written ranges is read along where it is no more than this: storage takes about as long to
find a place as to read so much."""


@dataclass
class Written:
    """What was written since the last flush: ranges with their BLAKE3 digests, and zeroed runs.

    Attributes:
        size_bytes: data and zeroes together.
        count: ranges and runs together: what bounds its memory.
        when_proven: to be called then.
    """

    ranges: list[Ranges] = field(default_factory=list)
    proofs: list[bytes] = field(default_factory=list)
    zeroes: list[tuple[int, int]] = field(default_factory=list)
    size_bytes: int = 0
    count: int = 0
    when_proven: list[Callable[[], None]] = field(default_factory=list)

    def add_data(self, ranges: Ranges, proofs: bytes) -> None:
        """Remember ranges and their digests (32 bytes each, in the order of `ranges`)."""
        self.ranges.append(ranges)
        self.proofs.append(proofs)
        self.size_bytes += int(ranges[:, 1].sum())
        self.count += len(ranges)

    def add_zeroes(self, offset: int, length: int) -> None:
        """Remember a zeroed run."""
        self.zeroes.append((offset, length))
        self.size_bytes += length
        self.count += 1

    @property
    def firsts(self) -> list[int]:
        """The first byte of each addition."""
        return [int(ranges[0, 0]) for ranges in self.ranges] + [offset for offset, _ in self.zeroes]


def shares(written: Written, count: int) -> list[Written]:
    """`written` in at most `count` parts of about the same size, each in rising order."""
    parts = [Written() for _ in range(count)]
    if written.ranges:
        ranges = np.concatenate(written.ranges)
        proofs = np.frombuffer(b"".join(written.proofs), dtype=f"V{PROOF_BYTES}")
        order = np.argsort(ranges[:, 0], kind="stable")
        ranges, proofs = ranges[order], proofs[order]
        done = np.cumsum(ranges[:, 1])
        cuts = np.searchsorted(done, [int(done[-1]) * k // count for k in range(1, count)], side="right")
        pairs = zip(np.split(ranges, cuts), np.split(proofs, cuts), strict=True)
        for part, (some, theirs) in zip(parts, pairs, strict=True):
            if len(some):
                part.add_data(some, theirs.tobytes())
    for number, (offset, length) in enumerate(written.zeroes):
        parts[number % count].add_zeroes(offset, length)
    return [part for part in parts if part.count]


def read_back(disk: Disk, written: Written, rehash: Rehash | None = None) -> int:
    """Read everything in `written` back; returns the bytes proven. What `rehash` gathers is what was read.

    Raises:
        VerificationFailed: naming disk and offset of the first difference.
        DiskError: a read failed.
    """
    proven = 0
    with _memory() as buffer:
        for ranges, proofs in zip(written.ranges, written.proofs, strict=True):
            proven += _read_data(disk, ranges, proofs, buffer, rehash)
        for offset, length in written.zeroes:
            proven += _read_zeroes(disk, offset, length, buffer)
        if rehash is not None:
            rehash.add_rest(disk, written.ranges, written.zeroes, buffer)
    return proven


_idle: queue.SimpleQueue[memoryview] = queue.SimpleQueue()


@contextmanager
def _memory() -> Iterator[memoryview]:
    """Memory to read back into, used again and again: fresh memory costs more time than what is read into it."""
    try:
        buffer = _idle.get_nowait()
    except queue.Empty:
        buffer = memoryview(mmap.mmap(-1, READ_BYTES))
    try:
        yield buffer
    finally:
        _idle.put(buffer)


def _read_data(disk: Disk, ranges: Ranges, proofs: bytes, buffer: memoryview, rehash: Rehash | None) -> int:
    offsets, ends = ranges[:, 0].tolist(), (ranges[:, 0] + ranges[:, 1]).tolist()
    batch: list[tuple[int, int]] = []  # index pairs (start, stop) of ranges that one read brings
    size = 0
    for start, stop in _groups(offsets, ends):
        length = ends[stop - 1] - offsets[start]
        if length > READ_BYTES:  # a range larger than the buffer, alone
            proof = proofs[start * PROOF_BYTES : stop * PROOF_BYTES]
            _check_large(disk, offsets[start], ends[start], proof, buffer, rehash)
            continue
        if size + length > READ_BYTES:
            _check(disk, batch, offsets, ends, proofs, buffer, rehash)
            batch, size = [], 0
        batch.append((start, stop))
        size += length
    _check(disk, batch, offsets, ends, proofs, buffer, rehash)
    return int(sum(ends) - sum(offsets))


def _check(
    disk: Disk,
    batch: list[tuple[int, int]],
    offsets: list[int],
    ends: list[int],
    proofs: bytes,
    buffer: memoryview,
    rehash: Rehash | None,
) -> None:
    """Read the ranges of a batch back, many reads under way together, and compare each with its proof."""
    runs = [(offsets[start], ends[stop - 1] - offsets[start]) for start, stop in batch]
    disk.read_back_runs(runs, buffer[: sum(length for _, length in runs)])
    at = 0
    for (start, stop), (first, length) in zip(batch, runs, strict=True):
        for index in range(start, stop):
            piece = buffer[at + offsets[index] - first : at + ends[index] - first]
            if blake3(piece).digest() != proofs[index * PROOF_BYTES : (index + 1) * PROOF_BYTES]:
                raise _difference(disk, offsets[index], piece.nbytes)
        if rehash is not None:
            rehash.add(first, buffer[at : at + length])
        at += length


def _groups(offsets: list[int], ends: list[int]) -> Iterator[tuple[int, int]]:
    """Index pairs (start, stop) of ranges that one read brings: near one another, together within the buffer."""
    start = 0
    for index in range(1, len(offsets)):
        if offsets[index] - ends[index - 1] > BRIDGED_BYTES or ends[index] - offsets[start] > READ_BYTES:
            yield start, index
            start = index
    yield start, len(offsets)


def _check_large(disk: Disk, offset: int, end: int, proof: bytes, buffer: memoryview, rehash: Rehash | None) -> None:
    hasher = blake3()
    for at in range(offset, end, READ_BYTES):
        part = buffer[: min(READ_BYTES, end - at)]
        disk.read_back(at, part)
        hasher.update(part)
        if rehash is not None:
            rehash.add(at, part)
    if hasher.digest() != proof:
        raise _difference(disk, offset, end - offset)


def _read_zeroes(disk: Disk, offset: int, length: int, buffer: memoryview) -> int:
    """Holes prove themselves (the storage guarantees that they read as zero); the rest is read."""
    for extent in disk.extents(offset, length):
        if extent.zero:
            continue
        end = extent.offset_bytes + extent.length_bytes
        for at in range(extent.offset_bytes, end, READ_BYTES):
            part = buffer[: min(READ_BYTES, end - at)]
            disk.read_back(at, part)
            if np.frombuffer(part, dtype=np.uint8).any():
                raise _difference(disk, at, part.nbytes)
    return length


def _difference(disk: Disk, offset: int, length: int) -> VerificationFailed:
    return VerificationFailed(
        f"disk {disk.name}: {length} bytes at offset {offset} read back differently from what the source sent; "
        "the storage of the target does not keep what is written to it: examine it before running again",
        disk=disk.name,
        offset_bytes=offset,
        length_bytes=length,
    )
