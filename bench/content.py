"""Bytes for pages of each kind: text, machine code, packed data, database pages, metadata. Seeded, and fast."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 4 << 10
WORDS = PAGE_BYTES // 8
"""Content is made of words of eight bytes, taken from a vocabulary or at random."""

# Share of words that come from the vocabulary, by kind; the rest is random. zstd -3 makes of it about what it makes of
# logs and configuration (3 to 1), of programs and libraries (2 to 1), of packages and pictures (nothing).
FROM_VOCABULARY = {1: 0.9, 2: 0.82, 3: 0.68, 4: 0.0, 5: 0.6}
VOCABULARY_WORDS = 1 << 12


@cache
def _vocabulary(kind: int) -> npt.NDArray[np.uint64]:
    """The words of a kind, shape (VOCABULARY_WORDS,): letters for text, mostly small numbers for code."""
    dice = np.random.default_rng([7, kind])
    if kind == 2:
        letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkqjxz     \n.,=/-_", dtype=np.uint8)
        return letters[dice.integers(0, len(letters), size=(VOCABULARY_WORDS, 8))].view(np.uint64).reshape(-1)
    words = dice.integers(0, 256, size=(VOCABULARY_WORDS, 8), dtype=np.uint8)
    words[dice.random(words.shape) < 0.5] = 0
    return words.view(np.uint64).reshape(-1)


def fill(kinds: npt.NDArray[np.uint8], seed: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Content of pages of these kinds (see `bench.images.Kind`; 0 stays zero), shape (len(kinds), PAGE_BYTES)."""
    dice = np.random.Generator(np.random.SFC64(list(seed)))
    content = dice.integers(0, 1 << 64, size=(len(kinds), WORDS), dtype=np.uint64)
    for kind, share in FROM_VOCABULARY.items():
        pages = np.flatnonzero(kinds == kind)
        if not len(pages) or not share:
            continue
        random = content[pages]
        # One random word serves as number and as the choice which it is: common words have low numbers.
        number = (random & np.uint64(VOCABULARY_WORDS - 1)) & (random >> np.uint64(12))
        known = ((random >> np.uint64(32)) & np.uint64(0xFFFF)) < np.uint64(round(share * 0xFFFF))
        words = _vocabulary(kind)[number & np.uint64(VOCABULARY_WORDS - 1)]
        content[pages] = np.where(known, words, random)
    content[kinds == 0] = 0
    return content.view(np.uint8).reshape(len(kinds), PAGE_BYTES)
