"""Digests of a disk's blocks in given ranges; blocks that are known to read as zero are not read."""

from __future__ import annotations

import threading

import numpy as np

from agent.delta.blocks import BLOCK_BYTES, Ranges, block_lengths
from agent.delta.digests import Digests, block_digests, digests_from_wire, zero_digest
from agent.disk.seam import Disk

STEP_BYTES = 4 << 20
"""How much is read at once: large enough for storage, small enough to be hashed while still cached."""

_local = threading.local()


def _buffer() -> memoryview:
    """A read buffer of this worker thread, made once."""
    buffer: memoryview | None = getattr(_local, "buffer", None)
    if buffer is None:
        buffer = _local.buffer = memoryview(bytearray(STEP_BYTES))
    return buffer


def hash_ranges(disk: Disk, ranges: Ranges, *, seed: int) -> tuple[Digests, int]:
    """Digests of all blocks in `ranges` (shape (n, 2), from block boundaries on), and how many bytes were read.

    Raises:
        DiskError: as the disk says.
    """
    parts: list[Digests] = []
    read_bytes = 0
    for offset, length in ranges.tolist():
        for run_offset, run_length, zero in _runs(disk, offset, length):
            if zero:
                parts.append(_zero_digests(run_length, seed))
                continue
            parts.append(_read_digests(disk, run_offset, run_length, seed))
            read_bytes += run_length
    return np.concatenate(parts), read_bytes


def _runs(disk: Disk, offset: int, length: int) -> list[tuple[int, int, bool]]:
    """The range as runs of whole blocks: zero where every byte is known to be, else to be read."""
    blocks = -(-length // BLOCK_BYTES)
    data = np.zeros(blocks, dtype=bool)
    for extent in disk.extents(offset, length):
        if not extent.zero:
            first = (extent.offset_bytes - offset) // BLOCK_BYTES
            last = (extent.offset_bytes - offset + extent.length_bytes - 1) // BLOCK_BYTES
            data[first : last + 1] = True
    edges = np.flatnonzero(np.diff(data)) + 1
    starts = [0, *edges.tolist()]
    ends = [*edges.tolist(), blocks]
    return [
        (offset + start * BLOCK_BYTES, min(end * BLOCK_BYTES, length) - start * BLOCK_BYTES, not data[start])
        for start, end in zip(starts, ends, strict=True)
    ]


def _zero_digests(length: int, seed: int) -> Digests:
    lengths = block_lengths(length).tolist()
    return digests_from_wire(b"".join([zero_digest(size, seed=seed) for size in lengths]))


def _read_digests(disk: Disk, offset: int, length: int, seed: int) -> Digests:
    parts: list[Digests] = []
    buffer = _buffer()
    while length:
        step = min(length, STEP_BYTES)
        disk.read_into(offset, buffer[:step])
        parts.append(block_digests(buffer[:step], block_lengths(step), seed=seed))
        offset, length = offset + step, length - step
    return np.concatenate(parts)
