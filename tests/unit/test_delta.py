"""The pure parts of the delta engine, by values."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator

import pytest
import xxhash

from agent.delta.blocks import (
    BATCH_BYTES,
    BLOCK_BYTES,
    Batch,
    ZeroRun,
    block_lengths,
    coalesce,
    plan_batches,
    split_blocks,
    to_ranges,
)
from agent.delta.compare import differing
from agent.delta.digests import block_digests, digests_from_wire, digests_to_wire, zero_digest
from agent.disk.seam import Extent
from agent.errors import SyncError

B = BLOCK_BYTES


def plan(*runs: tuple[int, bool], batch_bytes: int = 4 * B) -> list[tuple[str, list[list[int]]]]:
    """The plan for runs of (length, zero), as plain values."""
    extents, offset = [], 0
    for length, zero in runs:
        extents.append(Extent(offset, length, zero))
        offset += length
    items = plan_batches(extents, offset, batch_bytes=batch_bytes)
    return [("data" if isinstance(item, Batch) else "zero", item.ranges.tolist()) for item in items]


# --- planning -------------------------------------------------------------------------------------------------------


def test_data_is_widened_to_blocks_and_zeroes_are_narrowed() -> None:
    assert plan((B + 1, True), (10, False), (3 * B - 11, True)) == [
        ("zero", [[0, B], [2 * B, 2 * B]]),
        ("data", [[B, B]]),
    ]


def test_a_block_that_is_zero_in_two_pieces_is_zero() -> None:
    assert plan((B // 2, True), (B // 2, True), (B, False)) == [("zero", [[0, B]]), ("data", [[B, B]])]


def test_a_hole_smaller_than_a_block_is_data() -> None:
    assert plan((B, False), (100, True), (2 * B - 100, False)) == [("data", [[0, 3 * B]])]


def test_the_short_last_block_is_data_or_zero_by_itself() -> None:
    assert plan((2 * B, True), (517, False)) == [("zero", [[0, 2 * B]]), ("data", [[2 * B, 517]])]
    assert plan((2 * B, False), (517, True)) == [("zero", [[2 * B, 517]]), ("data", [[0, 2 * B]])]
    assert plan((2 * B, True), (517, True)) == [("zero", [[0, 2 * B + 517]])]


def test_long_data_is_cut_into_full_batches() -> None:
    assert plan((9 * B + 1, False)) == [
        ("data", [[0, 4 * B]]),
        ("data", [[4 * B, 4 * B]]),
        ("data", [[8 * B, B + 1]]),
    ]


def test_scattered_data_shares_a_batch_preceded_by_its_zeroes() -> None:
    scattered = [(B, False), (B, True)] * 5
    assert plan(*scattered) == [
        ("zero", [[B, B], [3 * B, B], [5 * B, B]]),
        ("data", [[0, B], [2 * B, B], [4 * B, B], [6 * B, B]]),
        ("zero", [[7 * B, B], [9 * B, B]]),
        ("data", [[8 * B, B]]),
    ]


def test_an_empty_disk_needs_nothing() -> None:
    assert plan() == []


def test_ten_empty_terabytes_are_one_range_and_no_memory() -> None:
    window = 1 << 30

    def windows() -> Iterator[Extent]:
        for number in range(10 * 1024):
            yield Extent(number * window, window, zero=True)

    tracemalloc.start()
    items = list(plan_batches(windows(), 10 * 1024 * window))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [item.ranges.tolist() for item in items] == [[[0, 10 << 40]]]
    assert isinstance(items[0], ZeroRun)
    assert items[0].zero_bytes == 10 << 40
    assert peak_bytes < 100_000


def test_planning_is_lazy() -> None:
    asked: list[int] = []

    def extents() -> Iterator[Extent]:
        for number in range(1000):
            asked.append(number)
            yield Extent(number * BATCH_BYTES, BATCH_BYTES, zero=number % 2 == 1)

    items = plan_batches(extents(), 1000 * BATCH_BYTES)
    next(items)
    assert len(asked) < 5


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
        list(plan_batches(extents, 2 * B))


def test_batches_are_made_of_whole_blocks() -> None:
    with pytest.raises(ValueError, match="not made of blocks"):
        list(plan_batches([], 0, batch_bytes=B + 1))


def test_a_batch_knows_its_blocks() -> None:
    batch = Batch(0, to_ranges([(0, 2 * B), (5 * B, B + 9)]), B)
    assert batch.blocks().tolist() == [[0, B], [B, B], [5 * B, B], [6 * B, 9]]
    assert batch.block_lengths().tolist() == [B, B, B, 9]
    assert batch.data_bytes == 3 * B + 9


def test_lengths_of_blocks() -> None:
    assert block_lengths(2 * B + 1).tolist() == [B, B, 1]
    assert block_lengths(B).tolist() == [B]
    assert block_lengths(0).tolist() == []
    assert block_lengths(5, block_bytes=2).tolist() == [2, 2, 1]


def test_adjoining_ranges_are_joined_and_others_are_not() -> None:
    assert coalesce(to_ranges([(0, 1), (1, 2), (4, 1), (5, 5), (100, 1)])).tolist() == [[0, 3], [4, 6], [100, 1]]
    assert coalesce(to_ranges([])).shape == (0, 2)


def test_offsets_of_huge_disks_stay_exact() -> None:
    offset = (1 << 62) // B * B
    blocks = split_blocks(to_ranges([(offset, 2 * B + 1)]))
    assert blocks.tolist() == [[offset, B], [offset + B, B], [offset + 2 * B, 1]]
    assert coalesce(blocks).tolist() == [[offset, 2 * B + 1]]


# --- digests ----------------------------------------------------------------------------------------------------------


def test_digests_are_canonical_xxh3_of_each_block_under_the_seed() -> None:
    content = random.Random(0).randbytes(2 * B + 77)
    digests = block_digests(memoryview(content), block_lengths(len(content)), seed=2**64 - 1)
    wire = digests_to_wire(digests)
    assert digests.shape == (3,)
    for number, start in enumerate((0, B, 2 * B)):
        expected = xxhash.xxh3_128_intdigest(content[start : start + B], seed=2**64 - 1)
        assert int.from_bytes(wire[number * 16 :][:16], "big") == expected


def test_the_digest_of_nothing_is_the_one_of_the_specification() -> None:
    # XXH3_128bits of an empty input, seed 0 (xxhash, tests/sanity_test_vectors.h).
    assert zero_digest(0, seed=0).hex() == "99aa06d3014798d86001c324468d497f"


def test_digests_of_zeroes_are_made_once_and_depend_on_length_and_seed() -> None:
    digests = block_digests(memoryview(bytes(B + 5)), block_lengths(B + 5), seed=9)
    assert digests.tolist() == [zero_digest(B, seed=9), zero_digest(5, seed=9)]
    assert zero_digest(B, seed=9) is zero_digest(B, seed=9)
    assert zero_digest(B, seed=9) != zero_digest(B, seed=8)


def test_digests_survive_the_wire() -> None:
    digests = block_digests(memoryview(bytes(range(256)) * 1024), block_lengths(4 * B), seed=1)
    assert digests_from_wire(memoryview(digests_to_wire(digests))).tolist() == digests.tolist()
    with pytest.raises(SyncError, match="whole number of digests"):
        digests_from_wire(b"x" * 17)


def test_a_buffer_that_is_not_the_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="in a buffer of"):
        block_digests(memoryview(bytes(B)), block_lengths(B + 1), seed=0)


def test_differing_tells_each_block() -> None:
    ours = digests_from_wire(b"a" * 16 + b"b" * 16 + b"c" * 15 + b"\0")
    theirs = digests_from_wire(b"a" * 16 + b"x" + b"b" * 15 + b"c" * 15 + b"\1")
    assert differing(ours, theirs).tolist() == [False, True, True]
    assert differing(ours, ours.copy()).tolist() == [False, False, False]
    with pytest.raises(SyncError, match="hashed 3 and 2 blocks"):
        differing(ours, theirs[:2])
