"""Whatever was written, the spans of a tracked pass cover the disk and name exactly the blocks it lies in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.delta import tracked
from agent.delta.blocks import BLOCK_BYTES
from agent.delta.tracked import plan_tracked
from agent.errors import SyncError

B = BLOCK_BYTES
GIB, TIB = 1 << 30, 1 << 40


@dataclass(frozen=True)
class Run:
    offset_bytes: int
    length_bytes: int
    zero: bool


@dataclass
class Kinds:
    """A disk of which each 512 bytes are data or not; counts the questions."""

    data: list[bool]
    size_bytes: int
    asked: int = 0

    def extents(self, offset: int, length: int) -> Iterator[Run]:
        self.asked += 1
        start, end = offset, offset + length
        while start < end:
            kind, stop = self.data[start // 512], start
            while stop < end and self.data[stop // 512] is kind:
                stop = min((stop // 512 + 1) * 512, end)
            yield Run(start, stop - start, not kind)
            start = stop


def rising(pairs: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Pairs of gap and length, in units of 512 bytes, as ranges inside the disk."""
    at, ranges = 0, []
    for gap, length in pairs:
        offset = at + gap * 512
        at = min(offset + length * 512, size)
        if offset < at:
            ranges.append((offset, at - offset))
    return ranges


def blocks(offset: int, length: int) -> set[int]:
    return set(range(offset // B, -(-(offset + length) // B)))


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 24 * 128).map(lambda sectors: sectors * 512),
    pairs=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 400)), max_size=12),
    kinds=st.lists(st.tuples(st.booleans(), st.integers(1, 300)), min_size=1, max_size=20),
    batch=st.sampled_from([B, 4 * B, 64 * B]),
    most_ranges=st.sampled_from([1, 2, 4096]),
)
def test_spans_name_the_blocks_that_were_written_and_no_others(
    size: int, pairs: list[tuple[int, int]], kinds: list[tuple[bool, int]], batch: int, most_ranges: int
) -> None:
    written = rising(pairs, size)
    row = [kind for kind, count in kinds for _ in range(count)]
    disk = Kinds((row * (size // 512 // len(row) + 1))[: size // 512], size)
    at, data, zeroes = 0, set[int](), set[int]()
    for number, span in enumerate(
        plan_tracked(written, disk.extents, size, batch_bytes=lambda: batch, batch_ranges=most_ranges)
    ):
        assert span.number == number
        assert span.offset_bytes == at
        at = span.end_bytes
        assert span.zeroes is not None
        assert span.data_bytes == sum(length for _, length in span.data.tolist()) <= batch
        assert len(span.data) + len(span.zeroes) <= most_ranges
        assert span.data_bytes + span.zero_bytes + span.unchanged_bytes == span.length_bytes
        for ranges, seen in ((span.data, data), (span.zeroes, zeroes)):
            for offset, length in ranges.tolist():
                assert offset % B == 0
                assert (offset + length) % B == 0 or offset + length == size
                assert span.offset_bytes <= offset < offset + length <= span.end_bytes
                assert not blocks(offset, length) & (data | zeroes)
                seen |= blocks(offset, length)
    assert at == size
    assert data | zeroes == {block for run in written for block in blocks(*run)}
    for block in zeroes:
        assert not any(disk.data[block * B // 512 : (block + 1) * B // 512])
    for block in data:
        assert any(disk.data[block * B // 512 : (block + 1) * B // 512])


def test_a_clean_disk_of_any_size_is_one_span_and_asks_nothing() -> None:
    disk = Kinds([], 8 * TIB)
    (span,) = plan_tracked([], disk.extents, 8 * TIB)
    assert (span.length_bytes, span.unchanged_bytes, disk.asked) == (8 * TIB, 8 * TIB, 0)


def test_extents_are_asked_for_where_something_was_written_and_together_where_that_lies_near() -> None:
    asked: list[tuple[int, int]] = []

    def extents(offset: int, length: int) -> Iterator[Run]:
        asked.append((offset, length))
        yield Run(offset, length, zero=False)

    written = [(0, B), (4 * B, B), (TIB, B), (2 * TIB, 3 * GIB)]
    spans = list(plan_tracked(written, extents, 4 * TIB))
    assert asked == [(0, 5 * B), (TIB, B), *((2 * TIB + n * GIB, GIB) for n in range(3))]
    assert sum(span.data_bytes for span in spans) == 3 * B + 3 * GIB


def test_windows_of_extents_are_bounded_in_ranges() -> None:
    runs = [(n * 2 * B, n * 2 * B + B) for n in range(tracked.WINDOW_RUNS + 1)]
    assert [len(window) for window in tracked._windows(runs)] == [tracked.WINDOW_RUNS, 1]


@pytest.mark.parametrize(
    "written",
    [
        pytest.param([(0, 0)], id="empty"),
        pytest.param([(B, B), (0, B)], id="not rising"),
        pytest.param([(0, 2 * B), (B, 2 * B)], id="overlapping"),
        pytest.param([(3 * B, 2 * B)], id="beyond the end"),
    ],
)
def test_a_record_that_cannot_be_true_is_refused(written: list[tuple[int, int]]) -> None:
    with pytest.raises(SyncError, match="cannot be trusted"):
        list(plan_tracked(written, Kinds([True] * 512, 4 * B).extents, 4 * B))


def test_extents_that_do_not_cover_what_was_asked_are_refused() -> None:
    with pytest.raises(SyncError, match="cannot be trusted"):
        list(plan_tracked([(0, 2 * B)], lambda offset, length: [Run(offset, length - 512, zero=False)], 4 * B))
