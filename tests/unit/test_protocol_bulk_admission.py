"""Bulk connections over real TLS on loopback, in threads: who is not let in, and what they are told."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from protocol.codec import encode
from protocol.errors import ConnectionLost, PeerEnded, PeerViolation
from protocol.framing import frame_prefix
from protocol.messages import (
    BulkHello,
    Goodbye,
)
from tests.unit.bulk_house import DEADLINE_S, Threads, connect, listening
from tests.unit.protocol_house import AGENT_NAME, Certificates, make_certificates, refused


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    threads.close()


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
        assert b"version 2" in said
        assert b"speaks 9" in said
        with pytest.raises(ConnectionLost, match="cannot be spoken with"):
            accepted.result(DEADLINE_S)


def test_a_source_may_say_goodbye_instead_of_hello(certificates: Certificates, threads: Threads) -> None:
    with listening(certificates, threads) as (port, accepted), raw_source(port, certificates) as sock:
        sock.sendall(frame_prefix(encode(Goodbye(code="done", sentence="changed my mind")), 0))
        with pytest.raises(PeerEnded, match="changed my mind"):
            accepted.result(DEADLINE_S)
