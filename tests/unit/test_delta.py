"""Ranges, blocks and spans, by values."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest

from agent.delta.blocks import (
    BATCH_BYTES,
    BLOCK_BYTES,
    Span,
    as_runs,
    coalesce,
    gaps,
    owners,
    plan_spans,
    positions,
    split,
    to_ranges,
    total_bytes,
)
from agent.disk.seam import Extent
from agent.errors import SyncError

B = BLOCK_BYTES
TIB = 1 << 40


def extents_of(*runs: tuple[int, bool]) -> list[Extent]:
    """The extents of a disk made of runs of (length, zero)."""
    extents, offset = [], 0
    for length, zero in runs:
        extents.append(Extent(offset, length, zero))
        offset += length
    return extents


def plan(*runs: tuple[int, bool], batch_bytes: int = 4 * B, batch_ranges: int = 4096) -> list[tuple[int, int, object]]:
    """The spans of such a disk as plain values: offset, length, ranges of data. They must adjoin and be numbered."""
    extents = extents_of(*runs)
    size = sum(length for length, _ in runs)
    spans = list(plan_spans(extents, size, batch_bytes=lambda: batch_bytes, batch_ranges=batch_ranges))
    assert [span.number for span in spans] == list(range(len(spans)))
    assert [span.offset_bytes for span in spans] == [0, *(span.end_bytes for span in spans)][: len(spans)]
    assert not spans or spans[-1].end_bytes == size
    return [(span.offset_bytes, span.length_bytes, span.data.tolist()) for span in spans]


# --- planning -------------------------------------------------------------------------------------------------------


def test_data_is_widened_to_blocks_and_zeroes_are_narrowed() -> None:
    assert plan((B + 1, True), (10, False), (3 * B - 11, True)) == [(0, 4 * B, [[B, B]])]


def test_a_block_that_is_zero_in_two_pieces_is_zero() -> None:
    assert plan((B // 2, True), (B // 2, True), (B, False)) == [(0, 2 * B, [[B, B]])]


def test_a_hole_smaller_than_a_block_is_data() -> None:
    assert plan((B, False), (100, True), (2 * B - 100, False)) == [(0, 3 * B, [[0, 3 * B]])]


def test_the_short_last_block_is_data_or_zero_by_itself() -> None:
    assert plan((2 * B, True), (517, False)) == [(0, 2 * B + 517, [[2 * B, 517]])]
    assert plan((2 * B, False), (517, True)) == [(0, 2 * B + 517, [[0, 2 * B]])]
    assert plan((2 * B, True), (517, True)) == [(0, 2 * B + 517, [])]
    assert plan((1, False)) == [(0, 1, [[0, 1]])]


def test_a_last_block_that_is_zero_but_for_its_beginning_is_data() -> None:
    assert plan((B + 1, False), (516, True)) == [(0, B + 517, [[0, B + 517]])]


def test_long_data_is_cut_into_full_spans() -> None:
    assert plan((9 * B + 1, False)) == [
        (0, 4 * B, [[0, 4 * B]]),
        (4 * B, 4 * B, [[4 * B, 4 * B]]),
        (8 * B, B + 1, [[8 * B, B + 1]]),
    ]


def test_scattered_data_shares_a_span_with_its_zeroes() -> None:
    scattered = [(B, False), (B, True)] * 5
    assert plan(*scattered) == [
        (0, 7 * B, [[0, B], [2 * B, B], [4 * B, B], [6 * B, B]]),
        (7 * B, 3 * B, [[8 * B, B]]),
    ]


def test_a_span_of_many_small_ranges_ends_before_it_is_full() -> None:
    scattered = [(B, False), (B, True)] * 5
    assert plan(*scattered, batch_ranges=2) == [
        (0, 3 * B, [[0, B], [2 * B, B]]),
        (3 * B, 4 * B, [[4 * B, B], [6 * B, B]]),
        (7 * B, 3 * B, [[8 * B, B]]),
    ]


def test_zeroes_behind_the_last_data_are_a_span_of_their_own_where_the_last_one_was_full() -> None:
    assert plan((4 * B, False), (B, True)) == [(0, 4 * B, [[0, 4 * B]]), (4 * B, B, [])]


def test_an_empty_disk_needs_nothing() -> None:
    assert plan() == []


def test_eight_empty_terabytes_are_one_span_and_no_memory() -> None:
    window = 1 << 30

    def windows() -> Iterator[Extent]:
        for number in range(8 * TIB // window):
            yield Extent(number * window, window, zero=True)

    tracemalloc.start()
    (span,) = plan_spans(windows(), 8 * TIB)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (span.length_bytes, span.zero_bytes, span.data_bytes) == (8 * TIB, 8 * TIB, 0)
    assert peak_bytes < 100_000


def test_a_hole_of_terabytes_between_data_is_part_of_one_span() -> None:
    assert plan((B, False), (8 * TIB, True), (B, False)) == [
        (0, 8 * TIB + 2 * B, [[0, B], [8 * TIB + B, B]]),
    ]


def test_planning_is_lazy() -> None:
    asked: list[int] = []

    def extents() -> Iterator[Extent]:
        for number in range(1000):
            asked.append(number)
            yield Extent(number * BATCH_BYTES, BATCH_BYTES, zero=number % 2 == 1)

    next(plan_spans(extents(), 1000 * BATCH_BYTES))
    assert len(asked) < 5


def test_the_size_of_a_span_is_asked_for_before_each() -> None:
    sizes = iter([B, 3 * B, 2 * B, B])
    spans = list(plan_spans(extents_of((6 * B, False)), 6 * B, batch_bytes=lambda: next(sizes)))
    assert [span.data_bytes for span in spans] == [B, 3 * B, 2 * B]


@pytest.mark.parametrize(
    "extents",
    [
        [Extent(0, B, False)],
        [Extent(0, 2 * B, False), Extent(2 * B, B, True)],
        [Extent(0, B, False), Extent(B + 1, B - 1, False)],
        [Extent(0, B, False), Extent(0, B, False)],
        [Extent(1, 2 * B - 1, False)],
        [],
    ],
)
def test_a_map_that_does_not_cover_the_disk_is_refused(extents: list[Extent]) -> None:
    with pytest.raises(SyncError, match="cannot be trusted"):
        list(plan_spans(extents, 2 * B))


def test_a_span_tells_its_data_and_its_zeroes() -> None:
    span = Span(3, 4 * B, 10 * B, to_ranges([(5 * B, B), (8 * B, 2 * B)]), 3 * B)
    assert (span.data_bytes, span.zero_bytes, span.end_bytes) == (3 * B, 7 * B, 14 * B)


# --- ranges -----------------------------------------------------------------------------------------------------------


def test_ranges_are_cut_at_every_multiple_of_the_unit() -> None:
    ranges = to_ranges([(0, 2 * B), (5 * B, B + 9)])
    assert split(ranges, B).tolist() == [[0, B], [B, B], [5 * B, B], [6 * B, 9]]
    assert split(ranges, 2 * B).tolist() == [[0, 2 * B], [5 * B, B], [6 * B, 9]]
    assert split(ranges, 8 * B).tolist() == ranges.tolist()


def test_a_range_that_begins_and_ends_between_multiples_keeps_its_ends() -> None:
    assert split(to_ranges([(3, 4), (9, 2)]), 4).tolist() == [[3, 1], [4, 3], [9, 2]]


def test_nothing_cut_is_nothing() -> None:
    assert split(to_ranges([]), B).shape == (0, 2)


def test_each_piece_knows_the_range_it_was_cut_from() -> None:
    ranges = to_ranges([(0, 2 * B), (2 * B, B), (5 * B, 3)])
    assert owners(ranges, split(ranges, B)).tolist() == [0, 0, 1, 2]


def test_positions_are_where_ranges_lie_end_to_end() -> None:
    assert positions(to_ranges([(7, 3), (100, 1), (200, 9)])).tolist() == [0, 3, 4]


def test_gaps_are_what_the_data_leaves_of_a_stretch() -> None:
    data = to_ranges([(10, 5), (15, 5), (30, 10)])
    assert gaps(data, 0, 50).tolist() == [[0, 10], [20, 10], [40, 10]]
    assert gaps(data, 10, 30).tolist() == [[20, 10]]
    assert gaps(to_ranges([]), 7, 3).tolist() == [[7, 3]]


def test_adjoining_ranges_are_joined_and_others_are_not() -> None:
    ranges = to_ranges([(0, 1), (1, 2), (4, 1), (5, 5), (100, 1)])
    assert coalesce(ranges).tolist() == [[0, 3], [4, 6], [100, 1]]
    assert as_runs(ranges) == [(0, 3), (4, 6), (100, 1)]
    assert coalesce(to_ranges([])).shape == (0, 2)
    assert as_runs(to_ranges([])) == []


def test_lengths_add_up() -> None:
    assert total_bytes(to_ranges([])) == 0
    assert total_bytes(to_ranges([(0, TIB), (9 * TIB, TIB)])) == 2 * TIB


def test_offsets_of_huge_disks_stay_exact() -> None:
    offset = (1 << 62) // B * B
    blocks = split(to_ranges([(offset, 2 * B + 1)]), B)
    assert blocks.tolist() == [[offset, B], [offset + B, B], [offset + 2 * B, 1]]
    assert coalesce(blocks).tolist() == [[offset, 2 * B + 1]]
    assert gaps(blocks, offset - B, 5 * B).tolist() == [[offset - B, B], [offset + 2 * B + 1, 2 * B - 1]]
