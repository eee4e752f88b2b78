"""Payloads of bulk messages as numpy arrays: ranges, digests and answers to bytes and back (``protocol/SPEC.md``).

Whatever comes from the peer is checked whole before any of it is used.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

from agent.delta.blocks import BLOCK_BYTES, PAGE_BYTES, Ranges, owners, split, total_bytes
from agent.delta.compare import Answer, detail_pieces
from agent.delta.digests import Digests, digests_from_wire, digests_to_wire
from protocol.errors import PeerViolation
from protocol.messages import CompareSpan, TrackedSpan

Buffer = bytes | bytearray | memoryview
RANGE_BYTES = 16
MAX_STRETCHES = 4096
"""Stretches of a disk that were spoken of and do not adjoin: lanes that run ahead of one another leave a few dozen."""
PROOF_BYTES = 32


def fitting_frame_bytes(window_bytes: int) -> int:
    """How many plain bytes a frame may have so that its payload fits a window, raw and in ranges of a page each."""
    pages = (window_bytes - RANGE_BYTES - PROOF_BYTES) // (PAGE_BYTES + RANGE_BYTES + PROOF_BYTES)
    return max(pages, 1) * PAGE_BYTES


def ranges_to_wire(ranges: Ranges) -> bytes:
    """`ranges` as little-endian 64-bit pairs."""
    return np.ascontiguousarray(ranges, dtype="<u8").tobytes()


def ranges_from_wire(payload: Buffer, count: int) -> Ranges:
    """The first `count` ranges of `payload`.

    Raises:
        PeerViolation: the payload is too short.
    """
    view = memoryview(payload)
    if count < 0 or view.nbytes < count * RANGE_BYTES:
        raise PeerViolation(f"a payload of {view.nbytes} bytes cannot hold the {count} ranges it declares")
    return np.frombuffer(view[: count * RANGE_BYTES], dtype="<u8").reshape(count, 2).astype(np.uint64)


def answer_to_wire(answer: Answer) -> tuple[bytes, bytes]:
    """Both rows of bits, and the details."""
    return np.packbits(answer.differs).tobytes() + np.packbits(answer.empty).tobytes(), digests_to_wire(answer.details)


def answer_from_wire(payload: Buffer, superblocks: Ranges, *, superblock_bytes: int, detail_bytes: int) -> Answer:
    """The answer about those superblocks (shape (n, 2)), asked for in that granularity.

    Raises:
        PeerViolation: it does not fit them.
    """
    view = memoryview(payload)
    row = -(-len(superblocks) // 8)
    bits = np.frombuffer(view[: 2 * row], dtype=np.uint8).reshape(2, row)
    differs, empty = (np.unpackbits(bits[i], count=len(superblocks)).astype(bool) for i in range(2))
    details = digests_from_wire(view[2 * row :])
    due = len(detail_pieces(superblocks[differs & ~empty], superblock_bytes, detail_bytes))
    if (empty & ~differs).any() or len(details) != due:
        raise PeerViolation(
            f"an answer about {len(superblocks)} superblocks from byte {int(superblocks[0, 0])} on contradicts itself: "
            f"{int(differs.sum())} differ, {int(empty.sum())} are empty, {len(details)} of {due} details came"
        )
    return Answer(differs, empty, details)


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A span as the target was asked about it: its data, the superblocks of that, and the source's digests of them."""

    message: CompareSpan | TrackedSpan
    data: Ranges
    data_bytes: int
    superblocks: Ranges
    digests: Digests


def question_from_wire(message: CompareSpan, payload: memoryview, size_bytes: int) -> Question:
    """The span with its ranges and digests; the connection has checked that they fit each other.

    Raises:
        PeerViolation: the span is not part of a disk of `size_bytes`, or is asked about too coarsely.
    """
    _check_fits(message, size_bytes)
    data = ranges_from_wire(payload, message.count)
    return _question(message, data, payload[message.count * RANGE_BYTES :])


def tracked_from_wire(message: TrackedSpan, payload: memoryview, size_bytes: int) -> tuple[Question, Ranges]:
    """A tracked span, and what of it reads as zero; raises as `question_from_wire`. One that asks nothing has neither
    superblocks nor digests."""
    _check_fits(message, size_bytes)
    ranges = ranges_from_wire(payload, message.data_count + message.zero_count)
    data, zeroes = ranges[: message.data_count], ranges[message.data_count :]
    return _question(message, data, payload[len(ranges) * RANGE_BYTES :]), zeroes


def _question(message: CompareSpan | TrackedSpan, data: Ranges, digests: memoryview) -> Question:
    superblocks = split(data, message.superblock_bytes) if message.superblock_bytes else data[:0]
    return Question(message, data, total_bytes(data), superblocks, digests_from_wire(digests))


def _check_fits(message: CompareSpan | TrackedSpan, size_bytes: int) -> None:
    end = message.offset_bytes + message.length_bytes
    if end > size_bytes or (end % BLOCK_BYTES and end != size_bytes):
        raise PeerViolation(
            f"a span of {message.length_bytes} bytes at offset {message.offset_bytes} does not fit the disk of "
            f"{size_bytes} bytes"
        )


@dataclass
class Coverage:
    """Which of a disk was spoken of: spans of all connections, each byte in exactly one.

    Spans come nearly in order, so few are kept apart at any time.

    Attributes:
        size_bytes: of the disk.
    """

    size_bytes: int
    _starts: list[int] = field(default_factory=list)
    _ends: list[int] = field(default_factory=list)

    def claim(self, offset: int, length: int) -> None:
        """Add a span.

        Raises:
            PeerViolation: part of it was spoken of before.
        """
        end = offset + length
        at = bisect_right(self._starts, offset)
        if (at and self._ends[at - 1] > offset) or (at < len(self._starts) and self._starts[at] < end):
            raise PeerViolation(f"the span of {length} bytes at offset {offset} was spoken of before")
        joins_left = at > 0 and self._ends[at - 1] == offset
        joins_right = at < len(self._starts) and self._starts[at] == end
        if joins_left and joins_right:
            self._ends[at - 1] = self._ends[at]
            del self._starts[at], self._ends[at]
        elif joins_left:
            self._ends[at - 1] = end
        elif joins_right:
            self._starts[at] = offset
        else:
            if len(self._starts) == MAX_STRETCHES:
                raise PeerViolation(f"the span at offset {offset} leaves one more gap than the {MAX_STRETCHES} allowed")
            self._starts.insert(at, offset)
            self._ends.insert(at, end)

    @property
    def covered_bytes(self) -> int:
        """How much was spoken of."""
        return sum(self._ends) - sum(self._starts)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self.covered_bytes == self.size_bytes


@dataclass
class Allowed:
    """Where changed ranges may come on one connection: in superblocks answered as differing, and in the data of tracked
    spans that ask nothing, all of which must come; rising, each byte once.

    Answers are given out of turn, so what is still to come is kept by span; data comes in the order of the spans.

    Attributes:
        size_bytes: of the disk; a range may end off a page only there.
        owed_bytes: what must come and has not.
    """

    size_bytes: int
    owed_bytes: int = 0
    _spans: list[tuple[int, Ranges]] = field(default_factory=list)
    _owed: set[int] = field(default_factory=set)  # offsets of the spans of which everything must come
    _cursor_bytes: int = 0

    def open(self, offset: int, superblocks: Ranges) -> None:
        """The span at `offset` was answered: these of its superblocks differ."""
        if len(superblocks):
            at = bisect_right(self._spans, offset, key=lambda span: span[0])
            self._spans.insert(at, (offset, superblocks))

    def owe(self, offset: int, data: Ranges) -> None:
        """The span at `offset` asks nothing: all of its data comes."""
        if len(data):
            self.open(offset, data)
            self._owed.add(offset)
            self.owed_bytes += total_bytes(data)

    @property
    def open_spans(self) -> int:
        """How many spans are kept."""
        return len(self._spans)

    def accept(self, ranges: Ranges) -> None:
        """Check changed ranges whole, then move on behind the last; all are of one span.

        Raises:
            PeerViolation: naming the first range that is wrong.
        """
        if not len(ranges):
            raise PeerViolation("a message of changed ranges names no range")
        starts, lengths = ranges[:, 0], ranges[:, 1]
        ends = starts + lengths
        first = int(starts[0])
        while len(self._spans) > 1 and self._spans[1][0] <= first:
            self._owed.discard(self._spans[0][0])
            del self._spans[0]
        page, size = np.uint64(PAGE_BYTES), np.uint64(self.size_bytes)
        good = (lengths > 0) & (starts < size) & (lengths <= size) & (starts % page == 0)
        good &= (ends % page == 0) | (ends == size)
        good &= starts >= np.concatenate((np.array([self._cursor_bytes], dtype=np.uint64), ends[:-1]))
        if self._spans and good.all():
            good &= self._inside(self._spans[0][1], ranges)
        else:
            good &= bool(self._spans)
        if not good.all():
            start, length = (int(value) for value in ranges[int(np.argmin(good))])
            raise PeerViolation(
                f"changed data of {length} bytes at offset {start} is outside what the answers allow "
                f"(disk of {self.size_bytes} bytes, rising from {self._cursor_bytes})"
            )
        self._cursor_bytes = int(ends[-1])
        if self._spans[0][0] in self._owed:
            self.owed_bytes -= total_bytes(ranges)

    @staticmethod
    def _inside(superblocks: Ranges, ranges: Ranges) -> np.ndarray:
        """Whether each range lies in superblocks that adjoin."""
        edges = superblocks[:, 0] + superblocks[:, 1]
        breaks = np.concatenate(([True], superblocks[1:, 0] != edges[:-1]))
        runs = np.cumsum(breaks) - 1
        owner = owners(superblocks, ranges)
        last = np.searchsorted(superblocks[:, 0], ranges[:, 0] + ranges[:, 1], side="left") - 1
        inside = (owner >= 0) & (ranges[:, 0] < edges[np.maximum(owner, 0)])
        one_run = runs[last] == runs[np.maximum(owner, 0)]
        return np.asarray(inside & (ranges[:, 0] + ranges[:, 1] <= edges[last]) & one_run)
