"""The page cache of the host is left as it was found, whatever is read, written and read back."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agent.disk import storage
from agent.disk.direct import DirectReader
from agent.disk.lock import hold_exclusive
from agent.disk.open import open_source, open_target
from agent.disk.priority import CLASS_IDLE, priority_class
from agent.disk.raw import RawDisk
from agent.disk.residency import Residency, Run
from agent.disk.seam import Disk
from tests.contract.disk_backends import MIB, loop_device, need_root, run

PAGE = mmap.PAGESIZE
SIZE_BYTES = 24 * MIB
CONTENT = random.Random(1).randbytes(SIZE_BYTES)


@pytest.fixture(params=["file", pytest.param("block", marks=pytest.mark.root)])
def half_cached(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file or block device that is cached in part: some of it whole, some of it page by page, most of it not."""
    image = tmp_path / "image"
    image.write_bytes(CONTENT)
    if request.param == "file":
        cache_some_of(image)
        yield image
        return
    need_root()
    with loop_device(image) as device, device.open("rb"):  # a device that nobody has open has no cache
        cache_some_of(device)
        yield device


def cache_some_of(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        if not missing(path):
            pytest.skip(f"{path} lies on a file system that is the page cache itself")
        os.pread(fd, 5 * MIB, 3 * MIB)
        for offset in range(10 * MIB, 12 * MIB, 3 * PAGE):
            os.pread(fd, PAGE, offset)
        os.pread(fd, PAGE, SIZE_BYTES - PAGE)
    finally:
        os.close(fd)


def missing(path: Path) -> list[Run]:
    """What mincore(2) says is not cached."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return Residency(fd, with_cachestat=False).named(0, SIZE_BYTES)
    finally:
        os.close(fd)


def assert_left_as_it_was(path: Path, before: list[Run]) -> None:
    """Nothing was brought in, and what was cached still is, but for the odd page that the kernel itself reclaimed."""
    was, now = cached_pages(before), cached_pages(missing(path))
    assert not now - was
    assert len(was - now) <= len(was) // 20


def cached_pages(missing_runs: list[Run]) -> set[int]:
    absent = {page for start, end in missing_runs for page in range(start // PAGE, end // PAGE)}
    return set(range(SIZE_BYTES // PAGE)) - absent


def read_all(disk: Disk, step: int, *, shifted: int = 0) -> bytes:
    """Read it from end to end into page-aligned memory, or into memory that is not."""
    found = bytearray()
    with closing(mmap.mmap(-1, step + PAGE)) as memory:
        for offset in range(0, disk.size_bytes, step):
            with memoryview(memory) as whole, whole[shifted : shifted + min(step, disk.size_bytes - offset)] as buffer:
                disk.read_into(offset, buffer)
                found += buffer
    return bytes(found)


@pytest.mark.parametrize(("step", "shifted"), [(8 * MIB, 0), (MIB, 0), (MIB + 77, 0), (8 * MIB, 13), (64 * 1024, 0)])
def test_reading_a_disk_leaves_the_cache_as_it_was(half_cached: Path, step: int, shifted: int) -> None:
    before = missing(half_cached)
    assert len(before) > 100
    with closing(open_source("vda", half_cached, "raw", half_cached.parent)) as disk:
        assert read_all(disk, step, shifted=shifted) == CONTENT
        runs = [(offset, 3 * PAGE + 5) for offset in range(0, SIZE_BYTES - 4 * PAGE, 7 * PAGE)]
        disk.read_runs(runs, memoryview(bytearray(sum(length for _, length in runs))))
    assert_left_as_it_was(half_cached, before)


def test_without_a_way_past_the_cache_it_is_left_as_it_was_too(
    half_cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DirectReader, "of", lambda *_: None)
    before = missing(half_cached)
    with closing(open_source("vda", half_cached, "raw", half_cached.parent)) as disk:
        assert not disk.reads_back_past_cache
        assert read_all(disk, MIB + 77) == CONTENT
        disk.read_back(3 * MIB + 5, memoryview(bytearray(9 * MIB)))
    assert_left_as_it_was(half_cached, before)


def test_writing_flushing_and_reading_back_leave_the_cache_as_it_was(half_cached: Path) -> None:
    before = missing(half_cached)
    with closing(RawDisk.open("vda", half_cached, writable=True)) as disk:
        runs = [(offset, 2 * PAGE + 100) for offset in range(MIB + 50, SIZE_BYTES - 4 * PAGE, 9 * PAGE)]
        data = memoryview(random.Random(2).randbytes(sum(length for _, length in runs)))
        disk.write_runs(runs, data)
        disk.write(0, data[:MIB])
        assert cached_pages(missing(half_cached)) - cached_pages(before)
        disk.flush()
        assert_left_as_it_was(half_cached, before)
        found = bytearray(MIB)
        disk.read_back(0, memoryview(found))
        assert found == data[:MIB]
        disk.read_into(0, memoryview(found))
        assert found == data[:MIB]
    assert_left_as_it_was(half_cached, before)


def test_what_waits_to_be_dropped_is_bounded(half_cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BOOKED_RUNS", 16)
    before = missing(half_cached)
    with closing(RawDisk.open("vda", half_cached, writable=True)) as disk:
        for offset in range(12 * MIB, 20 * MIB, 32 * PAGE):
            disk.write(offset, memoryview(b"x" * PAGE))
        assert len(cached_pages(missing(half_cached)) - cached_pages(before)) < 16  # of 64 written, without a flush
        disk.flush()
    assert_left_as_it_was(half_cached, before)


def test_a_qcow2_image_read_by_its_map_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(CONTENT)
    image = tmp_path / "image"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", image)
    cache_some_of(image)
    before = missing(image)
    with closing(open_source("vda", image, "qcow2", tmp_path)) as disk:
        assert disk.access == "cluster map"
        assert read_all(disk, 8 * MIB) == CONTENT
    assert_left_as_it_was(image, before)


def test_the_tables_of_a_qcow2_image_that_was_not_cached_stay_uncached(tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=full", image, str(SIZE_BYTES))
    cache_some_of(image)
    before = missing(image)
    with closing(open_source("vda", image, "qcow2", tmp_path)) as disk:
        assert len(list(disk.extents(0, SIZE_BYTES))) == 1
    assert_left_as_it_was(image, before)


def test_what_is_not_cached_is_read_from_a_source_at_idle_priority_and_from_a_target_not(
    half_cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int | None] = []
    really = DirectReader.read_into

    def spied(reader: DirectReader, offset_bytes: int, buffer: memoryview) -> None:
        found.append(priority_class())
        really(reader, offset_bytes, buffer)

    before = priority_class()
    with closing(open_source("vda", half_cached, "raw", half_cached.parent)) as disk:
        monkeypatch.setattr(DirectReader, "read_into", spied)
        read_all(disk, MIB)
    assert found
    assert set(found) == {CLASS_IDLE}
    assert priority_class() == before

    monkeypatch.setattr(DirectReader, "read_into", really)
    with closing(hold_exclusive(half_cached)) as held, closing(open_target("vda", held, "raw", Path("/tmp"))) as disk:
        monkeypatch.setattr(DirectReader, "read_into", spied)
        found.clear()
        read_all(disk, MIB)
    assert set(found) == {before}


def test_what_a_broken_pass_has_left_in_the_cache_is_not_taken_for_what_the_storage_holds(half_cached: Path) -> None:
    with closing(hold_exclusive(half_cached)) as held:
        assert cached_pages(missing(half_cached))
        with closing(open_target("vda", held, "raw", half_cached.parent, doubtful=True)) as disk:
            assert not cached_pages(missing(half_cached)), "a read could be answered with what was never stored"
            assert disk.size_bytes == SIZE_BYTES
