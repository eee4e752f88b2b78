"""What the page cache holds: counted by cachestat, named by mincore, and both agree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.disk import residency
from agent.disk.residency import PAGE_BYTES, Residency

PAGES = 64


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file whose last page is half a page, nothing of it cached."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * (PAGES * PAGE_BYTES - PAGE_BYTES // 2))
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    if not Residency(fd, with_cachestat=False).missing(0, PAGE_BYTES):
        pytest.skip(f"{path} lies on a file system that is the page cache itself")
    yield fd
    os.close(fd)


def touch(fd: int, page: int) -> None:
    os.pread(fd, 1, page * PAGE_BYTES)


@pytest.mark.parametrize("with_cachestat", [True, False])
def test_missing_pages_are_named_in_runs_of_whole_pages(fd: int, with_cachestat: bool) -> None:
    asked = Residency(fd, with_cachestat=with_cachestat)
    end = PAGES * PAGE_BYTES
    assert asked.missing(0, end) == [(0, end)]
    assert asked.missing(PAGE_BYTES + 1, PAGE_BYTES + 2) == [(PAGE_BYTES, 2 * PAGE_BYTES)]
    assert asked.missing(7, 7) == [(0, PAGE_BYTES)]
    assert asked.missing(0, 0) == []
    for page in (0, 5, 6, PAGES - 1):
        touch(fd, page)
    assert asked.missing(0, end) == [
        (PAGE_BYTES, 5 * PAGE_BYTES),
        (7 * PAGE_BYTES, (PAGES - 1) * PAGE_BYTES),
    ]
    assert asked.missing(5 * PAGE_BYTES + 9, 7 * PAGE_BYTES) == []
    assert asked.missing((PAGES - 1) * PAGE_BYTES, end - 5000) == []


def test_a_long_range_is_named_over_many_mappings(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_MAPPED_BYTES", 4 * PAGE_BYTES)
    touch(fd, 9)
    assert Residency(fd, with_cachestat=False).missing(0, PAGES * PAGE_BYTES) == [
        (0, 9 * PAGE_BYTES),
        (10 * PAGE_BYTES, PAGES * PAGE_BYTES),
    ]


def test_a_kernel_without_cachestat_is_asked_page_by_page(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_CACHESTAT", 100_000)  # a number no kernel knows: ENOSYS
    asked = Residency(fd)
    touch(fd, 1)
    for _ in range(2):
        assert asked.missing(0, 3 * PAGE_BYTES) == [(0, PAGE_BYTES), (2 * PAGE_BYTES, 3 * PAGE_BYTES)]


def test_without_cachestat_a_long_range_is_sampled_before_it_is_named(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_SAMPLE_BYTES", 8 * PAGE_BYTES)
    asked = Residency(fd, with_cachestat=False)
    end = PAGES * PAGE_BYTES
    assert asked.missing(0, end) == [(0, end)]
    for page in (*range(0, PAGES, 8), PAGES - 1):
        touch(fd, page)
    assert asked.missing(0, end) == []  # mostly cached, as far as it looked
    assert asked.missing(PAGE_BYTES, 3 * PAGE_BYTES) == [(PAGE_BYTES, 3 * PAGE_BYTES)]


def test_a_descriptor_that_cannot_be_mapped_is_an_error() -> None:
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(OSError, match=r"No such device|Illegal seek|Invalid"):
            Residency(read_end, with_cachestat=False).missing(0, 1)
    finally:
        os.close(read_end)
        os.close(write_end)
