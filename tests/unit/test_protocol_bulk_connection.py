"""The bulk conversation without a wire: lengths, ranges, window, batches, last words."""

from __future__ import annotations

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
    CompareRanges,
    Credit,
    EndOfPass,
    Goodbye,
    PassFailed,
    PassVerified,
    Ping,
    RangeDigests,
    ZeroRanges,
)
from tests.unit.protocol_house import HELLO, MIB, deliver, open_bulk, ranges

K = 1024
END = EndOfPass(data_bytes=0, zero_bytes=0, compared_bytes=0)
VERIFIED = PassVerified(written_bytes=0, zeroed_bytes=0, verified_bytes=0, compared_bytes=0, past_cache=True)
FAILED = PassFailed(code="x", sentence="x", target="vda", offset_bytes=-1)


def _compare(batch: int = 1, block: int = 64 * K, count: int = 1) -> CompareRanges:
    return CompareRanges(batch=batch, block_bytes=block, count=count)


def _zeroes(count: int) -> ZeroRanges:
    return ZeroRanges(count=count, compared=False)


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
    payload = ranges((0, 128 * K), (MIB, 100))
    assert deliver(source.send(_compare(count=2), payload), target)[0].payload == payload
    digests = bytes(48)
    assert deliver(target.send(RangeDigests(batch=1, read_bytes=5), digests), source)[0].payload == digests
    deliver(source.send(_zeroes(1), ranges((2 * MIB, 7 * MIB))), target)
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
    pytest.param(_compare(count=0), b"", "count is 0", id="no ranges to compare"),
    pytest.param(_compare(count=-1), b"", "count is -1", id="negative count"),
    pytest.param(_compare(count=limits.MAX_RANGES + 1), b"", "allowed are 1 to 65536", id="too many to compare"),
    pytest.param(_compare(count=2), ranges((0, 64 * K)), "must have 32 bytes", id="payload too short"),
    pytest.param(_compare(), ranges((0, 64 * K)) + b"x", "must have 16 bytes", id="payload too long"),
    pytest.param(_compare(batch=-1), ranges((0, 64 * K)), "does not rise", id="batch below 0"),
    pytest.param(_compare(block=100_000), ranges((0, 100_000)), "no power of two", id="odd block size"),
    pytest.param(_compare(block=256), ranges((0, 256)), "block_bytes is 256", id="block too small"),
    pytest.param(_compare(block=2**27), ranges((0, 2**27)), "block_bytes is", id="block too large"),
    pytest.param(_compare(), ranges((512, 64 * K)), "multiple of 65536", id="range off a block"),
    pytest.param(_compare(count=2), ranges((0, 512), (64 * K, 512)), "multiple of 65536", id="short range inside"),
    pytest.param(_compare(), ranges((0, 0)), "empty", id="empty range"),
    pytest.param(_compare(count=2), ranges((64 * K, 64 * K), (0, 64 * K)), "before it", id="falling"),
    pytest.param(_compare(count=2), ranges((0, 128 * K), (64 * K, 64 * K)), "overlaps", id="overlapping"),
    pytest.param(_compare(), ranges((2**63 - 65536, 2**16)), "beyond any disk", id="past 2**63"),
    pytest.param(_compare(), ranges((2**64 - 65536, 2**16)), "beyond any disk", id="past 2**64"),
    pytest.param(_compare(block=512), ranges((0, 512 * (limits.MAX_DIGESTS + 1))), "blocks; allowed", id="digests"),
    pytest.param(_compare(), ranges((0, 512 * MIB)), "may be asked for now", id="more than ahead_bytes"),
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
    pytest.param(EndOfPass(data_bytes=-1, zero_bytes=0, compared_bytes=0), b"", "data_bytes is -1", id="books"),
    pytest.param(END, b"x", "must have 0", id="payload where none belongs"),
    pytest.param(RangeDigests(batch=1, read_bytes=0), b"", "must not be said", id="the target's words"),
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


@pytest.mark.parametrize(
    ("message", "payload", "why"),
    [
        pytest.param(RangeDigests(batch=2, read_bytes=0), bytes(16), "not open", id="batch never asked for"),
        pytest.param(RangeDigests(batch=1, read_bytes=0), bytes(16), "must have 32", id="too few digests"),
        pytest.param(RangeDigests(batch=1, read_bytes=0), bytes(48), "must have 32", id="too many digests"),
        pytest.param(RangeDigests(batch=1, read_bytes=-1), bytes(32), "read_bytes is -1", id="negative read"),
        pytest.param(RangeDigests(batch=1, read_bytes=128 * K + 1), bytes(32), "read_bytes", id="more than there is"),
        pytest.param(Credit(payload_bytes=1), b"", "payload_bytes is 1", id="credit for nothing"),
        pytest.param(Credit(payload_bytes=-1), b"", "payload_bytes is -1", id="negative credit"),
        pytest.param(VERIFIED, b"", "must not be said", id="verified before the end"),
        pytest.param(_compare(), ranges((0, 64 * K)), "must not be said", id="the source's words"),
        pytest.param(_data(5), ranges((0, 5)) + bytes(37), "must not be said", id="data from the target"),
        pytest.param(END, b"", "must not be said", id="end from the target"),
        pytest.param(
            BulkWelcome(version=1, software="", window_bytes=MIB, ahead_bytes=MIB), b"", "must not be", id="welcome"
        ),
    ],
)
def test_a_target_that_breaks_a_rule_is_cut_off(message: BulkMessage, payload: bytes, why: str) -> None:
    source, target = open_bulk()
    deliver(source.send(_compare(), ranges((0, 128 * K))), target)
    with pytest.raises(LocalMisuse, match=why):
        target.send(message, payload)
    _violates(source, message, payload, why)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 2}, "not offered"),
        ({"window_bytes": limits.MIN_WINDOW_BYTES - 1}, "window_bytes"),
        ({"window_bytes": limits.MAX_WINDOW_BYTES + 1}, "window_bytes"),
        ({"ahead_bytes": limits.MIN_AHEAD_BYTES - 1}, "ahead_bytes"),
        ({"ahead_bytes": limits.MAX_AHEAD_BYTES + 1}, "ahead_bytes"),
    ],
)
def test_a_welcome_beyond_the_limits_is_refused(change: dict[str, int], why: str) -> None:
    source = BulkConnection(Speaker.CALLER)
    source.send(HELLO)
    values = {"version": 1, "window_bytes": MIB, "ahead_bytes": MIB, **change}
    _violates(source, BulkWelcome(software="", **values), b"", why)


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
    assert limits.BULK.payload_bytes >= limits.MAX_DIGESTS * 16
    assert limits.BULK.payload_bytes >= limits.MAX_RANGES * 16


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
    target.send(BulkWelcome(version=1, software="", window_bytes=MIB, ahead_bytes=MIB))
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
    assert not source.must_wait(_compare(), ranges((0, 2 * MIB)))


def test_batches_may_be_answered_in_any_order() -> None:
    source, target = open_bulk(ahead_bytes=MIB)
    for batch in (1, 2, 7):
        deliver(source.send(_compare(batch=batch), ranges((0, 128 * K))), target)
    assert source.ahead_left_bytes == MIB - 3 * 128 * K
    for batch in (7, 1, 2):
        deliver(target.send(RangeDigests(batch=batch, read_bytes=0), bytes(32)), source)
    assert source.ahead_left_bytes == target.ahead_left_bytes == MIB
    with pytest.raises(LocalMisuse, match="not open"):
        target.send(RangeDigests(batch=1, read_bytes=0), bytes(32))


def test_the_pass_cannot_end_while_a_batch_is_unanswered() -> None:
    source, target = open_bulk()
    deliver(source.send(_compare(), ranges((0, 64 * K))), target)
    with pytest.raises(LocalMisuse, match="1 batches"):
        source.send(END)
    _violates(target, END, b"", "1 batches")


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


def test_digests_that_arrive_while_the_source_fails_are_dropped() -> None:
    source, target = open_bulk()
    deliver(source.send(_compare(), ranges((0, 64 * K))), target)
    answer = target.send(RangeDigests(batch=1, read_bytes=0), bytes(16))
    source.send(FAILED)
    assert deliver(answer, source) == []
