"""What both ends of a control connection do with trio: a queue of what to send, a task that sends it, and events in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

import trio

from protocol.connection import Buffer, ControlConnection, Received, Speaker
from protocol.errors import ConnectionLost, LocalMisuse, ProtocolError
from protocol.tls_stream import TlsStream

FAREWELL_S = 2.0
"""How long a Goodbye may take to get out."""


class ControlPipe:
    """A `ControlConnection` on a `TlsStream` whose TLS handshake is through.

    What is to be said is queued in the same breath as the state machine learns of it, so that a task cancelled in
    between cannot leave the two apart; the protocol bounds how much can be queued. `close` must be called in any case:
    it alone ends `write`, which is shielded so that a last word gets out of a task that is being cancelled.
    """

    def __init__(self, stream: TlsStream, us: Speaker, peer: str, silent_after_s: float) -> None:
        self.connection = ControlConnection(us)
        self.last_heard = self.last_said = trio.current_time()
        self._stream = stream
        self._peer = peer
        self._silent_after_s = silent_after_s
        self._queue, self._queued = trio.open_memory_channel[bytes](math.inf)
        self._writing = trio.CancelScope(shield=True)
        self._written = trio.Event()
        self._reading = trio.CancelScope()
        self._read = trio.Event()
        self._read.set()
        self._closing = False

    @property
    def queued_messages(self) -> int:
        """How many messages wait for the peer to read."""
        return self._queued.statistics().current_buffer_used

    def put(self, buffers: Sequence[Buffer]) -> None:
        """Queue what the state machine gave; never waits. Silently dropped when the pipe is closing."""
        self.last_said = trio.current_time()
        with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            self._queue.send_nowait(b"".join(buffers))

    async def write(self) -> None:
        """Send what is queued until the pipe closes. Raises ConnectionLost, PeerViolation."""
        try:
            with self._writing:
                async for data in self._queued:
                    with trio.move_on_after(self._silent_after_s) as patience:
                        await self._stream.send_all(data)
                    if patience.cancelled_caught:
                        raise ConnectionLost(f"{self._peer} read nothing for {self._silent_after_s:g} seconds")
        finally:
            self._queued.close()
            self._written.set()

    async def say(self, buffers: Sequence[Buffer]) -> None:
        """Send at once: for the handshake, before `write` runs. Raises ConnectionLost, PeerViolation."""
        await self._stream.send_all(b"".join(buffers))

    async def next_event(self) -> Received:
        """The next event. Raises ConnectionLost (also when the peer is silent for too long), PeerViolation."""
        while True:
            event = self.connection.next_event()
            if event is not None:
                return event
            data = await self._receive()
            if not data:
                raise self.connection.lost()
            self.last_heard = trio.current_time()
            self.connection.feed(data)

    async def _receive(self) -> bytes:
        if self._closing:
            raise ConnectionLost(f"the connection with {self._peer} was closed on this side")
        self._read = trio.Event()
        try:
            with trio.move_on_after(self._silent_after_s) as self._reading:
                data = await self._stream.receive_some()
        finally:
            self._read.set()
        if not self._reading.cancelled_caught:
            return data
        if self._closing:
            raise ConnectionLost(f"the connection with {self._peer} was closed on this side")
        raise ConnectionLost(f"{self._peer} was silent for {self._silent_after_s:g} seconds")

    async def close(self, code: str, sentence: str) -> None:
        """Say Goodbye if that is still possible, send what is queued, close. Bounded in time whatever the peer does."""
        with trio.CancelScope(shield=True):
            self._closing = True
            self._reading.cancel()
            await self._read.wait()
            try:
                self.put(self.connection.goodbye(code, sentence))
                said = True
            except LocalMisuse:
                said = False  # the peer was first, or broke a rule
            self._queue.close()
            if said:
                with trio.move_on_after(FAREWELL_S):
                    await self._written.wait()
            self._writing.cancel()
            await self._written.wait()
            await self._stream.aclose(politely=said)

    async def refuse(self, code: str, sentence: str) -> None:
        """Say Goodbye before `write` runs, and close. Bounded in time."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(FAREWELL_S), suppress(ProtocolError):
                await self.say(self.connection.goodbye(code, sentence))
            await self._stream.aclose(politely=True)
