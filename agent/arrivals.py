"""The connections of one disk of a receiving pass: welcomed with a window each, hung up on at the end."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio

from agent.sync.buffers import Windows
from agent.sync.conversation import Wire
from agent.threads import Threads
from protocol.bulk import BulkSocket
from protocol.errors import ConnectionLost
from protocol.limits import MAX_LANES
from protocol.messages import BulkHello

AHEAD_BYTES = 1 << 30
"""Data that may be asked about ahead of the answers on one connection: never what holds a source back, which has less
memory than that, and a bound for the questions that wait here."""


class Joinable(Protocol):
    """A pass over one disk that is under way."""

    def join(self, wire: Wire) -> None:
        """One more connection of the disk, welcomed already."""


@dataclass
class Arrivals:
    """The connections of one attempt at a disk of a receiving pass: each is welcomed with a window, and hung up on at
    the end.

    Attributes:
        attempt: its number; `proven`: what its source is told of.
        successor: the first connection of a later attempt, which has come meanwhile.
    """

    threads: Threads
    windows: Windows
    waiting: trio.MemoryReceiveChannel[tuple[BulkSocket, BulkHello]]
    target: str
    seed: int
    attempt: int = 1
    proven: tuple[tuple[int, int], ...] = ()
    successor: tuple[BulkSocket, BulkHello] | None = None
    _taken: list[tuple[BulkSocket, int]] = field(default_factory=list)

    async def welcome(self, connection: BulkSocket) -> None:
        """Let it in."""
        window_bytes = self.windows.lease()
        self._taken.append((connection, window_bytes))
        await self.threads.on_network(
            lambda: connection.welcome(
                window_bytes=window_bytes, ahead_bytes=AHEAD_BYTES, lanes=MAX_LANES, proven=self.proven
            )
        )

    async def let_join(self, target: Joinable) -> None:
        """Let further connections of the disk take part in its pass. Where one of a later attempt comes, the source has
        lost the others: they are hung up on."""
        while True:
            connection, hello = await self.waiting.receive()
            if hello.digest_seed == self.seed and hello.attempt > self.attempt:
                self.successor = connection, hello
                for taken, _ in self._taken:
                    taken.shutdown()
                return
            if (hello.digest_seed, hello.attempt) != (self.seed, self.attempt) or len(self._taken) == MAX_LANES:
                sentence = f"the pass of disk {self.target} takes no more connections, or not this one"
                await self.threads.on_network(partial(connection.refuse, "forbidden", sentence))
                continue
            # One that is lost at once is the source's to tell: it has counted it.
            with contextlib.suppress(ConnectionLost):
                await self.welcome(connection)
                target.join(connection)

    async def hang_up(self, *, goes_on: bool = False) -> None:
        """The attempt is over. `goes_on`: the caller takes its successor up, if there is one."""
        for connection, window_bytes in self._taken:
            await hang_up(self.threads, connection)
            self.windows.give_back(window_bytes)
        self._taken.clear()
        if self.successor is not None and not goes_on:
            await hang_up(self.threads, self.successor[0])


async def hang_up(threads: Threads, connection: BulkSocket) -> None:
    """Closing waits a moment for the peer to read our last word: not on the thread that serves everybody."""
    with trio.CancelScope(shield=True):
        await threads.on_network(connection.close)
