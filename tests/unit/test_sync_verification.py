"""Reading back what was written: in few requests, each range proven, the first difference named."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from blake3 import blake3

from agent.delta.blocks import BLOCK_BYTES, PAGE_BYTES, to_ranges
from agent.errors import DiskError, VerificationFailed
from agent.sync.verification import BRIDGED_BYTES, READ_BYTES, Written, read_back, shares
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage

B, P, MIB = BLOCK_BYTES, PAGE_BYTES, 1 << 20
SIZE = 16 * MIB


class Watched(MemoryDisk):
    """Notes what is read back, and in how many calls."""

    def __init__(self, storage: MemoryStorage) -> None:
        super().__init__("vda", storage)
        self.read: list[tuple[int, int]] = []
        self.calls = 0

    def read_back(self, offset_bytes: int, buffer: memoryview) -> None:
        self.calls += 1
        self.read.append((offset_bytes, buffer.nbytes))
        super().read_back(offset_bytes, buffer)

    def read_back_runs(self, runs: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        self.calls += 1
        self.read += runs
        super().read_back_runs(runs, buffer)


@pytest.fixture
def disk() -> Watched:
    storage = MemoryStorage(SIZE)
    storage.allocate(0, SIZE)
    storage.content[:] = random.Random(1).randbytes(SIZE)
    return Watched(storage)


def written(disk: Watched, *runs: tuple[int, int], zeroes: tuple[tuple[int, int], ...] = ()) -> Written:
    """The books of what is on the disk, as if it had just been written."""
    books = Written()
    if runs:
        content = disk.storage.content
        proofs = b"".join(blake3(bytes(content[offset : offset + length])).digest() for offset, length in runs)
        books.add_data(to_ranges(runs), proofs)
    for offset, length in zeroes:
        books.add_zeroes(offset, length)
    return books


def test_ranges_near_one_another_are_read_in_one_request(disk: Watched) -> None:
    runs = [(0, P), (2 * P, P), (3 * P + BRIDGED_BYTES, P)]
    assert read_back(disk, written(disk, *runs)) == 3 * P
    assert disk.read == [(0, 4 * P + BRIDGED_BYTES)]


def test_ranges_far_from_one_another_are_read_by_themselves_and_under_way_together(disk: Watched) -> None:
    assert read_back(disk, written(disk, (0, P), (P + BRIDGED_BYTES + P, P))) == 2 * P
    assert disk.read == [(0, P), (2 * P + BRIDGED_BYTES, P)]
    assert disk.calls == 1


def test_what_lies_between_is_read_along_and_not_judged(disk: Watched) -> None:
    books = written(disk, (0, P), (2 * P, P))
    disk.storage.rot(P + 7)
    assert read_back(disk, books) == 2 * P


def test_adjoining_ranges_are_read_as_much_at_once_as_the_buffer_holds(disk: Watched) -> None:
    size = 2 * READ_BYTES + MIB
    runs = [(offset, B) for offset in range(0, size, B)]
    assert read_back(disk, written(disk, *runs)) == size
    assert disk.read == [(0, READ_BYTES), (READ_BYTES, READ_BYTES), (2 * READ_BYTES, MIB)]


@pytest.mark.parametrize("length", [READ_BYTES, READ_BYTES + 1, 2 * READ_BYTES, 3 * READ_BYTES - P])
def test_a_range_larger_than_the_buffer_is_read_in_parts_and_proven_whole(disk: Watched, length: int) -> None:
    books = written(disk, (0, P), (B, length), (SIZE - P, P))
    assert read_back(disk, books) == length + 2 * P
    disk.storage.rot(B + length - 1)
    with pytest.raises(VerificationFailed) as caught:
        read_back(disk, books)
    assert caught.value.facts == {"disk": "vda", "offset_bytes": B, "length_bytes": length}


@pytest.mark.parametrize("wrong", [[3], [0], [9], [4, 7], [7, 4]])
def test_the_first_range_that_differs_is_named(disk: Watched, wrong: list[int]) -> None:
    runs = [(number * 2 * B, P) for number in range(10)]
    books = written(disk, *runs)
    for number in wrong:
        disk.storage.rot(number * 2 * B + P - 1)
    with pytest.raises(VerificationFailed, match=f"disk vda: {P} bytes at offset {min(wrong) * 2 * B} read back"):
        read_back(disk, books)


def test_zeroes_are_read_where_they_are_no_holes(disk: Watched) -> None:
    disk.write_zeroes(0, 2 * B)
    length = READ_BYTES + MIB
    disk.write(3 * B, memoryview(bytes(length)))
    assert read_back(disk, written(disk, zeroes=((0, 2 * B), (3 * B, length)))) == 2 * B + length
    assert disk.read == [(3 * B, READ_BYTES), (3 * B + READ_BYTES, MIB)]


def test_what_should_be_zero_and_is_not_is_named(disk: Watched) -> None:
    disk.write(0, memoryview(bytes(READ_BYTES + MIB)))
    disk.storage.rot(READ_BYTES + 5)
    with pytest.raises(VerificationFailed) as caught:
        read_back(disk, written(disk, zeroes=((0, READ_BYTES + MIB),)))
    assert caught.value.facts["offset_bytes"] == READ_BYTES


def test_storage_that_cannot_be_read_is_an_error_of_the_disk(disk: Watched) -> None:
    books = written(disk, (0, P))
    disk.storage.fail_next("reading back")
    with pytest.raises(DiskError) as caught:
        read_back(disk, books)
    assert caught.value.facts["offset_bytes"] == 0


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize("ranges", [0, 1, 3, 100])
def test_shares_lose_nothing_and_rise(disk: Watched, count: int, ranges: int) -> None:
    dice = random.Random(ranges)
    runs = [(number * B, dice.randrange(1, B)) for number in range(ranges)]
    zeroes = [(7 * MIB + number * 2 * P, P) for number in range(ranges // 2)]
    books = Written()
    order = dice.sample(runs, len(runs))  # frames are written out of turn
    for offset, length in order:
        content = bytes(disk.storage.content[offset : offset + length])
        books.add_data(to_ranges([(offset, length)]), blake3(content).digest())
    for offset, length in zeroes:
        disk.write_zeroes(offset, length)
        books.add_zeroes(offset, length)
    parts = shares(books, count)
    assert len(parts) <= count
    assert all(part.count for part in parts)
    assert sum(part.size_bytes for part in parts) == books.size_bytes
    assert sum(part.count for part in parts) == books.count
    held = [ranges.tolist() for part in parts for ranges in part.ranges]
    assert [tuple(run) for some in held for run in some] == runs
    assert sorted(run for part in parts for run in part.zeroes) == zeroes
    assert sum(read_back(disk, part) for part in parts) == books.size_bytes  # each proof is still beside its range


def test_shares_are_of_about_the_same_size(disk: Watched) -> None:
    parts = shares(written(disk, *[(number * B, P) for number in range(100)]), 4)
    assert [part.count for part in parts] == [25, 25, 25, 25]


def test_one_huge_range_is_one_share() -> None:
    books = Written()
    books.add_data(to_ranges([(0, 4 * MIB), (4 * MIB, P)]), bytes(64))
    assert sum(part.count for part in shares(books, 4)) == 2
    assert np.concatenate([part.ranges[0] for part in shares(books, 4)]).tolist() == [[0, 4 * MIB], [4 * MIB, P]]


def test_nothing_written_has_no_shares() -> None:
    assert shares(Written(), 4) == []
