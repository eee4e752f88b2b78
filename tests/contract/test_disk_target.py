"""A qcow2 target: read by its cluster map until the first write, served and written by qemu-nbd from then on."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from agent.disk.lock import HeldImage, hold_exclusive, hold_frozen, image_in_use
from agent.disk.mapped import MappedDisk
from agent.disk.nbd import NbdDisk
from agent.disk.open import open_source, open_target
from agent.disk.qemu_nbd import QemuNbd
from agent.disk.runs import Run
from agent.disk.seam import Disk, Extent
from agent.errors import DiskError
from tests.contract.disk_backends import MIB, run

SIZE_BYTES = 16 * MIB
CONTENT = random.Random(1).randbytes(6 * MIB)
NOISE = memoryview(random.Random(2).randbytes(MIB))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with data at its beginning and nothing behind."""
    (tmp_path / "raw").write_bytes(CONTENT)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", tmp_path / "image")
    run("qemu-img", "resize", "-q", "-f", "qcow2", tmp_path / "image", str(SIZE_BYTES))
    (tmp_path / "raw").unlink()
    return tmp_path / "image"


@pytest.fixture
def held(image: Path) -> Iterator[HeldImage]:
    with closing(hold_exclusive(image)) as held:
        yield held


@pytest.fixture
def target(held: HeldImage) -> Iterator[Disk]:
    with closing(open_target("vda", held, "qcow2", held.path.parent)) as disk:
        yield disk


def read(disk: Disk, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def sockets(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_socket()]


def test_a_target_that_is_only_read_is_never_served_and_not_touched(image: Path, held: HeldImage) -> None:
    before = image.stat()
    with closing(open_target("vda", held, "qcow2", image.parent)) as disk:
        assert disk.access == "cluster map"
        assert read(disk, 0, SIZE_BYTES) == CONTENT + bytes(SIZE_BYTES - len(CONTENT))
        assert list(disk.extents(0, SIZE_BYTES)) == [
            Extent(0, len(CONTENT), zero=False),
            Extent(len(CONTENT), SIZE_BYTES - len(CONTENT), zero=True),
        ]
        found = bytearray(MIB)
        disk.read_back(MIB, memoryview(found))
        assert found == CONTENT[MIB : 2 * MIB]
        disk.flush()
        assert not sockets(image.parent)
    after = image.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


def test_the_first_write_starts_the_server_and_reads_see_what_is_written(
    image: Path, held: HeldImage, target: Disk
) -> None:
    assert read(target, 8 * MIB, MIB) == bytes(MIB)
    target.write(8 * MIB, NOISE)
    assert target.access == "cluster map, and NBD for what was written"
    assert len(sockets(image.parent)) == 1
    assert read(target, 8 * MIB, MIB) == NOISE
    target.write_zeroes(0, 2 * MIB)
    target.write_runs([(3 * MIB, 512), (4 * MIB, 512)], NOISE[:1024])
    target.flush()
    expected = bytearray(CONTENT + bytes(SIZE_BYTES - len(CONTENT)))
    expected[8 * MIB : 9 * MIB] = NOISE
    expected[: 2 * MIB] = bytes(2 * MIB)
    expected[3 * MIB : 3 * MIB + 512] = NOISE[:512]
    expected[4 * MIB : 4 * MIB + 512] = NOISE[512:1024]
    assert read(target, 0, SIZE_BYTES) == expected
    found = bytearray(SIZE_BYTES)
    target.read_back(0, memoryview(found))
    assert found == expected
    zero_before = [extent.zero for extent in target.extents(0, SIZE_BYTES)]
    assert zero_before == [True, False, True, False, True]
    target.close()
    held.close()
    assert not sockets(image.parent)
    assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", image)


def test_the_lock_lives_on_when_the_caller_let_go_before_the_first_write(image: Path, held: HeldImage) -> None:
    disk = open_target("vda", held, "qcow2", image.parent)
    held.close()
    assert image_in_use(image)
    disk.write(0, NOISE)
    assert image_in_use(image)
    disk.close()
    assert not image_in_use(image)
    hold_exclusive(image).close()


def test_what_is_read_while_the_first_write_comes_is_always_right(target: Disk) -> None:
    stop = threading.Event()

    def keep_reading(number: int) -> int:
        chance, rounds = random.Random(number), 0
        while not stop.is_set() or rounds < 20:
            offset = chance.randrange(5 * MIB)
            assert read(target, offset, 64 * 1024) == CONTENT[offset : offset + 64 * 1024]
            rounds += 1
        return rounds

    def write_behind(number: int) -> None:
        target.write((8 + number) * MIB, NOISE)

    with ThreadPoolExecutor(6) as threads:
        readers = [threads.submit(keep_reading, number) for number in range(3)]
        try:
            list(threads.map(write_behind, range(3)))
        finally:
            stop.set()
        assert all(reader.result(timeout=60) >= 20 for reader in readers)
    for number in range(3):
        assert read(target, (8 + number) * MIB, MIB) == NOISE


def test_extents_go_on_when_the_first_write_comes_between_them(target: Disk) -> None:
    told = target.extents(0, SIZE_BYTES)
    first = next(told)
    target.write(15 * MIB, NOISE)
    extents = [first, *told]
    at = 0
    for extent in extents:
        assert extent.offset_bytes == at
        at += extent.length_bytes
    assert at == SIZE_BYTES


def test_a_server_that_does_not_start_fails_the_write_and_nothing_else(
    target: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> QemuNbd:
        raise DiskError("Disk vda: no server today.", disk="vda")

    with monkeypatch.context() as patched:
        patched.setattr(QemuNbd, "start", refuse)
        with pytest.raises(DiskError, match="no server today"):
            target.write(0, NOISE)
        assert read(target, 0, MIB) == CONTENT[:MIB]
    target.write(0, NOISE)
    assert read(target, 0, MIB) == NOISE


def test_a_path_given_to_another_file_before_the_first_write_is_found_out(image: Path, target: Disk) -> None:
    image.rename(image.with_name("old"))
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE_BYTES))
    with pytest.raises(DiskError, match="not the file any more that was locked"):
        target.write(0, NOISE)
    with pytest.raises(DiskError, match="moved or replaced while it was read"):
        read(target, 0, 512)
    assert not sockets(image.parent)


def test_a_compressed_cluster_is_read_through_the_server(tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
    run("qemu-io", "-f", "qcow2", "-c", "write -c -P 7 1M 64k", "-c", "write -P 8 2M 1M", image)
    with closing(hold_exclusive(image)) as held, closing(open_target("vda", held, "qcow2", tmp_path)) as disk:
        assert read(disk, 2 * MIB, MIB) == b"\x08" * MIB
        assert not sockets(tmp_path)
        assert read(disk, MIB, 64 * 1024) == b"\x07" * 64 * 1024
        assert len(sockets(tmp_path)) == 1
        disk.write(MIB, NOISE[:512])
        assert read(disk, MIB, 64 * 1024) == bytes(NOISE[:512]) + b"\x07" * (64 * 1024 - 512)
    assert not sockets(tmp_path)


def test_what_is_not_written_is_never_asked_of_the_server(
    image: Path, target: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    read_runs = NbdDisk.read_runs

    def remember(disk: NbdDisk, runs: Sequence[Run], buffer: memoryview) -> None:
        asked.extend(offset for offset, _ in runs)
        read_runs(disk, runs, buffer)

    monkeypatch.setattr(NbdDisk, "read_runs", remember)
    target.write(8 * MIB, NOISE)
    buffer = memoryview(bytearray(MIB))
    target.read_runs([(0, MIB)], buffer)
    assert buffer == CONTENT[:MIB]
    target.read_runs([(8 * MIB, MIB)], buffer)
    assert buffer == NOISE
    assert asked == [8 * MIB]
    assert len(sockets(image.parent)) == 1


def test_a_map_that_fails_after_the_first_write_costs_nothing(target: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DiskError("Disk vda: no map today.", disk="vda")

    target.write(8 * MIB, NOISE)
    monkeypatch.setattr(MappedDisk, "read_runs", fail)
    assert read(target, 0, MIB) == CONTENT[:MIB]
    assert read(target, 8 * MIB, MIB) == NOISE
    assert sum(extent.length_bytes for extent in target.extents(0, SIZE_BYTES)) == SIZE_BYTES


@pytest.mark.parametrize("cluster_bytes", [512, 64 * 1024, 2 * MIB])
def test_whatever_is_written_reads_are_right_beside_the_server(tmp_path: Path, cluster_bytes: int) -> None:
    """Clusters are compressed, allocated, missing and freed; what one write frees the next may fill."""
    image, chance = tmp_path / "image", random.Random(cluster_bytes)
    (tmp_path / "raw").write_bytes(CONTENT + bytes(SIZE_BYTES - len(CONTENT)))
    words = ("-o", f"cluster_size={cluster_bytes}")
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *words, tmp_path / "raw", image)
    expected = bytearray((tmp_path / "raw").read_bytes())
    with closing(hold_exclusive(image)) as held, closing(open_target("vda", held, "qcow2", tmp_path)) as disk:
        for _ in range(150):
            offset = chance.randrange(SIZE_BYTES // 512) * 512
            length = min(chance.choice([512, 4096, 64 * 1024, MIB]), SIZE_BYTES - offset)
            match chance.randrange(4):
                case 0:
                    disk.write(offset, NOISE[:length])
                    expected[offset : offset + length] = NOISE[:length]
                case 1:
                    disk.write_zeroes(offset, length)
                    expected[offset : offset + length] = bytes(length)
                case _:
                    assert read(disk, offset, length) == expected[offset : offset + length]
        assert disk.access == "cluster map, and NBD for what was written"
        assert read(disk, 0, SIZE_BYTES) == expected


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
def test_a_target_over_a_frozen_base_is_read_through_both_and_leaves_the_base_alone(
    tmp_path: Path, base_format: str
) -> None:
    base, top = tmp_path / "base", tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", base_format, base, str(SIZE_BYTES))
    with closing(hold_exclusive(base)) as held:
        below = open_target("vda", held, base_format, tmp_path)
        below.write(MIB, NOISE[:MIB])
        below.close()
    before = base.read_bytes()
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", base_format, top, str(SIZE_BYTES))
    expected = bytearray(SIZE_BYTES)
    expected[MIB : 2 * MIB] = NOISE[:MIB]
    chance = random.Random(1)
    with (
        closing(hold_frozen(base)),
        closing(hold_exclusive(top)) as held,
        closing(open_target("vda", held, "qcow2", tmp_path)) as disk,
    ):
        assert disk.access == "cluster map"
        assert read(disk, 0, SIZE_BYTES) == expected
        for _ in range(60):
            offset = chance.randrange(SIZE_BYTES // 512) * 512
            length = min(chance.choice([512, 4096, 64 * 1024]), SIZE_BYTES - offset)
            if chance.randrange(2):
                disk.write(offset, NOISE[:length])
                expected[offset : offset + length] = NOISE[:length]
            else:
                disk.write_zeroes(offset, length)
                expected[offset : offset + length] = bytes(length)
        assert read(disk, 0, SIZE_BYTES) == expected
    assert base.read_bytes() == before


def test_a_target_over_a_base_that_somebody_may_write_is_left_to_qemu_from_the_start(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "raw", base, "4M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top, "4M")
    with closing(hold_exclusive(base)), closing(hold_exclusive(top)) as held, pytest.raises(DiskError):
        open_target("vda", held, "qcow2", tmp_path)


def test_a_source_whose_path_is_given_to_another_file_is_found_out(image: Path) -> None:
    with closing(open_source("vda", image, "qcow2", image.parent)) as disk:
        image.rename(image.with_name("old"))
        run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE_BYTES))
        with pytest.raises(DiskError, match="moved or replaced while it was read"):
            read(disk, 0, 512)


# --- only compared ----------------------------------------------------------------------------------------------------


def _bitmap_flags(image: Path) -> dict[str, list[str]]:
    told = json.loads(run("qemu-img", "info", "-U", "-f", "qcow2", "--output=json", image))
    return {bitmap["name"]: bitmap["flags"] for bitmap in told["format-specific"]["data"]["bitmaps"]}


@pytest.mark.parametrize("scattered", [False, True])
def test_an_image_that_is_only_compared_is_not_written_by_its_server_nor_are_the_bitmaps_of_others(
    tmp_path: Path, *, scattered: bool
) -> None:
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE_BYTES))
    run("qemu-img", "bitmap", "-f", "qcow2", "--add", image, "of-a-backup")
    # Compressed clusters come from a server whatever way the rest is read.
    run("qemu-io", "-f", "qcow2", "-c", "write -c -P 7 1M 64k", "-c", "write -P 8 2M 1M", image)
    before, content = image.stat(), image.read_bytes()
    with (
        closing(hold_exclusive(image)) as held,
        closing(open_target("vda", held, "qcow2", tmp_path, scattered=scattered, writable=False)) as disk,
    ):
        found = bytearray(SIZE_BYTES)
        disk.read_back(0, memoryview(found))
        assert found[MIB : MIB + 65536] == b"\7" * 65536
        assert found[2 * MIB : 3 * MIB] == b"\10" * MIB
        assert len(sockets(tmp_path)) == 1
        with image.open("rb") as looked_at:  # while it is served
            assert looked_at.read() == content
        assert _bitmap_flags(image) == {"of-a-backup": ["auto"]}
        with pytest.raises(DiskError, match="open for reading only"):
            disk.write(0, NOISE)
        disk.flush()
    after = image.stat()
    assert image.read_bytes() == content
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert _bitmap_flags(image) == {"of-a-backup": ["auto"]}
    assert not sockets(tmp_path)
