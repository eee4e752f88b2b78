"""Deterministic disk images: half compressible, half not, with holes; and changes scattered over them.

The same seed makes the same bytes on any machine, so that runs can be compared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

BLOCK_BYTES = 64 << 10
PAGE_BYTES = 4 << 10
STEP_BLOCKS = 256
HOLES = 0.3
"""Share of the disk that is never written, in runs, as on a file system that is two thirds full."""


def _holes(dice: np.random.Generator, blocks: int) -> np.ndarray:
    """Which blocks are holes, in runs of 1 to 512 blocks, shape (blocks,)."""
    hole = np.zeros(blocks, dtype=bool)
    at = 0
    while at < blocks:
        run = int(dice.integers(1, 513))
        hole[at : at + run] = dice.random() < HOLES
        at += run
    return hole


def _content(dice: np.random.Generator, blocks: int) -> np.ndarray:
    """Bytes of `blocks` blocks, shape (blocks, BLOCK_BYTES): every other page repeats a short text."""
    content = dice.integers(0, 256, size=(blocks, BLOCK_BYTES // PAGE_BYTES, PAGE_BYTES), dtype=np.uint8)
    content[:, ::2, :] = np.tile(dice.integers(97, 123, size=64, dtype=np.uint8), PAGE_BYTES // 64)
    return content.reshape(blocks, BLOCK_BYTES)


def make(path: Path, size_bytes: int, *, seed: int) -> int:
    """A raw image of `size_bytes` (a multiple of 16 MiB); returns the bytes of data in it."""
    dice = np.random.default_rng(seed)
    blocks = size_bytes // BLOCK_BYTES
    hole = _holes(dice, blocks)
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for start in range(0, blocks, STEP_BLOCKS):
            content = _content(dice, STEP_BLOCKS)
            for number in np.flatnonzero(~hole[start : start + STEP_BLOCKS]).tolist():
                file.seek((start + number) * BLOCK_BYTES)
                file.write(content[number].data)
    return int((~hole).sum()) * BLOCK_BYTES


def change(path: Path, *, share: float, seed: int, data_seed: int) -> int:
    """Rewrite one to three pages in `share` of the data blocks of an image that `make` made with `data_seed`.

    The places depend on `seed` and `data_seed` alone; the bytes are new each time. Returns the bytes of changed blocks.
    """
    size = path.stat().st_size
    data = np.flatnonzero(~_holes(np.random.default_rng(data_seed), size // BLOCK_BYTES))
    dice = np.random.default_rng(seed)
    chosen = np.sort(dice.choice(data, size=int(len(data) * share), replace=False))
    fresh = np.random.default_rng()
    with path.open("r+b") as file:
        for block in chosen.tolist():
            for page in dice.choice(BLOCK_BYTES // PAGE_BYTES, size=int(dice.integers(1, 4)), replace=False).tolist():
                file.seek(block * BLOCK_BYTES + page * PAGE_BYTES)
                file.write(fresh.integers(0, 256, size=PAGE_BYTES, dtype=np.uint8).data)
    return len(chosen) * BLOCK_BYTES
