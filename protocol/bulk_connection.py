"""The bulk conversation as a pure state machine: a source makes one disk of a target equal one view.

Adds to `protocol.connection.Connection` the table of bulk messages, the length every payload must have, and two books
that both ends keep alike: `BlockData` payload on its way (against `Credit`), and spans asked about (against
`SpanAnswer`).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from protocol import limits
from protocol.bulk_ranges import (
    RANGE_BYTES,
    check_between,
    check_inside,
    check_rising,
    size_of,
    split_ranges,
    start_of,
    superblock_count,
)
from protocol.codec import Message
from protocol.connection import Allocate, Breach, Buffer, Connection, Speaker, State, Table
from protocol.messages import (
    BlockData,
    BulkHello,
    BulkMessage,
    BulkWelcome,
    Codec,
    CompareSpan,
    Credit,
    EndOfPass,
    Goodbye,
    PassFailed,
    PassVerified,
    ProvenRanges,
    SpanAnswer,
    SpansSettled,
    TrackedSpan,
    ZeroRanges,
)

DIGEST_BYTES = 16  # xxh3-128
PROOF_BYTES = 32  # BLAKE3
MAX_SEED = 2**64 - 1  # XXH64_hash_t, what xxh3 takes as seed

_LAST_WORDS = {PassFailed: State.OVER, Goodbye: State.OVER}

BULK_TABLE: Table = {
    (State.SILENT, Speaker.CALLER): {BulkHello: State.ASKED, Goodbye: State.OVER},
    (State.SILENT, Speaker.LISTENER): {Goodbye: State.OVER},
    (State.ASKED, Speaker.CALLER): {Goodbye: State.OVER},
    (State.ASKED, Speaker.LISTENER): {BulkWelcome: State.OPEN, Goodbye: State.OVER},
    (State.OPEN, Speaker.CALLER): {
        CompareSpan: State.OPEN,
        TrackedSpan: State.OPEN,
        ZeroRanges: State.OPEN,
        SpansSettled: State.OPEN,
        BlockData: State.OPEN,
        EndOfPass: State.ENDING,
        **_LAST_WORDS,
    },
    (State.OPEN, Speaker.LISTENER): {
        ProvenRanges: State.OPEN,
        SpanAnswer: State.OPEN,
        Credit: State.OPEN,
        **_LAST_WORDS,
    },
    (State.ENDING, Speaker.CALLER): _LAST_WORDS,
    (State.ENDING, Speaker.LISTENER): {Credit: State.ENDING, PassVerified: State.OVER, **_LAST_WORDS},
}
"""Bulk: (state, who speaks) -> what may be said, and the state after it. The source is the caller."""


def _check_granularity(message: CompareSpan | TrackedSpan) -> None:
    check_between("superblock_bytes", message.superblock_bytes, limits.BLOCK_BYTES, limits.MAX_SUPERBLOCK_BYTES)
    check_between("detail_bytes", message.detail_bytes, limits.MIN_DETAIL_BYTES, message.superblock_bytes)
    for name in ("superblock_bytes", "detail_bytes"):
        if getattr(message, name).bit_count() != 1:
            raise Breach(f"{name} {getattr(message, name)} is no power of two")


def _asked_ranges(message: Message) -> int:
    """How many ranges of data a span asks about, which stand first in its payload."""
    match message:
        case CompareSpan():
            return message.count
        case TrackedSpan() if message.superblock_bytes:
            return message.data_count
        case _:
            return 0


@dataclass(frozen=True, slots=True)
class OpenSpan:
    """A span that waits for its answer.

    Attributes:
        superblocks: how many it has.
        data_bytes: how much of it is data.
        most_details: how many digests of details its answer may carry.
        details_each: how many a whole superblock has; 0 where none are told.
    """

    superblocks: int
    data_bytes: int
    most_details: int
    details_each: int

    @property
    def row_bytes(self) -> int:
        """How long each of the two rows of bits of its answer is."""
        return -(-self.superblocks // 8)


class BulkConnection(Connection):
    """One end of a bulk conversation. The source agent is `Speaker.CALLER`, the target agent `Speaker.LISTENER`.

    Attributes:
        window_bytes: how much `BlockData` payload may be without `Credit`.
        unacknowledged_bytes: how much is.
    """

    def __init__(self, us: Speaker, allocate: Allocate | None = None) -> None:
        super().__init__(us, BULK_TABLE, limits.BULK, allocate)
        self._offered: tuple[int, ...] = ()
        self.window_bytes = 0
        self.unacknowledged_bytes = 0
        self._lanes = 0
        self._ahead_bytes = 0
        self._asked_bytes = 0
        self._batches: dict[int, OpenSpan] = {}
        self._last_batch = -1  # batches are numbered from 0
        self._settled_batch = -1
        self._proven_due = 0
        self._end_of_spans = 0

    @property
    def window_left_bytes(self) -> int:
        """How much `BlockData` payload may be sent before more `Credit` comes."""
        return self.window_bytes - self.unacknowledged_bytes

    @property
    def ahead_left_bytes(self) -> int:
        """How many bytes of data may be asked about before more `SpanAnswer` come."""
        return self._ahead_bytes - self._asked_bytes

    def send(self, message: BulkMessage, *payload: Buffer) -> list[Buffer]:
        """Buffers to put on the wire; the payload pieces among them are not copied. Raises LocalMisuse."""
        return self._send(message, 0, payload)

    def must_wait(self, message: BulkMessage, *payload: Buffer) -> bool:
        """True when `send` would be misuse only because the peer has not made room for this message yet."""
        if self.state is not State.OPEN:
            return False
        if isinstance(message, BlockData):
            return self.window_left_bytes < size_of(payload) <= self.window_bytes
        count = _asked_ranges(message)
        if 0 < count * RANGE_BYTES <= size_of(payload):
            _, lengths = split_ranges(payload, count)
            return self.ahead_left_bytes < sum(lengths) <= self._ahead_bytes
        return False

    # --- rules that the header alone decides ---

    def _check_header(self, speaker: Speaker, number: int, message: Message, payload_bytes: int) -> None:
        if number != 0:
            raise Breach(f"bulk messages carry no request number, this one carries {number}")
        match message:
            case CompareSpan():
                self._check_compare(message, payload_bytes)
                expected = payload_bytes
            case TrackedSpan():
                expected = self._check_tracked(message, payload_bytes)
            case ZeroRanges():
                check_between("count", message.count, 1, limits.MAX_RANGES)
                expected = message.count * RANGE_BYTES
            case BlockData():
                self._check_block_data(message, payload_bytes)
                expected = payload_bytes
            case SpanAnswer():
                expected = self._check_answer(message)
            case ProvenRanges():
                check_between("count", message.count, 1, limits.MAX_PROVEN_RANGES)
                if message.count != self._proven_due:
                    raise Breach(f"{message.count} proven ranges, where {self._proven_due} were announced")
                expected = message.count * RANGE_BYTES
            case _:
                self._check_plain(message)
                expected = 0
        if payload_bytes != expected:
            raise Breach(f"{type(message).__name__} must have {expected} bytes of payload, not {payload_bytes}")

    def _check_compare(self, message: CompareSpan, payload_bytes: int) -> None:
        check_between("count", message.count, 0, limits.MAX_RANGES)
        _check_granularity(message)
        self._check_place(message)
        digests, rest = divmod(payload_bytes - message.count * RANGE_BYTES, DIGEST_BYTES)
        if rest or not message.count <= digests <= limits.MAX_DIGESTS or (digests and not message.count):
            raise Breach(f"CompareSpan of {message.count} ranges has {payload_bytes} bytes of payload")

    def _check_tracked(self, message: TrackedSpan, payload_bytes: int) -> int:
        """How long the payload must be; breach where that cannot be."""
        check_between("data_count", message.data_count, 0, limits.MAX_RANGES)
        check_between("zero_count", message.zero_count, 0, limits.MAX_RANGES - message.data_count)
        self._check_place(message)
        ranges_bytes = (message.data_count + message.zero_count) * RANGE_BYTES
        if not message.superblock_bytes:
            check_between("detail_bytes", message.detail_bytes, 0, 0)
            return ranges_bytes
        _check_granularity(message)
        digests = max(payload_bytes - ranges_bytes, 0) // DIGEST_BYTES
        least = message.data_count
        return ranges_bytes + DIGEST_BYTES * min(max(digests, least), limits.MAX_DIGESTS if least else 0)

    def _check_place(self, message: CompareSpan | TrackedSpan) -> None:
        """Breach unless the span lies behind the one before."""
        if message.batch <= self._last_batch:
            raise Breach(f"batch {message.batch} does not rise above {self._last_batch}")
        check_between("length_bytes", message.length_bytes, 1, limits.MAX_DISK_BYTES)
        check_between("offset_bytes", message.offset_bytes, 0, limits.MAX_DISK_BYTES - message.length_bytes)
        if self._end_of_spans % limits.BLOCK_BYTES:
            # Without this a span could hold a single byte of data, and `ahead_bytes` of them could be open at once.
            raise Breach(
                f"a span at byte {message.offset_bytes} behind one that ended at byte {self._end_of_spans}; that is no "
                f"multiple of {limits.BLOCK_BYTES}, so the disk ended there"
            )
        if message.offset_bytes < self._end_of_spans or message.offset_bytes % limits.BLOCK_BYTES:
            raise Breach(
                f"the span at byte {message.offset_bytes} stands before byte {self._end_of_spans}, where the one "
                f"before ended, or at no multiple of {limits.BLOCK_BYTES}"
            )

    def _check_block_data(self, message: BlockData, payload_bytes: int) -> None:
        check_between("count", message.count, 1, limits.MAX_BLOCK_RANGES)
        check_between("plain_bytes", message.plain_bytes, 1, limits.MAX_PLAIN_BYTES)
        stored = payload_bytes - message.count * (RANGE_BYTES + PROOF_BYTES)
        least = message.plain_bytes if message.codec is Codec.RAW else 1
        if not least <= stored <= message.plain_bytes:
            raise Breach(f"BlockData stores {message.plain_bytes} bytes ({message.codec.value}) in {stored}")
        if payload_bytes > self.window_left_bytes:
            raise Breach(
                f"BlockData has {payload_bytes} bytes of payload; the window has {self.window_left_bytes} left"
            )

    def _check_answer(self, message: SpanAnswer) -> int:
        if message.batch not in self._batches:
            raise Breach(f"SpanAnswer answers batch {message.batch}, which is not open")
        span = self._batches[message.batch]
        check_between("read_bytes", message.read_bytes, 0, span.data_bytes)
        check_between("details", message.details, 0, span.most_details)
        return 2 * span.row_bytes + message.details * DIGEST_BYTES

    def _check_plain(self, message: Message) -> None:
        match message:
            case BulkHello():
                check_between("digest_seed", message.digest_seed, 0, MAX_SEED)
                check_between("attempt", message.attempt, 1, limits.MAX_ATTEMPTS)
            case BulkWelcome():
                if message.version not in self._offered:
                    raise Breach(f"BulkWelcome chooses version {message.version}, which was not offered")
                check_between("window_bytes", message.window_bytes, limits.MIN_WINDOW_BYTES, limits.MAX_WINDOW_BYTES)
                check_between("ahead_bytes", message.ahead_bytes, limits.MIN_AHEAD_BYTES, limits.MAX_AHEAD_BYTES)
                check_between("lanes", message.lanes, 1, limits.MAX_LANES)
                check_between("proven", message.proven, 0, limits.MAX_PROVEN_RANGES)
            case SpansSettled():
                check_between("batch", message.batch, self._settled_batch, self._last_batch)
                if any(batch <= message.batch for batch in self._batches):
                    raise Breach(f"SpansSettled up to batch {message.batch}, and not all of those are answered")
            case Credit():
                check_between("payload_bytes", message.payload_bytes, 0, self.unacknowledged_bytes)
            case EndOfPass():
                if self._batches:
                    raise Breach(f"EndOfPass while {len(self._batches)} spans are unanswered")
                check_between("lanes", message.lanes, 1, self._lanes)
                for name in ("data_bytes", "zero_bytes", "compared_bytes", "unchanged_bytes"):
                    check_between(name, getattr(message, name), 0, limits.MAX_DISK_BYTES)
            case PassVerified():
                for name in ("written_bytes", "zeroed_bytes", "verified_bytes", "compared_bytes"):
                    check_between(name, getattr(message, name), 0, limits.MAX_DISK_BYTES)
            case PassFailed():
                check_between("offset_bytes", message.offset_bytes, -1, limits.MAX_DISK_BYTES)
            case _:
                pass

    # --- rules that need the payload, and the books ---

    def _check_payload(self, speaker: Speaker, number: int, message: Message, payload: Sequence[Buffer]) -> None:
        match message:
            case CompareSpan():
                offsets, lengths = split_ranges(payload, message.count)
                self._book_span(message, offsets, lengths, size_of(payload) // DIGEST_BYTES - message.count)
            case TrackedSpan():
                self._book_tracked(message, payload)
            case ZeroRanges():
                check_rising(*split_ranges(payload, message.count))
            case BlockData():
                offsets, lengths = split_ranges(payload, message.count)
                check_rising(offsets, lengths)
                if sum(lengths) != message.plain_bytes:
                    raise Breach(f"BlockData's ranges hold {sum(lengths)} bytes, not {message.plain_bytes}")
                self.unacknowledged_bytes += size_of(payload)
            case SpanAnswer():
                self._check_rows(message, self._batches[message.batch], payload)
                self._asked_bytes -= self._batches.pop(message.batch).data_bytes
            case Credit():
                self.unacknowledged_bytes -= message.payload_bytes
            case BulkHello():
                self._offered = message.versions
            case SpansSettled():
                self._settled_batch = message.batch
            case ProvenRanges():
                check_rising(*split_ranges(payload, message.count))
                self._proven_due = 0
            case BulkWelcome():
                self._proven_due = message.proven
                self.window_bytes, self._ahead_bytes = message.window_bytes, message.ahead_bytes
                self._lanes = message.lanes
            case _:
                pass

    def _book_span(
        self, message: CompareSpan | TrackedSpan, offsets: array[int], lengths: array[int], digests: int
    ) -> None:
        check_inside(message, offsets, lengths)
        self._last_batch, self._end_of_spans = message.batch, message.offset_bytes + message.length_bytes
        if not message.superblock_bytes:
            return
        count = superblock_count(offsets, lengths, message.superblock_bytes)
        if count != digests:
            raise Breach(f"{digests} digests came for {count} superblocks")
        size = sum(lengths)
        if size > self.ahead_left_bytes:
            raise Breach(f"a span with {size} bytes of data; {self.ahead_left_bytes} may be asked for now")
        most, each = 0, 0
        if message.detail_bytes < message.superblock_bytes:
            most = superblock_count(offsets, lengths, message.detail_bytes)
            each = message.superblock_bytes // message.detail_bytes
            if most > limits.MAX_DIGESTS:
                raise Breach(f"a span with {most} details; an answer tells {limits.MAX_DIGESTS} at most")
        if count:
            self._batches[message.batch] = OpenSpan(count, size, most, each)
            self._asked_bytes += size

    def _book_tracked(self, message: TrackedSpan, payload: Sequence[Buffer]) -> None:
        count = message.data_count + message.zero_count
        offsets, lengths = split_ranges(payload, count)
        data, zeroes = slice(message.data_count), slice(message.data_count, None)
        check_inside(message, offsets[zeroes], lengths[zeroes])
        both = sorted(zip(offsets, lengths, strict=True))
        check_rising(array("Q", [offset for offset, _ in both]), array("Q", [length for _, length in both]))
        self._book_span(message, offsets[data], lengths[data], size_of(payload) // DIGEST_BYTES - count)

    def _check_rows(self, message: SpanAnswer, span: OpenSpan, payload: Sequence[Buffer]) -> None:
        """Breach unless the rows of bits agree with each other and with the number of details. Which details are due
        only those can tell who kept the ranges."""
        rows = bytes(start_of(payload, 2 * span.row_bytes))
        differs, empty = (int.from_bytes(row, "big") for row in (rows[: span.row_bytes], rows[span.row_bytes :]))
        if (differs | empty) & ((1 << -span.superblocks % 8) - 1):
            raise Breach(f"SpanAnswer sets bits behind those of its {span.superblocks} superblocks")
        if empty & ~differs:
            raise Breach("SpanAnswer calls superblocks empty that do not differ")
        if span.details_each:
            told = (differs & ~empty).bit_count()
            check_between("details", message.details, told, told * span.details_each)
