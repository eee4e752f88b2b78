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
    Credit,
    EndOfPass,
    Goodbye,
    PassFailed,
    PassVerified,
    Ping,
    ZeroRanges,
)
from tests.unit.protocol_house import HELLO, MIB, answer, ask_nine, compare, deliver, open_bulk, ranges, span, violates

K = 1024
END = EndOfPass(lanes=1, data_bytes=0, zero_bytes=0, compared_bytes=0)
VERIFIED = PassVerified(written_bytes=0, zeroed_bytes=0, verified_bytes=0, compared_bytes=0, past_cache=True)
FAILED = PassFailed(code="x", sentence="x", target="vda", offset_bytes=-1)


BULK_WELCOME = BulkWelcome(version=2, software="", window_bytes=MIB, ahead_bytes=MIB, lanes=1)


def _zeroes(count: int) -> ZeroRanges:
    return ZeroRanges(count=count)


def _data(plain: int, count: int = 1, codec: Codec = Codec.RAW) -> BlockData:
    return BlockData(count=count, codec=codec, plain_bytes=plain)


def test_a_whole_pass() -> None:
    source, target = open_bulk()
    message, payload = compare((0, 192 * K), (MIB, 100), length=MIB + 100, superblock=128 * K, detail=4 * K, digests=3)
    assert deliver(source.send(message, payload), target)[0].payload == payload
    # The first and the third differ, the first reads as zero there; the third has one page, of 100 bytes.
    rows, details = b"\xa0\x80", bytes(16)
    assert deliver(target.send(answer(read=5, details=1), rows, details), source)[0].payload == rows + details
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
    pytest.param(*compare(count=-1), "count is -1", id="negative count"),
    pytest.param(*compare(count=limits.MAX_RANGES + 1), "allowed are 0 to 65536", id="too many ranges"),
    pytest.param(*compare((0, MIB), count=2), "of 2 ranges has 32 bytes", id="fewer digests than ranges"),
    pytest.param(*compare((0, MIB), count=3, digests=0), "of 3 ranges has 16 bytes", id="fewer ranges than told"),
    pytest.param(*compare(digests=1), "of 0 ranges has 16 bytes", id="digests of nothing"),
    pytest.param(*compare((0, MIB), digests=limits.MAX_DIGESTS + 1), "of 1 ranges has", id="more digests than allowed"),
    pytest.param(compare()[0], b"x", "of 0 ranges has 1 bytes", id="half a digest"),
    pytest.param(*compare((0, MIB), digests=15), "15 digests came for 16", id="a digest too few"),
    pytest.param(*compare((0, MIB), digests=17), "17 digests came for 16", id="a digest too many"),
    pytest.param(*compare(batch=-1), "does not rise above -1", id="batch below 0"),
    pytest.param(*compare(superblock=96 * K), "superblock_bytes 98304 is no power", id="odd superblock"),
    pytest.param(*compare(superblock=32 * K, detail=4 * K), "superblock_bytes is 32768", id="superblock too small"),
    pytest.param(*compare(superblock=2**27), "superblock_bytes is", id="superblock too large"),
    pytest.param(*compare(detail=12 * K), "detail_bytes 12288 is no power", id="odd detail"),
    pytest.param(*compare(detail=2 * K), "detail_bytes is 2048", id="detail too small"),
    pytest.param(*compare(detail=128 * K), "detail_bytes is 131072", id="detail above its superblock"),
    pytest.param(*compare(length=0), "length_bytes is 0", id="empty span"),
    pytest.param(*compare(length=-1), "length_bytes is -1", id="negative span"),
    pytest.param(*compare(length=2**63), "length_bytes is", id="span longer than any disk"),
    pytest.param(*compare(at=-64 * K), "offset_bytes is -65536", id="span before the disk"),
    pytest.param(*compare(at=2**63 - 64 * K), "offset_bytes is", id="span past 2**63"),
    pytest.param(*compare(at=4 * K), "no multiple of 65536", id="span off a block"),
    pytest.param(*compare((512, 64 * K)), "byte 512 does not begin", id="range begins off a block"),
    pytest.param(*compare((0, 512), (64 * K, 64 * K)), "byte 0 does not begin", id="range ends off a block"),
    pytest.param(*compare((0, 512)), "byte 0 does not begin", id="last ends off a block before its span does"),
    pytest.param(*compare((64 * K, 64 * K), at=MIB), "out of their span", id="range before its span"),
    pytest.param(*compare((MIB - 64 * K, 128 * K)), "out of their span", id="range behind its span"),
    pytest.param(*compare((0, 0)), "empty", id="empty range"),
    pytest.param(*compare((64 * K, 64 * K), (0, 64 * K)), "before it", id="falling"),
    pytest.param(*compare((0, 128 * K), (64 * K, 64 * K)), "overlaps", id="overlapping"),
    pytest.param(*compare((2**63 - 65536, 2**16)), "beyond any disk", id="past 2**63"),
    pytest.param(*compare((2**64 - 65536, 2**16)), "beyond any disk", id="past 2**64"),
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
    pytest.param(answer(), b"", "must not be said", id="the target's words"),
    pytest.param(Credit(payload_bytes=0), b"", "must not be said", id="credit from the source"),
    pytest.param(VERIFIED, b"", "must not be said", id="verified by the source"),
    pytest.param(HELLO, b"", "must not be said", id="second hello"),
    pytest.param(Ping(), b"", "must not be said", id="control words"),
    pytest.param(PassFailed(code="", sentence="", target="", offset_bytes=-2), b"", "offset_bytes", id="offset"),
]


@pytest.mark.parametrize(("message", "payload", "why"), BAD_FROM_SOURCE)
def test_a_source_that_breaks_a_rule_is_cut_off(message: BulkMessage, payload: bytes, why: str) -> None:
    _, target = open_bulk()
    violates(target, message, payload, why)


@pytest.mark.parametrize(("message", "payload", "why"), BAD_FROM_SOURCE)
def test_the_same_from_our_own_side_is_misuse_and_harmless(message: BulkMessage, payload: bytes, why: str) -> None:
    source, target = open_bulk()
    with pytest.raises(LocalMisuse, match=why):
        source.send(message, payload)
    deliver(source.send(_zeroes(1), ranges((0, 1))), target)


BAD_FROM_TARGET = [
    pytest.param(answer(batch=2), bytes(2), "not open", id="batch never asked for"),
    pytest.param(answer(), bytes(3), "must have 4", id="a row too short"),
    pytest.param(answer(), bytes(5), "must have 4", id="a row too long"),
    pytest.param(answer(details=-1), bytes(4), "details is -1", id="negative details"),
    pytest.param(answer(details=18), bytes(4 + 288), "details is 18; allowed are 0 to 17", id="too many details"),
    pytest.param(answer(details=1), bytes(4), "must have 20", id="details told and not sent"),
    pytest.param(answer(), bytes(20), "must have 4", id="details sent and not told"),
    pytest.param(answer(), b"\0\x40\0\0", "bits behind those of its 9", id="a tenth of nine differs"),
    pytest.param(answer(), b"\0\0\0\x01", "bits behind those of its 9", id="a sixteenth of nine is empty"),
    pytest.param(answer(), b"\x40\0\x60\0", "empty that do not differ", id="empty and the same"),
    pytest.param(answer(details=1), b"\xc0\0\0\0" + bytes(16), "details is 1; allowed are 2", id="too few for two"),
    pytest.param(answer(details=3), b"\x80\0\0\0" + bytes(48), "allowed are 1 to 2", id="too many for one"),
    pytest.param(answer(details=1), b"\x80\0\x80\0" + bytes(16), "allowed are 0 to 0", id="details of emptiness"),
    pytest.param(answer(read=-1), bytes(4), "read_bytes is -1", id="negative read"),
    pytest.param(answer(read=17 * 64 * K + 1), bytes(4), "read_bytes", id="more read than there is"),
    pytest.param(Credit(payload_bytes=1), b"", "payload_bytes is 1", id="credit for nothing"),
    pytest.param(Credit(payload_bytes=-1), b"", "payload_bytes is -1", id="negative credit"),
    pytest.param(VERIFIED, b"", "must not be said", id="verified before the end"),
    pytest.param(*compare(batch=2, at=2 * MIB), "must not be said", id="the source's words"),
    pytest.param(_data(5), ranges((0, 5)) + bytes(37), "must not be said", id="data from the target"),
    pytest.param(END, b"", "must not be said", id="end from the target"),
    pytest.param(BULK_WELCOME, b"", "must not be said", id="second welcome"),
]


@pytest.mark.parametrize(("message", "payload", "why"), BAD_FROM_TARGET)
def test_a_target_that_breaks_a_rule_is_cut_off(message: BulkMessage, payload: bytes, why: str) -> None:
    source, target = open_bulk()
    ask_nine(source, target)
    with pytest.raises(LocalMisuse, match=why):
        target.send(message, payload)
    violates(source, message, payload, why)


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
    violates(source, replace(BULK_WELCOME, **change), b"", why)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 0])
def test_a_seed_has_64_bits(seed: int) -> None:
    target = BulkConnection(Speaker.LISTENER)
    hello = replace(HELLO, digest_seed=seed)
    if seed < 0:
        violates(target, hello, b"", "digest_seed is -1")
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
    message = compare(count=2)[0]
    assert not source.must_wait(message, payload)
    with pytest.raises(LocalMisuse, match="of 2 ranges"):
        source.send(message, payload)


def test_the_pass_cannot_end_while_a_span_is_unanswered() -> None:
    source, target = open_bulk()
    deliver(source.send(*span(1, 0, 64 * K)), target)
    with pytest.raises(LocalMisuse, match="1 spans"):
        source.send(END)
    violates(target, END, b"", "1 spans")


@pytest.mark.parametrize(
    ("message", "payload"),
    [(_zeroes(1), ranges((0, 1))), (_data(1), ranges((0, 1)) + bytes(33)), (END, b"")],
)
def test_after_the_end_the_source_sends_no_more(message: BulkMessage, payload: bytes) -> None:
    source, target = open_bulk()
    deliver(source.send(END), target)
    with pytest.raises(LocalMisuse):
        source.send(message, payload)
    violates(target, message, payload, "must not be said")


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
    told = target.send(answer(), bytes(2))
    source.send(FAILED)
    assert deliver(told, source) == []
