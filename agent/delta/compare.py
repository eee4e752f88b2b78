"""Comparing: what one side answers to the other's digests, and what follows from the answer.

Pure functions over a buffer that holds the data of some ranges end to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from agent.delta.blocks import Ranges, owners, positions, split
from agent.delta.digests import (
    DIGEST_BYTES,
    Digests,
    block_digests,
    digests_from_wire,
    piece_digests,
    superblock_digests,
    zero_digest,
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

    def blocks(self, *, seed: int) -> list[bytes]:
        """The digest of each block of the ranges."""
        digests: list[bytes] = []
        at = 0
        for length in self.ranges[:, 1].tolist():
            digests += block_digests(self.buffer[at : at + length], seed=seed)
            at += length
        return digests

    def superblocks(self, superblock_bytes: int, *, seed: int) -> tuple[Ranges, Digests]:
        """The superblocks of the ranges and their digests."""
        digests = superblock_digests(self.ranges.tolist(), self.blocks(seed=seed), superblock_bytes, seed=seed)
        return split(self.ranges, superblock_bytes), digests_from_wire(b"".join(digests))

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
    superblocks: Ranges,
    theirs: Digests,
    held: Held,
    *,
    superblock_bytes: int,
    detail_bytes: int,
    seed: int,
    ours: Digests | None = None,
) -> Answer:
    """The target's answer.

    Args:
        superblocks: shape (n, 2); `theirs`: the source's digests of them.
        held: the target's bytes of those superblocks that do not read as zero, whole.
        superblock_bytes, detail_bytes: the granularity asked for.
        seed: 64 bits.
        ours: the digests of what is held, where they are known already.
    """
    if ours is None:
        _, ours = held.superblocks(superblock_bytes, seed=seed)
    # Lists and bytes: for the few superblocks that one read brings, numpy would take longer to call than to compute.
    mine, their_digests = iter(_each(ours)), _each(theirs)
    if len(their_digests) != len(superblocks):
        raise SyncError(f"{len(their_digests)} digests came for {len(superblocks)} superblocks; update both agents.")
    differs: list[bool] = []
    empty: list[bool] = []
    details: list[bytes] = []
    for (offset, length, place), expected in zip(_places(superblocks, held.ranges), their_digests, strict=True):
        found = zero_digest(length, seed=seed) if place is None else next(mine)
        differs.append(found != expected)
        empty.append(found != expected and place is None)
        if found != expected and place is not None and detail_bytes < superblock_bytes:
            details += _details(held.buffer[place : place + length], offset, detail_bytes, seed)
    return Answer(np.array(differs, dtype=bool), np.array(empty, dtype=bool), digests_from_wire(b"".join(details)))


def _each(digests: Digests) -> list[bytes]:
    plain = digests.tobytes()
    return [plain[at : at + DIGEST_BYTES] for at in range(0, len(plain), DIGEST_BYTES)]


def _places(superblocks: Ranges, held: Ranges) -> Iterator[tuple[int, int, int | None]]:
    """Each superblock with the place of its bytes in a buffer that holds the ranges `held`; None where in none."""
    place = 0
    runs = iter([(offset, offset + length) for offset, length in held.tolist()])
    start, end = next(runs, (0, 0))
    for offset, length in superblocks.tolist():
        while end <= offset and (run := next(runs, None)) is not None:
            start, end = run
        if start <= offset < end:
            yield offset, length, place
            place += length
        else:
            yield offset, length, None


def _details(part: memoryview, offset: int, detail_bytes: int, seed: int) -> list[bytes]:
    """Digests of what lies between the multiples of `detail_bytes` in a part of the disk that begins at `offset`."""
    first = detail_bytes - offset % detail_bytes
    cuts = [0, *range(first, part.nbytes, detail_bytes), part.nbytes]
    return [xxh3_128_digest(part[start:end], seed) for start, end in pairwise(cuts)]


def same(count: int) -> Answer:
    """The answer about that many superblocks that do not differ."""
    nothing = np.zeros(count, dtype=bool)
    return Answer(nothing, nothing, digests_from_wire(b""))


def joined(answers: Sequence[Answer]) -> Answer:
    """Answers about superblocks that follow one another as one."""
    return Answer(
        np.concatenate([each.differs for each in answers]),
        np.concatenate([each.empty for each in answers]),
        np.concatenate([each.details for each in answers]),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Portion:
    """Superblocks that differ, and what the target told of them.

    Attributes:
        superblocks: shape (n, 2).
        empty: which of them read as zero at the target, shape (n,).
        pieces: the details of those that do not, shape (m, 2); none where a superblock is its own detail.
        details: the target's digests of them.
    """

    superblocks: Ranges
    empty: Mask
    pieces: Ranges
    details: Digests

    def changed(self, held: Held, *, seed: int) -> Ranges:
        """What must be sent of the portion, in rising order, from the source's bytes of its superblocks."""
        if not len(self.pieces):
            return self.superblocks
        chosen = self.pieces[differing(held.details(self.pieces, seed=seed), self.details)]
        both = np.concatenate((self.superblocks[self.empty], chosen))
        return both[np.argsort(both[:, 0], kind="stable")]


def portions(
    superblocks: Ranges, told: Answer, *, superblock_bytes: int, detail_bytes: int, most_bytes: int
) -> Iterator[Portion]:
    """What differs of a span, in portions of at most `most_bytes`, at least one superblock each.

    Args:
        superblocks: of the span, shape (n, 2); `told`: the target's answer about them.
        superblock_bytes, detail_bytes: the granularity that was asked for.
        most_bytes: what the source holds of them at once.
    """
    chosen, empty = superblocks[told.differs], told.empty[told.differs]
    at = 0
    for start, end in groups(chosen[:, 1], most_bytes):
        some, none = chosen[start:end], empty[start:end]
        pieces = detail_pieces(some[~none], superblock_bytes, detail_bytes)
        yield Portion(some, none, pieces, told.details[at : at + len(pieces)])
        at += len(pieces)


def groups(lengths: NDArray[np.uint64], most_bytes: int) -> Iterator[tuple[int, int]]:
    """Index pairs (start, end) of neighbours that are together no longer than `most_bytes`, one at least."""
    start, size = 0, 0
    for index, length in enumerate(lengths.tolist()):
        if index > start and size + length > most_bytes:
            yield start, index
            start, size = index, 0
        size += length
    if start < len(lengths):
        yield start, len(lengths)
