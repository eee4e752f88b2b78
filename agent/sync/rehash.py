"""Digests of what was read back past the page cache, for the digest map: whole blocks, whatever of them was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agent.delta.blocks import BLOCK_BYTES, Ranges, split
from agent.delta.digest_map import Shape
from agent.delta.digests import block_digests
from agent.disk.seam import Disk


@dataclass
class Rehash:
    """Gathers the digests of the blocks that some writes touch while those are read back; used by one thread.

    Attributes:
        shape: of the disk and its map.
        blocks: numbers of the blocks hashed so far; `digests`: theirs.
    """

    shape: Shape
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)

    def add(self, offset_bytes: int, part: memoryview) -> None:
        """This was read back from `offset_bytes` on: the blocks that lie in it whole are hashed."""
        end = min(offset_bytes + part.nbytes, self.shape.size_bytes)
        first = -(-offset_bytes // BLOCK_BYTES) * BLOCK_BYTES
        behind = end if end == self.shape.size_bytes else end // BLOCK_BYTES * BLOCK_BYTES
        if first < behind:
            self.digests += block_digests(part[first - offset_bytes : behind - offset_bytes], seed=self.shape.seed)
            self.blocks += range(first // BLOCK_BYTES, -(-behind // BLOCK_BYTES))

    def add_rest(self, disk: Disk, ranges: list[Ranges], zeroes: list[tuple[int, int]], buffer: memoryview) -> None:
        """Read back the blocks that the writes touch and that `add` never saw whole.

        Args:
            disk: flushed.
            ranges: written; `zeroes`: zeroed runs, of which only the edges are read.
            buffer: to read into.

        Raises:
            DiskError: as the disk says.
        """
        touched = [_touched(some) for some in ranges] + [np.fromiter(_edges(zeroes), dtype=np.int64)]
        rest = np.setdiff1d(np.concatenate(touched), np.array(self.blocks, dtype=np.int64))
        rest = rest[rest < self.shape.blocks]
        most = buffer.nbytes // BLOCK_BYTES
        for start in range(0, len(rest), most):
            runs = self._runs(rest[start : start + most])
            part = buffer[: sum(length for _, length in runs)]
            disk.read_back_runs(runs, part)
            at = 0
            for offset, length in runs:
                self.add(offset, part[at : at + length])
                at += length

    def _runs(self, blocks: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Each block as a run; the disk's last may be shorter."""
        size = self.shape.size_bytes
        return [(block * BLOCK_BYTES, min(BLOCK_BYTES, size - block * BLOCK_BYTES)) for block in blocks.tolist()]


def _touched(ranges: Ranges) -> NDArray[np.int64]:
    """The blocks in which something of the rising ranges lies."""
    return np.unique(split(ranges, BLOCK_BYTES)[:, 0] // np.uint64(BLOCK_BYTES)).astype(np.int64)


def _edges(zeroes: list[tuple[int, int]]) -> Iterator[int]:
    """The blocks that runs cover in part at their beginnings and ends."""
    for offset, length in zeroes:
        if offset % BLOCK_BYTES:
            yield offset // BLOCK_BYTES
        if (offset + length) % BLOCK_BYTES:
            yield (offset + length) // BLOCK_BYTES
