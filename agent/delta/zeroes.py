"""Telling whether a block holds only zeroes."""

from __future__ import annotations

import numpy as np

_WORD_BYTES = 8


def is_zero(block: memoryview) -> bool:
    """Whether every byte of `block` is zero. Blocks that are not are mostly told by their first bytes."""
    words = block.nbytes // _WORD_BYTES
    if words and np.frombuffer(block, dtype=np.uint64, count=words).any():
        return False
    return not any(block[words * _WORD_BYTES :])
