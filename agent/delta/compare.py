"""Comparing: what one side answers to the other's digests, and what follows from the answer.

Pure functions over a buffer that holds the data of some ranges end to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from agent.delta.blocks import BLOCK_BYTES, Ranges, owners, positions, split
from agent.delta.digests import (
    DIGEST_BYTES,
    Digests,
    digests_from_wire,
    piece_digests,
    superblock_digests,
    zero_digests,
)
from agent.errors import SyncError

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What the target says about the superblocks of a span.

    Attributes:
        differs: which differ, shape (n,).
        empty: which of those read as zero at the target, shape (n,).
        details: digests of the details of those that differ and are not empty, in order.
    """

    differs: Mask
    empty: Mask
    details: Digests


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The bytes of rising ranges, end to end in one buffer.

    Attributes:
        ranges: shape (n, 2), from block boundaries on.
        buffer: exactly their bytes.
    """

    ranges: Ranges
    buffer: memoryview

    def starts(self, pieces: Ranges) -> NDArray[np.uint64]:
        """Where in the buffer each of the `pieces` of the ranges lies, shape (m,)."""
        owner = owners(self.ranges, pieces)
        return np.asarray(positions(self.ranges)[owner] + (pieces[:, 0] - self.ranges[owner, 0]), dtype=np.uint64)

    def superblocks(self, superblock_bytes: int, *, seed: int) -> tuple[Ranges, Digests]:
        """The superblocks of the ranges and their digests."""
        blocks = split(self.ranges, BLOCK_BYTES)
        digests = piece_digests(self.buffer, blocks[:, 1], seed=seed)
        superblocks = split(self.ranges, superblock_bytes)
        return superblocks, superblock_digests(blocks, digests, superblocks, seed=seed)

    def details(self, pieces: Ranges, *, seed: int) -> Digests:
        """Digests of those `pieces` of the ranges."""
        # Where pieces adjoin (they mostly do) the buffer is hashed in one go.
        starts = self.starts(pieces).tolist()
        lengths = pieces[:, 1]
        breaks = [i for i in range(1, len(starts)) if starts[i] != starts[i - 1] + int(lengths[i - 1])]
        parts = [
            piece_digests(self.buffer[starts[i] : starts[j - 1] + int(lengths[j - 1])], lengths[i:j], seed=seed)
            for i, j in pairwise([0, *breaks, len(starts)])
        ]
        return np.concatenate(parts)


def differing(ours: Digests, theirs: Digests) -> Mask:
    """For each piece whether its digests differ, shape (n,).

    Raises:
        SyncError: the two sides hashed a different number of pieces.
    """
    if ours.shape != theirs.shape:
        raise SyncError(
            f"The two sides hashed {len(ours)} and {len(theirs)} blocks of the same ranges; "
            "update both agents to the same version and run the pass again."
        )
    return np.asarray((_words(ours) != _words(theirs)).any(axis=1))


def _words(digests: Digests) -> NDArray[np.uint64]:
    return np.frombuffer(digests.tobytes(), dtype=np.uint64).reshape(-1, DIGEST_BYTES // 8)


def detail_pieces(superblocks: Ranges, superblock_bytes: int, detail_bytes: int) -> Ranges:
    """The details of superblocks; none where a detail would be the superblock itself."""
    if detail_bytes >= superblock_bytes:
        return superblocks[:0]
    return split(superblocks, detail_bytes)


def answer(
    superblocks: Ranges, theirs: Digests, held: Held, *, superblock_bytes: int, detail_bytes: int, seed: int
) -> Answer:
    """The target's answer.

    Args:
        superblocks: of the span, shape (n, 2); `theirs`: the source's digests of them.
        held: the target's bytes of those superblocks that do not read as zero, whole.
        superblock_bytes, detail_bytes: the granularity asked for.
        seed: 64 bits.
    """
    read, digests = held.superblocks(superblock_bytes, seed=seed)
    is_read = np.isin(superblocks[:, 0], read[:, 0], assume_unique=True)
    ours = np.empty(len(superblocks), dtype=f"V{DIGEST_BYTES}")
    ours[is_read] = digests
    if not is_read.all():
        ours[~is_read] = zero_digests(superblocks[~is_read, 1], seed=seed)
    differs = differing(ours, theirs)
    pieces = detail_pieces(superblocks[differs & is_read], superblock_bytes, detail_bytes)
    details = held.details(pieces, seed=seed) if len(pieces) else digests_from_wire(b"")
    return Answer(differs, differs & ~is_read, details)


def changed_pieces(
    superblocks: Ranges, told: Answer, held: Held, *, superblock_bytes: int, detail_bytes: int, seed: int
) -> tuple[Ranges, int]:
    """What the source must send: pieces in rising order, shape (m, 2), and how many details were compared for it.

    Args:
        superblocks: of the span, shape (n, 2); `told`: what the target answered.
        held: the source's bytes of the span's data.
        superblock_bytes, detail_bytes: the granularity that was asked for.
        seed: 64 bits.

    Raises:
        SyncError: the answer has another number of details than it must.
    """
    whole = told.empty if detail_bytes < superblock_bytes else told.differs
    pieces = detail_pieces(superblocks[told.differs & ~told.empty], superblock_bytes, detail_bytes)
    if not len(pieces):
        if len(told.details):
            raise SyncError(f"{len(told.details)} digests of details came where none were due; update both agents.")
        return superblocks[whole], 0
    chosen = pieces[differing(held.details(pieces, seed=seed), told.details)]
    both = np.concatenate((superblocks[whole], chosen))
    return both[np.argsort(both[:, 0], kind="stable")], len(pieces)
