"""Bulk connections: a thin driver of blocking calls for worker threads around `protocol.bulk_connection`.

`protocol/SPEC.md` says what is said; here it is put on a TLS socket. Every wait ends with a deadline, or with
`shutdown` from another thread.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from typing import cast

from protocol import limits
from protocol.bulk_connection import BulkConnection
from protocol.bulk_ranges import join_ranges, split_ranges
from protocol.connection import Allocate, Buffer, Received, Speaker, State, agree, no_common_version
from protocol.errors import ConnectionLost, PeerEnded, PeerViolation, ProtocolError
from protocol.link import LinkFacts, tune
from protocol.messages import (
    PROTOCOL_VERSIONS,
    BlockData,
    BulkHello,
    BulkMessage,
    BulkWelcome,
    Credit,
    Goodbye,
    ProvenRanges,
    Role,
)
from protocol.software import SOFTWARE
from protocol.tls import PeerIdentity, explain
from protocol.tls_socket import TlsSocket

IDLE_TIMEOUT_S = 300.0
"""A peer whose kernel answers may take nothing from us for so long: its agent waits for its storage."""

SILENCE_TIMEOUT_S = 30.0
"""Neither side may leave the other without a byte for so long, however busy it is: `Credit` of nothing is a sign of
life of the target, `SpansSettled` said again one of the source; both are given every 5 s."""

HANDSHAKE_TIMEOUT_S = 10.0

WELCOME_TIMEOUT_S = 60.0


class BulkSocket:
    """One bulk connection. One thread may send while another receives; several senders take turns.

    Attributes:
        peer: who the other end's certificate says it is.
        bytes_sent, bytes_received: frames whole, before TLS.
        waited_for_window_s: how long `send` has waited for `Credit`: the peer's agent had not dealt with what it had.
        sending_s: how long `send` took to encrypt and to hand over to the kernel.
        proven: at a source: the ranges (offset, length) that the welcome says equal the view already.
        waited_for_link_s: the part of `sending_s` in which the kernel had no room: the network took no more, or (then
            `LinkFacts.receiver_limited_s` rises too) the peer's kernel.
    """

    def __init__(self, pipe: TlsSocket, peer: PeerIdentity, connection: BulkConnection, idle_timeout_s: float) -> None:
        self.peer = peer
        self.bytes_sent = 0
        self.bytes_received = 0
        self.waited_for_window_s = 0.0
        self.sending_s = 0.0
        self._pipe = pipe
        self._connection = connection
        self._idle_timeout_s = idle_timeout_s
        # Guards the state machine; waited on for room made by the peer, and for another sender's frame to be out.
        self._changed = threading.Condition()
        self._sending = False
        self._owed_bytes = 0  # credit gathered and not sent yet
        self._room = 0  # rises with everything the peer says
        self._failure: ProtocolError | None = None
        self._stopped = ConnectionLost("the bulk connection was shut down on this side")
        self._version = PROTOCOL_VERSIONS[0]
        self.proven: tuple[tuple[int, int], ...] = ()

    def send(self, message: BulkMessage, *pieces: Buffer) -> None:
        """Send a message; `pieces`, end to end, are its payload, and may be used again on return.

        At the source `BlockData` waits for window and `CompareSpan` for room in ``ahead_bytes``, while another thread
        must be receiving. Raises LocalMisuse (nothing was sent), ConnectionLost, PeerEnded (the peer said Goodbye),
        PeerViolation (found by the receiving thread).
        """
        with self._changed:
            if isinstance(message, Credit):
                gathered = self._gather(message)
                if gathered is None:
                    return
                message = gathered
            self._await_turn(message, pieces)
            buffers = self._connection.send(message, *pieces)
            self._sending = True
        count = 0
        began = time.monotonic()
        try:
            count = self._pipe.send_all(buffers, self._idle_timeout_s)
        except ProtocolError as error:
            # Part of the frame may be out; nothing can follow it.
            self._fail(error)
            raise
        finally:
            with self._changed:
                self._sending = False
                self.bytes_sent += count
                self.sending_s += time.monotonic() - began
                self._changed.notify_all()

    def receive(self, timeout_s: float | None = None) -> tuple[BulkMessage, memoryview]:
        """The next message and its payload, which is the caller's to keep.

        `Credit` never comes out: the socket takes it in. The peer's last word (`PassVerified`, `PassFailed`, `Goodbye`)
        comes out as a message; whoever receives again gets ConnectionLost (PeerEnded after a Goodbye).

        Args:
            timeout_s: how long the peer may be silent, instead of `SILENCE_TIMEOUT_S` (or the connection's idle
                time-out, where that is less).
        """
        return self._receive(min(self._idle_timeout_s, SILENCE_TIMEOUT_S) if timeout_s is None else timeout_s, None)

    def welcome(
        self, *, window_bytes: int, ahead_bytes: int, lanes: int = 1, proven: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Target: let the source in, once its grant and `peer.fingerprint` were checked.

        Args:
            window_bytes: `BlockData` payload that may be on its way without `Credit`; 1 MiB to 1 GiB.
            ahead_bytes: bytes of data that may be asked about and not answered; 1 MiB to 1 TiB.
            lanes: how many connections of this disk will be let in, this one included.
            proven: rising ranges (offset, length) that equal the view already.
        """
        welcome = BulkWelcome(
            version=self._version,
            software=SOFTWARE,
            window_bytes=window_bytes,
            ahead_bytes=ahead_bytes,
            lanes=lanes,
            proven=len(proven),
        )
        self.send(welcome)
        if proven:
            self.send(ProvenRanges(count=len(proven)), join_ranges(proven))

    def refuse(self, code: str, sentence: str) -> None:
        """Say Goodbye with that reason, if the connection still takes it, and close."""
        with contextlib.suppress(ProtocolError):
            self.send(Goodbye(code=code, sentence=sentence[:1000]))
        self.close()

    def link(self) -> LinkFacts:
        """What the kernel knows of the link, so far; from any thread, also after `shutdown` and `close`."""
        return self._pipe.link()

    @property
    def waited_for_link_s(self) -> float:
        return self._pipe.waited_for_link_s

    def shutdown(self) -> None:
        """From any thread: every `send` and `receive`, now and later, ends with ConnectionLost at once. Repeatable."""
        self._fail(self._stopped)

    def close(self) -> None:
        """Release the socket, after the threads that use it are through; waits up to 2 seconds for the peer to read
        our last word if we said one. Repeatable."""
        with self._changed:
            last_word_ours = self._connection.state is State.OVER and self._connection.ended_by is self._connection.us
            intact = self._failure in (None, self._stopped)
            self._failure = self._failure or ConnectionLost("the bulk connection was closed on this side")
        self._pipe.close(politely=last_word_ours and intact)

    # --- inside ---

    def _gather(self, credit: Credit) -> Credit | None:
        """Small credits are gathered, for each costs both sides a wake-up: what to send now, if anything.

        Never held back are an eighth of the window, a sign of life (0), and the last that the source could wait for:
        unless what it has left is room for the largest payload there is.
        """
        owed = self._owed_bytes + credit.payload_bytes
        window = self._connection.window_bytes
        spare = window - owed >= limits.BULK.payload_bytes
        if credit.payload_bytes and owed < window // 8 and (spare or owed < self._connection.unacknowledged_bytes):
            self._owed_bytes = owed
            return None
        self._owed_bytes = 0
        return Credit(payload_bytes=owed)

    def _await_turn(self, message: BulkMessage, pieces: tuple[Buffer, ...]) -> None:
        """Wait, holding `_changed`, until no other frame is being sent and the peer has room for this one."""
        now = time.monotonic()
        deadline = now + self._idle_timeout_s
        room = self._room
        while True:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            if self._connection.state is State.OVER:
                raise self._connection.lost()
            if not self._sending and not self._connection.must_wait(message, *pieces):
                return
            if room != self._room:
                deadline, room = now + self._idle_timeout_s, self._room
            for_window = not self._sending and isinstance(message, BlockData)
            in_time = self._changed.wait(deadline - now)
            before, now = now, time.monotonic()
            if for_window:
                self.waited_for_window_s += now - before
            if not in_time:
                raise ConnectionLost(f"the peer made no room for {self._idle_timeout_s:g} seconds")

    def _receive(self, idle_timeout_s: float, deadline: float | None) -> tuple[BulkMessage, memoryview]:
        while True:
            with self._changed:
                if self._failure is not None:
                    raise self._failure.with_traceback(None)
                if self._connection.state is State.OVER:
                    raise self._connection.lost()
                space = self._connection.want()
            try:
                wait_s = idle_timeout_s if deadline is None else max(0.0, deadline - time.monotonic())
                event = self._take(space, self._pipe.receive_into(space, wait_s))
            except ProtocolError as error:
                self._fail(error)
                raise
            if event is not None and not isinstance(event.message, Credit):
                return cast("BulkMessage", event.message), event.payload

    def _take(self, space: memoryview, count: int) -> Received | None:
        """Count what was received into `space`, and wake the senders it makes room for."""
        with self._changed:
            if count == 0:
                raise self._connection.lost()
            self.bytes_received += count
            event = self._connection.filled(count)
            if event is not None:
                self._room += 1
                self._changed.notify_all()
            return event

    def _fail(self, error: ProtocolError) -> None:
        """The first failure stands; every thread that waits on this connection learns of it."""
        with self._changed:
            if self._failure is None:
                self._failure = error
                self._pipe.wake()
            self._changed.notify_all()


def connect_bulk(
    host: str,
    port: int,
    *,
    server_name: str,
    context: ssl.SSLContext,
    peer_fingerprint: str,
    grant: str,
    target: str,
    digest_seed: int,
    attempt: int = 1,
    connect_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    welcome_timeout_s: float = WELCOME_TIMEOUT_S,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
    allocate: Allocate | None = None,
) -> tuple[BulkSocket, BulkWelcome]:
    """Source: connect to a target agent and be welcomed.

    Args:
        host, port: where to connect to; `server_name`: the DNS name its certificate must carry.
        peer_fingerprint: SHA-256 (hex) of the only certificate the target may show.
        grant, target: which grant, which of its disks (named as the target names it).
        digest_seed: of the xxh3-128 digests of this pass; random, 64 bits.
        attempt: rises with each time that the disk's connections were lost.
        connect_timeout_s: for TCP and TLS together.
        welcome_timeout_s: from then on until the target agent, whose own part of the pass may begin later, lets us in.
        allocate: gives the buffer for a payload of so many bytes.

    Raises ConnectionLost (PeerEnded with the target's reason when it refuses), PeerViolation.
    """
    deadline = time.monotonic() + connect_timeout_s
    peer = f"{server_name} ({host} port {port})"
    try:
        plain = socket.create_connection((host, port), timeout=connect_timeout_s)
    except OSError as error:
        raise explain(error, peer) from error
    bulk = _shake_hands(plain, context, peer, deadline, Speaker.CALLER, idle_timeout_s, allocate, server_name)
    try:
        if bulk.peer.role is not Role.AGENT:
            raise PeerViolation(f"the certificate of {peer} is not an agent's")
        if bulk.peer.fingerprint != peer_fingerprint:
            raise PeerViolation(f"{peer} shows a certificate other than the one it was announced with")
        hello = BulkHello(
            versions=PROTOCOL_VERSIONS,
            software=SOFTWARE,
            grant=grant,
            target=target,
            digest_seed=digest_seed,
            attempt=attempt,
        )
        bulk.send(hello)
        message, _ = bulk._receive(idle_timeout_s, time.monotonic() + welcome_timeout_s)
        if isinstance(message, Goodbye):
            raise PeerEnded(f"{peer} refused the bulk connection: {message.sentence}", goodbye_code=message.code)
        assert isinstance(message, BulkWelcome), message  # the table allows nothing else
        if message.proven:
            told, payload = bulk._receive(idle_timeout_s, time.monotonic() + welcome_timeout_s)
            if not isinstance(told, ProvenRanges):
                raise PeerViolation(f"{peer} announced {message.proven} proven ranges and said {type(told).__name__}")
            bulk.proven = tuple(zip(*split_ranges([payload], told.count), strict=True))
    except ProtocolError:
        bulk.close()
        raise
    return bulk, message


def accept_bulk(
    sock: socket.socket,
    context: ssl.SSLContext,
    *,
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
    allocate: Allocate | None = None,
) -> tuple[BulkSocket, BulkHello]:
    """Target: TLS handshake and `BulkHello` on a TCP connection just accepted; `welcome` or `refuse` comes next.

    Takes `sock` over: it is closed when this raises. The caller checks the grant against `BulkSocket.peer`. Blocks for
    `handshake_timeout_s` at most (and `tls_socket.LINGER_S` more when it refuses). Raises ConnectionLost (PeerEnded
    after a Goodbye), PeerViolation.
    """
    deadline = time.monotonic() + handshake_timeout_s
    peer = _address(sock)
    bulk = _shake_hands(sock, context, peer, deadline, Speaker.LISTENER, idle_timeout_s, allocate, None)
    try:
        if bulk.peer.role is not Role.AGENT:
            bulk.refuse("forbidden", "only an agent's certificate opens a bulk connection")
            raise PeerViolation(f"the certificate of {peer} is not an agent's")
        hello, _ = bulk._receive(idle_timeout_s, deadline)
        if isinstance(hello, Goodbye):
            raise PeerEnded(hello.sentence, goodbye_code=hello.code)
        assert isinstance(hello, BulkHello), hello  # the table allows nothing else
        version = agree(hello.versions)
        if version is None:
            sentence = no_common_version(hello.versions, "this agent")
            bulk.refuse("version", sentence)
            raise ConnectionLost(f"{peer} cannot be spoken with: {sentence}")
    except ProtocolError:
        bulk.close()
        raise
    bulk._version = version
    return bulk, hello


def _address(sock: socket.socket) -> str:
    try:
        return f"the peer at {sock.getpeername()[0]}"
    except OSError:
        return "the peer"


def _shake_hands(
    plain: socket.socket,
    context: ssl.SSLContext,
    peer: str,
    deadline: float,
    us: Speaker,
    idle_timeout_s: float,
    allocate: Allocate | None,
    server_name: str | None,
) -> BulkSocket:
    """TLS on a TCP connection, with another agent. Closes it when that fails."""
    try:
        tune(plain, sends_blocks=us is Speaker.CALLER)
        pipe = TlsSocket(plain, context, peer, server_name)
    except (OSError, ValueError) as error:
        plain.close()
        raise explain(error, peer) from error
    identity = pipe.handshake(deadline)
    return BulkSocket(pipe, identity, BulkConnection(us, allocate), idle_timeout_s)
