"""Payloads of bulk messages as numpy arrays: ranges and digests to bytes and back (``protocol/SPEC.md``).

Whatever comes from the peer is checked whole before any of it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from agent.delta.blocks import Ranges
from protocol.errors import PeerViolation

Buffer = bytes | bytearray | memoryview
RANGE_BYTES = 16
BLAKE3_BYTES = 32


def ranges_to_wire(ranges: Ranges) -> bytes:
    """`ranges` as little-endian 64-bit pairs."""
    return np.ascontiguousarray(ranges, dtype="<u8").tobytes()


def ranges_from_wire(payload: Buffer, count: int) -> Ranges:
    """The first `count` ranges of `payload`.

    Raises:
        PeerViolation: the payload is too short.
    """
    view = memoryview(payload)
    if count < 0 or view.nbytes < count * RANGE_BYTES:
        raise PeerViolation(f"a payload of {view.nbytes} bytes cannot hold the {count} ranges it declares")
    return np.frombuffer(view[: count * RANGE_BYTES], dtype="<u8").reshape(count, 2).astype(np.uint64)


def total_bytes(ranges: Ranges) -> int:
    """Sum of the lengths."""
    return int(ranges[:, 1].sum()) if len(ranges) else 0


@dataclass
class RisingRanges:
    """A reader of ranges that must rise, stay inside the disk and start on block boundaries.

    Attributes:
        what: what the ranges are, for the sentence of a violation.
        size_bytes: the source's size: ranges end there at the latest.
        block_bytes: every range starts, and ends unless it ends the disk, at a multiple of it.
        cursor_bytes: where the next range may start at the earliest.
    """

    what: str
    size_bytes: int
    block_bytes: int
    cursor_bytes: int = field(default=0)

    def accept(self, ranges: Ranges) -> None:
        """Check `ranges` whole, then move the cursor behind the last.

        Raises:
            PeerViolation: naming the first range that is wrong.
        """
        if not len(ranges):
            raise PeerViolation(f"a message of {self.what} names no range")
        starts, lengths = ranges[:, 0], ranges[:, 1]
        size, block = np.uint64(self.size_bytes), np.uint64(self.block_bytes)
        inside = (lengths > 0) & (starts < size) & (lengths <= size - np.minimum(starts, size))
        ends = np.where(inside, starts + lengths, starts)
        aligned = (starts % block == 0) & ((ends % block == 0) | (ends == size))
        earliest = np.concatenate((np.array([self.cursor_bytes], dtype=np.uint64), ends[:-1]))
        good = inside & aligned & (starts >= earliest)
        if not good.all():
            start, length = (int(value) for value in ranges[int(np.argmin(good))])
            raise PeerViolation(
                f"{self.what} of {length} bytes at offset {start} are outside what the pass allows "
                f"(disk of {self.size_bytes} bytes, blocks of {self.block_bytes}, rising from {self.cursor_bytes})"
            )
        self.cursor_bytes = int(ends[-1])
