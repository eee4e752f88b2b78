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


class PeerEnded(ConnectionLost):
    """The peer said `protocol.messages.Goodbye`; its code and sentence are kept."""

    code = "peer-ended"

    def __init__(self, sentence: str, *, goodbye_code: str) -> None:
        super().__init__(sentence)
        self.goodbye_code = goodbye_code


class RequestFailed(ProtocolError):
    """The agent answered a request with `protocol.messages.Failure`; its code, sentence and facts are kept."""

    def __init__(self, code: str, sentence: str, facts: dict[str, str | int]) -> None:
        super().__init__(sentence)
        self.code = code
        self.facts = facts


class RequestTimedOut(ProtocolError):
    """The agent did not answer in time, was told to cancel, and confirmed that it stopped."""

    code = "request-timed-out"


class TlsFileError(ProtocolError):
    """A certificate, key or CA file is missing, unreadable or not what it should be."""

    code = "tls-file"
