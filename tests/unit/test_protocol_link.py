"""What the kernel tells of a link, and what we ask of it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from protocol import link
from protocol.link import (
    BUFFER_BYTES,
    CUT_AFTER_S,
    NO_FACTS,
    LinkFacts,
    link_facts,
    link_is_cut,
    parse_facts,
    shows_cut,
)

FIELDS_TO_4_0 = 120  # bytes of struct tcp_info in Linux 4.0
FIELDS_TO_4_9 = 168


def tcp_info(*, retransmits: int = 0, probes: int = 0, last_ack_ms: int = 0) -> bytes:
    """A ``struct tcp_info`` written field by field in the order of ``linux/tcp.h``, up to tcpi_sndbuf_limited."""
    return b"".join(
        (
            struct.pack("=8B", 1, 0, retransmits, probes, 0, 0, 0, 0),
            struct.pack("=4I", 200_000, 40_000, 1448, 1448),  # rto to rcv_mss
            struct.pack("=5I", 10, 0, 0, 0, 0),  # unacked to fackets
            struct.pack("=4I", 0, 0, 0, last_ack_ms),
            struct.pack("=8I", 1500, 65535, 101_000, 500, 2**31 - 1, 10, 1448, 3),  # pmtu to reordering
            struct.pack("=3I", 0, 65535, 0),  # rcv_rtt to total_retrans
            struct.pack("=4Q", 10**8, 2**64 - 1, 123_456_789_012, 4711),  # pacing_rate to bytes_received
            struct.pack("=6I", 1, 2, 0, 99_000, 3, 4),  # segs_out to data_segs_out
            struct.pack("=4Q", 10**8, 8_000_000, 3_500_000, 250_000),  # delivery_rate to sndbuf_limited
        )
    )


def test_the_facts_stand_where_the_kernel_puts_them() -> None:
    assert parse_facts(tcp_info() + bytes(64)) == LinkFacts(
        rtt_s=0.101,
        min_rtt_s=0.099,
        delivered_bytes=123_456_789_012,
        busy_s=8.0,
        receiver_limited_s=3.5,
        send_buffer_limited_s=0.25,
    )


def test_what_an_older_kernel_does_not_tell_is_none() -> None:
    facts = parse_facts(tcp_info()[:FIELDS_TO_4_9])
    assert (facts.rtt_s, facts.min_rtt_s, facts.delivered_bytes) == (0.101, 0.099, 123_456_789_012)
    assert facts.busy_s is facts.receiver_limited_s is facts.send_buffer_limited_s is None
    facts = parse_facts(tcp_info()[:FIELDS_TO_4_0])
    assert facts.rtt_s == 0.101
    assert facts.delivered_bytes is None
    assert parse_facts(b"") == NO_FACTS


SILENT_MS = int(CUT_AFTER_S * 1000)


@pytest.mark.parametrize("unanswered", [{"retransmits": 2}, {"probes": 2}])
def test_a_link_is_cut_when_nothing_is_acknowledged_though_it_was_sent_again(unanswered: dict[str, int]) -> None:
    assert shows_cut(tcp_info(last_ack_ms=SILENT_MS, **unanswered))
    assert not shows_cut(tcp_info(last_ack_ms=SILENT_MS - 1, **unanswered))


def test_a_peer_that_answers_probes_but_does_not_read_is_not_cut_off() -> None:
    assert not shows_cut(tcp_info(last_ack_ms=100_000, probes=0))
    assert not shows_cut(tcp_info(last_ack_ms=100_000, probes=1))  # the next probe is on its way


def test_a_kernel_that_tells_nothing_never_shows_a_cut() -> None:
    assert not shows_cut(b"")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        yield near, far


def test_a_real_connection_has_facts_until_it_is_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    near.sendall(bytes(100_000))
    received = 0
    while received < 100_000:
        received += len(far.recv(65536))
    far.sendall(b"x")
    near.recv(1)  # and with it the acknowledgement
    facts = link_facts(near)
    assert facts is not None
    assert facts.rtt_s is not None
    assert 0 < facts.rtt_s < 10
    assert facts.delivered_bytes is not None
    assert facts.delivered_bytes >= 100_000
    assert not link_is_cut(near)
    near.close()
    assert link_facts(near) is None
    assert not link_is_cut(near)


def buffers(sock: socket.socket) -> tuple[int, int]:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF), sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def may_force() -> bool:
    with socket.socket() as sock, suppress(PermissionError):
        sock.setsockopt(socket.SOL_SOCKET, 32, BUFFER_BYTES)  # SO_SNDBUFFORCE
        return True
    return False


@pytest.mark.parametrize("sends_blocks", [True, False])
def test_a_buffer_that_the_kernel_keeps_short_is_raised_where_blocks_pass(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sends_blocks: bool
) -> None:
    near, _ = pair
    (tmp_path / "limits").write_text(f"4096\t16384\t{BUFFER_BYTES - 1}\n")
    monkeypatch.setattr(link, "_SEND_BUFFERS", tmp_path / "limits")
    monkeypatch.setattr(link, "_RECEIVE_BUFFERS", tmp_path / "limits")
    raised = [2 * BUFFER_BYTES if may_force() else size for size in buffers(near)]  # the kernel doubles it, socket(7)
    send, receive = buffers(near)
    link.tune(near, sends_blocks=sends_blocks)
    assert buffers(near) == ((raised[0], receive) if sends_blocks else (send, raised[1]))


def test_a_kernel_that_goes_far_enough_is_left_to_size_buffers_by_need(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = pair
    (tmp_path / "limits").write_text(f"4096\t16384\t{BUFFER_BYTES}\n")
    monkeypatch.setattr(link, "_SEND_BUFFERS", tmp_path / "limits")
    monkeypatch.setattr(link, "_RECEIVE_BUFFERS", tmp_path / "limits")
    before = buffers(near), buffers(far)
    link.tune(near, sends_blocks=True)
    link.tune_listener(far)
    assert (buffers(near), buffers(far)) == before
