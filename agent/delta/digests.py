"""xxh3-128 digests: which blocks, superblocks and pages are the same.

The digest is the canonical big-endian one (xxhash specification, "Canonical representation"). xxHash is not
collision-resistant: equal digests mean *matched*, never *proven*; every pass has a random seed of its own.

A superblock's digest is made of its blocks' digests, not of its bytes: whoever keeps the blocks' digests can tell those
of superblocks of any size without reading anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from agent.delta.blocks import BLOCK_BYTES
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


def block_digests(buffer: memoryview, *, seed: int) -> list[bytes]:
    """The digest of each block of one run that begins at a block boundary; its last block may be shorter."""
    return [xxh3_128_digest(buffer[at : at + BLOCK_BYTES], seed) for at in range(0, buffer.nbytes, BLOCK_BYTES)]


def superblock_digests(
    ranges: Iterable[tuple[int, int]], blocks: list[bytes], superblock_bytes: int, *, seed: int
) -> list[bytes]:
    """Digests of superblocks from those of their blocks.

    Args:
        ranges: offset and length of what was hashed, from block boundaries on, rising.
        blocks: the digest of each of their blocks.
        superblock_bytes: a superblock is what of one range lies between two multiples of it. One that is a single block
            has that block's digest.
        seed: 64 bits.
    """
    if superblock_bytes == BLOCK_BYTES:
        return blocks
    digests: list[bytes] = []
    at = 0
    for offset, length in ranges:
        end = offset + length
        while offset < end:
            stop = min(end, (offset // superblock_bytes + 1) * superblock_bytes)
            count = -(-(stop - offset) // BLOCK_BYTES)
            some = blocks[at : at + count]
            digests.append(some[0] if count == 1 else xxh3_128_digest(b"".join(some), seed))
            offset, at = stop, at + count
    return digests


@lru_cache(maxsize=256)
def zero_digest(length_bytes: int, *, seed: int) -> bytes:
    """Digest of a superblock of zeroes, 16 bytes."""
    full, rest = divmod(length_bytes, BLOCK_BYTES)
    blocks = [bytes(xxh3_128_digest(bytes(BLOCK_BYTES), seed))] * full
    if rest:
        blocks.append(bytes(xxh3_128_digest(bytes(rest), seed)))
    return superblock_digests([(0, length_bytes)], blocks, max(BLOCK_BYTES, 2 * length_bytes), seed=seed)[0]


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
