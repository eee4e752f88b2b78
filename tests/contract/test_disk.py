"""What every `Disk` must do, the in-memory one of the tests included."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.disk.seam import Disk, Extent
from agent.errors import DiskError
from tests.contract.disk_backends import KINDS, MIB, Storage, storage_of

BLOCK = 64 * 1024

Request = Callable[[Disk, int, int], object]

READING: dict[str, Request] = {
    "read_into": lambda disk, offset, length: disk.read_into(offset, memoryview(bytearray(length))),
    "read_back": lambda disk, offset, length: disk.read_back(offset, memoryview(bytearray(length))),
    "read_runs": lambda disk, offset, length: disk.read_runs([(offset, length)], memoryview(bytearray(length))),
    "read_back_runs": lambda disk, offset, length: disk.read_back_runs(
        [(offset, length)], memoryview(bytearray(length))
    ),
    "extents": lambda disk, offset, length: list(disk.extents(offset, length)),
}
WRITING: dict[str, Request] = {
    "write": lambda disk, offset, length: disk.write(offset, memoryview(bytes(length))),
    "write_runs": lambda disk, offset, length: disk.write_runs([(offset, length)], memoryview(bytes(length))),
    "write_zeroes": lambda disk, offset, length: disk.write_zeroes(offset, length),
}
ALL = READING | WRITING


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    with storage_of(request.param, tmp_path) as storage:
        yield storage


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def read(disk: Disk, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xaa" * length)
    disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def read_back(disk: Disk, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xaa" * length)
    disk.read_back(offset, memoryview(buffer))
    return bytes(buffer)


def assert_adjoining(extents: list[Extent], offset: int, length: int) -> None:
    for extent in extents:
        assert extent.offset_bytes == offset
        assert extent.length_bytes >= 1
        offset, length = offset + extent.length_bytes, length - extent.length_bytes
    assert length == 0


def test_a_disk_knows_its_name_and_its_size(storage: Storage) -> None:
    disk = storage.open(False)
    assert disk.name == "vda"
    assert disk.size_bytes == storage.size_bytes


def test_an_empty_disk_reads_as_zero_in_one_large_request(storage: Storage) -> None:
    disk = storage.open(False)
    assert read(disk, 0, storage.size_bytes) == bytes(storage.size_bytes)


def test_an_empty_disk_is_one_zero_extent_where_the_storage_tells(storage: Storage) -> None:
    extents = list(storage.open(False).extents(0, storage.size_bytes))
    assert extents == [Extent(0, storage.size_bytes, zero=storage.tells_zeroes)]


@pytest.mark.parametrize("offset", [0, 1, 511, 4095, BLOCK - 1, 3 * MIB + 77])
def test_what_is_written_is_read_and_its_neighbours_stay(storage: Storage, offset: int) -> None:
    disk = storage.open(True)
    before = noise(8 * BLOCK, seed=1)
    disk.write(max(0, offset - BLOCK), memoryview(before))
    data = noise(3 * BLOCK + 13)
    disk.write(offset, memoryview(data))
    expected = bytearray(storage.size_bytes)
    start = max(0, offset - BLOCK)
    expected[start : start + len(before)] = before
    expected[offset : offset + len(data)] = data
    assert read(disk, 0, storage.size_bytes) == bytes(expected)
    assert read(disk, offset, len(data)) == data


def test_the_last_byte_can_be_written_and_read(storage: Storage) -> None:
    disk = storage.open(True)
    disk.write(storage.size_bytes - 1, memoryview(b"x"))
    assert read(disk, storage.size_bytes - 2, 2) == b"\0x"


def test_a_whole_disk_is_written_in_one_request(storage: Storage) -> None:
    disk = storage.open(True)
    data = noise(storage.size_bytes)
    disk.write(0, memoryview(data))
    disk.flush()
    assert read(disk, 0, storage.size_bytes) == data
    assert read_back(disk, 0, storage.size_bytes) == data


def scattered(size: int, seed: int) -> list[tuple[int, int]]:
    """Runs of a batch: small and large, some adjoining, some empty, up to the disk's last byte."""
    chance = random.Random(seed)
    runs, at = [], 0
    while at < size - 3 * BLOCK:
        at += chance.choice((0, 0, 1, 4096, 20_000))
        runs.append((at, chance.choice((0, 1, 4096, 4096, 4096, 2 * BLOCK + 1))))
        at += runs[-1][1]
    return [*runs, (size - 1, 1)]


def test_a_batch_of_runs_is_read_end_to_end(storage: Storage) -> None:
    disk = storage.open(True)
    content = noise(storage.size_bytes)
    disk.write(0, memoryview(content))
    runs = scattered(storage.size_bytes, seed=1)
    found = memoryview(bytearray(b"\xaa" * sum(length for _, length in runs)))
    disk.read_runs(runs, found)
    assert found == b"".join(content[offset : offset + length] for offset, length in runs)
    disk.flush()
    found[:] = bytes(found.nbytes)
    disk.read_back_runs(runs, found)
    assert found == b"".join(content[offset : offset + length] for offset, length in runs)


def test_a_batch_of_runs_is_written_and_nothing_between_them(storage: Storage) -> None:
    disk = storage.open(True)
    expected = bytearray(noise(storage.size_bytes, seed=1))
    disk.write(0, memoryview(expected))
    runs = scattered(storage.size_bytes, seed=2)
    data = noise(sum(length for _, length in runs), seed=2)
    at = 0
    for offset, length in runs:
        expected[offset : offset + length] = data[at : at + length]
        at += length
    disk.write_runs(runs, memoryview(data))
    disk.flush()
    assert read(disk, 0, storage.size_bytes) == expected
    assert read_back(disk, 0, storage.size_bytes) == expected


def test_thousands_of_small_writes_go_out_in_one_batch(storage: Storage) -> None:
    disk = storage.open(True)
    runs = [(offset, 512) for offset in range(0, 8 * MIB, 4096)]
    data = noise(512 * len(runs))
    disk.write_runs(runs, memoryview(data))
    found = memoryview(bytearray(len(data)))
    disk.read_runs(runs, found)
    assert found == data


def test_an_empty_batch_does_nothing(storage: Storage) -> None:
    disk = storage.open(True)
    disk.read_runs([], memoryview(bytearray()))
    disk.write_runs([], memoryview(b""))


@pytest.mark.parametrize(
    ("runs", "length", "why"),
    [
        ([(0, 512), (2**40, 512)], 1024, "outside the disk's"),
        ([(0, 512), (-5, 5)], 517, "outside the disk's"),
        ([(0, 512), (1024, -512)], 0, "outside the disk's"),
        ([(0, 1024), (512, 1024)], 2048, "must rise and not overlap"),
        ([(4096, 512), (0, 512)], 1024, "must rise and not overlap"),
        ([(0, 512), (4096, 512)], 1025, "have 1024 bytes and their buffer 1025"),
        ([], 1, "have 0 bytes and their buffer 1"),
    ],
)
def test_a_batch_is_validated_whole_before_its_first_byte(
    storage: Storage, runs: list[tuple[int, int]], length: int, why: str
) -> None:
    disk = storage.open(True)
    with pytest.raises(DiskError, match=rf"^Disk vda .*refused: .*{why}") as caught:
        disk.write_runs(runs, memoryview(b"x" * length))
    assert caught.value.facts["disk"] == "vda"
    assert read(disk, 0, 8192) == bytes(8192)
    with pytest.raises(DiskError, match=why):
        disk.read_runs(runs, memoryview(bytearray(length)))


def test_a_disk_says_how_it_is_reached_and_by_how_many_at_once(storage: Storage) -> None:
    disk = storage.open(False)
    assert disk.access
    assert 1 <= disk.readers <= 16


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, BLOCK), (1, 1), (100, 300), (511, 4098), (4096, 4096), (BLOCK + 5, 2 * BLOCK), (3 * BLOCK, MIB)],
)
def test_zeroing_zeroes_exactly_the_run(storage: Storage, offset: int, length: int) -> None:
    disk = storage.open(True)
    data = noise(2 * MIB)
    disk.write(0, memoryview(data))
    disk.write_zeroes(offset, length)
    assert read(disk, 0, 2 * MIB) == data[:offset] + bytes(length) + data[offset + length :]
    disk.flush()
    assert read_back(disk, 0, 2 * MIB) == data[:offset] + bytes(length) + data[offset + length :]


def test_zeroing_reaches_the_end_of_the_disk(storage: Storage) -> None:
    disk = storage.open(True)
    disk.write(0, memoryview(noise(storage.size_bytes)))
    disk.write_zeroes(5 * MIB + 1, storage.size_bytes - 5 * MIB - 1)
    assert read(disk, 5 * MIB + 1, storage.size_bytes - 5 * MIB - 1) == bytes(storage.size_bytes - 5 * MIB - 1)
    assert read(disk, 5 * MIB, 1) != b"\0"
    disk.write_zeroes(0, storage.size_bytes)
    assert read(disk, 0, storage.size_bytes) == bytes(storage.size_bytes)


def test_extents_tell_data_and_zeroes_exactly(storage: Storage) -> None:
    disk = storage.open(True)
    disk.write(BLOCK, memoryview(noise(2 * BLOCK)))
    disk.write(32 * BLOCK, memoryview(noise(BLOCK)))
    disk.write_zeroes(2 * BLOCK, BLOCK)
    disk.flush()
    extents = list(disk.extents(0, storage.size_bytes))
    assert_adjoining(extents, 0, storage.size_bytes)
    data = [(extent.offset_bytes, extent.length_bytes) for extent in extents if not extent.zero]
    if storage.tells_zeroes:
        assert data == [(BLOCK, BLOCK), (32 * BLOCK, BLOCK)]
    else:
        assert data == [(0, storage.size_bytes)]


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (0, 1), (BLOCK - 1, 2), (BLOCK + 7, 5), (BLOCK // 2, 3 * BLOCK), (7 * MIB, 3 * MIB)]
)
def test_extents_of_a_part_are_clipped_to_it(storage: Storage, offset: int, length: int) -> None:
    disk = storage.open(True)
    disk.write(BLOCK, memoryview(noise(BLOCK)))
    extents = list(disk.extents(offset, length))
    assert_adjoining(extents, offset, length)
    content = read(disk, offset, length)
    for extent in extents:
        if extent.zero:
            start = extent.offset_bytes - offset
            assert content[start : start + extent.length_bytes] == bytes(extent.length_bytes)


def test_zero_extents_never_cover_data_whatever_was_written(storage: Storage) -> None:
    disk = storage.open(True)
    chance = random.Random(3)
    for _ in range(40):
        length = chance.randrange(1, 2 * BLOCK)
        offset = chance.randrange(storage.size_bytes - length)
        if chance.random() < 0.4:
            disk.write_zeroes(offset, length)
        else:
            disk.write(offset, memoryview(chance.randbytes(length)))
    extents = list(disk.extents(0, storage.size_bytes))
    assert_adjoining(extents, 0, storage.size_bytes)
    for extent in extents:
        if extent.zero:
            assert read(disk, extent.offset_bytes, extent.length_bytes) == bytes(extent.length_bytes)


def test_flushed_writes_are_there_when_the_disk_is_opened_anew(storage: Storage) -> None:
    data = noise(BLOCK + 3)
    disk = storage.open(True)
    disk.write(storage.size_bytes - len(data), memoryview(data))
    disk.flush()
    disk.close()
    again = storage.open(False)
    assert read(again, storage.size_bytes - len(data), len(data)) == data


@pytest.mark.parametrize("length", [1, 511, 4096, 5000, BLOCK, MIB + 1])
@pytest.mark.parametrize("distance", [0, 1, 517, 4097])
def test_reading_back_works_at_any_offset_and_at_the_end(storage: Storage, length: int, distance: int) -> None:
    disk = storage.open(True)
    start = storage.size_bytes - 2 * MIB
    data = noise(2 * MIB)
    disk.write(start, memoryview(data))
    disk.flush()
    at = 2 * MIB - distance - length
    assert read_back(disk, start + at, length) == data[at : at + length]


def test_reading_back_sees_what_was_written_before_it_was_flushed(storage: Storage) -> None:
    disk = storage.open(True)
    data = noise(3 * BLOCK)
    disk.write(777, memoryview(data))
    assert read_back(disk, 777, len(data)) == data


def test_reading_back_goes_past_the_cache_here(storage: Storage) -> None:
    assert storage.open(False).reads_back_past_cache


def test_empty_requests_do_nothing(storage: Storage) -> None:
    disk = storage.open(True)
    for request in ALL.values():
        request(disk, storage.size_bytes, 0)
    assert read(disk, storage.size_bytes - 1, 1) == b"\0"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("past_end", "length"), [(1, 1), (-1, 2), (0, 1), (10**15, 512)])
def test_requests_behind_the_end_are_refused(storage: Storage, name: str, past_end: int, length: int) -> None:
    disk = storage.open(True)
    offset = storage.size_bytes + past_end
    with pytest.raises(DiskError, match=rf"^Disk vda .*outside the disk's {storage.size_bytes} bytes") as caught:
        ALL[name](disk, offset, length)
    assert caught.value.facts["disk"] == "vda"
    assert caught.value.facts["offset_bytes"] == offset
    assert caught.value.facts["length_bytes"] == length
    assert read(disk, storage.size_bytes - 2, 2) == b"\0\0"


@pytest.mark.parametrize("name", ALL)
def test_negative_offsets_are_refused(storage: Storage, name: str) -> None:
    with pytest.raises(DiskError, match="outside"):
        ALL[name](storage.open(True), -1, 1)


@pytest.mark.parametrize("name", WRITING)
def test_a_disk_opened_for_reading_refuses_to_write(storage: Storage, name: str) -> None:
    disk = storage.open(False)
    with pytest.raises(DiskError, match="reading only"):
        WRITING[name](disk, 0, 512)
    assert read(disk, 0, 512) == bytes(512)


def test_a_disk_opened_for_reading_has_nothing_to_flush(storage: Storage) -> None:
    storage.open(False).flush()


@pytest.mark.parametrize("name", ALL)
def test_a_closed_disk_refuses_everything(storage: Storage, name: str) -> None:
    disk = storage.open(True)
    disk.close()
    with pytest.raises(DiskError, match="closed"):
        ALL[name](disk, 0, 512)


def test_a_closed_disk_refuses_to_flush(storage: Storage) -> None:
    disk = storage.open(True)
    disk.close()
    with pytest.raises(DiskError, match="closed"):
        disk.flush()


def test_closing_again_is_harmless(storage: Storage) -> None:
    disk = storage.open(True)
    disk.close()
    disk.close()


def test_many_threads_read_and_write_at_once(storage: Storage) -> None:
    disk = storage.open(True)
    parts = [noise(MIB, seed=part) for part in range(9)]
    with ThreadPoolExecutor(9) as threads:
        list(threads.map(lambda part: disk.write(part * MIB, memoryview(parts[part])), range(9)))
        disk.flush()
        found = list(threads.map(lambda part: read(disk, part % 9 * MIB, MIB), range(36)))
        kept = list(threads.map(lambda part: read_back(disk, part % 9 * MIB, MIB), range(36)))
    assert found == parts * 4
    assert kept == parts * 4


def test_a_disk_is_closed_only_when_nobody_uses_it_any_more(storage: Storage) -> None:
    disk = storage.open(True)
    data = noise(MIB)
    stop = threading.Event()
    outcomes: list[str] = []

    def keep_writing() -> None:
        while not stop.is_set():
            try:
                disk.write(0, memoryview(data))
            except DiskError as error:
                outcomes.append(error.sentence)
                return

    writers = [threading.Thread(target=keep_writing) for _ in range(4)]
    for writer in writers:
        writer.start()
    disk.close()
    for writer in writers:
        writer.join(timeout=30)
    alive = [writer for writer in writers if writer.is_alive()]
    stop.set()
    assert not alive
    assert len(outcomes) == 4
    assert all("closed" in sentence for sentence in outcomes)
