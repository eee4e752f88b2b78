"""A digest map on disk: one sparse file for each disk of an original, read and written by window.

Header, marks, records, entries, in that order. A *mark* stands for a group of 16 windows (1 GiB of the disk): it is
durable before the first byte of the group is written, and as long as it stands nothing in the group counts; it is taken
back when everything that is known of the group is durable. So windows are stored at any time and in any order, and a
crash costs the groups that were written to. What is damaged counts as unknown.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import structlog
from xxhash import xxh3_64_intdigest

from agent.delta.blocks import BLOCK_BYTES
from agent.delta.digest_map import (
    ENTRIES_BYTES,
    RECORD_BYTES,
    WINDOW_BYTES,
    Kind,
    Shape,
    Window,
    decoded,
    encoded,
    kind_of,
    known_blocks,
    zero_record,
)
from agent.errors import AgentError

log = structlog.get_logger("failback.agent")

MAGIC = b"FAILBKDM"
VERSION = 1
ALGORITHM = "xxh3-128"
GROUP_WINDOWS = 16
HEADER_BYTES = 16384
"""Enough for a path and the name of a view, whatever they are."""
RECORDS_AT_ONCE = 4096
_PAGE = 4096
_HEAD = struct.Struct("<8sQI")  # magic, checksum, length of what follows
_MARKED, _CLEAN = b"\xff", b"\0"


class NoMap(AgentError):
    """There is no digest map that could be used."""

    code = "no-map"


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the file system says of an image's file; changes with every write to it."""

    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp | None:
        """The stamp of a file; None of anything else, whose times tell nothing."""
        if not stat.S_ISREG(status.st_mode):
            return None
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a map is about.

    Attributes:
        seed: of its digests.
        size_bytes: how much of the disk it stands for, from the first byte on.
        image: the path of the image it is about.
        view: the view that the image equals; None while it is written, and after a pass that was not completed.
        stamp: the image's, when the map was last put away; None for a block device.
    """

    seed: int
    size_bytes: int
    image: str
    view: str | None = None
    stamp: Stamp | None = None

    @property
    def shape(self) -> Shape:
        """How the disk falls into windows."""
        return Shape(self.size_bytes, self.seed)


def map_bytes(size_bytes: int) -> int:
    """The room that the map of a disk of that size may need: 260 MiB for each TiB."""
    return _Layout.of(size_bytes).end


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things lie in the file, in bytes."""

    groups: int
    records: int
    entries: int
    end: int

    @classmethod
    def of(cls, size_bytes: int) -> _Layout:
        windows = -(-size_bytes // WINDOW_BYTES)
        groups = -(-windows // GROUP_WINDOWS)
        records = HEADER_BYTES + _up(groups)
        entries = records + _up(windows * RECORD_BYTES)
        return cls(groups, records, entries, entries + windows * ENTRIES_BYTES)


class MapFile:
    """An open map. Its methods block, raise `OSError`, and are called by one thread at a time, but for `mark`.

    Attributes:
        header: as it was last written.
    """

    def __init__(self, path: Path, fd: int, header: Header) -> None:
        self.path = path
        self.header = header
        self._fd = fd
        self._is_named = True  # durably
        self._shape = header.shape
        self._layout = _Layout.of(header.size_bytes)
        self._marks = bytearray(os.pread(fd, self._layout.groups, HEADER_BYTES).ljust(self._layout.groups, _CLEAN))

    @classmethod
    def create(cls, path: Path, header: Header) -> MapFile:
        """A new map that knows nothing, in place of any other at `path`.

        It need not be durable yet: after a crash there may be none. The one before must be gone for good.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_map(path)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, map_bytes(header.size_bytes))
            made = cls(path, fd, header)
            made._put_header(header)
            made._is_named = False
        except OSError:
            os.close(fd)
            raise
        return made

    @classmethod
    def open(cls, path: Path, *, writable: bool) -> MapFile:
        """The map at `path`.

        Raises:
            NoMap: there is none, or it is damaged or of another kind.
        """
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NoMap("there is no digest map of the disk yet") from None
        except OSError as error:
            raise NoMap(f"the digest map {path} cannot be opened ({error.strerror})") from error
        try:
            header = _decode_header(os.pread(fd, HEADER_BYTES, 0), path)
            if os.fstat(fd).st_size != map_bytes(header.size_bytes):
                raise NoMap(f"the digest map {path} has not the size it should have: it is made anew")
            opened = cls(path, fd, header)
            if writable:
                opened._forget_marked()
        except OSError as error:
            os.close(fd)
            raise NoMap(f"the digest map {path} cannot be read ({error.strerror})") from error
        except NoMap:
            os.close(fd)
            raise
        return opened

    def close(self) -> None:
        """Close it as it is; what was not settled is worth what its marks say."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Close it, and see to it that nobody finds it again, as far as the file system lets us."""
        self.close()
        remove_map(self.path)

    # --- windows --------------------------------------------------------------------------------------------------

    def read_window(self, number: int) -> Window:
        """What is stored of a window; nothing is known of one that is damaged.

        A mark does not matter here: whoever set it since the map was opened stores what holds now.
        """
        record = os.pread(self._fd, RECORD_BYTES, self._layout.records + number * RECORD_BYTES)
        entries = b""
        if kind_of(record) is Kind.MIXED:
            entries = os.pread(self._fd, ENTRIES_BYTES, self._layout.entries + number * ENTRIES_BYTES)
        window = decoded(record, entries, number, self._shape)
        if window is None:
            log.warning("a window of a digest map is damaged and counts as unknown", map=str(self.path), window=number)
            return Window.unknown(self._shape.blocks_of(number))
        return window

    def write_window(self, number: int, window: Window) -> None:
        """Store a window; durable by `settle`."""
        record, entries = encoded(window, number, self._shape)
        if entries:
            _write(self._fd, entries, self._layout.entries + number * ENTRIES_BYTES)
        _write(self._fd, record, self._layout.records + number * RECORD_BYTES)
        window.changed = False

    def write_zero_windows(self, first: int, end: int) -> None:
        """Store that the windows from `first` up to before `end` hold zeroes."""
        record = zero_record(self._shape)
        for start in range(first, end, RECORDS_AT_ONCE):
            count = min(RECORDS_AT_ONCE, end - start)
            _write(self._fd, record * count, self._layout.records + start * RECORD_BYTES)

    @property
    def known_bytes(self) -> int:
        """How much of the disk is known and counts, by the records alone."""
        return self._known_bytes(self._marks)

    @property
    def stored_bytes(self) -> int:
        """How much of the disk is known and will count when this pass is settled."""
        return self._known_bytes(bytes(len(self._marks)))

    def _known_bytes(self, marks: bytes | bytearray) -> int:
        known = 0
        for first, records in self._records():
            counts = known_blocks(records, first, self._shape)
            groups = np.arange(first, first + len(counts)) // GROUP_WINDOWS
            marked = np.frombuffer(marks, dtype=np.uint8) != _CLEAN[0]
            known += int(counts[~marked[groups]].sum())
        return known * BLOCK_BYTES if known < self._shape.blocks else self._shape.size_bytes

    def _records(self) -> Iterator[tuple[int, bytes]]:
        for first in range(0, self._shape.windows, RECORDS_AT_ONCE):
            count = min(RECORDS_AT_ONCE, self._shape.windows - first)
            yield first, os.pread(self._fd, count * RECORD_BYTES, self._layout.records + first * RECORD_BYTES)

    # --- marks and the end ----------------------------------------------------------------------------------------

    def mark(self, groups: Iterable[int]) -> None:
        """Make it durable that nothing known of these groups counts until the next `settle`."""
        fresh = [group for group in groups if self._marks[group] == _CLEAN[0]]
        if not fresh:
            return
        if self.header.view is not None:
            self._put_header(replace(self.header, view=None))
        for group in fresh:
            _write(self._fd, _MARKED, HEADER_BYTES + group)
        os.fdatasync(self._fd)
        for group in fresh:  # last: whoever finds it set may write
            self._marks[group] = _MARKED[0]

    def settle(self, view: str | None, stamp: Stamp | None) -> None:
        """Everything that is stored counts from now on, durably, for an image with that stamp, which equals `view`."""
        if any(self._marks):  # what is stored must be durable before it counts; without marks it counts already
            os.fdatasync(self._fd)
            self._clear_marks()
        self._put_header(replace(self.header, view=view, stamp=stamp))
        os.fdatasync(self._fd)
        if not self._is_named:
            _sync_folder(self.path.parent)
            self._is_named = True

    def _forget_marked(self) -> None:
        """Whoever set these marks did not come to `settle`: what is stored there never counts again."""
        marked = [group for group in range(self._layout.groups) if self._marks[group] != _CLEAN[0]]
        if not marked:
            return
        for group in marked:
            first = group * GROUP_WINDOWS
            count = min(GROUP_WINDOWS, self._shape.windows - first)
            _write(self._fd, bytes(count * RECORD_BYTES), self._layout.records + first * RECORD_BYTES)
        os.fdatasync(self._fd)
        self._clear_marks()

    def _clear_marks(self) -> None:
        self._marks[:] = bytes(len(self._marks))
        _write(self._fd, bytes(self._marks), HEADER_BYTES)

    def _put_header(self, header: Header) -> None:
        text = json.dumps({"version": VERSION, "algorithm": ALGORITHM, "block_bytes": BLOCK_BYTES, **asdict(header)})
        body = text.encode()
        if _HEAD.size + len(body) > HEADER_BYTES:
            raise OSError(0, "the header does not fit")
        head = _HEAD.pack(MAGIC, xxh3_64_intdigest(body), len(body))
        _write(self._fd, (head + body).ljust(HEADER_BYTES, b"\0"), 0)
        self.header = header


def remove_map(path: Path) -> None:
    """Remove the map at `path`, durably; harmless where there is none. Raises `OSError`."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    _sync_folder(path.parent)


def _decode_header(data: bytes, path: Path) -> Header:
    damaged = f"the digest map {path} is damaged: it is made anew"
    if len(data) < HEADER_BYTES:
        raise NoMap(damaged)
    magic, checksum, length = _HEAD.unpack_from(data)
    body = data[_HEAD.size : _HEAD.size + length]
    if magic != MAGIC or checksum != xxh3_64_intdigest(body):
        raise NoMap(damaged)
    values = json.loads(body)
    kind = (values.pop("version", None), values.pop("algorithm", None), values.pop("block_bytes", None))
    if kind != (VERSION, ALGORITHM, BLOCK_BYTES):
        raise NoMap(f"the digest map {path} is of another version, algorithm or block size: it is made anew")
    stamp = values.pop("stamp")
    return Header(**values, stamp=None if stamp is None else Stamp(**stamp))


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _up(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
