"""Our image locks against QEMU's own tools."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from agent.disk.lock import hold_exclusive, hold_frozen, image_in_use
from agent.disk.nbd import NbdDisk
from agent.disk.open import open_source, open_target
from agent.disk.qemu_nbd import QemuNbd
from agent.errors import DiskBusy, DiskError
from tests.contract.disk_backends import MIB, loop_device, need_root, run, sparse_file


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"image.{request.param}"
    run("qemu-img", "create", "-q", "-f", request.param, path, "4M")
    return path


def format_of(image: Path) -> str:
    return image.suffix[1:]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "it did not come true in 20 s"
        time.sleep(0.01)


def busy(image: Path) -> bool:
    """Whether any process but us has an image lock of any kind on it."""
    try:
        hold_exclusive(image).close()
    except DiskBusy:
        return True
    return False


@contextmanager
def qemu_has_it_open(image: Path, *words: str) -> Iterator[None]:
    """A QEMU process that has the image open."""
    command = ["qemu-io", *words, "-f", format_of(image), str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: busy(image))
            yield
        finally:
            process.kill()


def qemu_io(image: Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["qemu-io", *words, "-f", format_of(image), "-c", command, str(image)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_frozen_image_is_read_by_qemu_and_written_by_nobody(image: Path) -> None:
    held = hold_frozen(image)
    assert qemu_io(image, "read 0 512", "-r").returncode == 0
    run("qemu-img", "info", image)
    refused = qemu_io(image, "write 0 512")
    assert refused.returncode != 0
    assert 'Failed to get "write" lock' in refused.stderr
    held.close()
    assert qemu_io(image, "write 0 512").returncode == 0


def test_a_frozen_image_may_be_frozen_twice_and_served(image: Path) -> None:
    one, two = hold_frozen(image), hold_frozen(image)
    source = open_source("vda", image, format_of(image), image.parent)
    assert source.size_bytes == 4 * MIB
    one.close()
    assert qemu_io(image, "write 0 512").returncode != 0
    source.close()
    two.close()


def test_an_image_held_exclusively_is_not_opened_by_anybody(image: Path) -> None:
    with closing(hold_exclusive(image)):
        assert qemu_io(image, "read 0 512", "-r").returncode != 0
        assert qemu_io(image, "write 0 512").returncode != 0
        with pytest.raises(DiskBusy):
            hold_frozen(image)
        with pytest.raises(DiskBusy):
            hold_exclusive(image)
    assert qemu_io(image, "write 0 512").returncode == 0


def test_an_image_that_qemu_writes_cannot_be_held_and_the_holder_is_named(image: Path) -> None:
    with qemu_has_it_open(image):
        assert image_in_use(image)
        for hold in (hold_exclusive, hold_frozen):
            with pytest.raises(DiskBusy, match=rf"{image} is in use by qemu-io \(\d+\); power that VM off") as caught:
                hold(image)
            assert caught.value.code == "disk-busy"
    assert not image_in_use(image)
    hold_exclusive(image).close()


def test_an_image_that_qemu_only_reads_is_not_in_use_but_not_ours_alone(image: Path) -> None:
    with qemu_has_it_open(image, "-r"):
        assert not image_in_use(image)
        hold_frozen(image).close()
        with pytest.raises(DiskBusy):
            hold_exclusive(image)


def test_our_own_locks_do_not_count_by_whatever_path(image: Path) -> None:
    link = image.with_name("link")
    link.symlink_to(image)
    held = hold_exclusive(image)
    assert image_in_use(link)
    assert not image_in_use(link, [held])
    other = hold_frozen(sparse_file(image.with_name("other"), MIB))
    assert image_in_use(image, [other])
    other.close()
    held.close()


def test_a_foreign_writer_counts_whatever_we_hold(image: Path) -> None:
    with qemu_has_it_open(image):
        other = hold_frozen(sparse_file(image.with_name("other"), MIB))
        assert image_in_use(image, [other])
        other.close()


def test_a_missing_image_is_an_error_everywhere(tmp_path: Path) -> None:
    for ask in (hold_exclusive, hold_frozen, image_in_use):
        with pytest.raises(DiskError, match="No such file"):
            ask(tmp_path / "missing")


def test_letting_go_twice_is_harmless(image: Path) -> None:
    held = hold_exclusive(image)
    held.close()
    held.close()
    assert not busy(image)


def test_the_lock_lives_as_long_as_the_last_who_writes_through_it(image: Path) -> None:
    held = hold_exclusive(image)
    disk = open_target("vda", held, format_of(image), image.parent)
    held.close()
    assert image_in_use(image)
    assert qemu_io(image, "write 0 512").returncode != 0
    disk.write(0, memoryview(b"x" * 512))
    disk.flush()
    disk.close()
    assert not busy(image)
    assert "verification failed" not in qemu_io(image, "read -P 0x78 0 512").stdout


def test_what_was_written_through_the_lock_is_what_qemu_reads(image: Path) -> None:
    held = hold_exclusive(image)
    disk = open_target("vda", held, format_of(image), image.parent)
    disk.write(MIB, memoryview(b"\x42" * MIB))
    disk.write_zeroes(MIB, 4096)
    disk.flush()
    disk.close()
    held.close()
    answer = qemu_io(image, f"read -P 0x42 {MIB + 4096} {MIB - 4096}", "-c", f"read -P 0 {MIB} 4096")
    assert answer.returncode == 0
    assert "verification failed" not in answer.stdout
    if format_of(image) == "qcow2":
        assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", image)


@pytest.mark.root
def test_a_block_device_that_the_host_itself_uses_is_refused(tmp_path: Path) -> None:
    need_root()
    with loop_device(sparse_file(tmp_path / "device", MIB)) as device:
        held = hold_exclusive(device)
        assert image_in_use(device)
        assert not image_in_use(device, [held])
        with pytest.raises(DiskBusy, match="in use by this host itself"):
            hold_exclusive(device)
        held.close()
        assert not image_in_use(device)


@pytest.mark.root
def test_a_qcow2_image_on_a_block_device_is_served(tmp_path: Path) -> None:
    need_root()
    with loop_device(sparse_file(tmp_path / "device", 8 * MIB)) as device:
        run("qemu-img", "create", "-q", "-f", "qcow2", device, "2M")
        held = hold_exclusive(device)
        disk = open_target("vda", held, "qcow2", tmp_path)
        disk.write(0, memoryview(b"x" * MIB))
        disk.flush()
        disk.close()
        held.close()
        assert "verification failed" not in run("qemu-io", "-f", "qcow2", "-c", f"read -P 0x78 0 {MIB}", device)


@pytest.mark.parametrize("name", ["a,b", "a,,b=c", "nbd:unix:x", "it's", 'say "so"', "space d", "json:{}", "ünïcode"])
def test_any_file_name_can_be_served(tmp_path: Path, name: str) -> None:
    image = tmp_path / name
    run("qemu-img", "create", "-q", "-f", "qcow2", image.absolute(), "1M")
    held = hold_exclusive(image)
    target = open_target("vda", held, "qcow2", tmp_path)
    target.write(0, memoryview(b"x" * 512))
    target.flush()
    target.close()
    held.close()
    source = open_source("vda", image, "qcow2", tmp_path)
    found = bytearray(512)
    source.read_into(0, memoryview(found))
    source.close()
    assert found == b"x" * 512
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_server_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "image", "1M")
    servers: list[QemuNbd] = []
    thread = threading.Thread(
        target=lambda: servers.append(QemuNbd.start("vda", tmp_path / "image", "qcow2", tmp_path))
    )
    thread.start()
    thread.join()
    server = servers[0]
    try:
        os.kill(server.pid, 0)
        NbdDisk.open("vda", server.socket, "disk", writable=False, past_cache=True).close()
        assert server.last_words() == ""  # nobody hung up on it
    finally:
        server.stop()
    assert not server.socket.exists()


AGENT = """
import sys, time
from pathlib import Path
from agent.disk.lock import hold_exclusive
from agent.disk.nbd import NbdDisk
from agent.disk.open import open_target
image = Path(sys.argv[1])
disk = open_target("vda", hold_exclusive(image), "qcow2", image.parent)
disk.write(0, memoryview(b"x" * 512))
print("writing", flush=True)
time.sleep(60)
"""


def test_a_killed_agent_leaves_no_writer_and_no_lock(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    with subprocess.Popen([sys.executable, "-c", AGENT, str(image)], stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == b"writing\n"
        assert busy(image)
        os.kill(agent.pid, signal.SIGKILL)
    wait_until(lambda: not busy(image))
