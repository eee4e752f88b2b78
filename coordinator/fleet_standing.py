"""Where each pair of a plan stands, read from its status and journal and from nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.audit import AuditState
from coordinator.entries import EntryKind
from coordinator.fleet import FleetPlan, Place, Standing, Turn, turns
from coordinator.model import State
from coordinator.runs import Coordinator
from coordinator.states import TABLE
from coordinator.status import SERVING, PairStatus

TAKEN_BACK = frozenset({None, "undone", "cancelled"})
"""Ways a run ends that are no failure of it; None: there was none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One pair of a picture. `begun`: this very process has its run worked on."""

    group: str
    standing: Standing
    status: PairStatus
    turn: Turn
    begun: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A plan at one moment, in its order."""

    rows: tuple[Row, ...]

    def standings(self) -> dict[str, Standing]:
        """By pair."""
        return {row.standing.pair: row.standing for row in self.rows}

    def count(self, *places: Place) -> int:
        """How many pairs stand there."""
        return sum(row.standing.place in places for row in self.rows)


class Looker:
    """Looks at a plan's pairs again and again."""

    def __init__(self, coordinator: Coordinator, plan: FleetPlan) -> None:
        self._coordinator = coordinator
        self._plan = plan
        self._home_s: dict[str | None, float | None] = {}  # by run: it came home once

    async def look(
        self,
        *,
        queued: frozenset[str] = frozenset(),
        begun: frozenset[str] = frozenset(),
        ended: dict[str, str] | None = None,
    ) -> Picture:
        """The plan now.

        Args:
            queued: pairs whose unfinished run somebody will work on.
            begun: pairs whose run is worked on, also where no process shows yet.
            ended: sentences of work that ended with an error.
        """
        found: dict[str, Standing] = {}
        statuses: dict[str, PairStatus] = {}
        for pair in self._plan.pairs:
            status = await self._coordinator.pair_status(pair)
            statuses[pair] = status
            found[pair] = await self._standing(
                status, queued=pair in queued, begun=pair in begun, error=(ended or {}).get(pair, "")
            )
        whose = turns(self._plan, found, self._coordinator.clock.wall_s())
        rows = []
        for pair in self._plan.pairs:
            group = self._plan.group_of(pair).name
            rows.append(
                Row(
                    group=group,
                    standing=found[pair],
                    status=statuses[pair],
                    turn=whose[group],
                    begun=pair in begun,
                )
            )
        return Picture(rows=tuple(rows))

    async def _standing(self, status: PairStatus, *, queued: bool, begun: bool, error: str) -> Standing:
        place = place_of(status, queued=queued, begun=begun)
        home_s = None
        if place is Place.HOME and status.state is State.FAILBACK:
            if status.run not in self._home_s:
                self._home_s[status.run] = await self._came_home(status)
            home_s = self._home_s[status.run]
        pair = status.pair
        return Standing(
            pair=pair.name,
            place=place,
            sentence=error if error and place in (Place.STOPPED, Place.AWAY) else _sentence(status, place),
            home_s=home_s,
            hosts=(pair.original.host, pair.replica.host),
        )

    async def _came_home(self, status: PairStatus) -> float | None:
        entries = await self._coordinator.history(status.pair.name, status.run)
        return next(
            (
                entry.at_s
                for entry in reversed(entries)
                if entry.kind is EntryKind.STATE and entry.step == State.FAILBACK.value
            ),
            None,
        )


def place_of(status: PairStatus, *, queued: bool = False, begun: bool = False) -> Place:
    """Where the pair stands. `queued`, `begun`: see `Looker.look`."""
    state = status.state
    if state is State.NEEDS_OPERATOR:
        return Place.NEEDS_OPERATOR
    if state is State.FAILBACK:
        return Place.FAILED if status.audit.state is AuditState.DIFFERS else Place.HOME
    if state is State.READY:
        return Place.HOME
    if state is State.FAILOVER:
        return Place.AWAY if status.outcome in TAKEN_BACK else Place.FAILED
    assert TABLE[state].unfinished
    if not (status.active or begun):
        return Place.QUEUED if queued else Place.STOPPED
    if state is State.READY_TO_SWITCH or (state in SERVING and status.waiting is not None):
        return Place.WAITING
    if state is State.SYNCING:
        return Place.COPYING
    if state is State.SWITCHING:
        return Place.SWITCHING
    return Place.HOME if state is State.COMMITTING else Place.TAKING_BACK


def _sentence(status: PairStatus, place: Place) -> str:
    match place:
        case Place.NEEDS_OPERATOR if status.operator is not None:
            return status.operator.sentence
        case Place.FAILED if status.state is State.FAILBACK:
            return status.audit.sentence
        case Place.FAILED:
            return status.reason
        case Place.AWAY if status.outcome is not None:
            return f"the last run was {status.outcome}"
        case Place.STOPPED:
            failed = f", after: {status.last_failure}" if status.last_failure else ""
            return f"stopped in {status.state.value}{failed}"
        case _:
            return ""
