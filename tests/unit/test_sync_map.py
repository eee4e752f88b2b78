"""Passes with a digest map: what it knows at the end is what the disk holds, and what it knows is not read again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from agent.delta.blocks import BLOCK_BYTES, PAGE_BYTES
from agent.delta.digest_map import WINDOW_BYTES
from agent.delta.granularity import Granularity
from agent.disk.lock import hold_exclusive
from agent.disk.open import open_target
from agent.disk.seam import Extent
from agent.sync import pass_map, writing
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage
from tests.fakes.sparse_disk import SparseDisk, SparseStorage
from tests.unit.map_house import SIZE, MapHouse, disks, noise

B, P, MIB, TIB = BLOCK_BYTES, PAGE_BYTES, 1 << 20, 1 << 40


@pytest.fixture
def house(tmp_path: Path) -> MapHouse:
    """The map of a small disk."""
    return MapHouse(tmp_path / "a.map", SIZE)


# --- filling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("larger", [0, 5 * B])
async def test_after_a_complete_pass_the_map_knows_the_whole_disk(house: MapHouse, seed: int, larger: int) -> None:
    chance = random.Random(seed)
    source, target = noise(1, SIZE), noise(1, SIZE + larger)
    for storage in (source, target):  # holes, zeroes that are written, scattered pages, in any order
        for _ in range(6):
            at = chance.randrange(SIZE // P) * P
            length = min(chance.choice([P, 3 * P, B, 5 * B]), SIZE - at)
            match chance.randrange(3):
                case 0:
                    MemoryDisk("vda", storage).write_zeroes(at, length)
                case 1:
                    storage.content[at : at + length] = bytes(length)
                case _:
                    storage.content[at : at + length] = chance.randbytes(length)
                    storage.allocate(at, length)
    granularity = chance.choice([None, Granularity(B, P), Granularity(4 * B, B), Granularity(B, B)])
    run = await house.run(*disks(source, target), granularity=granularity, lanes=chance.choice([1, 3]))
    assert run.complete, (run.source_failure, run.target_failure)
    assert target.content[:SIZE] == source.content
    assert house.known_bytes == SIZE
    assert house.agrees_with(bytes(target.content))
    assert house.header.view == "v1"
    assert run.target.report().rung == "digests"


async def test_the_digest_of_what_was_written_is_of_what_was_read_back(house: MapHouse) -> None:
    source, target = noise(1, SIZE), noise(1, SIZE)
    target.content[7 * B : 7 * B + P] = bytes(P)
    target.rot(7 * B + 2 * P)  # in the same block, where nothing is written
    run = await house.run(*disks(source, target))
    assert run.complete
    assert run.target.written_bytes == P
    stored = bytearray(target.content)
    stored[7 * B + 2 * P] ^= 1
    assert house.agrees_with(bytes(stored))


@pytest.mark.parametrize("at_once", [1, 3])
async def test_holes_that_are_told_in_small_pieces_are_known_as_well(
    house: MapHouse, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(writing, "EXTENTS_AT_ONCE", at_once)

    class Crumbs(MemoryDisk):
        """Tells its extents page by page."""

        def extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
            for extent in super().extents(offset_bytes, length_bytes):
                end = extent.offset_bytes + extent.length_bytes
                for at in range(extent.offset_bytes, end, P):
                    yield Extent(at, min(P, end - at), extent.zero)

    source, target = MemoryStorage(SIZE), MemoryStorage(SIZE)
    MemoryDisk("vda", target).write(3 * B + P, memoryview(b"x" * P))
    run = await house.run(MemoryDisk("vda", source), Crumbs("vda", target))
    assert run.complete
    assert house.known_bytes == SIZE
    assert house.agrees_with(bytes(SIZE))


# --- not reading what is known ----------------------------------------------------------------------------------------


async def test_a_second_pass_over_an_equal_disk_reads_nothing_at_the_target(tmp_path: Path) -> None:
    size = 200 * MIB
    house = MapHouse(tmp_path / "a.map", size)
    blocks = {number: random.Random(number % 7).randbytes(B) for number in range(200 * MIB // B)}
    source = SparseDisk("vda", SparseStorage(size, blocks), writable=False)
    target = SparseDisk("vda", SparseStorage(size, blocks))
    first = await house.run(source, target)
    assert first.complete
    assert target.read_bytes == size
    again = SparseDisk("vda", target.storage)
    second = await house.run(source, again)
    assert second.complete
    assert again.read_bytes == 0
    assert not {"reading", "reading back", "writing", "zeroing"} & set(again.requests)
    assert second.target.report().rung == "map"
    assert second.target.mapped_bytes == size
    assert second.target.report().compared_bytes == 0
    assert house.known_bytes == size


async def test_of_what_changed_only_superblocks_whose_pages_are_wanted_are_read(tmp_path: Path) -> None:
    size = 64 * MIB
    house = MapHouse(tmp_path / "a.map", size)
    blocks = {number: random.Random(number % 7).randbytes(B) for number in range(64 * MIB // B)}
    source, target = SparseDisk("vda", SparseStorage(size, blocks)), SparseDisk("vda", SparseStorage(size, blocks))
    await house.run(source, target)
    source.storage.write(10 * MIB + 5, b"changed")
    source.storage.write(20 * MIB + 5, b"changed")
    again = SparseDisk("vda", target.storage)
    run = await house.run(source, again, granularity=Granularity(B, P))
    assert run.complete
    assert run.target.compared_bytes == 2 * B
    assert run.source.changed_bytes == 2 * P
    blockwise = await house.run(source, SparseDisk("vda", target.storage), granularity=Granularity(B, B))
    assert blockwise.target.compared_bytes == 0
    assert house.agrees_with(source.storage.read(0, size))


async def test_details_that_are_blocks_come_from_the_map(house: MapHouse) -> None:
    source, target = noise(1, SIZE), noise(1, SIZE)
    await house.run(*disks(source, target))
    source.content[9 * B + 1] ^= 1
    run = await house.run(*disks(source, target), granularity=Granularity(4 * B, B))
    assert run.complete
    assert target.content == source.content
    assert run.target.compared_bytes == 0
    assert run.source.changed_bytes == B
    assert house.agrees_with(bytes(source.content))


async def test_what_the_map_knows_as_zeroes_is_told_as_empty(house: MapHouse) -> None:
    source, target = MemoryStorage(SIZE), MemoryStorage(SIZE)
    assert (await house.run(*disks(source, target))).complete
    assert house.known_bytes == SIZE
    MemoryDisk("vda", source).write(3 * B, memoryview(random.Random(3).randbytes(2 * B)))
    target.allocate(3 * B, 2 * B)  # zeroes, but no hole any more
    run = await house.run(*disks(source, target), granularity=Granularity(B, P))
    assert run.complete
    assert run.target.compared_bytes == 0
    assert target.content == source.content
    assert house.agrees_with(bytes(source.content))


async def test_only_what_the_map_does_not_know_is_read(house: MapHouse) -> None:
    source, target = noise(1, SIZE), noise(1, SIZE)
    await house.run(*disks(source, target))
    some = house.begin()
    some._window(0).forget(4, 9)
    assert some.settle(None, None)
    run = await house.run(*disks(source, target))
    assert run.complete
    assert run.target.compared_bytes == 5 * B
    assert run.target.report().rung == "map"
    assert house.known_bytes == SIZE
    assert house.agrees_with(bytes(source.content))


# --- sparse disks -----------------------------------------------------------------------------------------------------


async def test_the_map_of_a_sparse_disk_of_eight_tib_is_small_and_whole(tmp_path: Path) -> None:
    house = MapHouse(tmp_path / "a.map", 8 * TIB)
    blocks = {number: random.Random(number).randbytes(B) for number in range(2**24, 2**24 + 64)}
    source = SparseDisk("vda", SparseStorage(8 * TIB, blocks), writable=False)
    target = SparseDisk("vda", SparseStorage(8 * TIB, {5: b"x" * B}))
    run = await house.run(source, target)
    assert run.complete
    assert house.known_bytes == 8 * TIB
    assert house.path.stat().st_blocks * 512 <= 34 * MIB  # its records
    again = SparseDisk("vda", target.storage)
    assert (await house.run(source, again)).complete
    assert again.read_bytes == 0


def test_memory_is_bounded_by_the_windows_in_it(tmp_path: Path) -> None:
    size = 300 * WINDOW_BYTES
    digest_map = MapHouse(tmp_path / "a.map", size).begin()
    for number in range(300):
        digest_map.enter([(number * WINDOW_BYTES + B, B)], [bytes([number % 256]) * 16])
        assert len(digest_map._windows) <= pass_map.CACHED_WINDOWS
    assert digest_map.known_bytes == 300 * B
    entries, known = digest_map.look_up([(7 * WINDOW_BYTES, 3 * B)])
    assert known.tolist() == [False, True, False]
    assert entries[1].tobytes() == bytes([7]) * 16


async def test_a_qcow2_target_is_known_by_what_was_read_back_through_its_server(
    house: MapHouse, tmp_path: Path
) -> None:
    house.size_bytes = size = 64 * B
    image = tmp_path / "t.qcow2"
    await trio.run_process(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(size)])
    source = noise(1, size)
    MemoryDisk("vda", source).write_zeroes(20 * B + P, 10 * B)
    held = hold_exclusive(image)
    try:
        for number in range(3):
            target = open_target("vda", held, "qcow2", tmp_path)
            run = await house.run(MemoryDisk("vda", source, writable=False), target, granularity=Granularity(B, P))
            assert run.complete, run.target_failure
            assert run.target.compared_bytes == (0, 0, B)[number]  # nothing; by the map; the block whose pages are told
            target.close()
            assert house.known_bytes == size
            reopened = open_target("vda", held, "qcow2", tmp_path)
            content = bytearray(size)
            reopened.read_into(0, memoryview(content))
            reopened.close()
            assert content == source.content
            assert house.agrees_with(bytes(content))
            if number == 1:
                source.content[3 * B + P : 3 * B + 2 * P] = bytes(P)
    finally:
        held.close()
