"""Bulk connections over real TLS on loopback, in threads: flow control, last words, waking up, who is not let in."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

import pytest

from protocol.bulk import BulkSocket, accept_bulk, connect_bulk
from protocol.codec import encode
from protocol.errors import ConnectionLost, LocalMisuse, PeerEnded, PeerViolation
from protocol.framing import frame_prefix
from protocol.messages import (
    BlockData,
    BulkHello,
    BulkMessage,
    BulkWelcome,
    Codec,
    CompareRanges,
    Credit,
    EndOfPass,
    Goodbye,
    PassFailed,
    PassVerified,
    RangeDigests,
    Role,
    ZeroRanges,
)
from protocol.tls import PeerIdentity
from tests.unit.protocol_house import AGENT_NAME, MIB, Certificates, block_payload, make_certificates, ranges, refused

T = TypeVar("T")
DEADLINE_S = 20
VERIFIED = PassVerified(written_bytes=1, zeroed_bytes=0, verified_bytes=1, compared_bytes=1, past_cache=True)
END = EndOfPass(data_bytes=1, zero_bytes=0, compared_bytes=1)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("pki"))


class Threads:
    """Runs calls beside the test; what they return or raise is collected with a deadline."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(8)

    def start(self, call: Callable[[], T]) -> Future[T]:
        """Run it in a thread."""
        return self._pool.submit(call)

    def close(self) -> None:
        """Wait for all."""
        self._pool.shutdown()


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    threads.close()


@contextmanager
def listening(
    certificates: Certificates,
    threads: Threads,
    *,
    context: ssl.SSLContext | None = None,
    handshake_timeout_s: float = 5,
) -> Iterator[tuple[int, Future[tuple[BulkSocket, BulkHello]]]]:
    """A target agent that accepts one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)

        def accept() -> tuple[BulkSocket, BulkHello]:
            sock, _ = listener.accept()
            return accept_bulk(
                sock,
                context or certificates.agent.server(),
                handshake_timeout_s=handshake_timeout_s,
                idle_timeout_s=DEADLINE_S,
            )

        yield listener.getsockname()[1], threads.start(accept)


def connect(
    port: int,
    certificates: Certificates,
    *,
    context: ssl.SSLContext | None = None,
    server_name: str = AGENT_NAME,
    peer_fingerprint: str | None = None,
    idle_timeout_s: float = DEADLINE_S,
) -> tuple[BulkSocket, BulkWelcome]:
    return connect_bulk(
        "127.0.0.1",
        port,
        server_name=server_name,
        context=context or certificates.other_agent.client(),
        peer_fingerprint=peer_fingerprint or certificates.agent.fingerprint,
        grant="ab" * 16,
        target="vda",
        digest_seed=2**64 - 1,
        connect_timeout_s=5,
        idle_timeout_s=idle_timeout_s,
    )


@contextmanager
def connected(
    certificates: Certificates,
    threads: Threads,
    *,
    window_bytes: int = 4 * MIB,
    ahead_bytes: int = 4 * MIB,
    idle_timeout_s: float = DEADLINE_S,
) -> Iterator[tuple[BulkSocket, BulkSocket]]:
    """A source and a target past the handshake."""
    with ExitStack() as stack, listening(certificates, threads) as (port, accepted):
        connecting = threads.start(lambda: connect(port, certificates, idle_timeout_s=idle_timeout_s))
        target, hello = accepted.result(DEADLINE_S)
        stack.callback(target.close)
        stack.callback(target.shutdown)
        assert (hello.grant, hello.target, hello.digest_seed) == ("ab" * 16, "vda", 2**64 - 1)
        target.welcome(window_bytes=window_bytes, ahead_bytes=ahead_bytes)
        source, welcome = connecting.result(DEADLINE_S)
        stack.callback(source.close)
        stack.callback(source.shutdown)
        assert (welcome.window_bytes, welcome.ahead_bytes) == (window_bytes, ahead_bytes)
        yield source, target


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
                case CompareRanges():
                    target.send(RangeDigests(batch=message.batch, read_bytes=0), os.urandom(16 * 16))
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
            source.send(CompareRanges(batch=number + 1, block_bytes=65536, count=1), ranges((number * MIB, MIB)))
            source.send(
                BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB), *block_payload(number * MIB, blocks[number % 4])
            )
        for _ in range(count):
            assert answered.acquire(timeout=DEADLINE_S)
        source.send(END)
        assert got.result(DEADLINE_S) == [blocks[number % 4] for number in range(count)]
        messages = heard.result(DEADLINE_S)
        assert [m.batch for m in messages if isinstance(m, RangeDigests)] == list(range(1, count + 1))
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
        source.send(ZeroRanges(count=1, compared=False), ranges((0, 512)))  # the wait holds nobody else up
        assert isinstance(target.receive()[0], ZeroRanges)
        assert not second.done()
        target.send(Credit(payload_bytes=len(payload)))
        second.result(DEADLINE_S)
        assert isinstance(target.receive()[0], BlockData)


def test_ranges_wait_until_earlier_ones_are_answered(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads, ahead_bytes=MIB) as (source, target):
        source.send(CompareRanges(batch=1, block_bytes=65536, count=1), ranges((0, MIB)))
        second = threads.start(
            lambda: source.send(CompareRanges(batch=2, block_bytes=65536, count=1), ranges((MIB, MIB)))
        )
        assert isinstance(target.receive()[0], CompareRanges)
        assert not second.done()
        target.send(RangeDigests(batch=1, read_bytes=MIB), bytes(256))
        assert source.receive()[0] == RangeDigests(batch=1, read_bytes=MIB)
        second.result(DEADLINE_S)


def test_what_can_never_fit_the_window_is_misuse(certificates: Certificates, threads: Threads) -> None:
    with connected(certificates, threads, window_bytes=MIB) as (source, target):
        with pytest.raises(LocalMisuse, match="window"):
            source.send(BlockData(count=1, codec=Codec.RAW, plain_bytes=MIB), *block_payload(0, bytes(MIB)))
        source.send(ZeroRanges(count=1, compared=True), ranges((0, 512)))
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
        source.send(CompareRanges(batch=1, block_bytes=65536, count=1), ranges((0, MIB)))
        target.receive()
        digests = os.urandom(256)
        target.send(RangeDigests(batch=1, read_bytes=0), digests)
        _, payload = source.receive()
        assert payload is given[0]
        assert payload == digests
        source.shutdown()
        source.close()
        target.shutdown()
        target.close()


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


# --- who is not let in ----------------------------------------------------------------------------------------------


def test_nobody_listens(certificates: Certificates) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionLost, match="refuses connections"):
            connect(sock.getsockname()[1], certificates)


def test_a_refusal_carries_its_reason(certificates: Certificates, threads: Threads) -> None:
    with listening(certificates, threads) as (port, accepted):
        connecting = threads.start(lambda: connect(port, certificates))
        target, _ = accepted.result(DEADLINE_S)
        target.refuse("forbidden", "no such grant")
        with refused("forbidden"):
            connecting.result(DEADLINE_S)


@pytest.mark.parametrize(
    ("who", "alert"), [("foreign_agent", "CA it does not know"), ("expired_agent", "our certificate has expired")]
)
def test_a_wrong_certificate_of_the_source_is_refused_and_it_is_told_why(
    certificates: Certificates, threads: Threads, who: str, alert: str
) -> None:
    context = getattr(certificates, who).client()
    context.load_verify_locations(certificates.agent.issued.ca)
    with listening(certificates, threads) as (port, accepted):
        with pytest.raises(ConnectionLost, match=alert):
            connect(port, certificates, context=context)
        with pytest.raises(PeerViolation):
            accepted.result(DEADLINE_S)


def test_a_source_without_certificate_is_refused_and_told_why(certificates: Certificates, threads: Threads) -> None:
    with listening(certificates, threads) as (port, accepted):
        with pytest.raises(ConnectionLost, match="we showed none"):
            connect(port, certificates, context=certificates.other_agent.client_without_certificate())
        with pytest.raises(PeerViolation, match="showed no certificate"):
            accepted.result(DEADLINE_S)


def test_a_coordinator_may_not_open_bulk_connections(certificates: Certificates, threads: Threads) -> None:
    with listening(certificates, threads) as (port, accepted):
        with refused("forbidden"):
            connect(port, certificates, context=certificates.coordinator.client())
        with pytest.raises(PeerViolation, match="not an agent's"):
            accepted.result(DEADLINE_S)


@pytest.mark.parametrize(
    ("who", "why"),
    [("foreign_agent", "another CA"), ("expired_agent", "expired"), ("other_agent", "another host name")],
)
def test_the_source_refuses_a_wrong_certificate_of_the_target(
    certificates: Certificates, threads: Threads, who: str, why: str
) -> None:
    context = getattr(certificates, who).server()
    context.load_verify_locations(certificates.agent.issued.ca)
    with listening(certificates, threads, context=context) as (port, accepted):
        with pytest.raises(PeerViolation, match=why):
            connect(port, certificates)
        with pytest.raises(ConnectionLost):
            accepted.result(DEADLINE_S)


def test_the_source_refuses_a_target_other_than_the_one_announced(certificates: Certificates, threads: Threads) -> None:
    with listening(certificates, threads) as (port, accepted):
        with pytest.raises(PeerViolation, match="other than the one"):
            connect(port, certificates, peer_fingerprint="00" * 32)
        with pytest.raises(ConnectionLost):
            accepted.result(DEADLINE_S)


def test_a_peer_that_never_shakes_hands_is_given_up(certificates: Certificates, threads: Threads) -> None:
    with (
        listening(certificates, threads, handshake_timeout_s=0.1) as (port, accepted),
        socket.create_connection(("127.0.0.1", port)) as sock,
    ):
        sock.settimeout(DEADLINE_S)
        assert sock.recv(1) == b""
        with pytest.raises(ConnectionLost, match="in time"):
            accepted.result(DEADLINE_S)


@contextmanager
def raw_source(port: int, certificates: Certificates) -> Iterator[ssl.SSLSocket]:
    """A source past TLS that says what the test wants."""
    context = certificates.other_agent.client()
    with (
        socket.create_connection(("127.0.0.1", port), DEADLINE_S) as plain,
        context.wrap_socket(plain, server_hostname=AGENT_NAME) as sock,
    ):
        yield sock


def test_a_peer_that_dribbles_its_hello_is_given_up(certificates: Certificates, threads: Threads) -> None:
    with (
        listening(certificates, threads, handshake_timeout_s=0.3) as (port, accepted),
        raw_source(port, certificates) as sock,
    ):
        for byte in b"\x00\x00\x0f\x00\x00\x00\x00\x00" + bytes(1000):
            try:
                sock.sendall(bytes([byte]))
            except OSError:
                break
            with suppress(TimeoutError, ConnectionLost):
                accepted.result(0.05)
            if accepted.done():
                break
        with pytest.raises(ConnectionLost, match="sent nothing"):
            accepted.result(0)


def test_a_source_without_a_common_version_hears_both_sides_versions(
    certificates: Certificates, threads: Threads
) -> None:
    hello = BulkHello(versions=(9,), software="future", grant="", target="vda", digest_seed=0)
    with listening(certificates, threads) as (port, accepted):
        with raw_source(port, certificates) as sock:
            sock.sendall(frame_prefix(encode(hello), 0))
            said = b""
            while data := sock.recv(4096):
                said += data
        assert b"Goodbye" in said
        assert b"version 1" in said
        assert b"speaks 9" in said
        with pytest.raises(ConnectionLost, match="cannot be spoken with"):
            accepted.result(DEADLINE_S)


def test_a_source_may_say_goodbye_instead_of_hello(certificates: Certificates, threads: Threads) -> None:
    with listening(certificates, threads) as (port, accepted), raw_source(port, certificates) as sock:
        sock.sendall(frame_prefix(encode(Goodbye(code="done", sentence="changed my mind")), 0))
        with pytest.raises(PeerEnded, match="changed my mind"):
            accepted.result(DEADLINE_S)
