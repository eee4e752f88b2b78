"""The windows of a digest map: what each block of a stretch of a disk holds, as far as it is known.

A *window* stands for 64 MiB of the disk: a digest of 16 bytes for each of its 1024 blocks, and which of them are known.
A disk's last window, and its last block, may be shorter. Stored, a window is a *record* (what is known, a checksum) and
its *entries* (the digests); one whose blocks are all zeroes is its record alone. Pure functions and values.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from agent.delta.blocks import BLOCK_BYTES
from agent.delta.digests import DIGEST_BYTES, zero_digest

WINDOW_BYTES = 64 << 20
WINDOW_BLOCKS = WINDOW_BYTES // BLOCK_BYTES
ENTRIES_BYTES = WINDOW_BLOCKS * DIGEST_BYTES
RECORD_BYTES = 256

_HEAD = struct.Struct("<B7xQ")  # kind, checksum
_KNOWN_BYTES = WINDOW_BLOCKS // 8

Entries = NDArray[np.uint8]
"""Digests as rows of bytes, shape (n, 16)."""
Known = NDArray[np.bool_]
"""Which blocks are known, shape (n,)."""


class Kind(enum.IntEnum):
    """What is stored of a window."""

    UNKNOWN = 0  # nothing; also what a hole in the file says
    ZERO = 1  # every block holds zeroes; there are no entries
    MIXED = 2  # the record says which entries count


@dataclass(slots=True, eq=False)
class Window:
    """A window in memory.

    Attributes:
        entries: shape (n, 16), n being its blocks; `known`: which of them count.
        changed: it differs from what is stored.
    """

    entries: Entries
    known: Known
    changed: bool = False

    @classmethod
    def unknown(cls, count: int) -> Window:
        """Nothing is known of its `count` blocks."""
        return cls(np.zeros((count, DIGEST_BYTES), dtype=np.uint8), np.zeros(count, dtype=bool))

    def enter(self, first: int, entries: Entries) -> None:
        """The blocks from the window's `first` on are known to hold this."""
        self.entries[first : first + len(entries)] = entries
        self.known[first : first + len(entries)] = True
        self.changed = True

    def forget(self, first: int, end: int) -> None:
        """What those blocks hold is not known any more."""
        self.known[first:end] = False
        self.changed = True


@dataclass(frozen=True, slots=True)
class Shape:
    """How a disk falls into windows and blocks.

    Attributes:
        size_bytes: of the disk, at least 1.
        seed: of the digests.
    """

    size_bytes: int
    seed: int

    @property
    def blocks(self) -> int:
        """How many blocks the disk has."""
        return -(-self.size_bytes // BLOCK_BYTES)

    @property
    def windows(self) -> int:
        """How many windows it has."""
        return -(-self.size_bytes // WINDOW_BYTES)

    def blocks_of(self, number: int) -> int:
        """How many blocks that window has."""
        return min(WINDOW_BLOCKS, self.blocks - number * WINDOW_BLOCKS)

    def bytes_of(self, blocks: int) -> int:
        """How much of the disk the first so many blocks are."""
        return min(blocks * BLOCK_BYTES, self.size_bytes)

    def zero_entries(self, first: int, count: int) -> Entries:
        """The digests of `count` blocks of zeroes from the disk's block `first` on, shape (count, 16)."""
        row = np.frombuffer(zero_digest(BLOCK_BYTES, seed=self.seed), dtype=np.uint8)
        entries = np.tile(row, (count, 1))
        rest = self.size_bytes % BLOCK_BYTES
        if count and rest and first + count == self.blocks:
            entries[-1] = np.frombuffer(zero_digest(rest, seed=self.seed), dtype=np.uint8)
        return entries


def whole_blocks(shape: Shape, offset_bytes: int, length_bytes: int) -> tuple[int, int]:
    """The blocks that lie in a run whole, as (first, behind); first ≥ behind where there are none."""
    end = min(offset_bytes + length_bytes, shape.size_bytes)
    behind = shape.blocks if end == shape.size_bytes else end // BLOCK_BYTES
    return -(-offset_bytes // BLOCK_BYTES), behind


def encoded(window: Window, number: int, shape: Shape) -> tuple[bytes, bytes]:
    """A window as it is stored: its record, and its entries where it needs any."""
    if not window.known.any():
        return bytes(RECORD_BYTES), b""
    if window.known.all():
        zeroes = shape.zero_entries(number * WINDOW_BLOCKS, len(window.known))
        if np.array_equal(window.entries, zeroes):
            return zero_record(shape), b""
    known = np.packbits(window.known).tobytes().ljust(_KNOWN_BYTES, b"\0")
    entries = window.entries.tobytes().ljust(ENTRIES_BYTES, b"\0")
    return _record(Kind.MIXED, known, entries, shape.seed), entries


def zero_record(shape: Shape) -> bytes:
    """The record of any window of zeroes."""
    return _record(Kind.ZERO, bytes(_KNOWN_BYTES), b"", shape.seed)


def kind_of(record: bytes) -> Kind | None:
    """What a record says is stored; None: it is none."""
    try:
        return Kind(record[0])
    except ValueError:
        return None


def decoded(record: bytes, entries: bytes, number: int, shape: Shape) -> Window | None:
    """A window from its record and, where the record's kind is MIXED, its entries; None where they do not agree."""
    count = shape.blocks_of(number)
    kind = kind_of(record)
    if kind is Kind.UNKNOWN:
        return Window.unknown(count) if record == bytes(RECORD_BYTES) else None
    known = record[_HEAD.size : _HEAD.size + _KNOWN_BYTES]
    if kind is None or record != _record(kind, known, entries, shape.seed):
        return None
    if kind is Kind.ZERO:
        return Window(shape.zero_entries(number * WINDOW_BLOCKS, count), np.ones(count, dtype=bool))
    rows = np.frombuffer(entries, dtype=np.uint8).reshape(WINDOW_BLOCKS, DIGEST_BYTES)[:count].copy()
    return Window(rows, np.unpackbits(np.frombuffer(known, dtype=np.uint8), count=count).astype(bool))


def known_blocks(records: bytes, first: int, shape: Shape) -> NDArray[np.int64]:
    """How many blocks each of the windows from `first` on knows, by its record alone, shape (n,)."""
    rows = np.frombuffer(records, dtype=np.uint8).reshape(-1, RECORD_BYTES)
    counts = np.full(len(rows), WINDOW_BLOCKS, dtype=np.int64)
    if first + len(rows) == shape.windows:
        counts[-1] = shape.blocks_of(shape.windows - 1)
    bits = np.unpackbits(rows[:, _HEAD.size : _HEAD.size + _KNOWN_BYTES], axis=1).sum(axis=1, dtype=np.int64)
    kinds = rows[:, 0]
    return np.where(kinds == Kind.ZERO, counts, np.where(kinds == Kind.MIXED, np.minimum(bits, counts), 0))


def _record(kind: Kind, known: bytes, entries: bytes, seed: int) -> bytes:
    checksum = xxh3_64_intdigest(bytes([kind]) + known + entries, seed)
    return (_HEAD.pack(kind, checksum) + known).ljust(RECORD_BYTES, b"\0")
