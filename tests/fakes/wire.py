"""Two ends of a bulk connection in one process: messages pass as values, without a socket.

Like `protocol.bulk.BulkSocket` it blocks, counts the window of `BlockData`, keeps `Credit` to itself, and ends
every wait with `ConnectionLost` once it is shut down.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

from protocol.errors import ConnectionLost
from protocol.link import NO_FACTS, LinkFacts
from protocol.messages import BlockData, BulkMessage, Credit


@dataclass
class _Lane:
    """One direction."""

    messages: deque[tuple[BulkMessage, bytes]] = field(default_factory=deque)
    unacknowledged_bytes: int = 0


class FakeWire:
    """One end; `FakeWire.pair` makes both. `sent` keeps every message that left this end, for counting."""

    def __init__(self, shared: threading.Condition, out: _Lane, into: _Lane, window_bytes: int) -> None:
        self._shared, self._out, self._into = shared, out, into
        self._window_bytes = window_bytes
        self._peer: FakeWire | None = None
        self._down = False
        self.bytes_sent = 0
        self.bytes_received = 0
        self.waited_for_window_s = 0.0
        self.waited_for_link_s = 0.0
        self.sent: list[tuple[BulkMessage, bytes]] = []

    @classmethod
    def pair(cls, *, window_bytes: int = 1 << 20) -> tuple[FakeWire, FakeWire]:
        """Source end and target end."""
        shared, there, back = threading.Condition(), _Lane(), _Lane()
        source, target = cls(shared, there, back, window_bytes), cls(shared, back, there, window_bytes)
        source._peer, target._peer = target, source
        return source, target

    def send(self, message: BulkMessage, *pieces: bytes | bytearray | memoryview) -> None:
        """Send; waits for window."""
        payload = b"".join(bytes(piece) for piece in pieces)
        with self._shared:
            if isinstance(message, BlockData):
                self._shared.wait_for(lambda: self._down or self._fits(len(payload)))
                self._out.unacknowledged_bytes += len(payload)
            if self._down:
                raise ConnectionLost("the connection is down")
            if isinstance(message, Credit):
                self._into.unacknowledged_bytes -= message.payload_bytes
            else:
                self._out.messages.append((message, payload))
            self.sent.append((message, payload))
            self.bytes_sent += len(payload)
            self._shared.notify_all()

    def _fits(self, size_bytes: int) -> bool:
        used = self._out.unacknowledged_bytes
        return used == 0 or used + size_bytes <= self._window_bytes

    def receive(self, timeout_s: float | None = None) -> tuple[BulkMessage, memoryview]:
        """The next message; silence is never too long."""
        with self._shared:
            self._shared.wait_for(lambda: self._down or self._into.messages)
            if not self._into.messages:
                raise ConnectionLost("the connection is down")
            message, payload = self._into.messages.popleft()
            self.bytes_received += len(payload)
            return message, memoryview(payload)

    def link(self) -> LinkFacts:
        """A wire that no kernel knows."""
        return NO_FACTS

    def shutdown(self) -> None:
        """End every wait on both ends; what was sent before still arrives."""
        with self._shared:
            self._down = True
            if self._peer is not None:
                self._peer._down = True
            self._shared.notify_all()
