"""One disk's pass over links that are cut again and again: both sides with their attempts, in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import trio

from agent.attempts import Receiving, Sending
from agent.disk.seam import Disk
from agent.errors import AgentError
from agent.reconnect import Reconnecting
from agent.sync.buffers import BufferPool, Windows
from agent.sync.meter import Meter
from agent.sync.proven import Proven
from agent.sync.rate import Limits
from agent.sync.tuning import Tuning
from agent.threads import Threads
from protocol.bulk import BulkSocket
from protocol.errors import ConnectionLost, ProtocolError
from protocol.messages import (
    PROTOCOL_VERSIONS,
    BulkHello,
    BulkMessage,
    BulkWelcome,
    Credit,
    GrantedDisk,
)
from tests.fakes.wire import FakeWire

DEADLINE_S = 60.0
WINDOW_BYTES = 1 << 20


class CutWire(FakeWire):
    """One end of a link that is cut when so many messages have crossed it, both ways together, credit not counted; what
    is on its way then is lost."""

    link_state: LinkState
    proven: tuple[tuple[int, int], ...] = ()

    def send(self, message: BulkMessage, *pieces: bytes | bytearray | memoryview) -> None:
        """As on any wire, until the link is cut."""
        if not isinstance(message, Credit) and not self.link_state.lets_pass():
            with self._shared:
                self._out.frames.clear()
                self._into.frames.clear()
            self.shutdown()
            raise ConnectionLost("the link was cut")
        super().send(message, *pieces)

    def welcome(self, *, proven: Sequence[tuple[int, int]] = (), **_: int) -> None:
        """The target lets the source in, which waits for it in `CutLinks.connect`."""
        assert isinstance(self._peer, CutWire)
        self._peer.proven = tuple(proven)
        self.link_state.welcomed.set()

    def refuse(self, code: str, _: str) -> None:
        """The source is refused."""
        self.link_state.refused = code
        self.link_state.welcomed.set()
        self.shutdown()

    def close(self) -> None:
        """Nobody uses it any more."""
        self.shutdown()


@dataclass
class LinkState:
    """What both ends of a link share."""

    messages_left: int | None
    welcomed: threading.Event = field(default_factory=threading.Event)
    refused: str = ""
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def lets_pass(self) -> bool:
        """Count one message."""
        with self._turn:
            if self.messages_left is None:
                return True
            self.messages_left -= 1
            return self.messages_left >= 0


@dataclass
class CutLinks:
    """A pass of one disk over links of which each lets only so many messages pass, and the last any number.

    Attributes:
        letting: messages that each attempt's link lets pass.
        told: what each attempt was told to be proven.
        hellos: of the connections that came.
    """

    letting: list[int]
    told: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    hellos: list[BulkHello] = field(default_factory=list)
    before_connect: Callable[[int], None] = lambda attempt: None

    def __post_init__(self) -> None:
        self._send, self.waiting = trio.open_memory_channel[tuple[BulkSocket, BulkHello]](16)

    def connect(self, granted: GrantedDisk, seed: int, attempt: int) -> tuple[BulkSocket, BulkWelcome]:
        """Blocks, in a thread of trio's, until the target lets us in."""
        self.before_connect(attempt)
        near, far = CutWire.pair(window_bytes=WINDOW_BYTES)
        assert isinstance(near, CutWire)
        assert isinstance(far, CutWire)
        left = self.letting[attempt - 1] if attempt <= len(self.letting) else None
        near.link_state = far.link_state = LinkState(left)
        hello = BulkHello(
            versions=PROTOCOL_VERSIONS,
            software="test",
            grant="00",
            target=granted.peer_target,
            digest_seed=seed,
            attempt=attempt,
        )
        self.hellos.append(hello)
        trio.from_thread.run_sync(self._send.send_nowait, (cast("BulkSocket", far), hello))
        assert near.link_state.welcomed.wait(DEADLINE_S)
        if near.link_state.refused:
            raise ConnectionLost("refused")
        self.told.append(near.proven)
        welcome = BulkWelcome(
            version=PROTOCOL_VERSIONS[0], software="test", window_bytes=WINDOW_BYTES, ahead_bytes=1 << 30, lanes=1
        )
        return cast("BulkSocket", near), welcome


@dataclass
class CutRun:
    """How it went."""

    source: Meter
    target: Meter
    failures: list[AgentError | ProtocolError]
    proven: Proven


async def run_cut(
    source: Disk,
    target: Disk,
    links: CutLinks,
    *,
    batch_bytes: int = 1 << 17,
    proven: Proven | None = None,
    since: str | None = None,
    sending: dict[str, Any] | None = None,
    receiving: dict[str, Any] | None = None,
) -> CutRun:
    """Make `target` equal `source` over those links; failures are returned."""
    granted = GrantedDisk(
        target="vda",
        peer_target="vda",
        source_size_bytes=source.size_bytes,
        target_size_bytes=target.size_bytes,
        since=since,
    )
    threads = Threads()
    run = CutRun(Meter.of(granted), Meter.of(granted), [], proven or Proven())

    async def nothing() -> None:
        pass

    sender = Sending(
        granted=granted,
        disk=source,
        threads=threads,
        buffers=BufferPool(4, batch_bytes),
        limits=Limits(),
        tuning=Tuning(),
        meter=run.source,
        connect=links.connect,
        retry=Reconnecting("vda"),
        **(sending or {}),
    )
    receiver = Receiving(
        granted=granted,
        disk=target,
        digest_map=None,
        threads=threads,
        windows=Windows(),
        buffers=BufferPool(4, 4 << 20),
        limits=Limits(),
        meter=run.target,
        waiting=links.waiting,
        before_first_write=nothing,
        proven=run.proven,
        **(receiving or {}),
    )

    async def send() -> None:
        await sender.run()

    async def receive() -> None:
        await receiver.run(await links.waiting.receive())

    async def guarded(side: Callable[[], Any]) -> None:
        try:
            await side()
        except (AgentError, ProtocolError) as error:
            run.failures.append(error)
            nursery.cancel_scope.cancel()

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guarded, receive)
            nursery.start_soon(guarded, send)
    return run
