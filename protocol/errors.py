"""The errors of the protocol room: local misuse and peer violation are two different things.

Both carry a stable ``code`` and a sentence; foreign exceptions (msgpack, cattrs, ssl) are mapped to
them at the boundary.
"""

from __future__ import annotations


class ProtocolError(Exception):
    """Root of everything this package raises."""

    code = "protocol"

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class LocalMisuse(ProtocolError):
    """Our own code asked the connection for something its state does not allow; nothing was sent."""

    code = "local-misuse"


class PeerViolation(ProtocolError):
    """The peer sent what it must not; the connection is over and says nothing more."""

    code = "peer-violation"


class ConnectionLost(ProtocolError):
    """The connection ended: closed by the peer, reset, cut or timed out."""

    code = "connection-lost"
