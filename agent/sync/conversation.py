"""What both sides of a pass over one disk share: sending in turn, ending whole, telling the peer why.

A conversation owns the disk's bulk connections, its *lanes*. Its tasks run in one nursery; the first failure ends them
all, is told to the peer in bounded time, and is what the caller gets. A blocking receive is woken by shutting the
socket down.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from agent.errors import AgentError, DamagedFrame, SyncError
from agent.threads import Threads
from protocol.errors import ConnectionLost, PeerViolation, ProtocolError
from protocol.link import LinkFacts
from protocol.messages import BulkMessage, PassFailed

FAREWELL_TIMEOUT_S = 5.0
"""How long a failing side tries to tell the other why before it just hangs up."""
HEAR_OUT_S = 1.0
"""How long a side whose send found the connection gone waits for what the peer may have said before."""
SIGN_OF_LIFE_S = 5.0
"""How often each side hears from the other, however busy that is; a side that is silent for half a minute is taken for
dead (`protocol.bulk.SILENCE_TIMEOUT_S`)."""
SENDERS = 8
"""More than the tasks of either side that send, so that a farewell always finds a thread."""


class Wire(Protocol):
    """What a conversation needs of `protocol.bulk.BulkSocket`: blocking calls, several senders, one receiver.

    Attributes:
        bytes_sent, bytes_received: frames whole, before TLS.
        waited_for_window_s: how long sends of data waited for `Credit`.
    """

    bytes_sent: int
    bytes_received: int
    waited_for_window_s: float

    @property
    def waited_for_link_s(self) -> float:
        """How long sends waited because the kernel had no room."""

    def link(self) -> LinkFacts:
        """What the kernel knows of the link."""

    def send(self, message: BulkMessage, *pieces: bytes | bytearray | memoryview) -> None:
        """Send one message; `BlockData` waits for window."""

    def receive(self, timeout_s: float | None = None) -> tuple[BulkMessage, memoryview]:
        """Wait for the next message; the peer may be silent for `timeout_s`, by default as long as the wire allows."""

    def shutdown(self) -> None:
        """Wake whoever sends or receives with `ConnectionLost`; harmless when repeated."""


class Unforeseen(SyncError):
    """A defect: something was raised that nobody foresaw. The cause is chained to it."""

    code = "internal"


class PeerFailed(SyncError):
    """The other side ended the pass; its sentence is repeated here."""

    code = "peer-failed"


@dataclass(eq=False)
class Lane:
    """One connection of the disk.

    Its sends and receives count against limits of its own: senders wait for what a receiver brings, so if all lanes
    took their threads from one pool, enough blocked senders would leave none for the receivers they wait for.
    """

    wire: Wire
    senders: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(SENDERS))
    receivers: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(1))
    heard_out: trio.Event = field(default_factory=trio.Event)


@dataclass
class Conversation:
    """One disk's pass over its connections. `disk_name` is what messages call the disk; `before_bytes`: what earlier
    connections of the pass carried."""

    disk_name: str
    threads: Threads
    lanes: list[Lane]
    before_bytes: int = 0
    _nursery: trio.Nursery | None = None
    _scope: trio.CancelScope | None = None
    _failure: AgentError | ProtocolError | None = None
    _finished: bool = False

    @property
    def wire_bytes(self) -> int:
        """What all lanes carried so far, both ways, and those of earlier attempts."""
        return self.before_bytes + sum(lane.wire.bytes_sent + lane.wire.bytes_received for lane in self.lanes)

    async def send(self, lane: Lane, message: BulkMessage, *pieces: bytes | bytearray | memoryview) -> None:
        """Send one message, its payload in pieces."""
        await self.threads.on_wire(lambda: lane.wire.send(message, *pieces), lane.senders)

    async def receive(self, lane: Lane, timeout_s: float | None = None) -> tuple[BulkMessage, memoryview]:
        """The next message that is not the peer's failure; `timeout_s` as in `Wire.receive`.

        Raises:
            PeerFailed: the peer ended the pass.
            ConnectionLost, PeerViolation: as the wire says.
        """
        try:
            message, payload = await self.threads.on_wire(lambda: lane.wire.receive(timeout_s), lane.receivers)
        except ProtocolError:
            lane.heard_out.set()
            raise
        if isinstance(message, PassFailed):
            lane.heard_out.set()
            raise PeerFailed(message.sentence, peer_code=message.code, disk=message.target)
        return message, payload

    def spawn(self, task: Callable[[], Awaitable[None]]) -> None:
        """One task more, while `run` runs its own."""
        assert self._nursery is not None
        assert self._scope is not None
        self._nursery.start_soon(self._guarded, task, self._scope)

    def join(self, wire: Wire, task: Callable[[Lane], Awaitable[None]]) -> bool:
        """One connection more, with its task. False where the pass is over, or not begun: it was hung up on then."""
        if self._nursery is None or self._failure is not None:
            wire.shutdown()
            return False
        lane = Lane(wire)
        self.lanes.append(lane)
        self.spawn(lambda: task(lane))
        return True

    async def run(
        self, *tasks: Callable[[], Awaitable[None]], meanwhile: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Run `tasks` to their end, all of them or none, and `meanwhile` for as long.

        Raises:
            AgentError, ProtocolError: the first failure of any task, and nothing else.
        """
        async with trio.open_nursery() as outer:
            outer.start_soon(self._hang_up_when_cancelled)
            if meanwhile is not None:
                outer.start_soon(self._guarded, meanwhile, outer.cancel_scope)
            async with trio.open_nursery() as inner:
                self._nursery, self._scope = inner, outer.cancel_scope
                for task in tasks:
                    inner.start_soon(self._guarded, task, outer.cancel_scope)
            self._nursery = None
            if self._failure is None:
                self._finished = True
            outer.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _guarded(self, task: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        try:
            await task()
        except (AgentError, ProtocolError) as error:
            # The first failure is the cause; what follows from it (a socket shut down under a receiver) is not. Only a
            # lost connection may have a cause of its own: what the peer said before it hung up.
            if self._failure is None or (isinstance(self._failure, ConnectionLost) and isinstance(error, PeerFailed)):
                self._failure = self._naming_disk(error)
            if isinstance(error, ConnectionLost):
                with trio.move_on_after(HEAR_OUT_S):
                    for lane in self.lanes:
                        await lane.heard_out.wait()
            scope.cancel()
        except Exception as error:  # noqa: BLE001 - a defect; the peer and the coordinator must hear of it all the same
            if self._failure is None:
                self._failure = Unforeseen(
                    f"the pass over disk {self.disk_name} failed in a way nobody foresaw "
                    f"({type(error).__name__}: {error}); see the agent's log",
                    disk=self.disk_name,
                )
                self._failure.__cause__ = error
            scope.cancel()

    def _naming_disk(self, error: AgentError | ProtocolError) -> AgentError | ProtocolError:
        """What came wrong from the peer is noticed where the disk's name is not known."""
        named: AgentError | ProtocolError
        if isinstance(error, PeerViolation):
            named = PeerViolation(f"disk {self.disk_name}: {error.sentence}")
        elif isinstance(error, DamagedFrame):
            named = DamagedFrame(f"disk {self.disk_name}: {error.sentence}", **{"disk": self.disk_name, **error.facts})
        else:
            return error
        named.__cause__ = error
        return named

    async def _hang_up_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if not self._finished:
                with trio.CancelScope(shield=True):
                    await self._say_farewell()

    async def _say_farewell(self) -> None:
        if not isinstance(self._failure, PeerFailed | ConnectionLost):
            farewell = self._farewell()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._shut_down_after, FAREWELL_TIMEOUT_S)
                async with trio.open_nursery() as saying:
                    for lane in self.lanes:
                        saying.start_soon(self._say, lane, farewell)
                nursery.cancel_scope.cancel()
        self._shut_down()

    async def _say(self, lane: Lane, farewell: PassFailed) -> None:
        # Where the peer is gone, hanging up is all that is left to say.
        with contextlib.suppress(ProtocolError):
            await self.send(lane, farewell)

    async def _shut_down_after(self, delay_s: float) -> None:
        await trio.sleep(delay_s)
        self._shut_down()

    def _shut_down(self) -> None:
        for lane in self.lanes:
            lane.wire.shutdown()

    def _farewell(self) -> PassFailed:
        if self._failure is None:
            return PassFailed(
                code="cancelled",
                sentence=f"the pass over disk {self.disk_name} was cancelled on the other side",
                target=self.disk_name,
                offset_bytes=-1,
            )
        offset = self._failure.facts.get("offset_bytes", -1) if isinstance(self._failure, AgentError) else -1
        return PassFailed(
            code=self._failure.code,
            sentence=self._failure.sentence,
            target=self.disk_name,
            offset_bytes=offset if isinstance(offset, int) else -1,
        )


async def keep_alive(talk: Conversation, say: Callable[[Lane], Awaitable[None]]) -> None:
    """Let each connection hear from us every `SIGN_OF_LIFE_S`, whatever holds the others up. Ends by failing.

    Raises:
        ProtocolError: a connection is gone.
    """
    busy: set[Lane] = set()
    failures: list[ProtocolError] = []

    async def one(lane: Lane) -> None:
        try:
            await say(lane)
        except ProtocolError as error:
            failures.append(error)
            nursery.cancel_scope.cancel()
        finally:
            busy.discard(lane)

    async with trio.open_nursery() as nursery:
        while not failures:
            await trio.sleep(SIGN_OF_LIFE_S)
            for lane in talk.lanes:
                if lane not in busy:
                    busy.add(lane)
                    nursery.start_soon(one, lane)
    if failures:
        raise failures[0]


async def side_by_side(tasks: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Run the tasks to their end, all of them or none; the first failure ends the others and is what is raised."""
    failures: list[Exception] = []

    async def guarded(task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except Exception as error:  # noqa: BLE001 - kept whole and raised below, once every task has ended
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(guarded, task)
    if failures:
        raise failures[0]


async def accompanied(task: Callable[[], Awaitable[None]], companion: Callable[[], Awaitable[None]]) -> None:
    """Run `task`, and `companion` for as long; a failure of either ends both and is what is raised."""

    async def leading() -> None:
        await task()
        scope.cancel()

    with trio.CancelScope() as scope:
        await side_by_side((leading, companion))
