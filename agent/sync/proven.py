"""Which stretches of a disk are proven to equal the view of a pass: what an attempt leaves to the next one.

A span counts when the source has said that it is settled, it was answered, and whatever came for it was flushed, read
back and found right. Nothing is ever taken out of a set, and a set is about one view.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agent.delta.blocks import BLOCK_BYTES
from protocol.errors import PeerViolation
from protocol.limits import MAX_PROVEN_RANGES

Run = tuple[int, int]
"""Offset and length in bytes."""


class Proven:
    """Stretches of one disk, joined where they adjoin.

    Attributes:
        is_quiet: tells whether nothing is being written to the disk that is not proven yet.
    """

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self.is_quiet: Callable[[], bool] = lambda: True
        self._starts: list[int] = []
        self._ends: list[int] = []
        for offset, length in runs:
            self.add(offset, length)

    def add(self, offset: int, length: int) -> None:
        """This stretch is proven; parts of it may be already."""
        first = bisect_left(self._ends, offset)
        behind = bisect_right(self._starts, offset + length)
        start, end = offset, offset + length
        if first < behind:
            start, end = min(start, self._starts[first]), max(end, self._ends[behind - 1])
        self._starts[first:behind] = [start]
        self._ends[first:behind] = [end]

    @property
    def size_bytes(self) -> int:
        """How much is proven."""
        return sum(self._ends) - sum(self._starts)

    def runs(self) -> tuple[Run, ...]:
        """The stretches, rising; where they are more than one message tells, the largest."""
        runs = [(start, end - start) for start, end in zip(self._starts, self._ends, strict=True)]
        return tuple(sorted(sorted(runs, key=lambda run: run[1])[-MAX_PROVEN_RANGES:]))


def missing(proven: Iterable[Run], size_bytes: int) -> list[Run]:
    """What of a disk is in none of the rising runs, as pairs (start, end)."""
    found: list[Run] = []
    at = 0
    for offset, length in proven:
        if offset > at:
            found.append((at, offset))
        at = offset + length
    if at < size_bytes:
        found.append((at, size_bytes))
    return found


def check_runs(proven: Iterable[Run], size_bytes: int) -> None:
    """Refuse what no target of a disk of that size can have proven.

    Raises:
        PeerViolation: a run does not lie on the disk, or begins or ends off a block.
    """
    for offset, length in proven:
        end = offset + length
        if end > size_bytes or offset % BLOCK_BYTES or (end % BLOCK_BYTES and end != size_bytes):
            raise PeerViolation(
                f"the target calls {length} bytes at offset {offset} proven; on a disk of {size_bytes} bytes that is "
                "no stretch of whole blocks"
            )


@dataclass(eq=False)
class SpanBooks:
    """A span that is not proven yet.

    Attributes:
        waiting: what has come for it and is not proven, and its answer where one is due.
        owed_bytes: what of it must come and has not.
        settled: the source has said that nothing more comes for it.
    """

    offset_bytes: int
    length_bytes: int
    batch: int
    waiting: int = 0
    owed_bytes: int = 0
    settled: bool = False


@dataclass
class Settling:
    """The spans of one connection on their way to being proven; they rise."""

    proven: Proven
    _spans: list[SpanBooks] = field(default_factory=list)

    @property
    def open_spans(self) -> int:
        """How many spans are not proven."""
        return len(self._spans)

    def begin(self, offset_bytes: int, length_bytes: int, batch: int) -> SpanBooks:
        """A span was told of."""
        span = SpanBooks(offset_bytes, length_bytes, batch)
        self._spans.append(span)
        return span

    def at(self, offset_bytes: int) -> SpanBooks:
        """The span with that byte.

        Raises:
            PeerViolation: it is settled, or there is none.
        """
        index = bisect_right(self._spans, offset_bytes, key=lambda span: span.offset_bytes) - 1
        if index >= 0:
            span = self._spans[index]
            if offset_bytes < span.offset_bytes + span.length_bytes and not span.settled:
                return span
        raise PeerViolation(f"changed data at offset {offset_bytes} belongs to no span that is not settled")

    def settle(self, batch: int) -> None:
        """The source has sent everything of the spans up to that one.

        Raises:
            PeerViolation: it has not.
        """
        for span in self._spans:
            if span.batch > batch:
                break
            if span.owed_bytes:
                raise PeerViolation(
                    f"the source calls the span at offset {span.offset_bytes} settled and owes {span.owed_bytes} bytes"
                )
            span.settled = True
        self._sweep()

    def done(self, span: SpanBooks) -> None:
        """One of the things that it waited for is proven."""
        span.waiting -= 1
        if span.settled and not span.waiting:
            self._sweep()

    def _sweep(self) -> None:
        left: list[SpanBooks] = []
        for span in self._spans:
            if span.settled and not span.waiting:
                self.proven.add(span.offset_bytes, span.length_bytes)
            else:
                left.append(span)
        self._spans = left
