"""Telling what holds only zeroes: one block, or the aligned blocks inside the runs of a whole batch.

Zeroes are looked for in whole aligned blocks of 64 KiB only: that is what storage can make a hole of, and a range of
its own costs more than the few bytes into which zstd turns a smaller stretch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ZERO_BLOCK_BYTES = 64 * 1024
"""Zeroes are told apart in blocks of this size, aligned on the disk."""

_WORD_BYTES = 8

_PROBES = np.arange(0, ZERO_BLOCK_BYTES, 4093, dtype=np.int64)
"""Where a block is looked at first. 4093 is prime: the bytes looked at fall on no one column of a record or a page.
They tell almost every block that holds anything; the others are read whole."""


def is_zero(block: memoryview) -> bool:
    """Whether every byte of `block` is zero. Blocks that are not are mostly told by their first bytes."""
    count = block.nbytes // _WORD_BYTES
    if count:
        words = np.frombuffer(block, dtype=np.uint64, count=count)
        # The maximum is a vectorised pass over the memory, twice as fast as `any`, but it never stops early.
        if words[0] or words.max():
            return False
    return not any(block[count * _WORD_BYTES :])


def split_zeroes(
    buffer: memoryview, offsets: NDArray[np.int64], lengths: NDArray[np.int64], starts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Cut runs where aligned blocks of zeroes begin and end in them.

    Args:
        buffer: the bytes of the runs.
        offsets: of each run on the disk, in bytes, rising, shape (n,).
        lengths: of each run in bytes, at least 1.
        starts: where each run lies in `buffer`.

    Returns:
        Offsets, lengths and starts of the pieces, in rising order, and whether each holds only zeroes, shape (m,).
    """
    blocks = _zero_blocks(buffer, offsets, lengths, starts)
    if not len(blocks):
        return offsets, lengths, starts, np.zeros(len(offsets), dtype=np.bool_)
    # A stretch begins at a block whose predecessor is not one, or that opens another run.
    follows = blocks[1:] == blocks[:-1] + ZERO_BLOCK_BYTES
    owner = np.searchsorted(offsets, blocks, side="right") - 1
    joined = follows & (owner[1:] == owner[:-1])
    first = np.concatenate(([True], ~joined))
    last = np.concatenate((~joined, [True]))
    begins, ends = blocks[first], blocks[last] + ZERO_BLOCK_BYTES
    edges = np.unique(np.concatenate((offsets, begins, ends)))
    run = np.searchsorted(offsets, edges, side="right") - 1
    run_ends = offsets + lengths
    inside = edges < run_ends[run]
    edges, run = edges[inside], run[inside]
    until = np.minimum(np.concatenate((edges[1:], run_ends[-1:])), run_ends[run])
    return edges, until - edges, starts[run] + (edges - offsets[run]), np.isin(edges, begins)


def _zero_blocks(
    buffer: memoryview, offsets: NDArray[np.int64], lengths: NDArray[np.int64], starts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Offsets on the disk of the aligned blocks inside the runs that hold only zeroes."""
    block = ZERO_BLOCK_BYTES
    first = -(-offsets // block) * block
    counts = np.maximum((offsets + lengths) // block - first // block, 0)
    total = int(counts.sum())
    if not total:
        return np.empty(0, dtype=np.int64)
    position = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    blocks = np.repeat(first, counts) + position * block
    places = np.repeat(starts - offsets, counts) + blocks
    content = np.frombuffer(buffer, dtype=np.uint8)
    suspects = np.flatnonzero(~content[places[:, None] + _PROBES].any(axis=1))
    zero = [index for index in suspects.tolist() if is_zero(buffer[places[index] : places[index] + block])]
    return np.asarray(blocks[zero], dtype=np.int64)
