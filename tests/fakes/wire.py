"""Two ends of a bulk connection in one process: the real rules and the real bytes of the protocol, without a socket.

Like `protocol.bulk.BulkSocket` it blocks, waits for window, keeps `Credit` to itself, dies of the peer's violations,
and ends every wait with `ConnectionLost` once it is shut down. What crosses is counted as on a real connection.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from protocol.bulk_connection import BulkConnection
from protocol.codec import decode, encode
from protocol.connection import Allocate, Speaker, State
from protocol.errors import ConnectionLost, PeerViolation, ProtocolError
from protocol.framing import frame_prefix
from protocol.limits import MAX_LANES
from protocol.link import NO_FACTS, LinkFacts
from protocol.messages import PROTOCOL_VERSIONS, BlockData, BulkHello, BulkMessage, BulkWelcome, CompareSpan, Credit

_PREFIX_BYTES = 8


@dataclass
class _Way:
    """One direction: whole frames on their way. `held`: not delivered before `FakeWire.deliver`."""

    frames: deque[bytes] = field(default_factory=deque)
    held: deque[bytes] | None = None

    def put(self, frame: bytes) -> None:
        (self.frames if self.held is None else self.held).append(frame)


class _End:
    """What both kinds of ends have: two ways, and one lock for everything."""

    def __init__(self, shared: threading.Condition, out: _Way, into: _Way) -> None:
        self._shared, self._out, self._into = shared, out, into
        self._peer: _End | None = None
        self._down = False
        self.waiting = 0
        self.bytes_sent = 0
        self.bytes_received = 0

    def shutdown(self) -> None:
        """End every wait on both ends; what was sent before still arrives."""
        with self._shared:
            self._down = True
            if self._peer is not None:
                self._peer._down = True
            self._shared.notify_all()

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        self.waiting += 1
        self._shared.wait_for(lambda: self._down or ready())
        self.waiting -= 1

    def _take(self) -> bytes | None:
        """The next frame, or None when none can come any more."""
        self._wait_for(lambda: bool(self._into.frames))
        if not self._into.frames:
            return None
        frame = self._into.frames.popleft()
        self.bytes_received += len(frame)
        return frame

    def _put(self, frame: bytes) -> None:
        self._out.put(frame)
        self.bytes_sent += len(frame)
        self._shared.notify_all()


class FakeWire(_End):
    """One end; `pair` makes both.

    Attributes:
        sent: every message that left this end, with its payload, for counting.
        waiting: calls that wait for the peer now.
    """

    def __init__(self, shared: threading.Condition, out: _Way, into: _Way, connection: BulkConnection) -> None:
        super().__init__(shared, out, into)
        self._connection = connection
        self._failure: ProtocolError | None = None
        self.waited_for_window_s = 0.0
        self.waited_for_link_s = 0.0
        self.sent: list[tuple[BulkMessage, bytes]] = []

    @classmethod
    def pair(
        cls,
        *,
        window_bytes: int = 2 << 20,
        ahead_bytes: int = 1 << 30,
        stepped: bool = False,
        allocate: Allocate | None = None,
    ) -> tuple[FakeWire, FakeWire]:
        """Source end and target end, welcomed. `stepped`: what is sent waits for `deliver`. `allocate`: gives the
        target's buffers."""
        shared = threading.Condition()
        there, back = _Way(held=deque() if stepped else None), _Way(held=deque() if stepped else None)
        calling, listening = _welcomed(window_bytes, ahead_bytes, allocate)
        source, target = cls(shared, there, back, calling), cls(shared, back, there, listening)
        source._peer, target._peer = target, source
        return source, target

    @classmethod
    def with_script(cls, us: Speaker, *, window_bytes: int = 2 << 20) -> tuple[FakeWire, ScriptedEnd]:
        """Our end, welcomed, and the other end for a script that keeps no rules."""
        shared, out, into = threading.Condition(), _Way(), _Way()
        calling, listening = _welcomed(window_bytes, 1 << 30)
        ours = cls(shared, out, into, calling if us is Speaker.CALLER else listening)
        theirs = ScriptedEnd(shared, into, out)
        ours._peer, theirs._peer = theirs, ours
        return ours, theirs

    def send(self, message: BulkMessage, *pieces: bytes | bytearray | memoryview) -> None:
        """Send; data waits for window, questions for room ahead."""
        payload = b"".join(bytes(piece) for piece in pieces)
        with self._shared:
            if isinstance(message, BlockData | CompareSpan):
                self._wait_for(lambda: not self._connection.must_wait(message, payload))
            if self._failure is not None:
                raise self._failure
            if self._down or self._connection.state is State.OVER:
                raise self._connection.lost()
            self._put(b"".join(bytes(buffer) for buffer in self._connection.send(message, payload)))
            self.sent.append((message, payload))

    def receive(self, timeout_s: float | None = None) -> tuple[BulkMessage, memoryview]:
        """The next message that is no credit; silence is never too long."""
        with self._shared:
            while True:
                if self._failure is not None:
                    raise self._failure
                if self._connection.state is State.OVER:
                    raise self._connection.lost()
                frame = self._take()
                if frame is None:
                    raise self._connection.lost()
                self._connection.feed(frame)
                try:
                    event = self._connection.next_event()
                except PeerViolation as error:
                    self._failure = error
                    self.shutdown()
                    raise
                self._shared.notify_all()
                if event is not None and not isinstance(event.message, Credit):
                    return cast("BulkMessage", event.message), event.payload

    def deliver(self) -> int:
        """Of a stepped pair: let everything that this end has sent arrive; returns how many messages that is."""
        with self._shared:
            held = self._out.held
            assert held is not None
            count = len(held)
            self._out.frames.extend(held)
            held.clear()
            self._shared.notify_all()
            return count

    @property
    def arrived(self) -> int:
        """Messages that are there and were not received yet."""
        return len(self._into.frames)

    def link(self) -> LinkFacts:
        """A wire that no kernel knows."""
        return NO_FACTS


class ScriptedEnd(_End):
    """An end that says what a test tells it to, whether it may or not."""

    def say(self, message: BulkMessage, payload: bytes = b"", *, declared_bytes: int | None = None) -> None:
        """Send a message as it is; its frame may declare another length of payload than it has."""
        size = len(payload) if declared_bytes is None else declared_bytes
        with self._shared:
            if self._down:
                raise ConnectionLost("the other end hung up")
            self._put(frame_prefix(encode(message), size) + payload)

    def hear(self) -> tuple[BulkMessage, bytes]:
        """The next message, credit included. Raises `ConnectionLost` when the other end hung up."""
        with self._shared:
            frame = self._take()
        if frame is None:
            raise ConnectionLost("the other end hung up")
        header_bytes = int.from_bytes(frame[:4], "big")
        _, message = decode(frame[_PREFIX_BYTES : _PREFIX_BYTES + header_bytes])
        return cast("BulkMessage", message), frame[_PREFIX_BYTES + header_bytes :]


def _welcomed(
    window_bytes: int, ahead_bytes: int, allocate: Allocate | None = None
) -> tuple[BulkConnection, BulkConnection]:
    """Both ends of a connection behind its handshake."""
    calling, listening = BulkConnection(Speaker.CALLER), BulkConnection(Speaker.LISTENER, allocate)
    hello = BulkHello(versions=PROTOCOL_VERSIONS, software="test", grant="00" * 16, target="vda", digest_seed=0)
    welcome = BulkWelcome(
        version=PROTOCOL_VERSIONS[0],
        software="test",
        window_bytes=window_bytes,
        ahead_bytes=ahead_bytes,
        lanes=MAX_LANES,
    )
    for speaking, message, hearing in ((calling, hello, listening), (listening, welcome, calling)):
        for buffer in speaking.send(message):
            hearing.feed(buffer)
        assert hearing.next_event() is not None
    return calling, listening
