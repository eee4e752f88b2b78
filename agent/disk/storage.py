"""`StorageFile`: a file or block device read and written so that the host's page cache is left as it was found.

What the cache holds is read from it, at memory speed. What it does not hold is read past it (O_DIRECT); where that does
not exist, through it, and then dropped again. What a write brought in is dropped once it is durable. The kernel takes
this as advice: pages that somebody else dirtied, locked or mapped meanwhile stay; a file system may read O_DIRECT
through its cache (ext4 with data=journal, encryption or verity; btrfs with compression); tmpfs *is* the page cache; and
zeroing a range by fallocate always drops its pages.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from agent.disk.direct import DirectReader
from agent.disk.fallocate import block_device_size_bytes
from agent.disk.gate import RunFailed
from agent.disk.priority import idle_priority
from agent.disk.residency import Residency, Run
from agent.disk.side_by_side import SideBySide

_SCATTERED_RUNS = 16
"""More gaps than this in one read are not worth a request each: the whole is read through the cache."""

_GAPS_SHARE = 1 / 8
"""Where no more of a read than this is missing from the cache, the kernel brings it in, all of it at once, and it is
dropped again: where memory is reclaimed a few pages here and there, a request of ours for each costs more."""

BOOKED_RUNS = 65536
"""At most so many runs are remembered for dropping (some 8 MiB); then the file is flushed before its time."""


@dataclass(frozen=True, slots=True)
class Part:
    """One read among several.

    Attributes:
        place: its first byte in the file or device.
        buffer: where its bytes go.
        offset_bytes: its first byte on the disk, for errors.
    """

    place: int
    buffer: memoryview
    offset_bytes: int


class StorageFile:
    """An open file or block device of a known size. Thread-safe; raises `OSError`.

    Args:
        fd: open for reading, or reading and writing; owned from now on.
        size_bytes: its size when it was opened; it must keep it.
        sector_bytes: the logical sector of a block device, 1 for a file.
        idle: storage is read under idle I/O priority (see `agent.disk.priority`).
    """

    def __init__(self, fd: int, size_bytes: int, sector_bytes: int, *, idle: bool) -> None:
        self.fd = fd
        self._size_bytes = size_bytes
        self._is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self._idle = idle
        self._residency = Residency(fd)
        self._direct = DirectReader.of(fd, size_bytes, sector_bytes)
        self._side_by_side = SideBySide()
        self._books = threading.Lock()
        self._booked: list[Run] = []
        # No reading ahead: it would bring in what nobody asked for.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    @property
    def reads_past_cache(self) -> bool:
        """Whether O_DIRECT works here."""
        return self._direct is not None

    def read(self, offset_bytes: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset_bytes` on."""
        missing = self._residency.missing(offset_bytes, offset_bytes + buffer.nbytes)
        if missing:
            self._read_missing(offset_bytes, buffer, missing)
        else:
            self._read_through_cache(offset_bytes, buffer)
        self._check_end(offset_bytes + buffer.nbytes)

    def read_parts(self, parts: Sequence[Part]) -> None:
        """`read` for many places: what is not cached is under way together.

        Raises:
            RunFailed: a part failed.
        """
        waiting: list[tuple[Part, list[Run]]] = []
        coming: list[tuple[Part, list[Run]]] = []
        for part in parts:
            with _naming(part):
                missing = self._residency.missing(part.place, part.place + part.buffer.nbytes)
                if not missing:
                    self._read_through_cache(part.place, part.buffer)
                elif _are_gaps(missing, part.buffer.nbytes):
                    self._bring_in(missing)
                    coming.append((part, missing))
                else:
                    waiting.append((part, missing))
        for part, missing in coming:
            with _naming(part):
                self._read_and_drop(part.place, part.buffer, missing)
        waiting.sort(key=lambda job: job[0].place)  # what lies together is asked for together
        self._side_by_side.each(waiting, self._read_missing_part)
        for part in parts:
            with _naming(part):
                self._check_end(part.place + part.buffer.nbytes)

    def _read_missing_part(self, job: tuple[Part, list[Run]]) -> None:
        part, missing = job
        with _naming(part):
            self._read_missing(part.place, part.buffer, missing)

    def _read_missing(self, offset_bytes: int, buffer: memoryview, missing: list[Run]) -> None:
        with self._priority():
            self._read_around(offset_bytes, buffer, missing)

    def _priority(self) -> AbstractContextManager[None]:
        return idle_priority() if self._idle else nullcontext()

    def _bring_in(self, missing: list[Run]) -> None:
        """Have the kernel begin to read what is missing, without waiting for it."""
        with self._priority():
            for first, behind in missing:
                os.posix_fadvise(self.fd, first, behind - first, os.POSIX_FADV_WILLNEED)

    def _read_and_drop(self, offset_bytes: int, buffer: memoryview, missing: list[Run]) -> None:
        """Read through the cache, and drop what was missing from it."""
        self._read_through_cache(offset_bytes, buffer)
        self._drop(missing)

    def _read_around(self, offset_bytes: int, buffer: memoryview, missing: list[Run]) -> None:
        """Read what is cached through the cache, and what is not past it."""
        if self._direct is None or len(missing) > _SCATTERED_RUNS:
            self._read_and_drop(offset_bytes, buffer, missing)
            return
        at, end = offset_bytes, offset_bytes + buffer.nbytes
        for first, behind in missing:
            first, behind = max(first, offset_bytes), min(behind, end)
            self._read_through_cache(at, buffer[at - offset_bytes : first - offset_bytes])
            self._direct.read_into(first, buffer[first - offset_bytes : behind - offset_bytes])
            at = behind
        self._read_through_cache(at, buffer[at - offset_bytes :])

    def _read_through_cache(self, offset_bytes: int, buffer: memoryview) -> None:
        done = 0
        while done < buffer.nbytes:
            got = os.preadv(self.fd, [buffer[done:]], offset_bytes + done)
            if got == 0:
                raise OSError(0, f"the storage ends before byte {offset_bytes + done}: it was made smaller meanwhile")
            done += got

    def read_past_cache(self, offset_bytes: int, buffer: memoryview) -> None:
        """Fill `buffer` with what the storage holds. Where there is no O_DIRECT, what is dirty must have been flushed:
        the pages are dropped, as far as the kernel follows, and read anew."""
        with self._priority():
            if self._direct is not None:
                self._direct.read_into(offset_bytes, buffer)
                return
            end = offset_bytes + buffer.nbytes
            missing = self._residency.missing(offset_bytes, end)
            first = offset_bytes - offset_bytes % mmap.PAGESIZE  # pages that are covered in part only would stay
            self._drop([(first, end + mmap.PAGESIZE)])
            self._read_through_cache(offset_bytes, buffer)
            self._drop(missing)

    def read_parts_past_cache(self, parts: Sequence[Part]) -> None:
        """`read_past_cache` for many places, which are under way together.

        Raises:
            RunFailed: a part failed.
        """

        def read_part(part: Part) -> None:
            with _naming(part):
                self.read_past_cache(part.place, part.buffer)

        self._side_by_side.each(sorted(parts, key=lambda part: part.place), read_part)

    def write(self, offset_bytes: int, data: memoryview) -> None:
        """Write `data`; what that brings into the cache is dropped by the next `sync`."""
        missing = self._residency.missing(offset_bytes, offset_bytes + data.nbytes)
        try:
            done = 0
            while done < data.nbytes:
                done += os.pwritev(self.fd, [data[done:]], offset_bytes + done)
        finally:
            if missing:
                self._book(missing)

    def _book(self, missing: list[Run]) -> None:
        with self._books:
            for first, behind in missing:
                if self._booked and self._booked[-1][1] == first:
                    self._booked[-1] = (self._booked[-1][0], behind)
                else:
                    self._booked.append((first, behind))

    @property
    def books_full(self) -> bool:
        """Whether so much waits to be dropped that `sync` is due."""
        return len(self._booked) >= BOOKED_RUNS

    def sync(self) -> None:
        """Make durable what was written (fdatasync), then drop from the cache what the writes brought into it."""
        with self._books:
            booked, self._booked = self._booked, []
        os.fdatasync(self.fd)
        self._drop(_joined(booked))

    def _drop(self, runs: list[Run]) -> None:
        for first, behind in runs:
            os.posix_fadvise(self.fd, first, behind - first, os.POSIX_FADV_DONTNEED)

    def _check_end(self, end: int) -> None:
        """Whether a disk that was read to its end still ends there."""
        if end != self._size_bytes:
            return
        size = block_device_size_bytes(self.fd) if self._is_device else os.fstat(self.fd).st_size
        if size != self._size_bytes:
            how = "larger" if size > self._size_bytes else "smaller"
            raise OSError(0, f"the storage was made {how} meanwhile: {size} bytes instead of {self._size_bytes}")

    def close(self) -> None:
        """Close the descriptors. Nobody may be inside."""
        self._side_by_side.close()
        if self._direct is not None:
            self._direct.close()
        os.close(self.fd)


def _are_gaps(missing: list[Run], size_bytes: int) -> bool:
    """Whether little of a read of that size is missing."""
    return sum(behind - first for first, behind in missing) <= size_bytes * _GAPS_SHARE


@contextmanager
def _naming(part: Part) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailed(error, part.offset_bytes, part.buffer.nbytes) from error


def _joined(runs: list[Run]) -> list[Run]:
    """Fewer calls for the same pages: sorted, what touches or overlaps made one."""
    joined: list[Run] = []
    for first, behind in sorted(runs):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(behind, joined[-1][1]))
        else:
            joined.append((first, behind))
    return joined
