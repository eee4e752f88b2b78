"""Choosing the sizes of superblocks and details from what the last answers showed.

A superblock costs its digest; one that differs costs the digests of the details inside it; a detail that differs is
sent whole. Large superblocks are cheap where nothing changed, small ones where changes are scattered; pages as details
cost more digests and save the bytes around a small change. What each pair of sizes would cost is estimated from a few
measured densities, and the cheapest is used. Now and then one batch is asked at other sizes, to learn what the chosen
ones hide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from agent.delta.blocks import BLOCK_BYTES, PAGE_BYTES

KIB = 1024
MIB = 1024 * KIB

SUPERBLOCK_SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB)
DETAIL_SIZES = (PAGE_BYTES, BLOCK_BYTES)

_DIGEST_BYTES = 16
_VERDICT_BYTES = 0.25  # two bits in the answer


@dataclass(frozen=True, slots=True)
class Granularity:
    """Sizes for one batch, in bytes; equal ones mean that a differing superblock needs no details."""

    superblock_bytes: int
    detail_bytes: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What one answered batch showed.

    Attributes:
        compared_bytes: of the disk.
        superblock_bytes: the sizes the batch was asked with.
        detail_bytes: likewise.
        superblocks: how many were compared.
        differing_superblocks: of these.
        details: details compared inside the differing superblocks; 0 where superblock and detail are the same size.
        differing_details: of these.
        differing_blocks: distinct blocks of 64 KiB that the differing details lie in.
    """

    compared_bytes: int
    superblock_bytes: int
    detail_bytes: int
    superblocks: int
    differing_superblocks: int
    details: int
    differing_details: int
    differing_blocks: int


OPTIONS = tuple(Granularity(superblock, detail) for superblock in SUPERBLOCK_SIZES for detail in DETAIL_SIZES)

_START = Granularity(MIB, PAGE_BYTES)

_MEMORY_BYTES = 256 * MIB
"""Of compared disk after which what was seen counts by 1/e: long enough to see rare changes, short enough to follow."""
_FIRST_CHANGE_BYTES = 48 * MIB
"""Compared before the first choice of our own."""
_BETTER = 0.92
"""What another option must cost of the one in use, so that noise does not make us jump."""
_PROBE_EVERY = 32
"""Batches between two that are asked at other sizes: at worst, on a disk that changed all over, they add a
ten-thousandth to what is sent."""


class _Counts:
    """Two counts that fade together, and their ratio."""

    def __init__(self) -> None:
        self.part = self.whole = 0.0

    def add(self, part: float, whole: float, fade: float) -> None:
        self.part = self.part * fade + part
        self.whole = self.whole * fade + whole

    def ratio(self, unknown: float) -> float:
        return self.part / self.whole if self.whole else unknown


class GranularityChooser:
    """Chooses for one disk, batch after batch; used by one thread at a time.

    Args:
        start: the sizes to begin with, as `snapshot` gave them at the end of the last pass; None for 1 MiB and pages.
    """

    def __init__(self, start: Granularity | None = None) -> None:
        self._current = start if start in OPTIONS else _START
        self._blocks = _Counts()  # differing of compared blocks
        self._pages = _Counts()  # differing pages of those in differing blocks, where pages were compared
        self._pairs = {size: (_Counts(), _Counts()) for size in SUPERBLOCK_SIZES[1:]}  # superblocks; blocks beside them
        self._spread = 1.0
        self._compared_bytes = 0
        self._until_probe = _PROBE_EVERY
        self._probing = False

    @property
    def choice(self) -> Granularity:
        """The sizes to ask the next batch with. Batches that are asked before one is answered share it."""
        if not self._probing:
            return self._current
        # Pages show how much of a block changed, a superblock of many blocks how the changes lie together.
        superblock_bytes = max(self._current.superblock_bytes, MIB)
        return Granularity(superblock_bytes, PAGE_BYTES)

    def snapshot(self) -> Granularity:
        """The sizes that proved best so far: the start of the next pass over this disk."""
        return self._current

    def learn(self, seen: Seen) -> None:
        """Take in an answered batch, whatever sizes it was asked with."""
        if not seen.compared_bytes:
            return
        self._count(seen)
        self._compared_bytes += seen.compared_bytes
        self._schedule_probe()
        if self._compared_bytes >= _FIRST_CHANGE_BYTES:
            best = min(OPTIONS, key=self.expected_bytes_per_mib)
            if self.expected_bytes_per_mib(best) < _BETTER * self.expected_bytes_per_mib(self._current):
                self._current = best

    def expected_bytes_per_mib(self, option: Granularity) -> float:
        """What an option is expected to cost: digests, verdicts and bytes sent in vain, for each MiB compared. What
        must be sent anyway is left out, since it is the same for all."""
        superblocks = MIB / option.superblock_bytes
        cost = superblocks * (_DIGEST_BYTES + _VERDICT_BYTES)
        if option.detail_bytes < option.superblock_bytes:
            details = option.superblock_bytes / option.detail_bytes
            cost += superblocks * self._differing(option.superblock_bytes) * details * _DIGEST_BYTES
        if option.detail_bytes == BLOCK_BYTES:
            # Until pages were seen in a differing block, half of it is taken to have changed.
            in_vain = 1 - self._pages.ratio(unknown=0.5)
            cost += MIB * self._blocks.ratio(unknown=0.0) * in_vain
        return cost

    def _differing(self, superblock_bytes: int) -> float:
        """Expected share of differing superblocks of a size.

        Were changed blocks scattered at random with density b, it would be 1 - (1 - b) ^ n for n blocks; did they all
        lie together, b. In between n counts as n ^ spread, with the spread from 0 to 1 as it was last seen.
        """
        density = self._blocks.ratio(unknown=0.0)
        if density >= 1.0:
            return 1.0
        count = (superblock_bytes / BLOCK_BYTES) ** self._spread
        return -math.expm1(count * math.log1p(-density))

    def _count(self, seen: Seen) -> None:
        fade = math.exp(-seen.compared_bytes / _MEMORY_BYTES)
        blocks = seen.compared_bytes / BLOCK_BYTES
        differing = seen.differing_blocks
        if seen.superblock_bytes == seen.detail_bytes == BLOCK_BYTES:
            differing = seen.differing_superblocks
        self._blocks.add(differing, blocks, fade)
        if seen.detail_bytes == PAGE_BYTES and differing:
            self._pages.add(seen.differing_details, differing * (BLOCK_BYTES // PAGE_BYTES), fade)
        if seen.superblock_bytes in self._pairs:
            superblocks, beside = self._pairs[seen.superblock_bytes]
            superblocks.add(seen.differing_superblocks, seen.superblocks, fade)
            beside.add(differing, blocks, fade)
            self._learn_spread(seen.superblock_bytes, superblocks.ratio(0.0), beside.ratio(0.0))

    def _learn_spread(self, superblock_bytes: int, differing: float, density: float) -> None:
        """`_differing`, solved for the spread. Where nothing or everything differs, nothing can be told of it."""
        if not 0.0 < density <= differing < 1.0:
            return
        count = math.log1p(-differing) / math.log1p(-density)
        spread = math.log(max(count, 1.0)) / math.log(superblock_bytes / BLOCK_BYTES)
        self._spread = min(max(spread, 0.0), 1.0)

    def _schedule_probe(self) -> None:
        self._probing = False
        hidden = self._current.detail_bytes != PAGE_BYTES or self._current.superblock_bytes == BLOCK_BYTES
        self._until_probe -= 1
        if self._until_probe <= 0:
            self._until_probe = _PROBE_EVERY
            self._probing = hidden
