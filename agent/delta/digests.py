"""xxh3-128 digests: which blocks, superblocks and pages are the same.

The digest is the canonical big-endian one (xxhash specification, "Canonical representation"). xxHash is not
collision-resistant: equal digests mean *matched*, never *proven*; every pass has a random seed of its own.

A superblock's digest is made of its blocks' digests, not of its bytes: whoever keeps the blocks' digests can tell those
of superblocks of any size without reading anything.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from agent.delta.blocks import BLOCK_BYTES, Ranges, owners, split
from agent.errors import SyncError

DIGEST_BYTES = 16

Digests = NDArray[np.void]
"""Shape (n,), dtype ``V16``: the bytes of each digest."""


def piece_digests(buffer: memoryview, lengths: NDArray[np.uint64], *, seed: int) -> Digests:
    """Digests of pieces that lie one behind the other in `buffer`.

    Args:
        buffer: the pieces' bytes, exactly.
        lengths: length of each piece in bytes, shape (n,).
        seed: 64 bits.
    """
    bounds = [0, *np.cumsum(lengths).tolist()]
    if bounds[-1] != buffer.nbytes:
        raise ValueError(f"pieces of {bounds[-1]} bytes in a buffer of {buffer.nbytes}")
    return digests_from_wire(b"".join([xxh3_128_digest(buffer[start:end], seed) for start, end in pairwise(bounds)]))


def superblock_digests(blocks: Ranges, digests: Digests, superblocks: Ranges, *, seed: int) -> Digests:
    """Digests of superblocks from those of their blocks.

    Args:
        blocks: rising, shape (n, 2); `digests`: theirs.
        superblocks: what the blocks were cut from, shape (m, 2). One that is a single block has that block's digest.
        seed: 64 bits.
    """
    if len(blocks) == len(superblocks):
        return digests
    plain = memoryview(digests.tobytes())
    edges = np.searchsorted(owners(superblocks, blocks), np.arange(len(superblocks) + 1)).tolist()
    parts = [
        bytes(plain[start * DIGEST_BYTES : end * DIGEST_BYTES])
        if end == start + 1
        else xxh3_128_digest(plain[start * DIGEST_BYTES : end * DIGEST_BYTES], seed)
        for start, end in pairwise(edges)
    ]
    return digests_from_wire(b"".join(parts))


@lru_cache(maxsize=256)
def zero_digest(length_bytes: int, *, seed: int) -> bytes:
    """Digest of a superblock of zeroes, 16 bytes."""
    ranges = np.array([(0, length_bytes)], dtype=np.uint64)
    blocks = split(ranges, BLOCK_BYTES)
    parts = [bytes(xxh3_128_digest(bytes(length), seed)) for length in blocks[:, 1].tolist()]
    return superblock_digests(blocks, digests_from_wire(b"".join(parts)), ranges, seed=seed).tobytes()


def zero_digests(lengths: NDArray[np.uint64], *, seed: int) -> Digests:
    """Digests of superblocks of zeroes of those lengths, shape (n,)."""
    return digests_from_wire(b"".join([zero_digest(length, seed=seed) for length in lengths.tolist()]))


def digests_to_wire(digests: Digests) -> bytes:
    """16 bytes for each digest."""
    return digests.tobytes()


def digests_from_wire(payload: bytes | memoryview) -> Digests:
    """Digests from their bytes (shared, not copied).

    Raises:
        SyncError: not a whole number of digests.
    """
    view = memoryview(payload)
    if view.nbytes % DIGEST_BYTES:
        raise SyncError(
            f"{view.nbytes} bytes are not a whole number of digests; the peer speaks another protocol, update it."
        )
    return np.frombuffer(view, dtype=f"V{DIGEST_BYTES}")
