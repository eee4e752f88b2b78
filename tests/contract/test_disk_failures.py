"""What disks say and do when the storage under them fails: full, torn away, broken, slow."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.disk.lock import hold_exclusive, hold_frozen
from agent.disk.nbd import NbdDisk
from agent.disk.open import open_source, open_target, open_view
from agent.disk.qemu_nbd import QemuNbd
from agent.disk.raw import RawDisk
from agent.disk.seam import Extent
from agent.errors import DiskError, DiskFull
from tests.contract.disk_backends import MIB, loop_device, need_root, run, small_filesystem, sparse_file
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage

NOISE = memoryview(os.urandom(4 * MIB))


def read(disk: RawDisk | NbdDisk | MemoryDisk, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@contextmanager
def nbdkit(folder: Path, *words: str) -> Iterator[Path]:
    """An nbdkit server; yields its socket."""
    path = folder / "nbdkit"
    with subprocess.Popen(["nbdkit", "--foreground", "--unix", path, *words], stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 20
            while not answers(path):
                assert process.poll() is None, "nbdkit ended"
                assert time.monotonic() < deadline, "nbdkit is not ready"
                time.sleep(0.01)
            yield path
        finally:
            process.kill()


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return probe.recv(8) == b"NBDMAGIC"


# --- no room ----------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_raw_file_on_a_full_file_system_says_so(tmp_path: Path) -> None:
    need_root()
    with small_filesystem(tmp_path / "small", MIB) as folder:
        disk = RawDisk.open("vda", sparse_file(folder / "image", 10 * MIB), writable=True)
        with pytest.raises(DiskFull, match=r"No space left.*free some room") as caught:
            disk.write(MIB, NOISE)
        disk.close()
    assert caught.value.code == "disk-full"
    assert caught.value.facts == {"disk": "vda", "errno": "ENOSPC", "offset_bytes": MIB, "length_bytes": 4 * MIB}


@pytest.mark.root
def test_a_qcow2_image_on_a_full_file_system_says_so(tmp_path: Path) -> None:
    need_root()
    with small_filesystem(tmp_path / "small", MIB) as folder:
        image = folder / "image"
        run("qemu-img", "create", "-q", "-f", "qcow2", image, "10M")
        held = hold_exclusive(image)
        disk = open_target("vda", held, "qcow2", tmp_path)
        with pytest.raises(DiskFull, match="No space left"):
            disk.write(0, NOISE)
        disk.close()
        held.close()


def test_a_full_memory_disk_says_so() -> None:
    disk = MemoryDisk("vda", MemoryStorage(10 * MIB, capacity_bytes=MIB))
    disk.write(0, NOISE[:MIB])
    with pytest.raises(DiskFull):
        disk.write(MIB, NOISE[:1])
    disk.write_zeroes(0, MIB)
    disk.write(MIB, NOISE[:1])


# --- a flush that fails -------------------------------------------------------------------------------------------


def assert_poisoned(disk: RawDisk | NbdDisk | MemoryDisk) -> None:
    with pytest.raises(DiskError, match="flush"):
        disk.flush()
    for again in range(2):
        with pytest.raises(DiskError, match=r"earlier flush failed.*open the disk anew"):
            disk.write(again, NOISE[:512])
        with pytest.raises(DiskError, match="earlier flush failed"):
            disk.write_zeroes(0, 512)
        with pytest.raises(DiskError, match="earlier flush failed"):
            disk.flush()
    read(disk, 0, 512)


def test_a_failed_flush_poisons_a_memory_disk() -> None:
    storage = MemoryStorage(MIB)
    disk = MemoryDisk("vda", storage)
    storage.fail_next("flushing")
    assert_poisoned(disk)
    MemoryDisk("vda", storage).flush()


@pytest.mark.root
def test_a_failed_flush_poisons_a_block_device(tmp_path: Path) -> None:
    need_root()
    with (
        small_filesystem(tmp_path / "small", MIB) as folder,
        loop_device(sparse_file(folder / "device", 10 * MIB)) as device,
    ):
        disk = RawDisk.open("vda", device, writable=True)
        disk.write(0, NOISE)  # into the page cache: nobody knows yet that there is no room
        assert_poisoned(disk)
        disk.close()


def test_a_failed_flush_poisons_an_nbd_disk(tmp_path: Path) -> None:
    script = {"get_size": "echo 1M", "pread": "head -c $3 /dev/zero", "pwrite": "cat >/dev/null", "flush": "exit 1"}
    words = [f"{method}={action}" for method, action in script.items()]
    with nbdkit(tmp_path, "eval", *words, "can_write=exit 0", "can_flush=exit 0") as path:
        disk = NbdDisk.open("vda", path, "", writable=True, past_cache=False)
        disk.write(0, NOISE[:512])
        assert_poisoned(disk)
        disk.close()


# --- storage that is not what it was -------------------------------------------------------------------------------


def test_a_file_made_smaller_is_an_error_never_a_short_read(tmp_path: Path) -> None:
    image = sparse_file(tmp_path / "image", MIB)
    disk = RawDisk.open("vda", image, writable=False)
    os.truncate(image, MIB // 2)
    with pytest.raises(DiskError, match="made smaller"):
        read(disk, 0, MIB)
    with pytest.raises(DiskError, match="storage ends"):
        disk.read_back(0, memoryview(bytearray(MIB)))
    with pytest.raises(DiskError, match="mapping"):
        list(disk.extents(0, MIB))
    disk.close()


def test_a_file_made_larger_is_found_out_when_its_end_is_read(tmp_path: Path) -> None:
    image = sparse_file(tmp_path / "image", MIB)
    disk = RawDisk.open("vda", image, writable=False)
    os.truncate(image, 2 * MIB)
    assert read(disk, 0, MIB - 1) == bytes(MIB - 1)
    with pytest.raises(DiskError, match=rf"vda .*made larger meanwhile: {2 * MIB} bytes instead of {MIB}") as caught:
        read(disk, MIB // 2, MIB // 2)
    assert caught.value.facts["offset_bytes"] == MIB // 2
    disk.close()


def test_a_batch_that_fails_names_the_run_that_failed(tmp_path: Path) -> None:
    image = sparse_file(tmp_path / "image", MIB)
    disk = RawDisk.open("vda", image, writable=False)
    os.truncate(image, MIB // 2)
    with pytest.raises(DiskError, match="made smaller") as caught:
        disk.read_runs([(0, 4096), (MIB // 2 + 4096, 8192), (MIB - 4096, 4096)], memoryview(bytearray(16384)))
    disk.close()
    assert caught.value.facts["offset_bytes"] == MIB // 2 + 4096
    assert caught.value.facts["length_bytes"] == 8192

    storage = MemoryStorage(MIB)
    storage.fail_next("writing", errno.ENOSPC)
    with pytest.raises(DiskFull) as full:
        MemoryDisk("vda", storage).write_runs([(8192, 512), (16384, 512)], NOISE[:1024])
    assert full.value.facts == {"disk": "vda", "errno": "ENOSPC", "offset_bytes": 8192, "length_bytes": 512}


def test_an_export_that_ends_before_its_size_names_the_place(tmp_path: Path) -> None:
    short = f"pread=if [ $4 -ge {3 * MIB} ]; then echo EIO >&2; exit 1; fi; head -c $3 /dev/zero"
    with nbdkit(tmp_path, "eval", "get_size=echo 8M", short) as path:
        disk = NbdDisk.open("vda", path, "", writable=False, past_cache=False)
        for runs in ([(0, 4 * MIB)], [(0, 2 * MIB), (3 * MIB, MIB), (5 * MIB, MIB)]):
            with pytest.raises(DiskError, match=r"^Disk vda .*Input/output error") as caught:
                disk.read_runs(runs, memoryview(bytearray(4 * MIB)))
            assert caught.value.facts["disk"] == "vda"
            assert caught.value.facts["offset_bytes"] == 3 * MIB
        with pytest.raises(DiskError, match="Input/output error") as caught:
            read(disk, 0, 4 * MIB)
        assert caught.value.facts["offset_bytes"] == 3 * MIB
        assert read(disk, 0, 3 * MIB) == bytes(3 * MIB)
        disk.close()


@pytest.mark.root
def test_reading_back_hears_from_the_storage_not_from_the_cache(tmp_path: Path) -> None:
    need_root()
    image = sparse_file(tmp_path / "device", MIB)
    with loop_device(image) as device:
        disk = RawDisk.open("vda", device, writable=True)
        disk.write(0, NOISE[:MIB])
        disk.flush()
        assert device.read_bytes() == NOISE[:MIB]  # brings it into the cache, from where the disk reads it then
        with image.open("r+b") as storage:
            storage.seek(5000)
            storage.write(b"rotten")
        found = bytearray(MIB)
        disk.read_back(0, memoryview(found))
        assert read(disk, 5000, 6) == NOISE[5000:5006]
        assert found[5000:5006] == b"rotten"
        disk.close()


def test_memory_that_rots_is_seen_only_by_reading_back() -> None:
    storage = MemoryStorage(MIB)
    disk = MemoryDisk("vda", storage)
    storage.rot(100, 0x81)
    found = bytearray(200)
    disk.read_back(0, memoryview(found))
    assert found[100] == 0x81
    assert read(disk, 100, 1) == b"\0"
    disk.write(100, NOISE[:1])
    disk.read_back(0, memoryview(found))
    assert found[100] == NOISE[0]


@pytest.mark.root
def test_where_direct_reads_are_impossible_reading_back_says_so_and_still_reads(tmp_path: Path) -> None:
    need_root()
    folder = tmp_path / "ram"
    folder.mkdir()
    run("mount", "-t", "ramfs", "failback-test", folder)  # ramfs(5) knows no O_DIRECT
    try:
        raw = RawDisk.open("vda", sparse_file(folder / "raw", MIB), writable=True)
        raw.write(100, NOISE[:5000])
        found = bytearray(5000)
        raw.read_back(100, memoryview(found))
        assert found == NOISE[:5000]
        assert not raw.reads_back_past_cache
        raw.close()

        run("qemu-img", "create", "-q", "-f", "qcow2", folder / "qcow2", "1M")
        held = hold_exclusive(folder / "qcow2")
        served = open_target("vda", held, "qcow2", tmp_path)
        served.write(0, NOISE[:512])
        assert not served.reads_back_past_cache
        served.close()
        held.close()
    finally:
        run("umount", folder)


# --- what cannot be opened ------------------------------------------------------------------------------------------


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(DiskError, match=rf"Disk vda \({missing}\): opening failed: No such file"):
        RawDisk.open("vda", missing, writable=False)
    with pytest.raises(DiskError, match=f"{missing}.*No such file"):
        open_source("vda", missing, "qcow2", tmp_path)


def test_a_folder_is_not_a_disk(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="neither a file nor a block device"):
        RawDisk.open("vda", tmp_path, writable=False)


def test_a_descriptor_for_reading_is_not_written_through(tmp_path: Path) -> None:
    held = hold_frozen(sparse_file(tmp_path / "image", MIB))
    with pytest.raises(DiskError, match="opening for writing"):
        RawDisk.open("vda", held.path, writable=True, fd=held.fd)
    with pytest.raises(DiskError, match="frozen, not held for writing"):
        open_target("vda", held, "raw", tmp_path)
    held.close()


def test_an_image_of_another_format_is_refused_in_qemus_words(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"cannot serve .*: .*not in qcow2 format"):
        open_source("vda", sparse_file(tmp_path / "image", MIB), "qcow2", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_a_socket_path_that_is_too_long_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="shorter runtime folder"):
        open_source("vda", tmp_path / "image", "qcow2", tmp_path / ("x" * 100))


def test_a_target_whose_path_was_given_to_another_file_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    held = hold_exclusive(image)
    image.rename(tmp_path / "old")
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    with pytest.raises(DiskError, match="not the file any more that was locked"):
        open_target("vda", held, "qcow2", tmp_path)
    held.close()


# --- NBD servers of all kinds -------------------------------------------------------------------------------------


def test_an_nbd_server_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="connecting failed"):
        NbdDisk.open("vda", tmp_path / "nothing", "", writable=False, past_cache=False)


def test_a_view_is_opened_by_socket_and_export_for_reading(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "image", "1M")
    server = QemuNbd.start("vda", tmp_path / "image", "qcow2", tmp_path)
    view = open_view("vda", server.socket, "disk")
    assert list(view.extents(0, view.size_bytes)) == [Extent(0, MIB, zero=True)]
    with pytest.raises(DiskError, match="reading only"):
        view.write(0, NOISE[:512])
    view.close()
    server.stop()


def test_an_unknown_export_is_an_error(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "image", "1M")
    server = QemuNbd.start("vda", tmp_path / "image", "qcow2", tmp_path)
    with pytest.raises(DiskError, match="connecting failed"):
        NbdDisk.open("vda", server.socket, "another", writable=False, past_cache=True)
    server.stop()


def test_a_read_only_export_is_not_opened_for_writing(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--readonly", "memory", "1M") as path, pytest.raises(DiskError, match="for reading only"):
        NbdDisk.open("vda", path, "", writable=True, past_cache=False)


def test_without_a_map_everything_is_data(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--filter=noextents", "memory", "1M") as path:
        disk = NbdDisk.open("vda", path, "", writable=False, past_cache=False)
        assert list(disk.extents(100, 1000)) == [Extent(100, 1000, zero=False)]
        disk.close()


def test_without_a_zero_command_zeroes_are_written(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--filter=nozero", "memory", "8M") as path:
        disk = NbdDisk.open("vda", path, "", writable=True, past_cache=False)
        disk.write(0, NOISE)
        disk.write_zeroes(1000, 3 * MIB)
        assert read(disk, 0, 4 * MIB) == bytes(NOISE[:1000]) + bytes(3 * MIB) + bytes(NOISE[1000 + 3 * MIB :])
        disk.close()


def test_an_error_of_one_request_leaves_the_disk_usable(tmp_path: Path) -> None:
    trigger = tmp_path / "fail"
    with nbdkit(
        tmp_path, "--filter=error", "memory", "8M", "error=EIO", f"error-file={trigger}", "error-rate=1"
    ) as path:
        disk = NbdDisk.open("vda", path, "", writable=True, past_cache=False)
        disk.write(0, NOISE)
        trigger.touch()
        with pytest.raises(DiskError, match="Input/output error") as caught:
            read(disk, 0, 4 * MIB)
        assert caught.value.facts["errno"] == "EIO"
        assert caught.value.facts["offset_bytes"] == 0
        assert caught.value.facts["length_bytes"] == MIB  # of the one request among four that failed first
        with pytest.raises(DiskError):
            disk.write(0, NOISE)
        trigger.unlink()
        assert read(disk, 0, 4 * MIB) == NOISE
        disk.flush()
        disk.close()


def test_a_server_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--filter=delay", "memory", "1M", "delay-read=60", "delay-write=60") as path:
        disk = NbdDisk.open("vda", path, "", writable=True, past_cache=False, timeout_s=0.3)
        with pytest.raises(DiskError, match=r"did not answer for 0\.3 s"):
            read(disk, 0, 512)
        with pytest.raises(DiskError, match=r"connection to its NBD server was lost.*open the disk anew"):
            disk.write(0, NOISE[:512])
        disk.close()


def test_a_killed_server_ends_writing_for_good(tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "8M")
    held = hold_exclusive(image)
    server = QemuNbd.start("vda", image, "qcow2", tmp_path, held=held)
    disk = NbdDisk.open("vda", server.socket, "disk", writable=True, past_cache=True)
    disk.write(0, NOISE)
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(DiskError):
        disk.flush()
    with pytest.raises(DiskError, match="open the disk anew"):
        disk.write(0, NOISE)
    disk.close()
    with pytest.raises(DiskError, match="did not end in order"):
        server.stop()
    server.stop()
    held.close()


def test_an_error_number_that_says_nothing_still_makes_a_sentence() -> None:
    storage = MemoryStorage(MIB)
    storage.fail_next("reading", errno.EIO)
    with pytest.raises(
        DiskError, match=r"^Disk vda \(memory\): reading 512 bytes at 0 failed: Input/output error; look"
    ):
        read(MemoryDisk("vda", storage), 0, 512)
