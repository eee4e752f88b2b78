"""A dense disk of any size, made up as it is read: for what a pass costs in memory, not for what storage costs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from agent.disk.seam import Extent
from agent.errors import DiskError

BLOCK_BYTES = 64 << 10
TEMPLATE_BLOCKS = 64
"""4 MiB of random bytes that repeat, each block with its own number written over its first eight bytes."""
DIFFERS_EVERY = 1024
"""At the target one block in so many, unevenly, starts out different."""
MIXER = 0x9E3779B97F4A7C15


class GeneratedDisk:
    """A `Disk` that holds something in every block; the target's has other content in some until they are written to.

    Writes are forgotten but for the numbers of the blocks they fell on, 48 bytes or so for each.
    """

    def __init__(self, name: str, size_bytes: int, *, differs: bool) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self._differs = differs
        self._lock = threading.Lock()
        self._written: set[int] = set()
        random = np.random.default_rng(1).integers(0, 256, size=TEMPLATE_BLOCKS * BLOCK_BYTES, dtype=np.uint8)
        self._template = random.reshape(TEMPLATE_BLOCKS, BLOCK_BYTES)

    @property
    def access(self) -> str:
        """For reports."""
        return "generator"

    @property
    def readers(self) -> int:
        """Making bytes up takes a processor."""
        return 2

    @property
    def reads_back_past_cache(self) -> bool:
        """There is no cache in front of it."""
        return True

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """Make the bytes up."""
        self._check(offset_bytes, buffer.nbytes)
        out = np.frombuffer(buffer, dtype=np.uint8)
        at = 0
        while at < len(out):
            block, inside = divmod(offset_bytes + at, BLOCK_BYTES)
            row = block % TEMPLATE_BLOCKS
            whole = 0 if inside else min((len(out) - at) // BLOCK_BYTES, TEMPLATE_BLOCKS - row)
            if whole:
                rows = out[at : at + whole * BLOCK_BYTES].reshape(whole, BLOCK_BYTES)
                rows[:] = self._template[row : row + whole]
                rows[:, :8] = self._stamps(block, whole).view(np.uint8).reshape(whole, 8)
                at += whole * BLOCK_BYTES
                continue
            length = min(BLOCK_BYTES - inside, len(out) - at)
            content = self._template[row].copy()
            content[:8] = self._stamps(block, 1).view(np.uint8)
            out[at : at + length] = content[inside : inside + length]
            at += length

    def _stamps(self, block: int, count: int) -> np.ndarray:
        """The first eight bytes of blocks: their number, made another where the target differs."""
        numbers = np.arange(block, block + count, dtype=np.uint64)
        if not self._differs:
            return numbers
        other = (numbers * np.uint64(MIXER)) >> np.uint64(54) == 0
        for index in np.flatnonzero(other).tolist():
            if block + index not in self._written:
                numbers[index] ^= np.uint64(1 << 63)
        return numbers

    def write(self, offset_bytes: int, data: memoryview) -> None:
        """Remember which blocks now hold what the source has."""
        self._check(offset_bytes, data.nbytes)
        first, last = offset_bytes // BLOCK_BYTES, (offset_bytes + data.nbytes - 1) // BLOCK_BYTES
        with self._lock:
            self._written.update(range(first, last + 1))

    def read_runs(self, runs: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        """Make many runs up, end to end."""
        at = 0
        for offset, length in runs:
            self.read_into(offset, buffer[at : at + length])
            at += length

    def write_runs(self, runs: Sequence[tuple[int, int]], data: memoryview) -> None:
        """Remember which blocks of many runs now hold what the source has."""
        at = 0
        for offset, length in runs:
            self.write(offset, data[at : at + length])
            at += length

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        """Nothing on the source is zero, so that nobody may ask for it."""
        raise DiskError(f"Disk {self.name}: nothing of a generated disk is zero.", disk=self.name)

    def flush(self) -> None:
        """There is nothing to keep."""

    def extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
        """One extent of data."""
        self._check(offset_bytes, length_bytes)
        yield Extent(offset_bytes, length_bytes, zero=False)

    def read_back(self, offset_bytes: int, buffer: memoryview) -> None:
        """As `read_into`."""
        self.read_into(offset_bytes, buffer)

    def read_back_runs(self, runs: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        """As `read_runs`."""
        self.read_runs(runs, buffer)

    def close(self) -> None:
        """Nothing is open."""

    def _check(self, offset_bytes: int, length_bytes: int) -> None:
        if offset_bytes < 0 or length_bytes < 0 or offset_bytes + length_bytes > self.size_bytes:
            raise DiskError(
                f"Disk {self.name}: {length_bytes} bytes at {offset_bytes} are not all on it.",
                disk=self.name,
                offset_bytes=offset_bytes,
                length_bytes=length_bytes,
            )
