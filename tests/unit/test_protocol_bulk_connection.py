"""The bulk conversation without a wire: spans, answers, lengths, ranges, window, lanes, last words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from protocol import limits
from protocol.bulk_connection import BulkConnection
from protocol.codec import encode
from protocol.connection import Speaker, State
from protocol.errors import ConnectionLost, LocalMisuse, PeerViolation
from protocol.framing import frame_prefix
from protocol.messages import (
    BlockData,
    BulkMessage,
    BulkWelcome,
    Codec,
    CompareSpan,
    Credit,
    EndOfPass,
    Goodbye,
    PassFailed,
    PassVerified,
    Ping,
    SpanAnswer,
    ZeroRanges,
)
from tests.unit.protocol_house import HELLO, MIB, deliver, open_bulk, ranges, span

K = 1024
END = EndOfPass(lanes=1, data_bytes=0, zero_bytes=0, compared_bytes=0)
VERIFIED = PassVerified(written_bytes=0, zeroed_bytes=0, verified_bytes=0, compared_bytes=0, past_cache=True)
FAILED = PassFailed(code="x", sentence="x", target="vda", offset_bytes=-1)


BULK_WELCOME = BulkWelcome(version=2, software="", window_bytes=MIB, ahead_bytes=MIB, lanes=1)


def _compare(
    *pairs: tuple[int, int],
    batch: int = 1,
    at: int = 0,
    length: int = MIB,
    superblock: int = 64 * K,
    detail: int = 64 * K,
    digests: int | None = None,
    count: int | None = None,
) -> tuple[CompareSpan, bytes]:
    """A question about the span of `length` bytes at `at` whose data are `pairs`; a digest for each by default."""
    message = CompareSpan(
        batch=batch,
        offset_bytes=at,
        length_bytes=length,
        superblock_bytes=superblock,
        detail_bytes=detail,
        count=len(pairs) if count is None else count,
    )
    return message, ranges(*pairs) + bytes(16 * (len(pairs) if digests is None else digests))


def _answer(batch: int = 1, read: int = 0, details: int = 0) -> SpanAnswer:
    return SpanAnswer(batch=batch, read_bytes=read, details=details)


def _zeroes(count: int) -> ZeroRanges:
    return ZeroRanges(count=count)


def _data(plain: int, count: int = 1, codec: Codec = Codec.RAW) -> BlockData:
    return BlockData(count=count, codec=codec, plain_bytes=plain)


def _violates(connection: BulkConnection, message: BulkMessage | Ping, payload: bytes, why: str) -> None:
    connection.feed(frame_prefix(encode(message), len(payload)) + payload)
    with pytest.raises(PeerViolation, match=why):
        connection.next_event()
    with pytest.raises(PeerViolation, match=why):
        connection.next_event()


def test_a_whole_pass() -> None:
    source, target = open_bulk()
    message, payload = _compare((0, 192 * K), (MIB, 100), length=MIB + 100, superblock=128 * K, detail=4 * K, digests=3)
    assert deliver(source.send(message, payload), target)[0].payload == payload
    # The first and the third differ, the first reads as zero there; the third has one page, of 100 bytes.
    rows, details = b"\xa0\x80", bytes(16)
    assert deliver(target.send(_answer(read=5, details=1), rows, details), source)[0].payload == rows + details
    deliver(source.send(_zeroes(1), ranges((0, 4 * K))), target)
    (event,) = deliver(source.send(_data(100), ranges((MIB, 100)), bytes(32), bytes(100)), target)
    assert len(event.payload) == 148
    deliver(target.send(Credit(payload_bytes=148)), source)
    deliver(source.send(END), target)
    assert {source.state, target.state} == {State.ENDING}
    deliver(target.send(Credit(payload_bytes=0)), source)
    deliver(target.send(VERIFIED), source)
    assert {source.state, target.state} == {State.OVER}
    assert type(source.lost()) is ConnectionLost


def test_payload_pieces_are_not_copied() -> None:
    source, _ = open_bulk()
    data = bytearray(MIB)
    head, block_ranges, proof, block = source.send(_data(MIB), ranges((0, MIB)), bytes(32), data)
    assert block is data
    assert len(head) < 100
    assert len(block_ranges) + len(proof) == 48


BAD_FROM_SOURCE = [
    pytest.param(*_compare(count=-1), "count is -1", id="negative count"),
    pytest.param(*_compare(count=limits.MAX_RANGES + 1), "allowed are 0 to 65536", id="too many ranges"),
    pytest.param(*_compare((0, MIB), count=2), "of 2 ranges has 32 bytes", id="fewer digests than ranges"),
    pytest.param(*_compare((0, MIB), count=3, digests=0), "of 3 ranges has 16 bytes", id="fewer ranges than told"),
    pytest.param(*_compare(digests=1), "of 0 ranges has 16 bytes", id="digests of nothing"),
    pytest.param(
        *_compare((0, MIB), digests=limits.MAX_DIGESTS + 1), "of 1 ranges has", id="more digests than allowed"
    ),
    pytest.param(_compare()[0], b"x", "of 0 ranges has 1 bytes", id="half a digest"),
    pytest.param(*_compare((0, MIB), digests=15), "15 digests came for 16", id="a digest too few"),
    pytest.param(*_compare((0, MIB), digests=17), "17 digests came for 16", id="a digest too many"),
    pytest.param(*_compare(batch=-1), "does not rise above -1", id="batch below 0"),
    pytest.param(*_compare(superblock=96 * K), "superblock_bytes 98304 is no power", id="odd superblock"),
    pytest.param(*_compare(superblock=32 * K, detail=4 * K), "superblock_bytes is 32768", id="superblock too small"),
    pytest.param(*_compare(superblock=2**27), "superblock_bytes is", id="superblock too large"),
    pytest.param(*_compare(detail=12 * K), "detail_bytes 12288 is no power", id="odd detail"),
    pytest.param(*_compare(detail=2 * K), "detail_bytes is 2048", id="detail too small"),
    pytest.param(*_compare(detail=128 * K), "detail_bytes is 131072", id="detail above its superblock"),
    pytest.param(*_compare(length=0), "length_bytes is 0", id="empty span"),
    pytest.param(*_compare(length=-1), "length_bytes is -1", id="negative span"),
    pytest.param(*_compare(length=2**63), "length_bytes is", id="span longer than any disk"),
    pytest.param(*_compare(at=-64 * K), "offset_bytes is -65536", id="span before the disk"),
    pytest.param(*_compare(at=2**63 - 64 * K), "offset_bytes is", id="span past 2**63"),
    pytest.param(*_compare(at=4 * K), "no multiple of 65536", id="span off a block"),
    pytest.param(*_compare((512, 64 * K)), "byte 512 does not begin", id="range begins off a block"),
    pytest.param(*_compare((0, 512), (64 * K, 64 * K)), "byte 0 does not begin", id="range ends off a block"),
    pytest.param(*_compare((0, 512)), "byte 0 does not begin", id="last ends off a block before its span does"),
    pytest.param(*_compare((64 * K, 64 * K), at=MIB), "out of their span", id="range before its span"),
    pytest.param(*_compare((MIB - 64 * K, 128 * K)), "out of their span", id="range behind its span"),
    pytest.param(*_compare((0, 0)), "empty", id="empty range"),
    pytest.param(*_compare((64 * K, 64 * K), (0, 64 * K)), "before it", id="falling"),
    pytest.param(*_compare((0, 128 * K), (64 * K, 64 * K)), "overlaps", id="overlapping"),
    pytest.param(*_compare((2**63 - 65536, 2**16)), "beyond any disk", id="past 2**63"),
    pytest.param(*_compare((2**64 - 65536, 2**16)), "beyond any disk", id="past 2**64"),
    pytest.param(*span(1, 0, 4 * MIB + 1), "4194304 may be asked for now", id="more than ahead_bytes"),
    pytest.param(_zeroes(0), b"", "count is 0", id="no zeroes"),
    pytest.param(_zeroes(limits.MAX_RANGES + 1), b"", "count is", id="too many zeroes"),
    pytest.param(_zeroes(1), b"", "must have 16", id="zeroes without ranges"),
    pytest.param(_zeroes(2), ranges((5, 5), (9, 5)), "overlaps", id="overlapping zeroes"),
    pytest.param(_data(0), ranges((0, 0)) + bytes(32), "plain_bytes is 0", id="empty data"),
    pytest.param(_data(-1), b"", "plain_bytes is -1", id="negative data"),
    pytest.param(_data(limits.MAX_PLAIN_BYTES + 1), b"", "plain_bytes is", id="too many plain bytes"),
    pytest.param(_data(5, count=0), bytes(5), "count is 0", id="data without ranges"),
    pytest.param(_data(5, count=limits.MAX_BLOCK_RANGES + 1), b"", "count is", id="data in too many ranges"),
    pytest.param(_data(5), ranges((0, 5)) + bytes(32) + bytes(4), "stores 5 bytes", id="data too short"),
    pytest.param(_data(5), ranges((0, 5)) + bytes(32) + bytes(6), "stores 5 bytes", id="data too long"),
    pytest.param(_data(5), ranges((0, 5)), "stores 5 bytes", id="data without digest"),
    pytest.param(_data(5), ranges((0, 6)) + bytes(37), "hold 6 bytes", id="ranges and data disagree"),
    pytest.param(_data(5, codec=Codec.ZSTD), ranges((0, 5)) + bytes(32 + 6), "stores 5 bytes", id="compressed to more"),
    pytest.param(_data(5, codec=Codec.ZSTD), ranges((0, 5)) + bytes(32), "stores 5 bytes", id="compressed to nothing"),
    pytest.param(replace(END, data_bytes=-1), b"", "data_bytes is -1", id="negative data in the books"),
    pytest.param(replace(END, zero_bytes=-1), b"", "zero_bytes is -1", id="negative zeroes in the books"),
    pytest.param(replace(END, compared_bytes=2**63), b"", "compared_bytes is", id="more compared than any disk"),
    pytest.param(replace(END, lanes=0), b"", "lanes is 0", id="no lanes"),
    pytest.param(replace(END, lanes=3), b"", "lanes is 3; allowed are 1 to 2", id="more lanes than granted"),
    pytest.param(END, b"x", "must have 0", id="payload where none belongs"),
    pytest.param(_answer(), b"", "must not be said", id="the target's words"),
    pytest.param(Credit(payload_bytes=0), b"", "must not be said", id="credit from the source"),
    pytest.param(VERIFIED, b"", "must not be said", id="verified by the source"),
    pytest.param(HELLO, b"", "must not be said", id="second hello"),
    pytest.param(Ping(), b"", "must not be said", id="control words"),
    pytest.param(PassFailed(code="", sentence="", target="", offset_bytes=-2), b"", "offset_bytes", id="offset"),
]


@pytest.mark.parametrize(("message", "payload", "why"), BAD_FROM_SOURCE)
def test_a_source_that_breaks_a_rule_is_cut_off(message: BulkMessage, payload: bytes, why: str) -> None:
    _, target = open_bulk()
    _violates(target, message, payload, why)


@pytest.mark.parametrize(("message", "payload", "why"), BAD_FROM_SOURCE)
def test_the_same_from_our_own_side_is_misuse_and_harmless(message: BulkMessage, payload: bytes, why: str) -> None:
    source, target = open_bulk()
    with pytest.raises(LocalMisuse, match=why):
        source.send(message, payload)
    deliver(source.send(_zeroes(1), ranges((0, 1))), target)


BAD_FROM_TARGET = [
    pytest.param(_answer(batch=2), bytes(2), "not open", id="batch never asked for"),
    pytest.param(_answer(), bytes(3), "must have 4", id="a row too short"),
    pytest.param(_answer(), bytes(5), "must have 4", id="a row too long"),
    pytest.param(_answer(details=-1), bytes(4), "details is -1", id="negative details"),
    pytest.param(_answer(details=18), bytes(4 + 288), "details is 18; allowed are 0 to 17", id="too many details"),
    pytest.param(_answer(details=1), bytes(4), "must have 20", id="details told and not sent"),
    pytest.param(_answer(), bytes(20), "must have 4", id="details sent and not told"),
    pytest.param(_answer(), b"\0\x40\0\0", "bits behind those of its 9", id="a tenth of nine differs"),
    pytest.param(_answer(), b"\0\0\0\x01", "bits behind those of its 9", id="a sixteenth of nine is empty"),
    pytest.param(_answer(), b"\x40\0\x60\0", "empty that do not differ", id="empty and the same"),
    pytest.param(_answer(details=1), b"\xc0\0\0\0" + bytes(16), "details is 1; allowed are 2", id="too few for two"),
    pytest.param(_answer(details=3), b"\x80\0\0\0" + bytes(48), "allowed are 1 to 2", id="too many for one"),
    pytest.param(_answer(details=1), b"\x80\0\x80\0" + bytes(16), "allowed are 0 to 0", id="details of emptiness"),
    pytest.param(_answer(read=-1), bytes(4), "read_bytes is -1", id="negative read"),
    pytest.param(_answer(read=17 * 64 * K + 1), bytes(4), "read_bytes", id="more read than there is"),
    pytest.param(Credit(payload_bytes=1), b"", "payload_bytes is 1", id="credit for nothing"),
    pytest.param(Credit(payload_bytes=-1), b"", "payload_bytes is -1", id="negative credit"),
    pytest.param(VERIFIED, b"", "must not be said", id="verified before the end"),
    pytest.param(*_compare(batch=2, at=2 * MIB), "must not be said", id="the source's words"),
    pytest.param(_data(5), ranges((0, 5)) + bytes(37), "must not be said", id="data from the target"),
    pytest.param(END, b"", "must not be said", id="end from the target"),
    pytest.param(BULK_WELCOME, b"", "must not be said", id="second welcome"),
]


def _ask_nine(source: BulkConnection, target: BulkConnection) -> None:
    """A span of nine superblocks: eight of 128 KiB, one of 64; its details are its 17 blocks."""
    deliver(source.send(*_compare((0, MIB), (2 * MIB, 64 * K), length=3 * MIB, superblock=128 * K, digests=9)), target)


@pytest.mark.parametrize(("message", "payload", "why"), BAD_FROM_TARGET)
def test_a_target_that_breaks_a_rule_is_cut_off(message: BulkMessage, payload: bytes, why: str) -> None:
    source, target = open_bulk()
    _ask_nine(source, target)
    with pytest.raises(LocalMisuse, match=why):
        target.send(message, payload)
    _violates(source, message, payload, why)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 1}, "not offered"),
        ({"window_bytes": limits.MIN_WINDOW_BYTES - 1}, "window_bytes"),
        ({"window_bytes": limits.MAX_WINDOW_BYTES + 1}, "window_bytes"),
        ({"ahead_bytes": limits.MIN_AHEAD_BYTES - 1}, "ahead_bytes"),
        ({"ahead_bytes": limits.MAX_AHEAD_BYTES + 1}, "ahead_bytes"),
        ({"lanes": 0}, "lanes"),
        ({"lanes": limits.MAX_LANES + 1}, "lanes"),
    ],
)
def test_a_welcome_beyond_the_limits_is_refused(change: dict[str, Any], why: str) -> None:
    source = BulkConnection(Speaker.CALLER)
    source.send(HELLO)
    _violates(source, replace(BULK_WELCOME, **change), b"", why)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 0])
def test_a_seed_has_64_bits(seed: int) -> None:
    target = BulkConnection(Speaker.LISTENER)
    hello = replace(HELLO, digest_seed=seed)
    if seed < 0:
        _violates(target, hello, b"", "digest_seed is -1")
    else:
        assert deliver(BulkConnection(Speaker.CALLER).send(hello), target)[0].message == hello


def test_no_frame_is_larger_than_the_largest_message() -> None:
    _, target = open_bulk()
    target.feed(frame_prefix(encode(_data(1)), limits.BULK.payload_bytes + 1))
    with pytest.raises(PeerViolation, match="payload of"):
        target.next_event()


def test_a_largest_message_fits_a_frame() -> None:
    source, target = open_bulk(window_bytes=16 * MIB)
    count, size = limits.MAX_BLOCK_RANGES, limits.MAX_PLAIN_BYTES // limits.MAX_BLOCK_RANGES
    spots = ranges(*((2 * size * n, size) for n in range(count)))
    message = _data(limits.MAX_PLAIN_BYTES, count=count)
    (event,) = deliver(source.send(message, spots, bytes(32 * count), bytes(limits.MAX_PLAIN_BYTES)), target)
    assert len(event.payload) <= limits.BULK.payload_bytes
    assert limits.BULK.payload_bytes >= (limits.MAX_RANGES + limits.MAX_DIGESTS) * 16
    assert limits.BULK.payload_bytes >= 2 * limits.MAX_DIGESTS // 8 + limits.MAX_DIGESTS * 16


def test_the_length_is_wrong_before_the_payload_comes() -> None:
    _, target = open_bulk()
    target.feed(frame_prefix(encode(_zeroes(2)), 48))  # and not a byte of payload
    with pytest.raises(PeerViolation, match="must have 32"):
        target.next_event()


def test_no_buffer_is_taken_for_data_beyond_the_window() -> None:
    taken: list[int] = []

    def allocate(size_bytes: int) -> memoryview:
        taken.append(size_bytes)
        return memoryview(bytearray(size_bytes))

    target = BulkConnection(Speaker.LISTENER, allocate)
    target.feed(frame_prefix(encode(HELLO), 0))
    target.next_event()
    target.send(BULK_WELCOME)
    target.feed(frame_prefix(encode(_data(2 * MIB)), 2 * MIB + 48))
    with pytest.raises(PeerViolation, match="the window has 1048576 left"):
        target.next_event()
    assert not taken


def test_the_window_counts_payloads_until_they_are_credited() -> None:
    source, target = open_bulk(window_bytes=MIB)
    size = MIB // 2 - 48
    pieces = (ranges((0, size)), bytes(32), bytes(size))
    for _ in range(2):
        assert not source.must_wait(_data(size), *pieces)
        deliver(source.send(_data(size), *pieces), target)
    assert source.window_left_bytes == target.window_left_bytes == 0
    assert source.must_wait(_data(size), *pieces)
    with pytest.raises(LocalMisuse, match="window"):
        source.send(_data(size), *pieces)
    deliver(target.send(Credit(payload_bytes=MIB // 2)), source)
    assert not source.must_wait(_data(size), *pieces)
    deliver(source.send(_data(size), *pieces), target)


def test_what_never_fits_need_not_wait() -> None:
    source, _ = open_bulk(window_bytes=MIB, ahead_bytes=MIB)
    assert not source.must_wait(_data(MIB), ranges((0, MIB)), bytes(32), bytes(MIB))
    assert not source.must_wait(*span(1, 0, 2 * MIB))


@pytest.mark.parametrize("payload", [b"", b"x", bytes(8), bytes(31)])
def test_a_payload_too_short_for_its_ranges_need_not_wait_either(payload: bytes) -> None:
    source, _ = open_bulk()
    message = _compare(count=2)[0]
    assert not source.must_wait(message, payload)
    with pytest.raises(LocalMisuse, match="of 2 ranges"):
        source.send(message, payload)


def test_spans_may_be_answered_in_any_order() -> None:
    source, target = open_bulk(ahead_bytes=MIB)
    for batch in (1, 2, 7):
        deliver(source.send(*span(batch, batch * MIB, 128 * K)), target)
    assert source.ahead_left_bytes == MIB - 3 * 128 * K
    assert source.must_wait(*span(8, 8 * MIB, MIB))
    for batch in (7, 1, 2):
        deliver(target.send(_answer(batch), bytes(2)), source)
    assert source.ahead_left_bytes == target.ahead_left_bytes == MIB
    assert not source.must_wait(*span(8, 8 * MIB, MIB))
    with pytest.raises(LocalMisuse, match="not open"):
        target.send(_answer(1), bytes(2))


@pytest.mark.parametrize(
    ("following", "why"),
    [
        pytest.param(span(3, MIB, MIB), "batch 3 does not rise above 3", id="the same batch"),
        pytest.param(span(2, MIB, MIB), "batch 2 does not rise above 3", id="a lower batch"),
        pytest.param(span(4, 0, 64 * K), "stands before byte 1048576", id="the same span"),
        pytest.param(span(4, MIB - 64 * K, MIB), "stands before byte 1048576", id="an overlapping span"),
        pytest.param(span(4, MIB, MIB), "", id="an adjoining span"),
        pytest.param(span(9, 5 * MIB, MIB), "", id="a span further on"),
        pytest.param(_compare(batch=4, at=MIB), "", id="a span without data"),
    ],
)
def test_batches_and_spans_rise(following: tuple[CompareSpan, bytes], why: str) -> None:
    source, target = open_bulk()
    deliver(source.send(*span(3, 0, MIB)), target)
    if why:
        with pytest.raises(LocalMisuse, match=why):
            source.send(*following)
        _violates(target, *following, why)
    else:
        assert deliver(source.send(*following), target)[0].message == following[0]


def test_a_span_that_ends_off_a_block_is_the_last() -> None:
    source, target = open_bulk()
    deliver(source.send(*span(1, 0, MIB + 1)), target)
    following = span(2, MIB + 64 * K, 64 * K)
    with pytest.raises(LocalMisuse, match="the disk ended there"):
        source.send(*following)
    _violates(target, *following, "the disk ended there")


@pytest.mark.parametrize(
    ("pairs", "superblock", "count"),
    [
        pytest.param([(0, MIB)], 64 * K, 16, id="each block"),
        pytest.param([(0, MIB)], MIB, 1, id="all under one"),
        pytest.param([(64 * K, 128 * K)], 128 * K, 2, id="cut at a multiple"),
        pytest.param([(0, 64 * K), (128 * K, 64 * K)], MIB, 2, id="none reaches over a gap"),
        pytest.param([(0, 64 * K), (64 * K, 64 * K)], MIB, 2, id="nor into an adjoining range"),
        pytest.param([(896 * K, 128 * K + 1)], 512 * K, 2, id="the last a byte long"),
        pytest.param([(0, 64 * K), (MIB, 1)], 64 * K, 2, id="a range of a byte"),
    ],
)
def test_a_superblock_is_what_of_one_range_lies_between_two_multiples(
    pairs: list[tuple[int, int]], superblock: int, count: int
) -> None:
    end = sum(pairs[-1])
    for digests in range(len(pairs), count + 3):
        source, target = open_bulk()
        question = _compare(*pairs, length=end, superblock=superblock, digests=digests)
        if digests == count:
            deliver(source.send(*question), target)
            answer = _answer(read=sum(length for _, length in pairs))
            deliver(target.send(answer, bytes(2 * -(-count // 8))), source)
        else:
            with pytest.raises(LocalMisuse, match=f"{digests} digests came for {count} superblocks"):
                source.send(*question)


@pytest.mark.parametrize(
    ("rows", "details"),
    [
        pytest.param(b"\0\0\0\0", 0, id="all the same"),
        pytest.param(b"\x80\0\0\0", 2, id="the first differs"),
        pytest.param(b"\0\x80\0\0", 1, id="the last differs, which is short"),
        pytest.param(b"\x80\x80\x80\0", 1, id="the first is empty"),
        pytest.param(b"\xff\x80\0\0", 17, id="all differ"),
        pytest.param(b"\xff\x80\xff\x80", 0, id="all are empty"),
    ],
)
def test_an_answer_tells_the_details_of_what_differs_and_is_not_empty(rows: bytes, details: int) -> None:
    source, target = open_bulk()
    _ask_nine(source, target)
    answer = _answer(read=17 * 64 * K, details=details)
    assert deliver(target.send(answer, rows, bytes(16 * details)), source)[0].message == answer


def test_an_answer_may_come_in_pieces_of_any_length() -> None:
    source, target = open_bulk()
    _ask_nine(source, target)
    with pytest.raises(LocalMisuse, match="bits behind"):
        target.send(_answer(), b"", b"\0", b"", b"\x01\0", b"\0")
    deliver(target.send(_answer(details=1), b"", b"\0", b"\x80\0", b"\0" + bytes(3), bytes(13)), source)


def test_where_details_are_as_large_as_superblocks_none_are_told() -> None:
    source, target = open_bulk()
    deliver(source.send(*span(1, 0, 64 * K)), target)
    with pytest.raises(LocalMisuse, match="details is 1; allowed are 0 to 0"):
        target.send(_answer(details=1), b"\x80\0" + bytes(16))
    deliver(target.send(_answer(), b"\x80\0"), source)


@pytest.mark.parametrize(("more_bytes", "fits"), [(0, True), (64 * K, False)])
def test_no_span_is_asked_about_whose_details_no_answer_can_tell(more_bytes: int, fits: bool) -> None:
    source, target = open_bulk(ahead_bytes=limits.MAX_AHEAD_BYTES)
    size = limits.MAX_DIGESTS * 4 * K + more_bytes
    question = _compare((0, size), length=size, superblock=4 * MIB, detail=4 * K, digests=-(-size // (4 * MIB)))
    if fits:
        deliver(source.send(*question), target)
    else:
        with pytest.raises(LocalMisuse, match="details; an answer tells 262144 at most"):
            source.send(*question)


def test_a_span_without_data_waits_for_no_answer() -> None:
    source, target = open_bulk()
    deliver(source.send(*_compare(length=2**62)), target)
    with pytest.raises(LocalMisuse, match="not open"):
        target.send(_answer())
    assert source.ahead_left_bytes == 4 * MIB
    deliver(source.send(replace(END, lanes=2)), target)
    assert target.state is State.ENDING


def test_the_pass_cannot_end_while_a_span_is_unanswered() -> None:
    source, target = open_bulk()
    deliver(source.send(*span(1, 0, 64 * K)), target)
    with pytest.raises(LocalMisuse, match="1 spans"):
        source.send(END)
    _violates(target, END, b"", "1 spans")


@pytest.mark.parametrize(
    ("message", "payload"),
    [(_zeroes(1), ranges((0, 1))), (_data(1), ranges((0, 1)) + bytes(33)), (END, b"")],
)
def test_after_the_end_the_source_sends_no_more(message: BulkMessage, payload: bytes) -> None:
    source, target = open_bulk()
    deliver(source.send(END), target)
    with pytest.raises(LocalMisuse):
        source.send(message, payload)
    _violates(target, message, payload, "must not be said")


@pytest.mark.parametrize("word", [FAILED, Goodbye(code="x", sentence="x")])
def test_either_side_may_end_it_while_the_other_still_talks(word: BulkMessage) -> None:
    for first, second in (open_bulk(), open_bulk()[::-1]):
        said = first.send(word)
        if second.us is Speaker.CALLER:
            crossing = second.send(_zeroes(1), ranges((0, 1)))
        else:
            crossing = second.send(Credit(payload_bytes=0))
        assert deliver(crossing, first) == []  # dropped, not held against the peer
        assert deliver(said, second)[0].message == word
        with pytest.raises(LocalMisuse):
            second.send(word)


def test_two_failures_may_cross() -> None:
    source, target = open_bulk()
    one, other = source.send(FAILED), target.send(FAILED)
    assert deliver(one, target) == []
    assert deliver(other, source) == []


def test_a_payload_under_way_when_we_end_it_is_dropped() -> None:
    source, target = open_bulk()
    head, *rest = source.send(_data(1000), ranges((0, 1000)), bytes(32), bytes(1000))
    assert deliver([head], target) == []
    target.send(FAILED)
    assert deliver(rest, target) == []


def test_an_answer_that_arrives_while_the_source_fails_is_dropped() -> None:
    source, target = open_bulk()
    deliver(source.send(*span(1, 0, 64 * K)), target)
    answer = target.send(_answer(), bytes(2))
    source.send(FAILED)
    assert deliver(answer, source) == []
