"""The bulk conversation as a pure state machine: a source makes one disk of a target equal one view.

Adds to `protocol.connection.Connection` the table of bulk messages, the length every payload must have, and two books
that both ends keep alike: `BlockData` payload on its way (against `Credit`), and spans asked about (against
`SpanAnswer`).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from protocol import limits
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
    SpanAnswer,
    ZeroRanges,
)

RANGE_BYTES = 16  # offset and length, each an unsigned 64-bit little-endian number
DIGEST_BYTES = 16  # xxh3-128
PROOF_BYTES = 32  # BLAKE3

_LAST_WORDS = {PassFailed: State.OVER, Goodbye: State.OVER}

BULK_TABLE: Table = {
    (State.SILENT, Speaker.CALLER): {BulkHello: State.ASKED, Goodbye: State.OVER},
    (State.SILENT, Speaker.LISTENER): {Goodbye: State.OVER},
    (State.ASKED, Speaker.CALLER): {Goodbye: State.OVER},
    (State.ASKED, Speaker.LISTENER): {BulkWelcome: State.OPEN, Goodbye: State.OVER},
    (State.OPEN, Speaker.CALLER): {
        CompareSpan: State.OPEN,
        ZeroRanges: State.OPEN,
        BlockData: State.OPEN,
        EndOfPass: State.ENDING,
        **_LAST_WORDS,
    },
    (State.OPEN, Speaker.LISTENER): {SpanAnswer: State.OPEN, Credit: State.OPEN, **_LAST_WORDS},
    (State.ENDING, Speaker.CALLER): _LAST_WORDS,
    (State.ENDING, Speaker.LISTENER): {Credit: State.ENDING, PassVerified: State.OVER, **_LAST_WORDS},
}
"""Bulk: (state, who speaks) -> what may be said, and the state after it. The source is the caller."""


def split_ranges(payload: Sequence[Buffer], count: int) -> tuple[array[int], array[int]]:
    """The first `count` ranges of a payload: their offsets and their lengths, in bytes."""
    wanted = count * RANGE_BYTES
    numbers = array("Q")
    have = bytearray()
    for piece in payload:
        have += memoryview(piece).cast("B")[: wanted - len(have)]
        if len(have) == wanted:
            break
    numbers.frombytes(have)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers[0::2], numbers[1::2]


def _check_rising(offsets: array[int], lengths: array[int]) -> None:
    """Breach unless the ranges are not empty, rise, do not overlap and stay below 2**63."""
    end = 0
    for offset, length in zip(offsets, lengths, strict=True):
        if length == 0 or offset < end:
            raise Breach(f"the range at byte {offset} is empty, overlaps the one before or stands before it")
        end = offset + length
    if end > limits.MAX_DISK_BYTES:
        raise Breach(f"a range ends at byte {end}, beyond any disk")


def superblock_count(offsets: Sequence[int], lengths: Sequence[int], superblock_bytes: int) -> int:
    """How many superblocks ranges have: each is what of one range lies between two multiples of its size."""
    return sum(
        (offset + length - 1) // superblock_bytes - offset // superblock_bytes + 1
        for offset, length in zip(offsets, lengths, strict=True)
    )


@dataclass(frozen=True, slots=True)
class OpenSpan:
    """A span that waits for its answer.

    Attributes:
        superblocks: how many it has.
        data_bytes: how much of it is data.
        most_details: how many digests of details its answer may carry.
    """

    superblocks: int
    data_bytes: int
    most_details: int


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
        self._ahead_bytes = 0
        self._asked_bytes = 0
        self._batches: dict[int, OpenSpan] = {}
        self._last_batch = -1  # batches are numbered from 0
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
            size = sum(memoryview(piece).nbytes for piece in payload)
            return self.window_left_bytes < size <= self.window_bytes
        if isinstance(message, CompareSpan) and 0 < message.count <= limits.MAX_RANGES:
            _, lengths = split_ranges(payload, message.count)
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
            case ZeroRanges():
                _check_between("count", message.count, 1, limits.MAX_RANGES)
                expected = message.count * RANGE_BYTES
            case BlockData():
                self._check_block_data(message, payload_bytes)
                expected = payload_bytes
            case SpanAnswer():
                expected = self._check_answer(message)
            case _:
                self._check_plain(message)
                expected = 0
        if payload_bytes != expected:
            raise Breach(f"{type(message).__name__} must have {expected} bytes of payload, not {payload_bytes}")

    def _check_compare(self, message: CompareSpan, payload_bytes: int) -> None:
        _check_between("count", message.count, 0, limits.MAX_RANGES)
        _check_between("superblock_bytes", message.superblock_bytes, limits.BLOCK_BYTES, limits.MAX_SUPERBLOCK_BYTES)
        _check_between("detail_bytes", message.detail_bytes, limits.MIN_DETAIL_BYTES, message.superblock_bytes)
        for name in ("superblock_bytes", "detail_bytes"):
            if getattr(message, name).bit_count() != 1:
                raise Breach(f"{name} {getattr(message, name)} is no power of two")
        if message.batch <= self._last_batch:
            raise Breach(f"batch {message.batch} does not rise above {self._last_batch}")
        _check_between("length_bytes", message.length_bytes, 1, limits.MAX_DISK_BYTES)
        _check_between("offset_bytes", message.offset_bytes, 0, limits.MAX_DISK_BYTES - message.length_bytes)
        if message.offset_bytes < self._end_of_spans or message.offset_bytes % limits.BLOCK_BYTES:
            raise Breach(
                f"the span at byte {message.offset_bytes} stands before byte {self._end_of_spans}, where the one "
                f"before ended, or at no multiple of {limits.BLOCK_BYTES}"
            )
        digests, rest = divmod(payload_bytes - message.count * RANGE_BYTES, DIGEST_BYTES)
        if rest or not message.count <= digests <= limits.MAX_DIGESTS or (digests and not message.count):
            raise Breach(f"CompareSpan of {message.count} ranges has {payload_bytes} bytes of payload")

    def _check_block_data(self, message: BlockData, payload_bytes: int) -> None:
        _check_between("count", message.count, 1, limits.MAX_BLOCK_RANGES)
        _check_between("plain_bytes", message.plain_bytes, 1, limits.MAX_PLAIN_BYTES)
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
        _check_between("read_bytes", message.read_bytes, 0, span.data_bytes)
        _check_between("details", message.details, 0, span.most_details)
        return 2 * -(-span.superblocks // 8) + message.details * DIGEST_BYTES

    def _check_plain(self, message: Message) -> None:
        match message:
            case BulkWelcome():
                if message.version not in self._offered:
                    raise Breach(f"BulkWelcome chooses version {message.version}, which was not offered")
                _check_between("window_bytes", message.window_bytes, limits.MIN_WINDOW_BYTES, limits.MAX_WINDOW_BYTES)
                _check_between("ahead_bytes", message.ahead_bytes, limits.MIN_AHEAD_BYTES, limits.MAX_AHEAD_BYTES)
                _check_between("lanes", message.lanes, 1, limits.MAX_LANES)
            case Credit():
                _check_between("payload_bytes", message.payload_bytes, 0, self.unacknowledged_bytes)
            case EndOfPass():
                if self._batches:
                    raise Breach(f"EndOfPass while {len(self._batches)} spans are unanswered")
                _check_between("lanes", message.lanes, 1, limits.MAX_LANES)
                for name in ("data_bytes", "zero_bytes", "compared_bytes"):
                    _check_between(name, getattr(message, name), 0, limits.MAX_DISK_BYTES)
            case PassVerified():
                for name in ("written_bytes", "zeroed_bytes", "verified_bytes", "compared_bytes"):
                    _check_between(name, getattr(message, name), 0, limits.MAX_DISK_BYTES)
            case PassFailed():
                _check_between("offset_bytes", message.offset_bytes, -1, limits.MAX_DISK_BYTES)
            case _:
                pass

    # --- rules that need the payload, and the books ---

    def _check_payload(self, speaker: Speaker, number: int, message: Message, payload: Sequence[Buffer]) -> None:
        match message:
            case CompareSpan():
                self._book_span(message, *split_ranges(payload, message.count), payload)
            case ZeroRanges():
                _check_rising(*split_ranges(payload, message.count))
            case BlockData():
                offsets, lengths = split_ranges(payload, message.count)
                _check_rising(offsets, lengths)
                if sum(lengths) != message.plain_bytes:
                    raise Breach(f"BlockData's ranges hold {sum(lengths)} bytes, not {message.plain_bytes}")
                self.unacknowledged_bytes += sum(memoryview(piece).nbytes for piece in payload)
            case SpanAnswer():
                self._asked_bytes -= self._batches.pop(message.batch).data_bytes
            case Credit():
                self.unacknowledged_bytes -= message.payload_bytes
            case BulkHello():
                self._offered = message.versions
            case BulkWelcome():
                self.window_bytes, self._ahead_bytes = message.window_bytes, message.ahead_bytes
            case _:
                pass

    def _book_span(
        self, message: CompareSpan, offsets: array[int], lengths: array[int], payload: Sequence[Buffer]
    ) -> None:
        _check_rising(offsets, lengths)
        end = message.offset_bytes + message.length_bytes
        if offsets and not message.offset_bytes <= offsets[0] <= offsets[-1] + lengths[-1] <= end:
            raise Breach(f"ranges reach from byte {offsets[0]} to {offsets[-1] + lengths[-1]}, out of their span")
        for offset, length in zip(offsets, lengths, strict=True):
            if offset % limits.BLOCK_BYTES or ((offset + length) % limits.BLOCK_BYTES and offset + length != end):
                raise Breach(f"the range at byte {offset} does not begin and end at multiples of {limits.BLOCK_BYTES}")
        count = superblock_count(offsets, lengths, message.superblock_bytes)
        digests = sum(memoryview(piece).nbytes for piece in payload) // DIGEST_BYTES - message.count
        if count != digests:
            raise Breach(f"{digests} digests came for {count} superblocks")
        size = sum(lengths)
        if size > self.ahead_left_bytes:
            raise Breach(f"a span with {size} bytes of data; {self.ahead_left_bytes} may be asked for now")
        self._last_batch, self._end_of_spans = message.batch, end
        if count:
            most = superblock_count(offsets, lengths, message.detail_bytes)
            tells = message.detail_bytes < message.superblock_bytes
            self._batches[message.batch] = OpenSpan(count, size, min(most, limits.MAX_DIGESTS) if tells else 0)
            self._asked_bytes += size


def _check_between(what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise Breach(f"{what} is {value}; allowed are {least} to {most}")
