"""Storage with a volatile cache: what is written and not flushed may be lost, in part and in any order, by a crash.

The images are real files; what a file holds is what its host sees (the page cache). Beside each stands what the storage
holds of its pages where that is something else.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from agent.disk.gate import Gate, RunFailed
from agent.disk.seam import Extent
from agent.disk.stamp import Stamp
from tests.simulation.core import Process

PAGE = 4096


@dataclass(eq=False)
class FileState:
    """What is volatile of one file.

    Attributes:
        dirty: pages written since the last flush, with what is durable of them.
        bad: clean pages of which the storage holds something else than the cache.
        version: counts changes; the file's times.
    """

    path: Path
    dirty: dict[int, bytes] = field(default_factory=dict)
    bad: dict[int, bytes] = field(default_factory=dict)
    rotten: set[int] = field(default_factory=set)
    version: int = 1

    def write(self, fd: int, offset: int, data: bytes | memoryview) -> None:
        """Into the cache."""
        size = os.fstat(fd).st_size
        for page in range(offset // PAGE, -(-(offset + len(data)) // PAGE)):
            if page not in self.dirty:
                old = self.bad.pop(page, None)
                self.dirty[page] = old if old is not None else os.pread(fd, min(PAGE, size - page * PAGE), page * PAGE)
        os.pwrite(fd, data, offset)
        self.version += 1

    def flush(self, fd: int | None = None) -> None:
        """Everything is durable now, but for what the storage spoils."""
        for page in sorted(self.rotten & set(self.dirty)):
            held = self.path.read_bytes()[page * PAGE : (page + 1) * PAGE]
            self.bad[page] = bytes([held[0] ^ 1]) + held[1:]
        self.rotten.clear()
        self.dirty.clear()

    def fail_flush(self, random: Random) -> None:
        """A failed fsync: pages are clean and hold the new data, which the storage may never have got."""
        for page in sorted(self.dirty):
            if random.random() < 0.7:
                self.bad[page] = self.dirty[page]
        self.dirty.clear()

    def evict(self) -> None:
        """Clean pages leave the cache: what is read next is what the storage holds."""
        with self.path.open("r+b") as file:
            for page, held in sorted(self.bad.items()):
                file.seek(page * PAGE)
                file.write(held)
        self.bad.clear()

    def read_storage(self, fd: int, offset: int, length: int) -> bytes:
        """Past the cache."""
        data = bytearray(os.pread(fd, length, offset))
        for page in range(offset // PAGE, -(-(offset + length) // PAGE)):
            held = self.bad.get(page)
            if held is None:
                continue
            first, last = max(page * PAGE, offset), min(page * PAGE + len(held), offset + length)
            data[first - offset : last - offset] = held[first - page * PAGE : last - page * PAGE]
        return bytes(data)

    def crash(self, random: Random) -> None:
        """The host's power goes."""
        if not self.path.exists() or not (self.dirty or self.bad):
            self.dirty.clear()
            return
        with self.path.open("r+b") as file:
            lost = {page: old for page, old in sorted(self.dirty.items()) if random.random() < 0.6}
            for page, old in sorted({**self.bad, **lost}.items()):
                file.seek(page * PAGE)
                file.write(old)
        self.dirty.clear()
        self.bad.clear()
        self.version += 1


@dataclass(eq=False)
class Storage:
    """One host's: files by path, and small files that are replaced whole.

    Attributes:
        boot: counts the host's boots.
        pending: small files replaced and not durable yet, with what was durable (None: nothing).
        failing: errors that are about to happen, by what is done: number and how often; `tripped`: what did.
    """

    folder: Path
    random: Random
    boot: int = 1
    files: dict[Path, FileState] = field(default_factory=dict)
    pending: dict[Path, bytes | None] = field(default_factory=dict)
    failing: dict[str, tuple[int, int]] = field(default_factory=dict)
    tripped: set[str] = field(default_factory=set)

    def state(self, path: Path) -> FileState:
        """Of the file at `path`."""
        return self.files.setdefault(path, FileState(path))

    def trip(self, doing: str) -> None:
        """Raise what is about to happen."""
        number, left = self.failing.get(doing, (0, 0))
        if left:
            self.failing[doing] = (number, left - 1)
            self.tripped.add(doing)
            raise OSError(number, os.strerror(number))

    def content(self, path: Path) -> bytes:
        """What a guest that reads past the cache gets."""
        with path.open("rb") as file:
            return self.state(path).read_storage(file.fileno(), 0, os.fstat(file.fileno()).st_size)

    def write(self, path: Path, offset: int, data: bytes) -> None:
        """A guest writes."""
        with path.open("r+b") as file:
            self.state(path).write(file.fileno(), offset, data)

    def durable_text(self, path: Path) -> bytes | None:
        """What a small file would be after a crash now, at worst."""
        if path in self.pending:
            return self.pending[path]
        return path.read_bytes() if path.exists() else None

    def replace_whole(self, process: Process, path: Path, text: str, *, sync: bool = True) -> None:
        """As `agent.durable.replace_whole`."""
        process.point(f"replaces {path.name}")
        self.trip("recording")
        old = self.pending.get(path, path.read_bytes() if path.exists() else None)
        beside = path.with_suffix(".new")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
        self.pending[path] = old
        process.point(f"replaced {path.name}, not durable yet")
        if sync:
            del self.pending[path]
            process.point(f"{path.name} is durable")

    def settle(self, process: Process, folder: Path) -> None:
        """As `agent.durable.settle`."""
        if any(path.is_relative_to(folder) for path in self.pending):
            process.point(f"settles {folder.name}")
            self.pending = {path: old for path, old in self.pending.items() if not path.is_relative_to(folder)}

    def crash(self) -> None:
        """The power goes."""
        for path in sorted(self.files):
            self.files[path].crash(self.random)
        for path, old in sorted(self.pending.items()):
            if old is None:
                if self.random.random() < 0.5:
                    path.unlink(missing_ok=True)
            elif self.random.random() < 0.7:
                path.write_bytes(old)
        self.pending.clear()
        self.failing.clear()
        self.boot += 1

    def stamp(self, fd: int) -> Stamp:
        """Of an open file."""
        path = Path(f"/proc/self/fd/{fd}").readlink()
        status, version = os.fstat(fd), self.state(path).version
        return Stamp(
            device=1,
            inode=status.st_ino,
            size_bytes=status.st_size,
            mtime_ns=version,
            ctime_ns=version,
            boot=str(self.boot),
        )


class SimDisk:
    """A `Disk` over a file of a `Storage`. `before_write`: looks at each write before it happens."""

    access = "file"

    def __init__(
        self,
        name: str,
        path: Path,
        storage: Storage,
        process: Process,
        *,
        writable: bool,
        before_write: Callable[[], None] | None = None,
    ) -> None:
        self._storage, self._process, self._before_write = storage, process, before_write
        self._fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        self._state = storage.state(path)
        self._gate = Gate(name, path.name, os.fstat(self._fd).st_size, writable=writable)
        process.holds.append(self)

    @property
    def name(self) -> str:
        return self._gate.name

    @property
    def size_bytes(self) -> int:
        return self._gate.size_bytes

    @property
    def readers(self) -> int:
        return 2

    @property
    def reads_back_past_cache(self) -> bool:
        return True

    def _read(self, offset: int, buffer: memoryview, doing: str = "reading") -> None:
        self._storage.trip(doing)
        if doing == "reading":
            buffer[:] = os.pread(self._fd, buffer.nbytes, offset)
        else:
            buffer[:] = self._state.read_storage(self._fd, offset, buffer.nbytes)

    def _write(self, offset: int, data: memoryview | bytes) -> None:
        self._process.point(f"writes {self.name} {offset}+{len(data)}")
        if self._before_write is not None:
            self._before_write()
        self._storage.trip("writing")
        self._state.write(self._fd, offset, data)
        if "rotting" in self._storage.failing:
            del self._storage.failing["rotting"]
            self._state.rotten.add(offset // PAGE)
        self._process.point(f"wrote {self.name} {offset}")

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading", offset_bytes, buffer.nbytes):
            self._read(offset_bytes, buffer)

    def write(self, offset_bytes: int, data: memoryview) -> None:
        with self._gate.request("writing", offset_bytes, data.nbytes, writes=True):
            self._write(offset_bytes, data)

    def read_runs(self, runs: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        with self._gate.batch("reading", runs, buffer.nbytes):
            self._each(runs, buffer, self._read)

    def write_runs(self, runs: Sequence[tuple[int, int]], data: memoryview) -> None:
        with self._gate.batch("writing", runs, data.nbytes, writes=True):
            self._each(runs, data, self._write)

    @staticmethod
    def _each(runs: Sequence[tuple[int, int]], data: memoryview, move: Callable[[int, memoryview], None]) -> None:
        done = 0
        for offset, length in runs:
            try:
                move(offset, data[done : done + length])
            except OSError as error:
                raise RunFailed(error, offset, length) from error
            done += length

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        with self._gate.request("zeroing", offset_bytes, length_bytes, writes=True):
            self._write(offset_bytes, bytes(length_bytes))

    def flush(self) -> None:
        with self._gate.request("flushing", 0, 0, writes=self._gate.writable):
            self._process.point(f"flushes {self.name}")
            try:
                self._storage.trip("flushing")
            except OSError:
                self._state.fail_flush(self._storage.random)
                self._gate.poison("an earlier flush failed")
                raise
            self._state.flush()
            self._process.point(f"flushed {self.name}")

    def extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
        self._gate.check("mapping", offset_bytes, length_bytes)
        return _extents(
            lambda at, size: self._state.read_storage(self._fd, at, size), offset_bytes, offset_bytes + length_bytes
        )

    def read_back(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading back", offset_bytes, buffer.nbytes):
            self._read(offset_bytes, buffer, "reading back")

    def read_back_runs(self, runs: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        with self._gate.batch("reading back", runs, buffer.nbytes):
            self._each(runs, buffer, lambda at, part: self._read(at, part, "reading back"))

    def close(self) -> None:
        if self._gate.close():
            self._shut()

    def owner_died(self) -> None:
        """The kernel closes the descriptor."""
        self._shut()

    def _shut(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _extents(read: Callable[[int, int], bytes], at: int, end: int) -> Iterator[Extent]:
    while at < end:
        stop = min(end, (at // PAGE + 1) * PAGE)
        zero = not any(read(at, stop - at))
        while stop < end:
            step = min(PAGE, end - stop)
            if (not any(read(stop, step))) is not zero:
                break
            stop += step
        yield Extent(at, stop - at, zero=zero)
        at = stop


def nonzero_pages(content: bytes) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which pages hold anything."""
    padded = np.frombuffer(content.ljust(-(-len(content) // PAGE) * PAGE, b"\0"), dtype=np.uint8)
    return np.asarray(padded.reshape(-1, PAGE).max(axis=1) > 0)


class MapOs:
    """What `agent.sync.map_file` needs of `os`, on a `Storage` found by the path."""

    def __init__(self, find: Callable[[Path], tuple[Storage, Process] | None]) -> None:
        self._find = find
        self._paths: dict[int, Path] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        fd = os.open(path, flags, mode)
        self._paths[fd] = Path(path)
        return fd

    def close(self, fd: int) -> None:
        self._paths.pop(fd, None)
        os.close(fd)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        storage, process = self._of(fd)
        process.check()
        storage.trip("mapping")
        storage.state(self._paths[fd]).write(fd, offset, data)
        return len(data)

    def fdatasync(self, fd: int) -> None:
        storage, process = self._of(fd)
        process.point("syncs a map")
        storage.trip("mapping")
        storage.state(self._paths[fd]).flush()

    def _of(self, fd: int) -> tuple[Storage, Process]:
        found = self._find(self._paths[fd])
        assert found is not None
        return found


ENOSPC, EIO = errno.ENOSPC, errno.EIO
