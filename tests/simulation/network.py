"""The network of the simulation: links between hosts that delay, stall and are cut, and both kinds of connections.

The bytes are the real ones of `protocol.connection` and `protocol.bulk_connection`; only TLS is left out.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import trio

from protocol.bulk_connection import BulkConnection
from protocol.bulk_ranges import join_ranges, split_ranges
from protocol.connection import Speaker, State
from protocol.errors import ConnectionLost, PeerEnded, ProtocolError
from protocol.link import NO_FACTS, LinkFacts
from protocol.messages import PROTOCOL_VERSIONS, BulkHello, BulkMessage, BulkWelcome, Credit, Goodbye, ProvenRanges
from protocol.software import SOFTWARE
from protocol.tls import PeerIdentity
from tests.simulation.core import NotYet, Process, Signal

IDLE_S = 60.0
LATENCY_S = 0.001


@dataclass(eq=False)
class Link:
    """Between two hosts. `ends`: of the connections that go over it."""

    name: str
    up: bool = True
    stalled: bool = False
    ends: list[End] = field(default_factory=list)

    def cut(self) -> None:
        """Everything that is open breaks, and nothing new comes about until `mend`."""
        self.up = False
        for end in tuple(self.ends):
            end.breaks()

    def mend(self) -> None:
        """It works again; what was stalled arrives."""
        self.up, self.stalled = True, False
        for end in self.ends:
            end.signal.fire()

    def stall(self) -> None:
        """Nothing arrives, and nobody is told."""
        self.stalled = True


class End:
    """One end of a connection: bytes out, bytes in, in order."""

    def __init__(self, link: Link, process: Process) -> None:
        self.link, self.process = link, process
        self.signal = Signal()
        self.inbox: deque[tuple[float, bytes]] = deque()
        self.eof = self.broken = self.closed = False
        self.peer_end: End | None = None
        self._free_at = 0.0
        link.ends.append(self)
        process.holds.append(self)

    def transmit(self, data: bytes) -> None:
        """Send it on its way."""
        if self.broken or self.closed or self.process.dead:
            raise ConnectionLost("the connection is gone")
        peer = self.peer_end
        assert peer is not None
        if peer.closed:
            self.broken = True
            raise ConnectionLost("the peer hung up")
        self._free_at = max(self._free_at, trio.current_time() + LATENCY_S * (1 + self.process.chaos.random.random()))
        peer.inbox.append((self._free_at, data))
        peer.signal.fire()

    def take(self, timeout_s: float) -> bytes:
        """What arrived first; empty at the end. Raises `NotYet`, `ConnectionLost`."""
        if self.closed or self.process.dead:
            raise ConnectionLost("the connection was closed on this side")
        if self.inbox and not self.link.stalled:
            at, data = self.inbox[0]
            wait_s = at - trio.current_time()
            if wait_s > 0:
                raise NotYet(self.signal.event, wait_s)
            self.inbox.popleft()
            return data
        if self.broken:
            raise ConnectionLost("the connection broke")
        if self.eof and not self.link.stalled:
            return b""
        raise NotYet(self.signal.event, timeout_s, on_timeout=lambda: ConnectionLost(f"silent for {timeout_s:g} s"))

    def hang_up(self) -> None:
        """Close this end; what was sent still arrives."""
        if self.closed:
            return
        self.closed = True
        if self.peer_end is not None:
            self.peer_end.eof = True
            self.peer_end.signal.fire()
        self.signal.fire()

    def breaks(self) -> None:
        """The link is cut: what is on its way is lost."""
        self.broken = True
        self.inbox.clear()
        self.signal.fire()

    def owner_died(self) -> None:
        """The kernel closes it."""
        self.hang_up()


def pair(link: Link, one: Process, other: Process) -> tuple[End, End]:
    """Both ends of a new connection."""
    here, there = End(link, one), End(link, other)
    here.peer_end, there.peer_end = there, here
    return here, there


class PlainStream:
    """As `protocol.tls_stream.TlsStream`, without TLS, on an `End` that knows who the peer is."""

    def __init__(self, end: ControlEnd, *_: Any) -> None:
        self._end = end

    async def handshake(self) -> PeerIdentity:
        await trio.lowlevel.checkpoint()
        return self._end.peer

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        await self._end.end.process.awake()
        self._end.end.transmit(bytes(data))

    async def receive_some(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            await self._end.end.process.awake()
            try:
                return self._end.end.take(float("inf"))
            except NotYet as wait:
                with trio.move_on_after(wait.timeout_s):
                    await wait.event.wait()

    async def aclose(self, *, politely: bool) -> None:
        self._end.end.hang_up()
        await trio.lowlevel.checkpoint()


@dataclass(frozen=True)
class ControlEnd:
    """What stands for a TCP connection."""

    end: End
    peer: PeerIdentity

    @property
    def socket(self) -> Any:
        """It has none."""
        raise OSError("no socket")


class BulkEnd:
    """As `protocol.bulk.BulkSocket`, on an `End`; what would block raises `NotYet`."""

    def __init__(self, end: End, us: Speaker, peer: PeerIdentity) -> None:
        self.end, self.peer = end, peer
        self._connection = BulkConnection(us)
        self._failure: ProtocolError | None = None
        self.bytes_sent = self.bytes_received = 0
        self.proven: tuple[tuple[int, int], ...] = ()
        self.waited_for_window_s = self.waited_for_link_s = 0.0

    def send(self, message: BulkMessage, *pieces: Any) -> None:
        """See `BulkSocket.send`."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if self._connection.state is State.OVER:
            raise self._connection.lost()
        if self._connection.must_wait(message, *pieces):
            raise NotYet(self.end.signal.event, IDLE_S, on_timeout=lambda: ConnectionLost("no room was made"))
        data = b"".join(bytes(buffer) for buffer in self._connection.send(message, *pieces))
        self.end.process.point(f"sends {type(message).__name__}")
        try:
            self.end.transmit(data)
        except ConnectionLost as error:
            self._fail(error)
            raise
        self.bytes_sent += len(data)

    def receive(self, timeout_s: float | None = None) -> tuple[BulkMessage, memoryview]:
        """See `BulkSocket.receive`."""
        while True:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            if self._connection.state is State.OVER:
                raise self._connection.lost()
            try:
                data = self.end.take(timeout_s or IDLE_S)
                if not data:
                    raise self._connection.lost()
                self.bytes_received += len(data)
                self._connection.feed(data)
                event = self._connection.next_event()
            except ProtocolError as error:
                self._fail(error)
                raise
            if event is None:
                continue
            if isinstance(event.message, Credit):
                self.end.signal.fire()
                continue
            return cast("BulkMessage", event.message), memoryview(bytes(event.payload))

    def welcome(
        self, *, window_bytes: int, ahead_bytes: int, lanes: int = 1, proven: Sequence[tuple[int, int]] = ()
    ) -> None:
        """See `BulkSocket.welcome`."""
        self.send(
            BulkWelcome(
                version=PROTOCOL_VERSIONS[0],
                software=SOFTWARE,
                window_bytes=window_bytes,
                ahead_bytes=ahead_bytes,
                lanes=lanes,
                proven=len(proven),
            )
        )
        if proven:
            self.send(ProvenRanges(count=len(proven)), join_ranges(proven))

    def refuse(self, code: str, sentence: str) -> None:
        """See `BulkSocket.refuse`."""
        with contextlib.suppress(ProtocolError):
            self.send(Goodbye(code=code, sentence=sentence[:1000]))
        self.close()

    def link(self) -> LinkFacts:
        """No kernel knows it."""
        return NO_FACTS

    def shutdown(self) -> None:
        """See `BulkSocket.shutdown`."""
        self._fail(ConnectionLost("the bulk connection was shut down on this side"))

    def close(self) -> None:
        """See `BulkSocket.close`."""
        self._fail(ConnectionLost("the bulk connection was closed on this side"))
        self.end.hang_up()

    def _fail(self, error: ProtocolError) -> None:
        if self._failure is None:
            self._failure = error
            if self._connection.state is not State.OVER:
                self.end.hang_up()
        self.end.signal.fire()


def call_bulk(
    wire: BulkEnd, grant: str, target: str, digest_seed: int, attempt: int, answer: Callable[[], None]
) -> tuple[BulkEnd, BulkWelcome]:
    """The calling side's part of `protocol.bulk.connect_bulk`, on an end whose other one is about to be accepted."""
    hello = BulkHello(
        versions=PROTOCOL_VERSIONS, software=SOFTWARE, grant=grant, target=target, digest_seed=digest_seed
    )
    wire.send(hello)
    answer()
    return _await_welcome(wire)


def _await_welcome(wire: BulkEnd) -> tuple[BulkEnd, BulkWelcome]:
    try:
        message, _ = wire.receive(180.0)
    except NotYet as wait:
        raise NotYet(
            wait.event, wait.timeout_s, then=partial(_await_welcome, wire), on_timeout=wait.on_timeout
        ) from None
    if isinstance(message, Goodbye):
        wire.close()
        raise PeerEnded(f"refused the bulk connection: {message.sentence}", goodbye_code=message.code)
    assert isinstance(message, BulkWelcome)
    return _await_proven(wire, message) if message.proven else (wire, message)


def _await_proven(wire: BulkEnd, welcome: BulkWelcome) -> tuple[BulkEnd, BulkWelcome]:
    try:
        told, payload = wire.receive(180.0)
    except NotYet as wait:
        again = partial(_await_proven, wire, welcome)
        raise NotYet(wait.event, wait.timeout_s, then=again, on_timeout=wait.on_timeout) from None
    assert isinstance(told, ProvenRanges)
    wire.proven = tuple(zip(*split_ranges([payload], told.count), strict=True))
    return wire, welcome
