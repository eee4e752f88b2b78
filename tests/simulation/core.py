"""What everything in the simulation stands on: events with numbers, processes that can die at any of them, waiting."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import trio

from agent.threads import Threads
from protocol.messages import Order

if TYPE_CHECKING:
    pass

T = TypeVar("T")
MAX_EVENTS = 30_000
REQUEST: ContextVar[str] = ContextVar("REQUEST", default="")
"""What kind of request that is."""
HOST: ContextVar[str] = ContextVar("HOST", default="")
"""The host whose agent the running task belongs to; empty: the coordinator's."""
ORDER: ContextVar[Order | None] = ContextVar("ORDER", default=None)
"""The order that the running task of an agent carries out."""


class Killed(BaseException):
    """The process that runs this dies here. Nothing in the product catches it."""


class Violation(BaseException):
    """An invariant does not hold. Not an `Exception`: no boundary of the product may take it for a failure of its."""


class NotYet(BaseException):
    """A call that would block: it is made again when `event` is set.

    Args:
        event: what to wait for.
        timeout_s: how long at most.
        then: what to call then, instead of the same again.
        on_timeout: what to raise when the time is over; None: call again.
    """

    def __init__(
        self,
        event: trio.Event,
        timeout_s: float,
        *,
        then: Callable[[], Any] | None = None,
        on_timeout: Callable[[], Exception] | None = None,
    ) -> None:
        super().__init__()
        self.event, self.timeout_s, self.then, self.on_timeout = event, timeout_s, then, on_timeout


class Signal:
    """Wakes everybody who waits; again and again."""

    def __init__(self) -> None:
        self.event = trio.Event()

    def fire(self) -> None:
        """Wake them."""
        event, self.event = self.event, trio.Event()
        event.set()


class Hangs(Protocol):
    """Something a process holds, and the kernel takes away when it dies."""

    def owner_died(self) -> None:
        """As the kernel does it."""


@dataclass(eq=False)
class Process:
    """A process of the product: an agent, or a coordinator."""

    name: str
    chaos: Chaos
    dead: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    holds: list[Hangs] = field(default_factory=list)
    asleep: trio.Event | None = None

    async def awake(self) -> None:
        """Return when nothing holds it up (SIGSTOP)."""
        while self.asleep is not None:
            await self.asleep.wait()

    def wake(self) -> None:
        """SIGCONT."""
        if self.asleep is not None:
            event, self.asleep = self.asleep, None
            event.set()

    def kill(self) -> None:
        """SIGKILL. Whoever calls this from inside calls `check` next."""
        if self.dead:
            return
        self.dead = True
        for held in self.holds:
            held.owner_died()
        self.scope.cancel()

    def check(self) -> None:
        """Raise `Killed` where it is dead."""
        if self.dead:
            raise Killed(self.name)

    def point(self, label: str) -> None:
        """A place where a fault can strike."""
        self.check()
        self.chaos.event(f"{self.name} {label}")
        self.check()


@dataclass(eq=False)
class Chaos:
    """Counts events, writes the log, and lets faults strike at the events they are planned for.

    Attributes:
        planned: event number and what happens then, rising.
        triggers: what happens at the first event whose label ends with that, instead.
        after: looks at the world after each event.
    """

    random: Random
    planned: list[tuple[int, str, Callable[[], None]]] = field(default_factory=list)
    triggers: dict[str, Callable[[], None]] = field(default_factory=dict)
    after: list[Callable[[], None]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    count: int = 0
    echo: bool = False
    now_s: Callable[[], float] = lambda: trio.current_time()

    def say(self, line: str) -> None:
        """Add a line to the log."""
        text = f"{self.now_s():10.4f} {line}"
        self.log.append(text)
        if self.echo:
            print(text, flush=True)

    def event(self, label: str) -> None:
        """Something happens now."""
        self.count += 1
        if self.count > MAX_EVENTS:
            raise Violation(f"after {MAX_EVENTS} events there is no end")
        self.say(f"#{self.count} {label}")
        while self.planned and self.count >= self.planned[0][0]:
            _, name, act = self.planned.pop(0)
            self.say(f"!!! {name}")
            act()
        for end in [end for end in self.triggers if label.endswith(end)]:
            self.say(f"!!! at {end}")
            self.triggers.pop(end)()
        for look in self.after:
            look()


@dataclass
class InlineThreads(Threads):
    """Worker threads that are none: calls run where they are made, one after the other, and take virtual time."""

    process: Process = field(kw_only=True)

    async def on_disk(self, call: Callable[[], T]) -> T:
        return await self._inline(call)

    async def on_compute(self, call: Callable[[], T]) -> T:
        return await self._inline(call)

    async def on_network(self, call: Callable[[], T]) -> T:
        return await self._inline(call)

    async def on_libvirt(self, call: Callable[[], T]) -> T:
        return await self._inline(call)

    async def on_wire(self, call: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        async with limiter:
            return await self._inline(call)

    async def connecting(
        self, call: Callable[[], T], discard: Callable[[T], object], limiter: trio.CapacityLimiter | None = None
    ) -> T:
        return await self._inline(call, shield=False)

    async def _inline(self, call: Callable[[], T], *, shield: bool = True) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            await trio.sleep(self.process.chaos.random.random() * 0.002)
        while True:
            self.process.check()
            try:
                return call()
            except NotYet as wait:
                with trio.CancelScope(shield=shield), trio.move_on_after(wait.timeout_s) as patience:
                    await wait.event.wait()
                if patience.cancelled_caught and wait.on_timeout is not None:
                    raise wait.on_timeout() from None
                call = wait.then or call


def only_killed(error: BaseException) -> bool:
    """Whether nothing but a process' death is in it."""
    if isinstance(error, BaseExceptionGroup):
        return all(only_killed(inner) for inner in error.exceptions)
    return isinstance(error, Killed | trio.Cancelled)
