"""xxh3-128 digests of blocks: which blocks are the same.

The digest is the canonical big-endian one (xxhash specification, "Canonical representation"). xxHash is not
collision-resistant: equal digests mean *matched*, never *proven*; every pass has a random seed of its own.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from agent.errors import SyncError

DIGEST_BYTES = 16

Digests = NDArray[np.void]
"""Shape (n,), dtype ``V16``: the bytes of each digest."""


def block_digests(buffer: memoryview, lengths: NDArray[np.uint64], *, seed: int) -> Digests:
    """Digests of the blocks that lie one behind the other in `buffer`.

    Args:
        buffer: the blocks' bytes, exactly.
        lengths: length of each block in bytes, shape (n,).
        seed: 64 bits.
    """
    bounds = [0, *np.cumsum(lengths).tolist()]
    if bounds[-1] != buffer.nbytes:
        raise ValueError(f"blocks of {bounds[-1]} bytes in a buffer of {buffer.nbytes}")
    return digests_from_wire(b"".join([xxh3_128_digest(buffer[start:end], seed) for start, end in pairwise(bounds)]))


@lru_cache(maxsize=64)
def zero_digest(length_bytes: int, *, seed: int) -> bytes:
    """Digest of a block of zeroes, 16 bytes."""
    return bytes(xxh3_128_digest(bytes(length_bytes), seed))


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
