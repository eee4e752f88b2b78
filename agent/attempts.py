"""One disk of a pass, attempt after attempt: where its connections are lost they are made again, and the next attempt
goes on with what is proven.

Only the loss of a connection is worth another attempt. Whatever either side says, a failing disk say, ends the pass.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import structlog
import trio

from agent.arrivals import Arrivals, hang_up
from agent.disk.dirty import DirtyRanges
from agent.disk.seam import Disk
from agent.reconnect import TARGET_WAITS_LONGER_S, Reconnecting
from agent.sync.buffers import BufferPool, Windows
from agent.sync.comparing import ComparingSource, ComparingTarget, comparing_target
from agent.sync.conversation import Conversation, Lane, accompanied
from agent.sync.meter import Meter
from agent.sync.pass_map import PassMap
from agent.sync.proven import Proven
from agent.sync.rate import Limits
from agent.sync.source import SourcePass
from agent.sync.target import TargetPass
from agent.sync.tuning import Tuning
from agent.threads import Threads, cores
from protocol.bulk import BulkSocket
from protocol.errors import ConnectionLost, PeerEnded, PeerViolation
from protocol.lanes import lanes_wanted
from protocol.messages import BulkHello, BulkWelcome, GrantedDisk, PassVerified

log = structlog.get_logger("failback.agent")

Connect = Callable[[GrantedDisk, int, int], tuple[BulkSocket, BulkWelcome]]
"""Opens a connection for one disk with that digest seed and attempt; blocks."""
Arrived = tuple[BulkSocket, BulkHello]


@dataclass
class Sending:
    """One disk of a pass at its source.

    Attributes:
        disk: the view.
        written: what was, since the view that the grant names.
        compares: the pass only compares.
    """

    granted: GrantedDisk
    disk: Disk
    threads: Threads
    buffers: BufferPool
    limits: Limits
    tuning: Tuning
    meter: Meter
    connect: Connect
    retry: Reconnecting
    written: DirtyRanges | None = None
    compares: bool = False

    def __post_init__(self) -> None:
        granted = self.granted.digest_seed
        self._seed = secrets.randbits(64) if granted is None else granted

    async def run(self) -> PassVerified:
        """Carry the disk's pass to its end, over as many connections as it takes.

        Raises:
            AgentError, ProtocolError: it is not complete.
        """
        while True:
            try:
                return await self._attempt()
            except PeerEnded:
                raise
            except ConnectionLost as error:
                if not self.retry.ever_connected:
                    raise
                if not self.meter.reconnecting:
                    self.meter.cut()
                    log.warning("the connections of a disk are lost", disk=self.granted.target, reason=error.sentence)
                await self.retry.pause(error)

    async def _attempt(self) -> PassVerified:
        connections: list[BulkSocket] = []
        talk = Conversation(self.granted.target, self.threads, [], before_bytes=self.meter.wire_bytes)
        try:
            welcomes = [await self._open(connections)]
            first = connections[0]
            self.retry.connected(sum(length for _, length in first.proven))
            self.meter.reconnecting = False
            wanted = lanes_wanted(first.link().rtt_s or 0.0, cores(), welcomes[0].lanes)
            for _ in range(wanted - 1):
                welcomes.append(await self._open(connections))
            if any(other.proven != first.proven for other in connections):
                raise PeerViolation("the target tells different proven ranges on two connections of one disk")
            self.tuning.window_bytes = min(welcome.window_bytes for welcome in welcomes)
            self.meter.lanes = len(connections)
            talk.lanes += [Lane(connection) for connection in connections]
            return await (ComparingSource if self.compares else SourcePass)(
                disk=self.disk,
                size_bytes=self.granted.source_size_bytes,
                talk=talk,
                seed=self._seed,
                ahead_bytes=min(welcome.ahead_bytes for welcome in welcomes),
                buffers=self.buffers,
                limits=self.limits,
                tuning=self.tuning,
                meter=self.meter,
                dirty=self.written,
                proven=first.proven,
            ).run()
        finally:
            self.meter.wire_bytes = talk.wire_bytes
            for connection in connections:
                await hang_up(self.threads, connection)

    async def _open(self, connections: list[BulkSocket]) -> BulkWelcome:
        call = partial(self.connect, self.granted, self._seed, self.retry.attempt)
        connection, welcome = await self.threads.connecting(call, lambda made: made[0].close())
        connections.append(connection)
        return welcome


@dataclass
class Receiving:
    """One disk of a pass at its target.

    Attributes:
        disk: opened for writing; None in an audit, which asks the map alone.
        proven: what is proven to equal the view of the pass, before it and ever since.
        before_first_write: see `TargetPass`.
        deadline_s: how long the source may stay away.
        compares: the pass only compares.
    """

    granted: GrantedDisk
    disk: Disk | None
    digest_map: PassMap | None
    threads: Threads
    windows: Windows
    buffers: BufferPool
    limits: Limits
    meter: Meter
    waiting: trio.MemoryReceiveChannel[Arrived]
    before_first_write: Callable[[], Awaitable[None]]
    proven: Proven = field(default_factory=Proven)
    deadline_s: float = 120.0
    compares: bool = False

    async def run(self, arrived: Arrived) -> None:
        """Carry the disk's pass to its end, from the first connection on.

        Raises:
            AgentError, ProtocolError: it is not complete.
        """
        while True:
            connection, hello = arrived
            arrivals = Arrivals(
                self.threads,
                self.windows,
                self.waiting,
                self.granted.target,
                hello.digest_seed,
                attempt=hello.attempt,
                proven=() if self.compares else self.proven.runs(),
            )
            lost: ConnectionLost | None = None
            try:
                await self._attempt(connection, arrivals)
                return
            except ConnectionLost as error:
                if isinstance(error, PeerEnded):
                    raise
                lost = error
            finally:
                await arrivals.hang_up(goes_on=lost is not None)
            if not self.meter.reconnecting:
                self.meter.cut()
            log.warning("the connections of a disk are lost", disk=self.granted.target, reason=lost.sentence)
            if self.digest_map is not None:
                await self.threads.on_disk(self.digest_map.break_off)
            arrived = arrivals.successor or await self._next(hello, lost)
            if self.disk is not None and not self.compares:
                # What is compared from here on may lie in the page cache alone, and would never be flushed again.
                await self.threads.on_disk(self.disk.flush)

    async def _attempt(self, first: BulkSocket, arrivals: Arrivals) -> None:
        talk = Conversation(self.granted.target, self.threads, [Lane(first)], before_bytes=self.meter.wire_bytes)
        try:
            await arrivals.welcome(first)
            self.meter.reconnecting = False
            target = self._target(talk, arrivals)
            await accompanied(target.run, partial(arrivals.let_join, target))
        finally:
            self.meter.wire_bytes = talk.wire_bytes

    def _target(self, talk: Conversation, arrivals: Arrivals) -> TargetPass | ComparingTarget:
        if self.compares:
            return comparing_target(
                self.disk or self.digest_map,
                self.granted.source_size_bytes,
                talk,
                arrivals.seed,
                buffers=self.buffers,
                limits=self.limits,
                meter=self.meter,
            )
        assert self.disk is not None  # opened, or the pass had not begun
        return TargetPass(
            disk=self.disk,
            source_size_bytes=self.granted.source_size_bytes,
            target_size_bytes=self.granted.target_size_bytes,
            talk=talk,
            seed=arrivals.seed,
            buffers=self.buffers,
            limits=self.limits,
            before_first_write=self.before_first_write,
            meter=self.meter,
            since=self.granted.since,
            digest_map=self.digest_map,
            proven=self.proven,
            resumed=arrivals.proven,
        )

    async def _next(self, last: BulkHello, error: ConnectionLost) -> Arrived:
        """The first connection of the next attempt.

        Raises:
            ConnectionLost: it does not come.
        """
        with trio.move_on_after(self.deadline_s + TARGET_WAITS_LONGER_S):
            while True:
                connection, hello = await self.waiting.receive()
                if hello.attempt > last.attempt and hello.digest_seed == last.digest_seed:
                    return connection, hello
                sentence = f"the disk {self.granted.target} waits for a later attempt with the seed of the first"
                await self.threads.on_network(partial(connection.refuse, "forbidden", sentence))
        raise ConnectionLost(
            f"disk {self.granted.target}: the source agent was lost and did not come back within "
            f"{self.deadline_s + TARGET_WAITS_LONGER_S:g} s ({error.sentence}); mend the network and resume: what is "
            "proven is not sent again"
        ) from error
