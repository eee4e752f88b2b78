"""The link under a bulk connection: what we ask of the kernel, and what it tells us in return.

What it tells is ``struct tcp_info`` of ``linux/tcp.h``. That only ever grew at its end, so an older kernel gives a
shorter one; comments beside the offsets name the kernel that added what.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

CUT_AFTER_S = 20.0
"""After so long without any acknowledgement, though something was sent again and again, the link counts as cut: with
the time between two looks at it, within half a minute. A pass then makes its connections anew and goes on with what is
proven, so that a link that recovers later has lost little.

The kernel's own way would be ``TCP_USER_TIMEOUT``, but that also ends a connection whose peer answers every probe and
merely does not read (``tcp_probe_timer`` in ``net/ipv4/tcp_timer.c``; tried on Linux 6.18): a target that waits for its
disk is slow, not gone."""

UNANSWERED = 2
"""Retransmissions or probes in a row that got no answer: one may be lost on a good link."""

BUFFER_BYTES = 16 * 1024 * 1024
"""Send buffer at the source, receive buffer at the target: 1 Gbit/s over a round trip of 100 ms needs 12.5 MB on its
way. The kernel sizes buffers by need, which is better than any fixed size, but only up to ``tcp_wmem`` and ``tcp_rmem``
(4 MB and 6 MB by default): measured over such a link, one connection moved 226 Mbit/s as it was, 478 with this send
buffer, 660 with this receive buffer as well, 996 when the listening socket had it before the connection came."""

UNSENT_BYTES = 4 * 1024 * 1024
"""How much may wait in the kernel that the link cannot take yet: as much as its own send buffer would hold. Without it
a slow link would fill all of `BUFFER_BYTES` (which the kernel doubles), and a digest or a last word would wait behind
that: 2.7 s at 100 Mbit/s. Measured on loopback: 1 MiB costs a fifth of the throughput in waits, 4 MiB nothing."""

_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
"""A link that died without a word is noticed within half a minute also when there was nothing to acknowledge."""

_SEND_BUFFERS, _RECEIVE_BUFFERS = Path("/proc/sys/net/ipv4/tcp_wmem"), Path("/proc/sys/net/ipv4/tcp_rmem")
"""Smallest, first and largest buffer that the kernel gives a connection by itself (tcp(7))."""

_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h; the socket module does not name them

_INFO_BYTES = 512  # more than any kernel's struct tcp_info so far (256 in Linux 6.18)
_RETRANSMITS = 2  # tcpi_retransmits: how often the oldest segment was sent again
_PROBES = 3  # tcpi_probes: of a closed window or an idle connection, and not answered
_LAST_ACK = 56  # tcpi_last_ack_recv, ms ago
_RTT = 68  # tcpi_rtt, µs
_BYTES_ACKED = 120  # tcpi_bytes_acked; Linux 4.1
_MIN_RTT = 148  # tcpi_min_rtt, µs; Linux 4.6
_BUSY = 168  # tcpi_busy_time, µs; Linux 4.10
_RECEIVER_LIMITED = 176  # tcpi_rwnd_limited, µs; Linux 4.10
_SEND_BUFFER_LIMITED = 184  # tcpi_sndbuf_limited, µs; Linux 4.10
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFacts:
    """What a TCP connection has done so far, as its sending side sees it. None: this kernel does not say.

    The three times are of the kernel's sender and follow one another: a connection that is busy all the time without
    being held up by receiver or send buffer uses what the network gives.

    Attributes:
        rtt_s: smoothed round trip time to the peer's kernel; its agent's own delays are not in it.
        min_rtt_s: the least seen lately; `rtt_s` above it is time spent in queues, ours or the network's.
        delivered_bytes: acknowledged by the peer's kernel, TLS included.
        busy_s: how long something was on its way, or waited to be.
        receiver_limited_s: the part of it in which the peer's kernel had no room: its agent reads too slowly, or the
            receive buffer is too small for the round trip.
        send_buffer_limited_s: the part of it in which our send buffer was too small for the round trip.
    """

    rtt_s: float | None
    min_rtt_s: float | None
    delivered_bytes: int | None
    busy_s: float | None
    receiver_limited_s: float | None
    send_buffer_limited_s: float | None


NO_FACTS = LinkFacts(
    rtt_s=None,
    min_rtt_s=None,
    delivered_bytes=None,
    busy_s=None,
    receiver_limited_s=None,
    send_buffer_limited_s=None,
)


class HasOptions(Protocol):
    """A socket of whatever library."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """setsockopt(2)."""


def tune_listener(sock: HasOptions) -> None:
    """Before `listen`: bulk connections that come in get a receive window for long round trips.

    How far a window can open is settled when the connection begins, so a buffer given later helps only in part.
    """
    _widen(sock, _SO_RCVBUFFORCE, _RECEIVE_BUFFERS)


def tune(sock: socket.socket, *, sends_blocks: bool) -> None:
    """Prepare the socket of a bulk connection, at its source or (else) at its target. Raises OSError.

    Small answers leave at once, a dead link is noticed, a long one can be filled.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    if sends_blocks:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        _widen(sock, _SO_SNDBUFFORCE, _SEND_BUFFERS)
    else:
        _widen(sock, _SO_RCVBUFFORCE, _RECEIVE_BUFFERS)


def link_facts(sock: socket.socket) -> LinkFacts | None:
    """What the kernel tells of that connection; None when it tells nothing any more."""
    info = _tcp_info(sock)
    return None if info is None else parse_facts(info)


def link_is_cut(sock: socket.socket) -> bool:
    """True when the other end has not acknowledged anything for `CUT_AFTER_S` though it was asked to."""
    info = _tcp_info(sock)
    return info is not None and shows_cut(info)


def parse_facts(info: bytes) -> LinkFacts:
    """The facts in a ``struct tcp_info``, as much as there is of it."""
    return LinkFacts(
        rtt_s=_seconds(_U32, info, _RTT),
        min_rtt_s=_seconds(_U32, info, _MIN_RTT),
        delivered_bytes=_number(_U64, info, _BYTES_ACKED),
        busy_s=_seconds(_U64, info, _BUSY),
        receiver_limited_s=_seconds(_U64, info, _RECEIVER_LIMITED),
        send_buffer_limited_s=_seconds(_U64, info, _SEND_BUFFER_LIMITED),
    )


def shows_cut(info: bytes) -> bool:
    """Whether a ``struct tcp_info`` is that of a connection over a link that is cut.

    A peer that does not read closes its window but answers the probes of it, which sets their number back to 0.
    """
    silent_ms = _number(_U32, info, _LAST_ACK)
    if silent_ms is None or silent_ms < 1000 * CUT_AFTER_S:
        return False
    return info[_RETRANSMITS] >= UNANSWERED or info[_PROBES] >= UNANSWERED


def _tcp_info(sock: socket.socket) -> bytes | None:
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except OSError:
        return None


def _number(kind: struct.Struct, info: bytes, offset: int) -> int | None:
    if len(info) < offset + kind.size:
        return None
    number: int = kind.unpack_from(info, offset)[0]
    return number


def _seconds(kind: struct.Struct, info: bytes, offset: int) -> float | None:
    microseconds = _number(kind, info, offset)
    return None if microseconds is None else microseconds / 1e6


def _widen(sock: HasOptions, option: int, limits: Path) -> None:
    """Give the socket `BUFFER_BYTES`, unless the kernel would go as far by itself.

    Only with CAP_NET_ADMIN, as the agent has it. The options without FORCE are capped at ``net.core.wmem_max`` and
    ``rmem_max`` (208 KiB by default) and would also end the sizing by need: without the right, hands off.
    """
    try:
        kernel_goes_to = int(limits.read_text("ascii").split()[2])
    except (OSError, ValueError, IndexError):
        kernel_goes_to = 0
    if kernel_goes_to < BUFFER_BYTES:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
