"""Bulk connections over real TLS on loopback, in threads: flow control, last words, waking up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from protocol.bulk import BulkSocket, connect_bulk
from protocol.codec import encode
from protocol.errors import ConnectionLost, LocalMisuse, PeerViolation
from protocol.framing import frame_prefix
from protocol.messages import (
    BlockData,
    BulkMessage,
    Codec,
    CompareSpan,
    Credit,
    EndOfPass,
    PassFailed,
    PassVerified,
    Role,
    SpanAnswer,
    ZeroRanges,
)
from protocol.tls import PeerIdentity
from tests.unit.bulk_house import DEADLINE_S, END, VERIFIED, Threads, connected, listening
from tests.unit.protocol_house import AGENT_NAME, MIB, Certificates, block_payload, make_certificates, ranges, span


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    threads.close()


def test_both_sides_know_who_the_other_is(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads) as (source, target):
        assert source.peer == PeerIdentity(
            role=Role.AGENT, names=(AGENT_NAME,), fingerprint=certificates.agent.fingerprint
        )
        assert target.peer.fingerprint == certificates.other_agent.fingerprint


def test_a_whole_pass_goes_through_in_both_directions_at_once(certificates: Certificates, threads: Threads) -> None:
    """Much more than the window, while digests flow the other way; every byte arrives in its place."""
    blocks = [os.urandom(MIB) for _ in range(4)]
    count = 48

    def receive_all(target: BulkSocket) -> list[bytes]:
        got: list[bytes] = []
        while True:
            message, payload = target.receive()
            match message:
                case CompareSpan():
                    target.send(SpanAnswer(batch=message.batch, read_bytes=0, details=0), b"\xff\xff\0\0")
                case BlockData():
                    got.append(bytes(payload[48:]))
                    target.send(Credit(payload_bytes=len(payload)))
                case EndOfPass():
                    target.send(VERIFIED)
                    return got

    def listen(source: BulkSocket) -> list[BulkMessage]:
        heard: list[BulkMessage] = []
        while not heard or not isinstance(heard[-1], PassVerified):
            heard.append(source.receive()[0])
            answered.release()
        return heard

    answered = threading.Semaphore(0)
    with connected(certificates, threads, window_bytes=3 * MIB) as (source, target):
        got, heard = threads.start(lambda: receive_all(target)), threads.start(lambda: listen(source))
        for number in range(count):
            source.send(*span(number + 1, number * MIB, MIB))
            source.send(
                BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB), *block_payload(number * MIB, blocks[number % 4])
            )
        for _ in range(count):
            assert answered.acquire(timeout=DEADLINE_S)
        source.send(END)
        assert got.result(DEADLINE_S) == [blocks[number % 4] for number in range(count)]
        messages = heard.result(DEADLINE_S)
        assert [m.batch for m in messages if isinstance(m, SpanAnswer)] == list(range(1, count + 1))
        assert messages[-1] == VERIFIED
        assert not any(isinstance(m, Credit) for m in messages)
        assert source.bytes_sent == target.bytes_received > count * MIB
        assert target.bytes_sent == source.bytes_received


def test_block_data_waits_until_there_is_window(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads, window_bytes=MIB) as (source, target):
        message = BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB // 2)
        pieces = block_payload(0, bytes(MIB // 2))
        threads.start(source.receive)
        source.send(message, *pieces)
        second = threads.start(lambda: source.send(message, *pieces))
        _, payload = target.receive()
        assert not second.done()
        source.send(ZeroRanges(count=1), ranges((0, 512)))  # the wait holds nobody else up
        assert isinstance(target.receive()[0], ZeroRanges)
        assert not second.done()
        target.send(Credit(payload_bytes=len(payload)))
        second.result(DEADLINE_S)
        assert isinstance(target.receive()[0], BlockData)


def test_spans_wait_until_earlier_ones_are_answered(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads, ahead_bytes=MIB) as (source, target):
        source.send(*span(1, 0, MIB))
        second = threads.start(lambda: source.send(*span(2, MIB, MIB)))
        assert isinstance(target.receive()[0], CompareSpan)
        assert not second.done()
        answer = SpanAnswer(batch=1, read_bytes=MIB, details=0)
        target.send(answer, bytes(4))
        assert source.receive()[0] == answer
        second.result(DEADLINE_S)


def test_what_can_never_fit_the_window_is_misuse(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads, window_bytes=MIB) as (source, target):
        with pytest.raises(LocalMisuse, match="window"):
            source.send(BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB), *block_payload(0, bytes(MIB)))
        source.send(ZeroRanges(count=1), ranges((0, 512)))
        assert isinstance(target.receive()[0], ZeroRanges)


def test_small_credits_are_gathered_but_never_the_last(certificates: Certificates, threads: Threads) -> None:
    size = 64 * 1024
    with connected(certificates, threads, window_bytes=MIB) as (source, target):
        listener = threads.start(source.receive)
        for number in range(4):
            source.send(
                BlockData(count=1, codec=Codec.RAW, plain_bytes=size), *block_payload(number * size, bytes(size))
            )
        sizes = [len(target.receive()[1]) for _ in range(4)]
        before = target.bytes_sent
        target.send(Credit(payload_bytes=sizes[0]))
        assert target.bytes_sent == before  # less than an eighth of the window, and more is on its way
        target.send(Credit(payload_bytes=sizes[1]))
        assert target.bytes_sent > before
        before = target.bytes_sent
        target.send(Credit(payload_bytes=sizes[2]))
        target.send(Credit(payload_bytes=0))  # a sign of life carries what was gathered
        assert target.bytes_sent > before
        before = target.bytes_sent
        target.send(Credit(payload_bytes=sizes[3]))
        assert target.bytes_sent > before
        with pytest.raises(LocalMisuse):
            target.send(Credit(payload_bytes=1))
        target.send(PassFailed(code="x", sentence="x", target="vda", offset_bytes=-1))
        listener.result(DEADLINE_S)


def test_payloads_go_into_the_buffers_the_caller_gives(certificates: Certificates, threads: Threads) -> None:
    given: list[memoryview] = []

    def allocate(size_bytes: int) -> memoryview:
        given.append(memoryview(bytearray(size_bytes)))
        return given[-1]

    with listening(certificates, threads) as (port, accepted):
        connecting = threads.start(
            lambda: connect_bulk(
                "127.0.0.1",
                port,
                server_name=AGENT_NAME,
                context=certificates.other_agent.client(),
                peer_fingerprint=certificates.agent.fingerprint,
                grant="",
                target="vda",
                digest_seed=0,
                allocate=allocate,
            )
        )
        target, _ = accepted.result(DEADLINE_S)
        target.welcome(window_bytes=MIB, ahead_bytes=MIB)
        source, _ = connecting.result(DEADLINE_S)
        source.send(*span(1, 0, MIB))
        target.receive()
        rows = b"\xab\xcd\xab\0"
        target.send(SpanAnswer(batch=1, read_bytes=0, details=0), rows)
        _, payload = source.receive()
        assert payload is given[0]
        assert payload == rows
        source.shutdown()
        source.close()
        target.shutdown()
        target.close()


def test_credit_is_gathered_while_what_the_source_has_left_holds_the_largest_payload(
    certificates: Certificates, threads: Threads
) -> None:
    """Each credit wakes threads on both sides; a source that uses its whole window again and again never waits."""
    window = 32 * MIB
    with connected(certificates, threads, window_bytes=window) as (source, target):
        listener = threads.start(source.receive)
        frame, pieces = BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB), block_payload(0, bytes(MIB))
        before = target.bytes_sent
        for _ in range(64):
            source.send(frame, *pieces)
            target.send(Credit(payload_bytes=len(target.receive()[1])))
        one_credit = len(frame_prefix(encode(Credit(payload_bytes=window // 8)), 0))
        assert target.bytes_sent - before <= one_credit * 64 // 4
        target.send(PassFailed(code="x", sentence="x", target="vda", offset_bytes=-1))
        listener.result(DEADLINE_S)


def test_the_time_spent_waiting_for_window_is_kept_apart(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads, window_bytes=MIB, idle_timeout_s=0.2) as (source, _):
        message, pieces = BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB // 2), block_payload(0, bytes(MIB // 2))
        source.send(message, *pieces)
        assert source.waited_for_window_s == 0
        sending_s = source.sending_s
        assert sending_s > source.waited_for_link_s >= 0
        with pytest.raises(ConnectionLost, match="no room"):
            source.send(message, *pieces)
        assert source.waited_for_window_s >= 0.2
        assert source.sending_s == sending_s


def test_what_the_link_did_is_known_also_when_it_is_gone(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads) as (source, target):
        source.send(BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB), *block_payload(0, bytes(MIB)))
        target.receive()
        target.send(PassFailed(code="x", sentence="x", target="vda", offset_bytes=-1))
        source.receive()  # with the acknowledgement of all that was sent
        facts = source.link()
        assert facts.delivered_bytes is not None
        assert facts.delivered_bytes > source.bytes_sent
        assert facts.rtt_s is not None
        source.shutdown()
        assert source.link().delivered_bytes == facts.delivered_bytes
        source.close()
        assert source.link().delivered_bytes == facts.delivered_bytes


# --- endings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_a_hurry", [False, True])
def test_a_failure_reaches_a_source_that_is_sending_at_full_speed(
    certificates: Certificates, threads: Threads, in_a_hurry: bool
) -> None:
    """The target's last word must not be lost in the reset that unread data would cause."""
    failed = PassFailed(code="disk", sentence="no space", target="vda", offset_bytes=4096)
    with connected(certificates, threads, window_bytes=64 * MIB) as (source, target):

        def send_until_ended() -> None:
            for number in range(10_000):
                source.send(
                    BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB), *block_payload(number * MIB, bytes(MIB))
                )

        sending, listening_ = threads.start(send_until_ended), threads.start(source.receive)
        target.receive()
        target.send(failed)
        if in_a_hurry:
            target.shutdown()
        closing = threads.start(target.close)
        assert listening_.result(DEADLINE_S)[0] == failed
        with pytest.raises(ConnectionLost):
            sending.result(DEADLINE_S)
        with pytest.raises(ConnectionLost):
            source.receive()
        source.shutdown()
        closing.result(DEADLINE_S)


def test_shutdown_wakes_whoever_sends_and_whoever_receives(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads, window_bytes=1024 * MIB) as (source, _target):

        def fill() -> None:
            while True:  # nobody reads: the socket's buffers fill up, then this blocks
                source.send(BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB), *block_payload(0, bytes(MIB)))

        receiving, sending = threads.start(source.receive), threads.start(fill)
        before = -1
        while source.bytes_sent != before:  # until it does not move any more
            before = source.bytes_sent
            time.sleep(0.05)
        source.shutdown()
        source.shutdown()
        for future in (receiving, sending):
            with pytest.raises(ConnectionLost, match="shut down on this side"):
                future.result(DEADLINE_S)
        with pytest.raises(ConnectionLost):
            source.send(END)


def test_shutdown_wakes_who_waits_for_window(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads, window_bytes=MIB) as (source, target):
        message, pieces = BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB // 2), block_payload(0, bytes(MIB // 2))
        source.send(message, *pieces)
        waiting = threads.start(lambda: source.send(message, *pieces))
        target.receive()
        source.shutdown()
        with pytest.raises(ConnectionLost):
            waiting.result(DEADLINE_S)


def test_a_peer_that_vanishes_is_a_lost_connection(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads) as (source, target):
        receiving = threads.start(source.receive)
        target.shutdown()
        with pytest.raises(ConnectionLost, match="closed the connection without a word"):
            receiving.result(DEADLINE_S)


def test_a_silent_peer_is_given_up(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads) as (source, _):
        with pytest.raises(ConnectionLost, match=r"sent nothing for 0\.1 seconds"):
            source.receive(timeout_s=0.1)
        with pytest.raises(ConnectionLost):
            source.send(END)


def test_a_peer_that_dribbles_parts_of_a_record_says_nothing(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads) as (source, target):
        receiving = threads.start(lambda: source.receive(timeout_s=0.3))
        for byte in target._pipe._encrypt(memoryview(bytes(1000)))[:-1]:
            target._pipe._sock.send(bytes([byte]))
            with suppress(TimeoutError, ConnectionLost):
                receiving.result(0.05)
            if receiving.done():
                break
        with pytest.raises(ConnectionLost, match="sent nothing"):
            receiving.result(0)


@pytest.mark.parametrize("what", ["sends", "receives"])
def test_a_cut_link_is_noticed_by_whoever_waits(
    certificates: Certificates, threads: Threads, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What a cut looks like is for test_protocol_link; here the kernel is taken to have seen one."""
    with connected(certificates, threads, window_bytes=1024 * MIB) as (source, _):

        def fill() -> None:
            while True:  # nobody reads: the socket's buffers fill up, then this blocks
                source.send(BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB), *block_payload(0, bytes(MIB)))

        monkeypatch.setattr("protocol.tls_socket.LOOK_S", 0.01)
        monkeypatch.setattr("protocol.tls_socket.link_is_cut", lambda sock: True)
        with pytest.raises(ConnectionLost, match="acknowledged nothing for 20 seconds"):
            threads.start(fill if what == "sends" else source.receive).result(DEADLINE_S)
        with pytest.raises(ConnectionLost, match="acknowledged nothing"):
            source.send(END)


def test_a_peer_that_makes_no_room_is_given_up(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads, window_bytes=MIB, idle_timeout_s=0.2) as (source, _):
        message, pieces = BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB // 2), block_payload(0, bytes(MIB // 2))
        source.send(message, *pieces)
        with pytest.raises(ConnectionLost, match="no room"):
            source.send(message, *pieces)


def test_a_violation_ends_the_connection_for_every_thread(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads, window_bytes=MIB) as (source, target):
        message, pieces = BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB // 2), block_payload(0, bytes(MIB // 2))
        source.send(message, *pieces)
        waiting, receiving = threads.start(lambda: source.send(message, *pieces)), threads.start(source.receive)
        target._pipe.send_all([frame_prefix(encode(Credit(payload_bytes=10 * MIB)), 0)], DEADLINE_S)
        for future in (waiting, receiving):
            with pytest.raises(PeerViolation):
                future.result(DEADLINE_S)


def test_close_is_harmless_when_repeated(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads) as (source, target):
        source.close()
        source.close()
        source.shutdown()
        with pytest.raises(ConnectionLost):
            source.send(END)
        target.shutdown()
        target.close()
        target.shutdown()
