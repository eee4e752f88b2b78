"""A source and a target of a bulk connection, over real TLS on loopback, for tests."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from protocol.bulk import BulkSocket, accept_bulk, connect_bulk
from protocol.messages import (
    BulkHello,
    BulkWelcome,
    EndOfPass,
    PassVerified,
)
from tests.unit.protocol_house import AGENT_NAME, MIB, Certificates

T = TypeVar("T")
DEADLINE_S = 20
VERIFIED = PassVerified(written_bytes=1, zeroed_bytes=0, verified_bytes=1, compared_bytes=1, past_cache=True)
END = EndOfPass(lanes=1, data_bytes=1, zero_bytes=0, compared_bytes=1)


class Threads:
    """Runs calls beside the test; what they return or raise is collected with a deadline."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(8)

    def start(self, call: Callable[[], T]) -> Future[T]:
        """Run it in a thread."""
        return self._pool.submit(call)

    def close(self) -> None:
        """Wait for all."""
        self._pool.shutdown()


@contextmanager
def listening(
    certificates: Certificates,
    threads: Threads,
    *,
    context: ssl.SSLContext | None = None,
    handshake_timeout_s: float = 5,
) -> Iterator[tuple[int, Future[tuple[BulkSocket, BulkHello]]]]:
    """A target agent that accepts one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)

        def accept() -> tuple[BulkSocket, BulkHello]:
            sock, _ = listener.accept()
            return accept_bulk(
                sock,
                context or certificates.agent.server(),
                handshake_timeout_s=handshake_timeout_s,
                idle_timeout_s=DEADLINE_S,
            )

        yield listener.getsockname()[1], threads.start(accept)


def connect(
    port: int,
    certificates: Certificates,
    *,
    context: ssl.SSLContext | None = None,
    server_name: str = AGENT_NAME,
    peer_fingerprint: str | None = None,
    idle_timeout_s: float = DEADLINE_S,
) -> tuple[BulkSocket, BulkWelcome]:
    return connect_bulk(
        "127.0.0.1",
        port,
        server_name=server_name,
        context=context or certificates.other_agent.client(),
        peer_fingerprint=peer_fingerprint or certificates.agent.fingerprint,
        grant="ab" * 16,
        target="vda",
        digest_seed=2**64 - 1,
        connect_timeout_s=5,
        idle_timeout_s=idle_timeout_s,
    )


@contextmanager
def connected(
    certificates: Certificates,
    threads: Threads,
    *,
    window_bytes: int = 4 * MIB,
    ahead_bytes: int = 4 * MIB,
    idle_timeout_s: float = DEADLINE_S,
) -> Iterator[tuple[BulkSocket, BulkSocket]]:
    """A source and a target past the handshake."""
    with ExitStack() as stack, listening(certificates, threads) as (port, accepted):
        connecting = threads.start(lambda: connect(port, certificates, idle_timeout_s=idle_timeout_s))
        target, hello = accepted.result(DEADLINE_S)
        stack.callback(target.close)
        stack.callback(target.shutdown)
        assert (hello.grant, hello.target, hello.digest_seed) == ("ab" * 16, "vda", 2**64 - 1)
        target.welcome(window_bytes=window_bytes, ahead_bytes=ahead_bytes)
        source, welcome = connecting.result(DEADLINE_S)
        stack.callback(source.close)
        stack.callback(source.shutdown)
        assert (welcome.window_bytes, welcome.ahead_bytes) == (window_bytes, ahead_bytes)
        yield source, target
