"""What the map of an image is asked for while a server writes the image, and what not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from agent.disk.beside import UNIT_BYTES, ReaderBeside
from agent.disk.runs import Run
from agent.errors import DiskError
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage

SIZE_BYTES = 8 * UNIT_BYTES


class Watched(MemoryDisk):
    """Counts what it is asked, and does `meanwhile` in the middle of it."""

    asked = 0
    meanwhile: ReaderBeside | None = None
    fails = False

    def read_runs(self, runs: Sequence[Run], buffer: memoryview) -> None:
        self.asked += 1
        if self.fails:
            raise DiskError("Disk vda: gone.", disk="vda")
        if self.meanwhile is not None:
            self.meanwhile.wrote([(0, 512)])
        super().read_runs(runs, buffer)


@pytest.fixture
def disk() -> Watched:
    return Watched("vda", MemoryStorage(SIZE_BYTES))


def reads(reader: ReaderBeside, *runs: Run) -> bool:
    return reader.read_runs(runs, memoryview(bytearray(sum(length for _, length in runs))))


def test_what_was_not_written_is_read_by_it(disk: Watched) -> None:
    reader = ReaderBeside(disk)
    reader.wrote([(UNIT_BYTES, 512)])
    assert reads(reader, (0, UNIT_BYTES))
    assert reads(reader, (2 * UNIT_BYTES, UNIT_BYTES), (SIZE_BYTES - 512, 512))


def test_nothing_of_a_unit_that_was_written_is_asked_of_it(disk: Watched) -> None:
    reader = ReaderBeside(disk)
    reader.wrote([(2 * UNIT_BYTES - 512, 1024), (7 * UNIT_BYTES, 0)])
    assert not reads(reader, (UNIT_BYTES, 512))
    assert not reads(reader, (0, 512), (3 * UNIT_BYTES - 512, 512))
    assert disk.asked == 0
    assert reads(reader, (7 * UNIT_BYTES, 512))


def test_what_is_written_while_it_reads_does_not_count_as_read(disk: Watched) -> None:
    reader = ReaderBeside(disk)
    disk.meanwhile = reader
    assert not reads(reader, (UNIT_BYTES - 512, 512))
    assert reads(reader, (UNIT_BYTES, 512))


def test_a_reader_that_failed_is_not_asked_again(disk: Watched) -> None:
    reader = ReaderBeside(disk)
    disk.fails = True
    assert not reads(reader, (0, 512))
    disk.fails = False
    assert not reads(reader, (0, 512))
    assert disk.asked == 1


def test_extents_end_where_something_was_written(disk: Watched) -> None:
    reader = ReaderBeside(disk)
    reader.wrote([(2 * UNIT_BYTES, 512), (3 * UNIT_BYTES, 512), (6 * UNIT_BYTES, 512)])
    told = reader.extents(512, SIZE_BYTES, most=9)
    assert (told[0].offset_bytes, sum(extent.length_bytes for extent in told)) == (512, 2 * UNIT_BYTES - 512)
    assert reader.extents(2 * UNIT_BYTES, SIZE_BYTES, most=9) == []
    assert reader.written_until(2 * UNIT_BYTES + 512, SIZE_BYTES) == 4 * UNIT_BYTES
    assert reader.written_until(6 * UNIT_BYTES, SIZE_BYTES) == 7 * UNIT_BYTES
    assert reader.written_until(6 * UNIT_BYTES, 6 * UNIT_BYTES + 512) == 6 * UNIT_BYTES + 512


def test_extents_are_asked_elsewhere_once_the_reader_failed(disk: Watched) -> None:
    reader = ReaderBeside(disk)
    disk.fails = True
    assert not reads(reader, (0, 512))
    assert reader.extents(0, SIZE_BYTES, most=9) == []
    assert reader.written_until(0, SIZE_BYTES) == SIZE_BYTES
