"""A coordinator over the in-memory agents, with a clock and randomness of the test's own, and crashes on demand."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection

from coordinator.config import Config
from coordinator.database import Database
from coordinator.model import Pair, PairRequest
from coordinator.placed import PlacedAgents
from coordinator.runs import Coordinator
from coordinator.store import Store, Work
from protocol.messages import Request
from tests.fakes.agent import World

T = TypeVar("T")
PAIR = "web"
REQUEST = PairRequest(
    name=PAIR, original_host="prod", original_vm="web", replica_host="dr", replica_vm="web", in_failover=True
)


def world_of(coordinator: Coordinator) -> World:
    """The world that the coordinator's agents live in."""
    placed = coordinator.agents
    assert isinstance(placed, PlacedAgents)
    assert isinstance(placed.agents, World)
    return placed.agents


class Crash(BaseException):
    """The coordinator's process dies here. Nothing in the product catches it."""


def is_crash(error: BaseException) -> bool:
    """Whether it is one, alone or inside groups."""
    if isinstance(error, BaseExceptionGroup):
        return any(is_crash(inner) for inner in error.exceptions)
    return isinstance(error, Crash)


class CrashPlan:
    """Dies at the event of that number (counted from 1); None never. Events: both sides of every write and order.

    `look`: called at every event with its number, before the process dies or goes on.
    """

    def __init__(self, at: int | None = None, look: Callable[[int], object] | None = None) -> None:
        self.at = at
        self.seen = 0
        self._look = look

    def event(self) -> None:
        """One more place where a process can die."""
        self.seen += 1
        if self._look is not None:
            self._look(self.seen)
        if self.seen == self.at:
            raise Crash(f"event {self.at}")

    def fault(self, _host: str, _request: Request, _moment: str) -> None:
        """As a `tests.fakes.agent.Fault`."""
        self.event()


class CrashingStore(Store):
    """A store whose process may die just before or just after a write became durable."""

    def __init__(self, database: Database, plan: CrashPlan) -> None:
        super().__init__(database, inline=True)
        self._plan = plan

    async def write(self, work: Work[T]) -> T:
        """See `Store.write`."""
        self._plan.event()
        result = await super().write(work)
        self._plan.event()
        return result


class TickingClock:
    """Every look at it is a second later."""

    def __init__(self) -> None:
        self._wall = itertools.count(1_700_000_000)
        self._monotonic = itertools.count(100)

    def wall_s(self) -> float:
        """See `coordinator.clock.Clock`."""
        return float(next(self._wall))

    def monotonic_s(self) -> float:
        """See `coordinator.clock.Clock`."""
        return float(next(self._monotonic))


class House:
    """State folder and world that outlive a coordinator's process."""

    def __init__(self, folder: Path, world: World | None = None) -> None:
        self.move_to(folder)
        self.world = world or World()
        self.clock = TickingClock()
        self._random = itertools.count(1)

    def move_to(self, folder: Path) -> None:
        """Keep the database in another folder from now on."""
        self.folder = folder
        self.config = Config(state_dir=folder, hooks_dir=folder / "hooks.d")

    def tokens(self, length_bytes: int) -> str:
        """Counting up is random enough."""
        return f"{next(self._random):0{2 * length_bytes}x}"

    @asynccontextmanager
    async def process(self, plan: CrashPlan | None = None) -> AsyncIterator[Coordinator]:
        """One process of the coordinator; with a plan it may die."""
        crashes = plan or CrashPlan()
        self.world.fault = crashes.fault
        try:
            async with Coordinator(
                self.config,
                actor="root@test",
                agents=self.world,
                clock=self.clock,
                tokens=self.tokens,
                make_store=lambda database: CrashingStore(database, crashes),
            ) as coordinator:
                yield coordinator
        finally:
            self.world.crash_ends_passes()

    def twin(self, folder: Path) -> House:
        """The same house in another folder: database, VMs and agents as they are now, the coordinator gone.

        Taken in the middle of a process it is what a ``kill -9`` leaves: not even a ``finally`` is run.
        """
        shutil.copytree(self.folder, folder)
        other = copy.deepcopy(self)
        other.move_to(folder)
        return other

    async def register(self) -> Pair:
        """The pair, in Failover."""
        async with self.process() as coordinator:
            return await coordinator.register_pair(REQUEST)

    async def dies(self, plan: CrashPlan, act: Callable[[Coordinator], Awaitable[object]]) -> bool:
        """Let a process do `act` under the plan; whether it died."""
        try:
            async with self.process(plan) as coordinator:
                await act(coordinator)
        except BaseException as error:
            if not is_crash(error):
                raise
            return True
        return False

    def read(self, look: Callable[[Connection], T]) -> T:
        """Look into the database between two processes."""
        database = Database.open(self.config.database)
        try:
            with database.reading() as connection:
                return look(connection)
        finally:
            database.close()
