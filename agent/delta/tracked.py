"""Planning a pass that is limited to what was written since an earlier view.

The same spans as `agent.delta.blocks.plan_spans`, but what of a span is in no range is unchanged. Extents are asked for
only where something was written, so that planning costs what changed, never what the disk is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from agent.delta.blocks import (
    BATCH_BYTES,
    BATCH_RANGES,
    BLOCK_BYTES,
    ExtentLike,
    Span,
    aligned_runs,
    to_ranges,
)
from agent.errors import SyncError

Pairs = Iterable[tuple[int, int]]
"""Offset and length of ranges, in bytes, rising and not overlapping."""

NEAR_BYTES = 1 << 20
"""Written ranges with no more than this between them are asked about in one question for extents: the storage answers
for the little between them as quickly as a second question would be asked."""
WINDOW_BYTES = 1 << 30
WINDOW_RUNS = 1024
"""What one such question is about at most, so that memory is bounded and a cancelled pass ends soon."""


def whole_blocks(written: Pairs, size_bytes: int) -> Iterator[tuple[int, int]]:
    """The blocks in which something was written: runs (start, end), apart from one another.

    Raises:
        SyncError: the ranges do not rise, or are not on the disk.
    """
    start = end = -1
    before = 0
    for offset, length in written:
        if length < 1 or offset < before or offset + length > size_bytes:
            raise SyncError(
                f"The record of what was written names {length} bytes at {offset} of a disk of {size_bytes}, behind "
                f"byte {before}; it cannot be trusted, so run a pass that compares the whole disk."
            )
        before = offset + length
        first = offset // BLOCK_BYTES * BLOCK_BYTES
        last = min(-(-before // BLOCK_BYTES) * BLOCK_BYTES, size_bytes)
        if first > end:
            if end > start:
                yield start, end
            start = first
        end = max(end, last)
    if end > start:
        yield start, end


def plan_tracked(
    written: Pairs,
    extents: Callable[[int, int], Iterable[ExtentLike]],
    size_bytes: int,
    *,
    batch_bytes: Callable[[], int] = lambda: BATCH_BYTES,
    batch_ranges: int = BATCH_RANGES,
    start_bytes: int = 0,
    first_number: int = 0,
) -> Iterator[Span]:
    """Turn what was written into spans that cover the whole disk, or a stretch of it; lazy, one span is held.

    Args:
        written: what was, widened here to whole blocks.
        extents: of a run of the disk (offset, length), as `agent.disk.seam.Disk.extents`.
        size_bytes: of the disk, or a multiple of the block size where the stretch ends.
        batch_bytes: asked before each span: data in it if it is full, a multiple of the block size.
        batch_ranges: ranges of a span at most, of data and of zeroes together.
        start_bytes: where the stretch begins, a multiple of the block size; `first_number`: of its first span.

    Raises:
        SyncError: the ranges or the extents are not those of such a disk.
    """
    number, begin, filled, most = first_number, start_bytes, 0, batch_bytes()
    data: list[tuple[int, int]] = []
    zeroes: list[tuple[int, int]] = []
    for start, end, zero in _pieces(written, extents, size_bytes):
        while start < end:
            taken = end - start if zero else min(most - filled, end - start)
            (zeroes if zero else data).append((start, taken))
            start, filled = start + taken, filled + (0 if zero else taken)
            if filled == most or len(data) + len(zeroes) == batch_ranges:
                yield Span(number, begin, start - begin, to_ranges(data), filled, to_ranges(zeroes))
                number, begin, filled, data, zeroes, most = number + 1, start, 0, [], [], batch_bytes()
    if begin < size_bytes:
        yield Span(number, begin, size_bytes - begin, to_ranges(data), filled, to_ranges(zeroes))


def _pieces(
    written: Pairs, extents: Callable[[int, int], Iterable[ExtentLike]], size_bytes: int
) -> Iterator[tuple[int, int, bool]]:
    """What was written as runs of blocks (start, end, whether it reads as zero), rising."""
    for window in _windows(whole_blocks(written, size_bytes)):
        first, behind = window[0][0], window[-1][1]
        found = aligned_runs(extents(first, behind - first), behind, start_bytes=first)
        at = 0
        for start, end, zero in found:
            while at < len(window) and window[at][0] < end:
                yield max(start, window[at][0]), min(end, window[at][1]), zero
                if window[at][1] > end:
                    break
                at += 1


def _windows(runs: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Runs gathered that lie near one another; long ones are cut."""
    window: list[tuple[int, int]] = []
    for start, end in runs:
        for piece in range(start, end, WINDOW_BYTES):
            behind = min(piece + WINDOW_BYTES, end)
            if window and (
                piece - window[-1][1] > NEAR_BYTES or behind - window[0][0] > WINDOW_BYTES or len(window) == WINDOW_RUNS
            ):
                yield window
                window = []
            window.append((piece, behind))
    if window:
        yield window
