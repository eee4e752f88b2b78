"""Grants and passes of this agent: who may do what over a bulk connection, and the doing of it.

A grant names one pass: run, epoch, peer, VM, disks, direction. Only a bulk connection that shows the granted
certificate and names a granted disk, once, is let in; everything else is closed with a reason.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from agent.disk.seam import Disk
from agent.errors import AgentError, Forbidden, SyncError
from agent.sync.conversation import Conversation
from agent.sync.meter import Meter
from agent.sync.source import SourcePass
from agent.sync.target import TargetPass
from agent.threads import Threads
from protocol.bulk import BulkSocket
from protocol.errors import PeerViolation
from protocol.messages import (
    BulkHello,
    Direction,
    DiskReport,
    Grant,
    GrantedDisk,
    Order,
    PassProgress,
)

WINDOW_BYTES = 32 << 20
"""Block data that may be unacknowledged on one connection: fills a 25 Gbit/s link over 10 ms."""
AHEAD_BYTES = 512 << 20
"""Disk that may be asked for ahead of the answers: at 100 ms round trip, enough for 5 GB/s."""
BATCH_BYTES = 8 << 20
"""Data of one batch: large requests for storage, few thread hops, four buffers of it for each disk."""
PROGRESS_EVERY_S = 0.5
ARRIVAL_TIMEOUT_S = 120.0
"""How long a receiving pass waits for the source agent to open its disks and connect."""

Progress = Callable[[PassProgress], Awaitable[None]]


@dataclass(eq=False)
class Session:
    """One granted pass on this agent."""

    order: Order
    grant: Grant
    arrivals: dict[str, trio.MemorySendChannel[tuple[BulkSocket, BulkHello]]] = field(default_factory=dict)
    waiting: dict[str, trio.MemoryReceiveChannel[tuple[BulkSocket, BulkHello]]] = field(default_factory=dict)
    scope: trio.CancelScope | None = None
    ended: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        if self.grant.direction is Direction.RECEIVE:
            for disk in self.grant.disks:
                self.arrivals[disk.target], self.waiting[disk.target] = trio.open_memory_channel(1)

    def close(self) -> None:
        """Hang up on connections that came and were never taken."""
        for channel in self.waiting.values():
            try:
                channel.receive_nowait()[0].close()
            except (trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                continue
            finally:
                channel.close()


@dataclass
class PassDesk:
    """All grants of this agent, one for each pair at a time."""

    threads: Threads
    _sessions: dict[str, Session] = field(default_factory=dict)

    async def allow(self, order: Order, grant: Grant) -> None:
        """Store the grant in place of the pair's former one, whose pass (if it runs) is ended first."""
        await self.end(order.pair)
        self._sessions[order.pair] = Session(order, grant)

    async def end(self, pair: str) -> None:
        """End the pair's pass and forget its grant; returns when nothing of it runs any more."""
        session = self._sessions.pop(pair, None)
        if session is None:
            return
        if session.scope is not None:
            session.scope.cancel()
            await session.ended.wait()
        session.close()

    def session(self, order: Order, grant_id: str) -> Session:
        """The session of that grant.

        Raises:
            Forbidden: there is none under that order, or its pass ran already.
        """
        session = self._sessions.get(order.pair)
        if session is None or not secrets.compare_digest(session.grant.grant, grant_id) or session.order != order:
            raise Forbidden(f"no pass of the pair {order.pair} is granted under that number: grant it first")
        if session.scope is not None:
            raise Forbidden(f"the granted pass of the pair {order.pair} ran already: grant a new one")
        return session

    # --- arriving connections ---------------------------------------------------------------------------------------

    async def arrive(self, connection: BulkSocket, hello: BulkHello) -> None:
        """Hand a fresh bulk connection to the pass it was granted for, or refuse it."""
        for session in self._sessions.values():
            channel = session.arrivals.get(hello.target)
            if channel is None or not secrets.compare_digest(session.grant.grant, hello.grant):
                continue
            if connection.peer.fingerprint != session.grant.peer_fingerprint:
                break
            try:
                channel.send_nowait((connection, hello))
            except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                break
            channel.close()  # one connection for each granted disk
            return
        sentence = "no pass is granted to this certificate for that disk and number, or it was used already"
        await self.threads.on_network(lambda: connection.refuse("forbidden", sentence))

    # --- running ----------------------------------------------------------------------------------------------------

    async def receive(
        self,
        session: Session,
        disks: dict[str, Disk],
        before_first_write: Callable[[], Awaitable[None]],
        progress: Progress,
    ) -> tuple[DiskReport, ...]:
        """Carry out a granted RECEIVE pass on opened targets, by target name."""

        async def one(granted: GrantedDisk, meter: Meter) -> None:
            with trio.move_on_after(ARRIVAL_TIMEOUT_S) as patience:
                connection, hello = await session.waiting[granted.target].receive()
            if patience.cancelled_caught:
                raise SyncError(
                    f"the source agent did not connect for disk {granted.target} within {ARRIVAL_TIMEOUT_S:.0f} s: "
                    "check that it reaches this host's bulk port"
                )
            try:
                await self.threads.on_network(
                    lambda: connection.welcome(window_bytes=WINDOW_BYTES, ahead_bytes=AHEAD_BYTES)
                )
                await TargetPass(
                    disk=disks[granted.target],
                    source_size_bytes=granted.source_size_bytes,
                    target_size_bytes=granted.target_size_bytes,
                    talk=Conversation(granted.target, connection, self.threads),
                    seed=hello.digest_seed,
                    ahead_bytes=AHEAD_BYTES,
                    before_first_write=before_first_write,
                    meter=meter,
                ).run()
            finally:
                connection.close()

        return await self._all(session, one, progress)

    async def send(
        self,
        session: Session,
        disks: dict[str, Disk],
        connect: Callable[[GrantedDisk, int], tuple[BulkSocket, int]],
        progress: Progress,
    ) -> tuple[DiskReport, ...]:
        """Carry out a granted SEND pass from opened views. `connect` (blocking) opens the connection for one disk with
        that digest seed and returns it with the `ahead_bytes` its welcome granted."""

        async def one(granted: GrantedDisk, meter: Meter) -> None:
            seed = secrets.randbits(64)
            connection, ahead_bytes = await self.threads.on_network(lambda: connect(granted, seed))
            try:
                verified = await SourcePass(
                    disk=disks[granted.target],
                    size_bytes=granted.source_size_bytes,
                    talk=Conversation(granted.target, connection, self.threads),
                    seed=seed,
                    ahead_bytes=ahead_bytes,
                    batch_bytes=BATCH_BYTES,
                    meter=meter,
                ).run()
            finally:
                connection.close()
            if verified.verified_bytes < meter.changed_bytes:
                raise PeerViolation(
                    f"the target verified {verified.verified_bytes} bytes of disk {granted.target} "
                    f"after {meter.changed_bytes} were sent"
                )
            meter.verified_bytes = verified.verified_bytes
            meter.written_bytes, meter.zeroed_bytes = verified.written_bytes, verified.zeroed_bytes
            meter.past_cache = verified.past_cache

        return await self._all(session, one, progress)

    async def _all(
        self,
        session: Session,
        one: Callable[[GrantedDisk, Meter], Awaitable[None]],
        progress: Progress,
    ) -> tuple[DiskReport, ...]:
        """All disks side by side; the first failure ends the others and is what is raised."""
        meters = {disk.target: Meter(disk.target, disk.source_size_bytes) for disk in session.grant.disks}
        failures: list[Exception] = []

        async def guarded(granted: GrantedDisk) -> None:
            try:
                await one(granted, meters[granted.target])
            except Exception as error:  # noqa: BLE001 - kept whole and raised below, once every disk has ended
                failures.append(error)
                scope.cancel()

        async def tell() -> None:
            while True:
                await trio.sleep(PROGRESS_EVERY_S)
                await progress(PassProgress(disks=tuple(meter.progress() for meter in meters.values())))

        try:
            with trio.CancelScope() as scope:
                session.scope = scope
                async with trio.open_nursery() as outer:
                    outer.start_soon(tell)
                    async with trio.open_nursery() as nursery:
                        for granted in session.grant.disks:
                            nursery.start_soon(guarded, granted)
                    outer.cancel_scope.cancel()
        finally:
            session.ended.set()
        if failures:
            raise failures[0]
        if scope.cancelled_caught:
            raise PassEnded(f"the pass of the pair {session.order.pair} was ended by a newer order")
        return tuple(meter.report() for meter in meters.values())


class PassEnded(AgentError):
    """The pass was ended from outside before it was complete."""

    code = "cancelled"
