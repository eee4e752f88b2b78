"""Arithmetic of ranges and blocks: from the extents of a disk to batches of work.

A *range* is an offset and a length in bytes; many of them are an array of shape (n, 2). A *block* is a range that
starts at a multiple of the block size and is one block long, but for the last of a disk, which may be shorter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from agent.errors import SyncError

BLOCK_BYTES = 64 * 1024
"""The unit that is compared: digests of 16 bytes for it cost 0.02 % of a disk, and few guests write less at once."""

BATCH_BYTES = 8 * 1024 * 1024
"""Data that is read, hashed and compared in one go: large requests for the storage, few thread hops."""

Ranges = NDArray[np.uint64]
"""Shape (n, 2): offset and length in bytes, in rising order."""


class ExtentLike(Protocol):
    """What is read of a disk's extents (`agent.disk.seam.Extent` has it)."""

    @property
    def offset_bytes(self) -> int:
        """First byte."""

    @property
    def length_bytes(self) -> int:
        """Length, at least 1."""

    @property
    def zero(self) -> bool:
        """Whether the run is known to read as zero."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Data to read, hash and compare.

    Attributes:
        number: 0, 1, 2 … in the order of offsets.
        ranges: whole blocks, adjoining ones joined; together at most the batch size.
        block_bytes: the block size they are aligned to.
    """

    number: int
    ranges: Ranges
    block_bytes: int

    @property
    def data_bytes(self) -> int:
        """How much data that is."""
        return int(self.ranges[:, 1].sum())

    def blocks(self) -> Ranges:
        """The batch block by block."""
        return split_blocks(self.ranges, self.block_bytes)

    def block_lengths(self) -> NDArray[np.uint64]:
        """Length of each block in bytes, shape (n,)."""
        return self.blocks()[:, 1]


@dataclass(frozen=True, slots=True, eq=False)
class ZeroRun:
    """Ranges that read as zero, whole blocks, adjoining ones joined: not read, not hashed, not sent as data."""

    ranges: Ranges

    @property
    def zero_bytes(self) -> int:
        """How much that is."""
        return int(self.ranges[:, 1].sum())


def to_ranges(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """Pairs of offset and length as an array of shape (n, 2)."""
    return np.array(list(pairs), dtype=np.uint64).reshape(-1, 2)


def block_lengths(length_bytes: int, block_bytes: int = BLOCK_BYTES) -> NDArray[np.uint64]:
    """Lengths of the blocks of a run that starts at a block boundary, shape (n,)."""
    return split_blocks(to_ranges([(0, length_bytes)]), block_bytes)[:, 1]


def split_blocks(ranges: Ranges, block_bytes: int = BLOCK_BYTES) -> Ranges:
    """Ranges that start at block boundaries, cut into blocks; only a range's last block may be shorter."""
    block = np.uint64(block_bytes)
    offsets, lengths = ranges[:, 0], ranges[:, 1]
    counts = ((lengths + block - np.uint64(1)) // block).astype(np.int64)
    total = int(counts.sum())
    # Position of each block in its own range: 0, 1, 2 …
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(total) - first).astype(np.uint64) * block
    blocks = np.empty((total, 2), dtype=np.uint64)
    blocks[:, 0] = np.repeat(offsets, counts) + start
    blocks[:, 1] = np.minimum(block, np.repeat(lengths, counts) - start)
    return blocks


def coalesce(ranges: Ranges) -> Ranges:
    """Join ranges that adjoin; they must be in rising order and not overlap."""
    if len(ranges) < 2:
        return ranges
    ends = ranges[:, 0] + ranges[:, 1]
    first = np.concatenate(([True], ranges[1:, 0] != ends[:-1]))
    last = np.concatenate((first[1:], [True]))
    offsets = ranges[first, 0]
    return np.column_stack((offsets, ends[last] - offsets))


def plan_batches(
    extents: Iterable[ExtentLike], size_bytes: int, *, block_bytes: int = BLOCK_BYTES, batch_bytes: int = BATCH_BYTES
) -> Iterator[Batch | ZeroRun]:
    """Turn the extents of a whole disk into batches of data and runs of zeroes, each block in exactly one of them.

    Data is widened to whole blocks, zeroes are narrowed to them. Lazy: at most one batch is held, and a run of zeroes
    is one range however long it is. A batch is preceded by the zeroes that lie before and inside it.

    Args:
        extents: in order, adjoining, from 0 to `size_bytes`.
        size_bytes: of the disk.
        block_bytes: size of a block.
        batch_bytes: size of a full batch, a multiple of `block_bytes`.

    Raises:
        SyncError: the extents are not those of such a disk.
    """
    if batch_bytes <= 0 or batch_bytes % block_bytes:
        raise ValueError(f"batches of {batch_bytes} bytes are not made of blocks of {block_bytes}")
    number, filled = 0, 0
    data: list[tuple[int, int]] = []
    zeroes: list[tuple[int, int]] = []
    for start, end, zero in _aligned(_joined(extents, size_bytes), size_bytes, block_bytes):
        if zero:
            zeroes.append((start, end - start))
            continue
        while start < end:
            taken = min(batch_bytes - filled, end - start)
            if data and sum(data[-1]) == start:
                data[-1] = (data[-1][0], data[-1][1] + taken)
            else:
                data.append((start, taken))
            start, filled = start + taken, filled + taken
            if filled == batch_bytes:
                if zeroes:
                    yield ZeroRun(to_ranges(zeroes))
                yield Batch(number, to_ranges(data), block_bytes)
                number, filled, data, zeroes = number + 1, 0, [], []
    if zeroes:
        yield ZeroRun(to_ranges(zeroes))
    if data:
        yield Batch(number, to_ranges(data), block_bytes)


def _joined(extents: Iterable[ExtentLike], size_bytes: int) -> Iterator[tuple[int, int, bool]]:
    """Runs (start, end, zero) of alternating kind; checks that they cover the disk."""
    start, end, kind = 0, 0, False
    for extent in extents:
        if extent.offset_bytes != end or extent.length_bytes < 1:
            raise SyncError(
                f"The storage described {extent.length_bytes} bytes at {extent.offset_bytes} where a run at {end} was "
                "due; its map of the disk cannot be trusted, so look at the storage and run the pass again."
            )
        if extent.zero != kind and end > start:
            yield start, end, kind
            start = end
        kind = extent.zero
        end += extent.length_bytes
    if end != size_bytes:
        raise SyncError(
            f"The storage described {end} bytes of a disk of {size_bytes}; its map of the disk cannot be trusted, "
            "so look at the storage and run the pass again."
        )
    if end > start:
        yield start, end, kind


def _aligned(
    runs: Iterable[tuple[int, int, bool]], size_bytes: int, block_bytes: int
) -> Iterator[tuple[int, int, bool]]:
    """Runs of whole blocks: a block that is data in part is data."""
    done = 0
    for start, end, zero in runs:
        if zero:
            first = -(-start // block_bytes) * block_bytes
            last = end if end == size_bytes else end // block_bytes * block_bytes
        else:
            first = start // block_bytes * block_bytes
            last = min(-(-end // block_bytes) * block_bytes, size_bytes)
        first = max(first, done)
        if first < last:
            yield first, last, zero
            done = last
