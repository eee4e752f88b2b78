"""Proof of what was written: flush, read back past the page cache, compare with what the source said it sent."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3

from agent.delta.blocks import Ranges
from agent.delta.pack import BLAKE3_BYTES
from agent.disk.seam import Disk
from agent.errors import VerificationFailed

READ_BYTES = 4 << 20
"""How much is read back at once."""


@dataclass
class Written:
    """What was written since the last flush: blocks with their BLAKE3 digests, and zeroed runs.

    Bounded by `agent.sync.target.VERIFY_EVERY_BYTES` of blocks (48 bytes of books for each).
    """

    ranges: list[Ranges] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    zeroes: list[tuple[int, int]] = field(default_factory=list)
    size_bytes: int = 0

    def add_blocks(self, ranges: Ranges, digests: bytes) -> None:
        """Remember blocks and their digests (32 bytes each, in the order of `ranges`)."""
        self.ranges.append(ranges)
        self.digests.append(digests)
        self.size_bytes += int(ranges[:, 1].sum())

    def add_zeroes(self, runs: list[tuple[int, int]]) -> None:
        """Remember zeroed runs (offset, length)."""
        self.zeroes.extend(runs)
        self.size_bytes += sum(length for _, length in runs)


def verify(disk: Disk, written: Written) -> int:
    """Flush, then read everything in `written` back; returns the bytes proven.

    Raises:
        VerificationFailed: naming disk and offset of the first difference.
        DiskError: the flush or a read failed.
    """
    disk.flush()
    proven = 0
    buffer = memoryview(bytearray(READ_BYTES))
    if written.ranges:
        ranges = np.concatenate(written.ranges)
        proven += _verify_blocks(disk, ranges, b"".join(written.digests), buffer)
    for offset, length in written.zeroes:
        proven += _verify_zeroes(disk, offset, length, buffer)
    return proven


def _verify_blocks(disk: Disk, ranges: Ranges, digests: bytes, buffer: memoryview) -> int:
    proven, index = 0, 0
    for start, stop in _adjoining(ranges, buffer.nbytes):
        offset = int(ranges[start, 0])
        length = int(ranges[start:stop, 1].sum())
        disk.read_back(offset, buffer[:length])
        at = 0
        for size in ranges[start:stop, 1].tolist():
            expected = digests[index * BLAKE3_BYTES : (index + 1) * BLAKE3_BYTES]
            if blake3(buffer[at : at + size]).digest() != expected:
                raise _difference(disk, offset + at, size)
            at, index = at + size, index + 1
        proven += length
    return proven


def _adjoining(ranges: Ranges, limit_bytes: int) -> list[tuple[int, int]]:
    """Index pairs (start, stop) of blocks that adjoin and together fit the buffer."""
    groups: list[tuple[int, int]] = []
    start, size = 0, 0
    for index, (offset, length) in enumerate(ranges.tolist()):
        adjoins = index > start and offset == int(ranges[index - 1].sum())
        if index > start and (not adjoins or size + length > limit_bytes):
            groups.append((start, index))
            start, size = index, 0
        size += length
    groups.append((start, len(ranges)))
    return groups


def _verify_zeroes(disk: Disk, offset: int, length: int, buffer: memoryview) -> int:
    """Holes prove themselves (the storage guarantees that they read as zero); the rest is read."""
    for extent in disk.extents(offset, length):
        if extent.zero:
            continue
        at, end = extent.offset_bytes, extent.offset_bytes + extent.length_bytes
        while at < end:
            step = min(buffer.nbytes, end - at)
            disk.read_back(at, buffer[:step])
            if np.frombuffer(buffer[:step], dtype=np.uint8).any():
                raise _difference(disk, at, step)
            at += step
    return length


def _difference(disk: Disk, offset: int, length: int) -> VerificationFailed:
    return VerificationFailed(
        f"disk {disk.name}: {length} bytes at offset {offset} read back differently from what the source sent; "
        "the storage of the target does not keep what is written to it: examine it before running again",
        disk=disk.name,
        offset_bytes=offset,
        length_bytes=length,
    )
