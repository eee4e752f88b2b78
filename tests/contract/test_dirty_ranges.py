"""What every record of what was written must tell: QEMU's bitmaps of closed images, several of them joined, and the
fake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.disk.dirty import BITMAP_CONTEXT, DirtyRanges, JoinedDirtyRanges, open_dirty_closed, open_dirty_view, union
from agent.disk.lock import hold_frozen
from agent.disk.qemu_nbd import EXPORT, QemuNbd
from agent.errors import DiskError
from tests.contract.disk_backends import run
from tests.fakes.memory_dirty import MemoryDirtyRanges

K, MIB, TIB = 1024, 1 << 20, 1 << 40
B = 64 * K
Record = Callable[[int, list[tuple[int, int]]], DirtyRanges]
"""Makes a record of a disk of that size to which those runs were written."""


def image(path: Path, size_bytes: int) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(size_bytes))
    return path


def write(path: Path, *runs: tuple[int, int]) -> None:
    for offset, length in runs:
        run("qemu-io", "-f", "qcow2", "-c", f"write -q -z {offset} {length}", path)


def add_bitmap(path: Path, name: str) -> None:
    run("qemu-img", "bitmap", "--add", path, name)


@pytest.fixture(params=["memory", "joined memory", "closed image", "two bitmaps", "export"])
def record(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Record]:
    with ExitStack() as opened:

        def made(size_bytes: int, runs: list[tuple[int, int]]) -> DirtyRanges:
            dirty = make(request.param, tmp_path, opened, size_bytes, runs)
            opened.callback(dirty.close)
            return dirty

        yield made


def make(kind: str, folder: Path, opened: ExitStack, size_bytes: int, runs: list[tuple[int, int]]) -> DirtyRanges:
    if kind == "memory":
        return MemoryDirtyRanges(size_bytes, runs)
    if kind == "joined memory":
        return JoinedDirtyRanges([MemoryDirtyRanges(size_bytes, runs[::2]), MemoryDirtyRanges(size_bytes, runs[1::2])])
    path = image(folder / "disk.qcow2", size_bytes)
    add_bitmap(path, "failback-1")
    half = len(runs) // 2 if kind == "two bitmaps" else 0
    write(path, *runs[:half])
    if kind == "two bitmaps":  # as libvirt does: the next checkpoint records, the former stands still
        run("qemu-img", "bitmap", "--disable", path, "failback-1")
        add_bitmap(path, "failback-2")
    write(path, *runs[half:])
    opened.callback(hold_frozen(path).close)
    if kind == "export":
        server = QemuNbd.start("vda", path, "qcow2", folder, bitmap="failback-1")
        opened.callback(server.stop)
        return open_dirty_view("vda", server.socket, EXPORT, BITMAP_CONTEXT + "failback-1")
    names = ["failback-1", "failback-2"] if kind == "two bitmaps" else ["failback-1"]
    return open_dirty_closed("vda", path, "qcow2", names, folder)


def test_it_tells_what_was_written_and_nothing_else(record: Record) -> None:
    dirty = record(16 * MIB, [(0, B), (3 * MIB, 2 * B), (9 * MIB, B), (16 * MIB - B, B)])
    assert dirty.size_bytes == 16 * MIB
    assert dirty.rung == "bitmap"
    everything = [(0, B), (3 * MIB, 2 * B), (9 * MIB, B), (16 * MIB - B, B)]
    assert list(dirty.ranges(0, 16 * MIB)) == everything
    assert list(dirty.ranges(0, 16 * MIB)) == everything  # as often as it is asked


def test_it_tells_only_of_the_run_that_is_asked_about(record: Record) -> None:
    dirty = record(16 * MIB, [(0, B), (3 * MIB, 2 * B)])
    assert list(dirty.ranges(3 * MIB + B, 5 * MIB)) == [(3 * MIB + B, B)]
    assert list(dirty.ranges(B, 2 * MIB)) == []
    assert list(dirty.ranges(B, 0)) == []


def test_a_disk_nobody_wrote_to_has_no_ranges(record: Record) -> None:
    assert list(record(4 * MIB, []).ranges(0, 4 * MIB)) == []


def test_a_giant_disk_is_told_of_in_its_dirty_ranges(record: Record) -> None:
    far = 7 * TIB + 5 * MIB
    dirty = record(8 * TIB, [(MIB, B), (far, B)])
    first, second = dirty.ranges(0, 8 * TIB)
    # Of a disk of 8 TiB QEMU may record more coarsely.
    assert first[0] <= MIB < first[0] + first[1] <= far
    assert second[0] <= far < second[0] + second[1]


def test_a_run_off_the_disk_is_refused(record: Record) -> None:
    dirty = record(4 * MIB, [])
    with pytest.raises(DiskError, match="outside the disk"):
        dirty.ranges(MIB, 4 * MIB)


def test_closed_it_refuses_and_may_be_closed_again(record: Record) -> None:
    dirty = record(4 * MIB, [(0, B)])
    dirty.close()
    dirty.close()
    with pytest.raises(DiskError, match="closed"):
        list(dirty.ranges(0, MIB))


def test_a_bitmap_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = image(tmp_path / "disk.qcow2", MIB)
    add_bitmap(path, "failback-1")
    with pytest.raises(DiskError, match="failback-2"):
        open_dirty_closed("vda", path, "qcow2", ["failback-1", "failback-2"], tmp_path)
    assert not list(tmp_path.glob("nbd-*"))  # the server of the first is gone as well


def test_an_inconsistent_bitmap_is_an_error(tmp_path: Path) -> None:
    path = image(tmp_path / "disk.qcow2", MIB)
    add_bitmap(path, "failback-1")
    mark_in_use(path)
    with pytest.raises(DiskError, match="inconsistent"):
        open_dirty_closed("vda", path, "qcow2", ["failback-1"], tmp_path)


def test_an_export_without_the_bitmap_is_an_error(tmp_path: Path) -> None:
    path = image(tmp_path / "disk.qcow2", MIB)
    server = QemuNbd.start("vda", path, "qcow2", tmp_path)
    try:
        with pytest.raises(DiskError, match="no context"):
            open_dirty_view("vda", server.socket, EXPORT, BITMAP_CONTEXT + "failback-1")
    finally:
        server.stop()


def test_reading_a_bitmap_leaves_the_image_as_it_is(tmp_path: Path) -> None:
    path = image(tmp_path / "disk.qcow2", MIB)
    add_bitmap(path, "failback-1")
    write(path, (0, B))
    before = path.read_bytes(), path.stat().st_mtime_ns
    dirty = open_dirty_closed("vda", path, "qcow2", ["failback-1"], tmp_path)
    assert list(dirty.ranges(0, MIB)) == [(0, B)]
    dirty.close()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def mark_in_use(path: Path) -> None:
    """As a QEMU leaves it that was killed: flag 1 of the entry in the bitmap directory (QEMU docs/interop/qcow2.txt,
    "Bitmaps extension": type 0x23852875, directory at byte 16 of its data; flags at byte 12 of an entry)."""
    data = bytearray(path.read_bytes())
    at = data.index(bytes.fromhex("23852875")) + 8
    entry = int.from_bytes(data[at + 16 : at + 24], "big")
    data[entry + 15] |= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("rows", "together"),
    [
        pytest.param([[], []], [], id="nothing"),
        pytest.param([[(0, 2), (4, 2)], [(1, 2)]], [(0, 3), (4, 2)], id="overlapping"),
        pytest.param([[(0, 2)], [(2, 2)]], [(0, 4)], id="adjoining"),
        pytest.param([[(0, 9)], [(1, 2), (4, 1)]], [(0, 9)], id="one inside the other"),
        pytest.param([[(5, 1)], [(0, 1)], [(3, 1)]], [(0, 1), (3, 1), (5, 1)], id="three rows"),
    ],
)
def test_rows_of_ranges_are_united(rows: list[list[tuple[int, int]]], together: list[tuple[int, int]]) -> None:
    assert list(union([iter(row) for row in rows])) == together
