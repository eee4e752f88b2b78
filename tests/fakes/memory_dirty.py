"""`MemoryDirtyRanges`: what was written to a disk of the tests, kept as plain ranges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from agent.disk.gate import Gate


class MemoryDirtyRanges:
    """A `DirtyRanges` over rising (offset, length) pairs; it passes the same conformance suite as the real ones.

    Attributes:
        questions: how often it was asked.
    """

    def __init__(self, size_bytes: int, pairs: Iterable[tuple[int, int]], *, rung: str = "bitmap") -> None:
        self.size_bytes = size_bytes
        self.rung = rung
        self.questions = 0
        self._pairs = list(pairs)
        self._gate = Gate("vda", "memory", size_bytes, writable=False)

    def ranges(self, offset_bytes: int, length_bytes: int) -> Iterator[tuple[int, int]]:
        """The pairs, clipped."""
        self._gate.check("asking what was written", offset_bytes, length_bytes)
        self.questions += 1
        return self._clipped(offset_bytes, offset_bytes + length_bytes)

    def _clipped(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for offset, length in self._pairs:
            first, last = max(offset, start), min(offset + length, end)
            if first < last:
                yield first, last - first

    def close(self) -> None:
        """Later questions are refused."""
        self._gate.close()
