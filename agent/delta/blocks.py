"""Arithmetic of ranges and blocks: from the extents of a disk to spans of work.

A *range* is an offset and a length in bytes; many of them are an array of shape (n, 2). A *block* is a range that
starts at a multiple of the block size and is one block long, but for the last of a disk, which may be shorter. Pieces
of a coarser or finer grid (superblocks, pages) are cut the same way: at multiples of their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from agent.errors import SyncError

BLOCK_BYTES = 64 * 1024
"""The unit that is hashed at once: a digest of 16 bytes for each costs 0.02 % of a disk."""

PAGE_BYTES = 4 * 1024
"""The unit that guests write: file systems and databases seldom use smaller pages."""

BATCH_BYTES = 16 * 1024 * 1024
"""Data that is read, hashed and compared in one go: large requests for the storage, few thread hops."""

BATCH_RANGES = 4096
"""Ranges in one span at most, whatever they hold: bounds the books of a scattered disk."""

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
class Span:
    """A stretch of the disk, whole: some of it data, the rest known to read as zero, or unchanged since a former view.

    Attributes:
        number: 0, 1, 2 … in the order of offsets.
        offset_bytes, length_bytes: where it lies; spans adjoin and cover the disk.
        data: whole blocks, adjoining ones joined, shape (n, 2), n may be 0.
        data_bytes: how much that is.
        zeroes: in a pass that is limited to what was written since an earlier view: what of that reads as zero, as
            `data`; all else is unchanged. None: all that is not data reads as zero.
    """

    number: int
    offset_bytes: int
    length_bytes: int
    data: Ranges
    data_bytes: int
    zeroes: Ranges | None = None

    @property
    def zero_bytes(self) -> int:
        """How much of it reads as zero."""
        return self.length_bytes - self.data_bytes if self.zeroes is None else total_bytes(self.zeroes)

    @property
    def unchanged_bytes(self) -> int:
        """How much of it is neither data nor zeroes."""
        return self.length_bytes - self.data_bytes - self.zero_bytes

    @property
    def end_bytes(self) -> int:
        """The first byte behind it."""
        return self.offset_bytes + self.length_bytes


def to_ranges(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """Pairs of offset and length as an array of shape (n, 2)."""
    return np.array(list(pairs), dtype=np.uint64).reshape(-1, 2)


def total_bytes(ranges: Ranges) -> int:
    """Sum of the lengths."""
    return int(ranges[:, 1].sum()) if len(ranges) else 0


def positions(ranges: Ranges) -> NDArray[np.uint64]:
    """Where each range begins in a buffer that holds them end to end, shape (n,)."""
    ends = np.cumsum(ranges[:, 1], dtype=np.uint64)
    return np.asarray(ends - ranges[:, 1], dtype=np.uint64)


def split(ranges: Ranges, unit_bytes: int) -> Ranges:
    """Ranges cut at every multiple of `unit_bytes`: the pieces in order, shape (m, 2)."""
    if not len(ranges):
        return ranges
    unit = np.uint64(unit_bytes)
    offsets, ends = ranges[:, 0], ranges[:, 0] + ranges[:, 1]
    counts = ((ends + unit - np.uint64(1)) // unit - offsets // unit).astype(np.int64)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    index = (np.arange(int(counts.sum()), dtype=np.int64) - first).astype(np.uint64)
    starts = np.maximum((np.repeat(offsets // unit, counts) + index) * unit, np.repeat(offsets, counts))
    stops = np.minimum((np.repeat(offsets // unit, counts) + index + np.uint64(1)) * unit, np.repeat(ends, counts))
    return np.column_stack((starts, stops - starts))


def owners(ranges: Ranges, pieces: Ranges) -> NDArray[np.int64]:
    """For each of the `pieces` cut from rising `ranges`, the index of the range it lies in, shape (m,)."""
    return np.searchsorted(ranges[:, 0], pieces[:, 0], side="right") - 1


def coalesce(ranges: Ranges) -> Ranges:
    """Join ranges that adjoin; they must be in rising order and not overlap."""
    if len(ranges) < 2:
        return ranges
    ends = ranges[:, 0] + ranges[:, 1]
    first = np.concatenate(([True], ranges[1:, 0] != ends[:-1]))
    last = np.concatenate((first[1:], [True]))
    offsets = ranges[first, 0]
    return np.column_stack((offsets, ends[last] - offsets))


def gaps(data: Ranges, offset_bytes: int, length_bytes: int) -> Ranges:
    """What of a stretch is in none of the rising ranges `data`, shape (m, 2)."""
    starts = np.concatenate((np.array([offset_bytes], dtype=np.uint64), data[:, 0] + data[:, 1]))
    ends = np.concatenate((data[:, 0], np.array([offset_bytes + length_bytes], dtype=np.uint64)))
    between = np.column_stack((starts, ends - starts))
    return between[between[:, 1] > 0]


def as_runs(ranges: Ranges) -> list[tuple[int, int]]:
    """The same as plain pairs, adjoining ones joined: what `agent.disk.seam.Disk` reads and writes."""
    return [(offset, length) for offset, length in coalesce(ranges).tolist()]


def plan_spans(
    extents: Iterable[ExtentLike],
    size_bytes: int,
    *,
    batch_bytes: Callable[[], int] = lambda: BATCH_BYTES,
    batch_ranges: int = BATCH_RANGES,
    start_bytes: int = 0,
    first_number: int = 0,
) -> Iterator[Span]:
    """Turn the extents of a disk, or of a stretch of it, into spans.

    Data is widened to whole blocks, zeroes are narrowed to them. Lazy: one span is held, and a hole is part of one span
    however long it is.

    Args:
        extents: in order, adjoining, from `start_bytes` to `size_bytes`.
        size_bytes: of the disk, or a multiple of the block size where the stretch ends.
        batch_bytes: asked before each span: data in it if it is full, a multiple of the block size.
        batch_ranges: ranges of data in a span at most.
        start_bytes: where the stretch begins, a multiple of the block size; `first_number`: of its first span.

    Raises:
        SyncError: the extents are not those of such a disk.
    """
    number, begin, filled, most = first_number, start_bytes, 0, batch_bytes()
    data: list[tuple[int, int]] = []
    for start, end, zero in aligned_runs(extents, size_bytes, start_bytes=start_bytes):
        while not zero and start < end:
            taken = min(most - filled, end - start)
            data.append((start, taken))
            start, filled = start + taken, filled + taken
            if filled == most or len(data) == batch_ranges:
                yield Span(number, begin, start - begin, to_ranges(data), filled)
                number, begin, filled, data, most = number + 1, start, 0, [], batch_bytes()
    if begin < size_bytes:
        yield Span(number, begin, size_bytes - begin, to_ranges(data), filled)


def aligned_runs(
    extents: Iterable[ExtentLike], end_bytes: int, *, start_bytes: int = 0
) -> Iterator[tuple[int, int, bool]]:
    """Extents as runs (start, end, reads as zero) of whole blocks. A block that is data in part is data; zeroes may be
    cut into several runs.

    Args:
        extents: in order, adjoining, from `start_bytes` to `end_bytes`.
        end_bytes: a multiple of the block size, or the end of the disk.
        start_bytes: a multiple of the block size.

    Raises:
        SyncError: they are not such.
    """
    return _aligned(_joined(extents, start_bytes, end_bytes), start_bytes, end_bytes)


def _joined(extents: Iterable[ExtentLike], begin: int, size_bytes: int) -> Iterator[tuple[int, int, bool]]:
    """Runs (start, end, zero) of alternating kind; checks that they cover the stretch from `begin` to `size_bytes`."""
    start, end, kind = begin, begin, False
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
            f"The storage described {end} bytes of a disk where {size_bytes} were due; its map of the disk cannot be "
            "trusted, so look at the storage and run the pass again."
        )
    if end > start:
        yield start, end, kind


def _aligned(
    runs: Iterable[tuple[int, int, bool]], start_bytes: int, size_bytes: int
) -> Iterator[tuple[int, int, bool]]:
    """Runs of whole blocks: a block that is data in part is data. Data that adjoins is one run."""
    done, begin = start_bytes, -1  # `begin`: where the data run that is being gathered starts
    for start, end, zero in runs:
        if zero:
            first = -(-start // BLOCK_BYTES) * BLOCK_BYTES
            last = end if end == size_bytes else end // BLOCK_BYTES * BLOCK_BYTES
        else:
            first = start // BLOCK_BYTES * BLOCK_BYTES
            last = min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, size_bytes)
        first = max(first, done)
        if first >= last:
            continue
        if zero and begin >= 0:
            yield begin, done, False
            begin = -1
        if zero:
            yield first, last, True
        elif begin < 0:
            begin = first
        done = last
    if begin >= 0:
        yield begin, done, False
