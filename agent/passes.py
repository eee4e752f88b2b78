"""Grants and passes of this agent: who may do what over a bulk connection, and the doing of it.

A grant names one pass: run, epoch, peer, VM, disks, direction. Only a bulk connection that shows the granted
certificate and names a granted disk, once, is let in; everything else is closed with a reason.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import trio

from agent.attempts import Connect, Receiving, Sending
from agent.disk.dirty import DirtyRanges
from agent.disk.seam import Disk
from agent.errors import AgentError, Forbidden, SyncError
from agent.reconnect import DEADLINE_S, Reconnecting
from agent.sync.buffers import TARGET_BUFFER_BYTES, TARGET_BUFFERS, BufferPool, Windows
from agent.sync.comparing import comparing_tuning
from agent.sync.conversation import accompanied, side_by_side
from agent.sync.meter import Meter
from agent.sync.pass_map import PassMap
from agent.sync.proven import Proven
from agent.sync.rate import Limits
from agent.sync.tuning import Tunings
from agent.threads import Threads
from protocol.bulk import BulkSocket
from protocol.errors import PeerViolation
from protocol.limits import MAX_LANES
from protocol.messages import (
    BulkHello,
    Direction,
    DiskReport,
    Grant,
    GrantedDisk,
    Order,
    PassKind,
    PassProgress,
    PassVerified,
)

DISKS_AT_ONCE = 8
"""Disks of this host that are sent side by side, the rest in their turn: they share the batch buffers, and more of them
would only take turns at those."""
PROGRESS_EVERY_S = 0.5
ARRIVAL_TIMEOUT_S = 120.0
"""How long a receiving pass waits for the source agent to connect when it works on no disk."""

Progress = Callable[[PassProgress], Awaitable[None]]


@dataclass(eq=False)
class Session:
    """One granted pass on this agent.

    Attributes:
        claimed: somebody runs the pass, or ran it: a grant is good for one.
        scope: cancelling it ends the pass, also one that is only about to begin.
        ended: nothing of the claimed pass runs any more.
        working: disks whose connection has arrived and that are not through.
        idle_since: when the last of those ended, in trio's time.
        limits: how fast this agent may send and read, all disks of the pass together.
        limits_changed: they were set by an order of their own (`PassDesk.limit`), which stands.
    """

    order: Order
    grant: Grant
    arrivals: dict[str, trio.MemorySendChannel[tuple[BulkSocket, BulkHello]]] = field(default_factory=dict)
    waiting: dict[str, trio.MemoryReceiveChannel[tuple[BulkSocket, BulkHello]]] = field(default_factory=dict)
    claimed: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    working: int = 0
    idle_since: float = 0.0
    limits: Limits = field(default_factory=Limits)
    limits_changed: bool = False

    def __post_init__(self) -> None:
        if self.grant.direction is Direction.RECEIVE:
            for disk in self.grant.disks:
                self.arrivals[disk.target], self.waiting[disk.target] = trio.open_memory_channel(MAX_LANES)

    @property
    def seeds(self) -> dict[str, int | None]:
        """The seed that each disk's digests were granted with, None where the source chooses."""
        return {disk.target: disk.digest_seed for disk in self.grant.disks}

    def close(self) -> None:
        """Hang up on connections that came and were never taken."""
        for channel in self.waiting.values():
            with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                while True:
                    channel.receive_nowait()[0].close()
            channel.close()


@dataclass
class PassDesk:
    """All grants of this agent, one for each pair at a time. `is_current`: whether an order's epoch is still the
    highest seen for its pair."""

    threads: Threads
    is_current: Callable[[Order], bool] = lambda _: True
    buffers: BufferPool = field(default_factory=BufferPool)
    scratch: BufferPool = field(default_factory=lambda: BufferPool(TARGET_BUFFERS, TARGET_BUFFER_BYTES))
    windows: Windows = field(default_factory=Windows)
    tunings: Tunings = field(default_factory=Tunings)
    reconnect_deadline_s: float = DEADLINE_S
    _sessions: dict[str, Session] = field(default_factory=dict)
    _at_once: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(DISKS_AT_ONCE))

    async def allow(self, order: Order, grant: Grant) -> None:
        """Store the grant in place of the pair's former one, whose pass (if it runs) is ended first."""
        await self.end(order.pair)
        self._sessions[order.pair] = Session(order, grant)

    async def end(self, pair: str) -> None:
        """End the pair's pass and forget its grant; returns when nothing of it runs any more.

        Cancelled itself, it leaves the session where the next order finds it and waits for it again.
        """
        session = self._sessions.get(pair)
        if session is None:
            return
        session.scope.cancel()
        if session.claimed:
            await session.ended.wait()
        self._forget(session)

    async def end_all(self) -> None:
        """End every pass."""
        for pair in tuple(self._sessions):
            await self.end(pair)

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Every grant that is stored or carried out."""
        return tuple(self._sessions.values())

    def is_granted(self, pair: str) -> bool:
        """Whether a pass of the pair runs here, or may begin."""
        return pair in self._sessions

    def is_running(self, pair: str) -> bool:
        """Whether a pass of the pair runs here."""
        session = self._sessions.get(pair)
        return session is not None and session.claimed

    def is_writing(self, pair: str) -> bool:
        """Whether one does that may write; one that only compares does not."""
        session = self._sessions.get(pair)
        return session is not None and session.claimed and session.grant.kind is PassKind.SYNC

    def limit(self, pair: str, network_bytes_per_s: int | None, read_bytes_per_s: int | None) -> None:
        """Other limits for the pair's pass, from now on; harmless when there is none.

        The pass may be granted and not begun: the order to run it can be overtaken by this newer one.

        Raises:
            BadLimit: a limit of nothing; neither is changed.
        """
        session = self._sessions.get(pair)
        set_limits(Limits() if session is None else session.limits, network_bytes_per_s, read_bytes_per_s)
        if session is not None:
            session.limits_changed = True

    def claim(self, order: Order, grant_id: str) -> Session:
        """The session of that grant, for the caller to run (`running`) without a moment's delay; nobody else gets it.

        Raises:
            Forbidden: there is none under that order, or its pass runs or ran already.
        """
        session = self._sessions.get(order.pair)
        if session is None or not _equal(session.grant.grant, grant_id) or session.order != order:
            raise Forbidden(f"no pass of the pair {order.pair} is granted under that number: grant it first")
        if session.claimed:
            raise Forbidden(f"the granted pass of the pair {order.pair} runs already: grant a new one")
        session.claimed = True
        return session

    @contextlib.contextmanager
    def running(self, session: Session) -> Iterator[None]:
        """Everything a claimed pass does, its preparations and its clearing up included, happens inside.

        Raises:
            PassEnded: `end` was called meanwhile.
        """
        try:
            with session.scope:
                yield
        finally:
            self._forget(session)
            session.ended.set()
        if session.scope.cancelled_caught:
            raise PassEnded(f"the pass of the pair {session.order.pair} was ended by a newer order")

    def _forget(self, session: Session) -> None:
        """The grant is used up: whoever still comes for it is refused."""
        if self._sessions.get(session.order.pair) is session:
            del self._sessions[session.order.pair]
        session.close()

    # --- arriving connections ---------------------------------------------------------------------------------------

    async def arrive(self, connection: BulkSocket, hello: BulkHello) -> None:
        """Hand a fresh bulk connection to the pass it was granted for, or refuse it."""
        for session in self._sessions.values():
            channel = session.arrivals.get(hello.target)
            if channel is None or not _equal(session.grant.grant, hello.grant):
                continue
            if connection.peer.fingerprint != session.grant.peer_fingerprint:
                break
            if not self.is_current(session.order):
                sentence = f"the grant for disk {hello.target} came under an epoch that is not the highest any more"
                await self.threads.on_network(partial(connection.refuse, "stale-epoch", sentence))
                return
            if session.seeds[hello.target] not in (None, hello.digest_seed):
                sentence = f"the digests of disk {hello.target} were granted with the seed of its digest map"
                await self.threads.on_network(partial(connection.refuse, "forbidden", sentence))
                return
            try:
                channel.send_nowait((connection, hello))
            except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                break
            return
        sentence = "no pass is granted to this certificate for that disk and number, or it was used already"
        await self.threads.on_network(lambda: connection.refuse("forbidden", sentence))

    # --- running ----------------------------------------------------------------------------------------------------

    async def receive(
        self,
        session: Session,
        disks: dict[str, Disk],
        maps: dict[str, PassMap],
        before_first_write: Callable[[GrantedDisk], Awaitable[None]],
        progress: Progress,
        why_not: Mapping[str, str] | None = None,
        proven: Mapping[str, Proven] | None = None,
    ) -> tuple[DiskReport, ...]:
        """Carry out a granted RECEIVE pass on opened targets and their digest maps, by target name.
        `before_first_write` is awaited for each disk before anything is written to it; `why_not`: why more is not known
        of a disk, for the reports. `proven`: what of each is proven to equal the view beforehand; it grows."""

        session.idle_since = trio.current_time()

        async def one(granted: GrantedDisk, meter: Meter) -> None:
            arrived = await _arrival(session, granted.target)
            session.working += 1
            try:
                await Receiving(
                    granted=granted,
                    disk=disks.get(granted.target),
                    digest_map=maps.get(granted.target),
                    threads=self.threads,
                    windows=self.windows,
                    buffers=self.scratch,
                    limits=session.limits,
                    meter=meter,
                    waiting=session.waiting[granted.target],
                    before_first_write=partial(before_first_write, granted),
                    proven=(proven or {}).get(granted.target) or Proven(),
                    deadline_s=self.reconnect_deadline_s,
                    compares=session.grant.kind is not PassKind.SYNC,
                ).run(arrived)
            finally:
                session.working -= 1
                session.idle_since = trio.current_time()

        return await self._all(session, one, progress, why_not or {})

    async def send(
        self,
        session: Session,
        disks: dict[str, Disk],
        connect: Connect,
        progress: Progress,
        dirty: Mapping[str, DirtyRanges] | None = None,
    ) -> tuple[DiskReport, ...]:
        """Carry out a granted SEND pass from opened views. `dirty`: by target, what was written since the view that its
        grant names; of a disk granted `since` a view it must be there."""
        tracked = {d.target: (dirty or {})[d.target] for d in session.grant.disks if d.since is not None}

        async def one(granted: GrantedDisk, meter: Meter) -> None:
            written = tracked.get(granted.target)
            if written is not None:
                meter.rung = written.rung
            async with self._at_once:
                verified = await self._send_disk(session, granted, disks[granted.target], meter, connect, written)
            if verified.verified_bytes < meter.changed_bytes:
                raise PeerViolation(
                    f"the target verified {verified.verified_bytes} bytes of disk {granted.target} "
                    f"after {meter.changed_bytes} were sent"
                )
            meter.verified_bytes = verified.verified_bytes
            meter.written_bytes, meter.zeroed_bytes = verified.written_bytes, verified.zeroed_bytes
            meter.past_cache = verified.past_cache

        return await self._all(session, one, progress, {})

    async def _send_disk(
        self,
        session: Session,
        granted: GrantedDisk,
        disk: Disk,
        meter: Meter,
        connect: Connect,
        written: DirtyRanges | None,
    ) -> PassVerified:
        compares = session.grant.kind is not PassKind.SYNC
        limit = session.limits.network.bytes_per_s
        uuid, target = session.grant.vm_uuid, granted.target
        tuning = comparing_tuning() if compares else self.tunings.begin(uuid, target, limit)
        verified = await Sending(
            granted=granted,
            disk=disk,
            threads=self.threads,
            buffers=self.buffers,
            limits=session.limits,
            tuning=tuning,
            meter=meter,
            connect=connect,
            retry=Reconnecting(target, self.reconnect_deadline_s),
            written=written,
            compares=compares,
        ).run()
        if not compares:
            self.tunings.end(uuid, target, tuning)
        return verified

    async def _all(
        self,
        session: Session,
        one: Callable[[GrantedDisk, Meter], Awaitable[None]],
        progress: Progress,
        why_not: Mapping[str, str],
    ) -> tuple[DiskReport, ...]:
        """All disks side by side; the first failure ends the others and is what is raised."""
        meters = {disk.target: Meter.of(disk, why_not.get(disk.target)) for disk in session.grant.disks}

        async def tell() -> None:
            while True:
                await trio.sleep(PROGRESS_EVERY_S)
                await progress(PassProgress(disks=tuple(meter.progress() for meter in meters.values())))

        async def disks() -> None:
            await side_by_side(partial(one, granted, meters[granted.target]) for granted in session.grant.disks)

        await accompanied(disks, tell)
        return tuple(meter.report() for meter in meters.values())


async def _arrival(session: Session, target: str) -> tuple[BulkSocket, BulkHello]:
    """The connection for that disk. The source works on some disks at a time, so the others' turn may come late; but
    when no disk is being worked on, one must come soon."""
    while True:
        with trio.move_on_at(max(trio.current_time(), session.idle_since) + ARRIVAL_TIMEOUT_S):
            return await session.waiting[target].receive()
        if not session.working and trio.current_time() >= session.idle_since + ARRIVAL_TIMEOUT_S:
            raise SyncError(
                f"the source agent did not connect for disk {target} within {ARRIVAL_TIMEOUT_S:.0f} s: "
                "check that it reaches this host's bulk port"
            )


def _equal(ours: str, theirs: str) -> bool:
    """Whether two grants are the same, in a time that tells nothing about them."""
    return secrets.compare_digest(ours.encode(), theirs.encode())


class PassEnded(AgentError):
    """The pass was ended from outside before it was complete."""

    code = "cancelled"


class BadLimit(AgentError):
    """A limit that would let nothing through."""

    code = "bad-limit"


def set_limits(limits: Limits, network_bytes_per_s: int | None, read_bytes_per_s: int | None) -> None:
    """`Limits.set` with what came over the wire; raises `BadLimit`."""
    try:
        limits.set(network_bytes_per_s, read_bytes_per_s)
    except ValueError as error:
        raise BadLimit(f"{error}: give at least 1 byte/s, or no limit") from error
