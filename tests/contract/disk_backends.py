"""The storages that `Disk` is tested on: each is made fresh and empty, and may be opened again and again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from agent.disk.lock import hold_exclusive, hold_frozen
from agent.disk.open import open_source, open_target
from agent.disk.raw import RawDisk
from agent.disk.seam import Disk
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage
from tests.fakes.sparse_disk import SparseDisk, SparseStorage
from tests.simulation.core import Chaos, Process
from tests.simulation.storage import SimDisk
from tests.simulation.storage import Storage as VolatileStorage

MIB = 1024 * 1024
ODD_SIZE_BYTES = 10 * MIB + 517


@dataclass(frozen=True)
class Storage:
    """One storage under test.

    Attributes:
        size_bytes: of the disk.
        tells_zeroes: its extents know what reads as zero.
        open: opens it anew, for writing or not. What it opened is closed when the test ends.
    """

    size_bytes: int
    tells_zeroes: bool
    open: Callable[[bool], Disk]


def run(*command: str | Path) -> str:
    """Run a program; returns its standard output."""
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def need_root() -> None:
    """Skip the test, saying why, where we are not root."""
    if os.geteuid() != 0:
        pytest.skip("needs root: loop devices and mounts")


@contextmanager
def loop_device(image: Path, *, sector_bytes: int = 512) -> Iterator[Path]:
    """A block device over a file."""
    device = Path(run("losetup", "--find", "--show", "--sector-size", str(sector_bytes), image).strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def small_filesystem(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system that is soon full."""
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "failback-test", folder)
    try:
        yield folder
    finally:
        run("umount", folder)


def sparse_file(path: Path, size_bytes: int) -> Path:
    """A file of nothing but a hole."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def raw_storage(path: Path, opened: ExitStack, size_bytes: int, *, tells_zeroes: bool = True) -> Storage:
    """A raw file or block device at `path`."""

    def open_raw(writable: bool) -> Disk:
        disk = RawDisk.open("vda", path, writable=writable)
        opened.callback(disk.close)
        return disk

    return Storage(size_bytes, tells_zeroes, open_raw)


def qcow2_storage(path: Path, opened: ExitStack, size_bytes: int) -> Storage:
    """A qcow2 image, served by qemu-nbd: locked and written, or frozen and read."""
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(size_bytes))

    def open_qcow2(writable: bool) -> Disk:
        held = hold_exclusive(path) if writable else hold_frozen(path)
        try:
            if writable:
                disk = open_target("vda", held, "qcow2", path.parent)
            else:
                disk = open_source("vda", path, "qcow2", path.parent)
        finally:
            held.close()
        opened.callback(disk.close)
        return disk

    return Storage(size_bytes, True, open_qcow2)


def memory_storage(size_bytes: int) -> Storage:
    """The in-memory disk of the tests."""
    storage = MemoryStorage(size_bytes)
    return Storage(size_bytes, True, lambda writable: MemoryDisk("vda", storage, writable=writable))


def sparse_storage(size_bytes: int) -> Storage:
    """The in-memory disk of the tests that may be huge."""
    storage = SparseStorage(size_bytes)
    return Storage(size_bytes, True, lambda writable: SparseDisk("vda", storage, writable=writable))


def simulated_storage(path: Path, opened: ExitStack, size_bytes: int) -> Storage:
    """The disk of the simulation, whose storage has a volatile cache."""
    chaos = Chaos(Random(1), now_s=lambda: 0.0)
    process, storage = Process("agent", chaos), VolatileStorage(path.parent, Random(1))

    def open_simulated(writable: bool) -> Disk:
        disk = SimDisk("vda", path, storage, process, writable=writable)
        opened.callback(disk.close)
        return disk

    return Storage(size_bytes, True, open_simulated)


@contextmanager
def storage_of(kind: str, folder: Path) -> Iterator[Storage]:
    """The storage of that kind, fresh and empty."""
    with ExitStack() as stack:
        opened = ExitStack()
        match kind:
            case "memory":
                storage = memory_storage(ODD_SIZE_BYTES)
            case "sparse":
                storage = sparse_storage(ODD_SIZE_BYTES)
            case "raw":
                storage = raw_storage(sparse_file(folder / "raw", 10 * MIB), opened, 10 * MIB)
            case "raw-odd":
                storage = raw_storage(sparse_file(folder / "raw", ODD_SIZE_BYTES), opened, ODD_SIZE_BYTES)
            case "simulated":
                storage = simulated_storage(sparse_file(folder / "raw", ODD_SIZE_BYTES), opened, ODD_SIZE_BYTES)
            case "qcow2":
                storage = qcow2_storage(folder / "image", opened, 10 * MIB + 512)
            case _:
                need_root()
                sector_bytes = 4096 if kind == "block-4k" else 512
                size_bytes = 10 * MIB + sector_bytes
                image = sparse_file(folder / "device", size_bytes)
                device = stack.enter_context(loop_device(image, sector_bytes=sector_bytes))
                storage = raw_storage(device, opened, size_bytes, tells_zeroes=False)
        with opened:
            yield storage


KINDS = [
    "memory",
    "sparse",
    "simulated",
    "raw",
    "raw-odd",
    "qcow2",
    pytest.param("block", marks=pytest.mark.root),
    pytest.param("block-4k", marks=pytest.mark.root),
]
