"""Frames of contents made up, for the tests of packing and unpacking."""

from __future__ import annotations

import random

import numpy as np

from agent.delta.blocks import BLOCK_BYTES, Ranges, to_ranges
from agent.delta.compression import Choice
from agent.delta.pack import Packed, Packer
from agent.delta.unpack import Unpacker

B = BLOCK_BYTES
P = 4096
MIB = 1 << 20
FAST = Choice(level=1, frame_bytes=MIB)
OFF = Choice(level=None, frame_bytes=MIB)


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def text(length: int) -> bytes:
    return (b"so it goes. " * (length // 12 + 1))[:length]


def pack(
    content: bytes,
    runs: list[tuple[int, int]] | None = None,
    choice: Choice = FAST,
    packer: Packer | None = None,
    first: int = B,
) -> list[Packed]:
    """Frames of a buffer that holds the disk from `first` on; all of it by default."""
    ranges = to_ranges([(first, len(content))] if runs is None else runs)
    return (packer or Packer()).pack(memoryview(content), ranges, ranges[:, 0] - np.uint64(first), choice)


def stored(packed: Packed) -> bytes:
    return b"".join(packed.pieces)


def unpack(packed: Packed, payload: bytes | None = None, ranges: Ranges | None = None) -> memoryview:
    return Unpacker().unpack(
        memoryview(stored(packed) if payload is None else payload),
        packed.codec,
        packed.ranges if ranges is None else ranges,
        memoryview(packed.proofs),
    )
