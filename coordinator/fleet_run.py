"""Leading the pairs of a plan: whose copying begins, whose turn it is, and when nothing more can be done.

Each pair stays a run of its own, with its own journal and lock, worked on by a task of its own (or watched by it,
where a unit of the service manager has the run). What goes wrong in one task ends that task and no other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from coordinator.errors import CoordinatorError
from coordinator.fleet import AT_REST, FleetPlan, Place, TurnKind, may_begin
from coordinator.fleet_standing import Looker, Picture
from coordinator.runs import Coordinator

Work = Callable[[str], Awaitable[object]]
"""Works on that pair's unfinished run until it rests, or the leader's `stop` is set."""
Explain = Callable[[str, Exception], str]
"""A sentence on an error that the work on that pair ended with."""


class FleetView(Protocol):
    """Shows a plan as it goes on; must not raise."""

    def show(self, picture: Picture) -> None:
        """The plan now."""

    def notice(self, sentence: str) -> None:
        """Something to be read now."""


class Leader:
    """Leads the unfinished runs of a plan until none can go on by itself.

    Args:
        coordinator: to look with and to give turns; the work has its own.
        plan: whose turn it is.
        work: see `Work`.
        explain: see `Explain`.
        view: sees every picture.
        stop: set it to have everything stop at the next safe boundary; set by the leader at the end, too.
        poll_s: how often to look.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        plan: FleetPlan,
        *,
        work: Work,
        explain: Explain,
        view: FleetView,
        stop: trio.Event,
        poll_s: float,
    ) -> None:
        self._coordinator = coordinator
        self._plan = plan
        self._work = work
        self._explain = explain
        self._view = view
        self._stop = stop
        self._poll_s = poll_s
        self._looker = Looker(coordinator, plan)
        self._queued: frozenset[str] = frozenset()
        self._running: set[str] = set()
        self._copied: set[str] = set()
        self._given: set[str] = set()
        self._errors: dict[str, str] = {}
        self._changed = trio.Event()

    async def lead(self, queued: frozenset[str]) -> Picture:
        """Work on the runs of these pairs; the picture at the end.

        An error of the leader itself stops every run at a safe boundary before it is raised.
        """
        self._queued = queued
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            try:
                await self._lead(nursery)
            except Exception as error:  # noqa: BLE001  # raised below: runs in a switchover must end it first
                failure = error
                self._stop.set()
        if failure is not None:
            raise failure
        return await self._look()

    async def _lead(self, nursery: trio.Nursery) -> None:
        while True:
            self._changed = trio.Event()
            try:
                await self._once(nursery)
            except CoordinatorError as error:  # a registry that is busy or full for now; the runs go on
                self._view.notice(error.sentence)
            if self._stop.is_set() and not self._running:
                return
            with trio.move_on_after(self._poll_s):
                await self._changed.wait()

    async def _once(self, nursery: trio.Nursery) -> None:
        picture = await self._look()
        self._view.show(picture)
        if self._stop.is_set():
            return
        await self._give_turns(picture)
        for row in picture.rows:
            if row.standing.place not in (Place.QUEUED, Place.COPYING):
                self._copied.add(row.standing.pair)
        copying = frozenset(self._running - self._copied)
        for pair in may_begin(self._plan, picture.standings(), copying):
            self._running.add(pair)
            nursery.start_soon(self._task, pair)
        if self._is_settled(picture):
            self._stop.set()

    async def _look(self) -> Picture:
        waiting = self._queued - set(self._errors) if not self._stop.is_set() else frozenset()
        return await self._looker.look(
            queued=waiting - self._running, begun=frozenset(self._running), ended=dict(self._errors)
        )

    async def _give_turns(self, picture: Picture) -> None:
        for row in picture.rows:
            pair = row.standing.pair
            if row.turn.kind is TurnKind.COME and pair not in self._given and row.standing.place not in AT_REST:
                if await self._coordinator.give_turn(pair) and self._plan.group_of(pair).after:
                    self._view.notice(f"{pair}: its turn has come, group {row.group}")
                self._given.add(pair)

    def _is_settled(self, picture: Picture) -> bool:
        """Whether nothing goes on by itself any more: every pair rests, or waits behind one that does not come."""
        for row in picture.rows:
            rests = row.standing.place in AT_REST and row.standing.pair not in self._running
            held = row.standing.place is Place.WAITING and row.turn.kind is TurnKind.HELD
            if not (rests or held):
                return False
        return True

    async def _task(self, pair: str) -> None:
        try:
            await self._work(pair)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is this pair's alone
            self._errors[pair] = self._explain(pair, error)
            self._view.notice(f"{pair}: {self._errors[pair]}")
        finally:
            self._running.discard(pair)
            self._queued -= {pair}
            self._changed.set()
