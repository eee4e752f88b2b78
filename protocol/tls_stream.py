"""TLS over a trio TCP stream, for control connections: one task reads, others write.

``trio.SSLStream`` would do but for one thing: when it refuses a peer's certificate it drops the alert that says so, and
the peer learns only that the connection ended. Here whatever TLS wants to say is sent, also in failure.
"""

from __future__ import annotations

import ssl
from contextlib import suppress

import trio

from protocol.tls import PeerIdentity, explain, peer_identity

CHUNK_BYTES = 64 * 1024
LINGER_S = 2.0
"""How long a polite close waits for the peer to have read our last word."""


class TlsStream:
    """Takes a TCP stream over.

    Args:
        tcp: the stream.
        context: from `protocol.tls`.
        peer: how error sentences call the other end.
        server_name: the DNS name its certificate must carry, when we connected; None when we listen.
    """

    def __init__(self, tcp: trio.SocketStream, context: ssl.SSLContext, peer: str, server_name: str | None) -> None:
        self._tcp = tcp
        self._peer = peer
        self._received = ssl.MemoryBIO()
        self._to_send = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._received, self._to_send, server_side=server_name is None, server_hostname=server_name
        )
        self._flushing = trio.Lock()

    async def handshake(self) -> PeerIdentity:
        """Shake hands; returns who the peer is. Raises ConnectionLost, PeerViolation."""
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await self._flush()
                    await self._fill()
            await self._flush()
            return peer_identity(self._tls)
        except (ssl.SSLError, trio.BrokenResourceError) as error:
            await self._flush_alert()
            raise explain(error, self._peer) from error

    async def send_all(self, data: bytes) -> None:
        """Send; a cancelled send leaves the stream of no use. Raises ConnectionLost, PeerViolation."""
        try:
            self._tls.write(data)
            await self._flush()
        except (ssl.SSLError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise explain(error, self._peer) from error

    async def receive_some(self) -> bytes:
        """At least one byte, or nothing when the peer closed. Raises ConnectionLost, PeerViolation."""
        try:
            while True:
                try:
                    return self._tls.read(CHUNK_BYTES)
                except ssl.SSLWantReadError:
                    await self._flush()
                    await self._fill()
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""
        except (ssl.SSLError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            await self._flush_alert()
            raise explain(error, self._peer) from error

    async def aclose(self, *, politely: bool) -> None:
        """Close at once, or politely: closing a socket that holds unread bytes resets the connection, which may
        overtake our last word, so wait (`LINGER_S` at most) until the peer has closed too."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            if politely:
                with trio.move_on_after(LINGER_S):
                    await self._tcp.send_eof()
                    while await self._tcp.receive_some(CHUNK_BYTES):
                        pass
        await trio.aclose_forcefully(self._tcp)

    async def _flush(self) -> None:
        async with self._flushing:
            if data := self._to_send.read():
                await self._tcp.send_all(data)

    async def _flush_alert(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError), trio.move_on_after(LINGER_S):
            await self._flush()

    async def _fill(self) -> None:
        data = await self._tcp.receive_some(CHUNK_BYTES)
        if data:
            self._received.write(data)
        else:
            self._received.write_eof()
