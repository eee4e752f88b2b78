"""Many pairs in one plan: their groups, and whose turn it is to switch over. Pure.

A plan keeps no state of its own. What each pair's journal says is all there is, so there is nothing that could get out
of step with it: whoever reads the same plan and the same journals comes to the same turns.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from coordinator.errors import UsageError
from coordinator.model import RunOptions

PARALLEL = 4
PARALLEL_PER_HOST = 2
"""Unless the file says otherwise: more passes at once than that make each other slow on one host's disks."""


class OnFailed(enum.Enum):
    """What a group does when a pair before it does not come home."""

    HOLD = "hold"  # its replicas go on serving, until somebody has mended it or says otherwise
    GO_ON = "go-on"  # it switches all the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Pairs that switch over together.

    Attributes:
        pairs: in the order of the file.
        after: groups whose pairs must all be home before this one switches.
        delay_s: how long to wait after the last of them came home.
    """

    name: str
    pairs: tuple[str, ...]
    after: tuple[str, ...] = ()
    delay_s: float = 0.0
    on_failed: OnFailed = OnFailed.HOLD


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """A plan of several pairs.

    Attributes:
        groups: in the order of the file.
        options: of each pair's run.
        parallel: so many pairs are copied at once.
        parallel_per_host: so many of them have the same host at either side.
    """

    groups: tuple[Group, ...]
    options: Mapping[str, RunOptions]
    parallel: int = PARALLEL
    parallel_per_host: int = PARALLEL_PER_HOST

    @property
    def pairs(self) -> tuple[str, ...]:
        """Every pair, in the order of groups that wait for each other, else of the file."""
        return tuple(pair for group in self.in_order() for pair in group.pairs)

    def group_of(self, pair: str) -> Group:
        """The group that the pair is in."""
        return next(group for group in self.groups if pair in group.pairs)

    def in_order(self) -> tuple[Group, ...]:
        """The groups, each behind those it waits for.

        Raises:
            UsageError: a group waits for itself, be it by way of others.
        """
        ordered: list[Group] = []
        rest = list(self.groups)
        while rest:
            known = {group.name for group in ordered}
            free = next((group for group in rest if set(group.after) <= known), None)
            if free is None:
                raise UsageError(
                    f"{_circle(rest)}: leave out one `after`, for none of them could ever begin", code="plan-cycle"
                )
            ordered.append(free)
            rest.remove(free)
        return tuple(ordered)


def _circle(groups: Sequence[Group]) -> str:
    """The groups that wait for each other, in words; every one of `groups` waits for another of them."""
    by_name = {group.name: group for group in groups}
    path = [groups[0].name]
    while True:
        following = next(name for name in by_name[path[-1]].after if name in by_name)
        if following in path:
            circle = [*path[path.index(following) :], following]
            return "group " + " waits for ".join(circle)
        path.append(following)


class Place(enum.Enum):
    """Where a pair of a plan stands; worth a word in a table."""

    AWAY = "failed over"  # the replica is in use, and no run is under way: none began, or it was taken back
    QUEUED = "queued"  # begun, waits until fewer pairs are copied
    COPYING = "copying"
    WAITING = "waiting"  # to switch, the replica serves
    SWITCHING = "switching"
    HOME = "home"  # the original is in use
    TAKING_BACK = "taking back"
    FAILED = "failed"  # the run ended without success, or its audit found a difference
    STOPPED = "stopped"  # unfinished, and no process works on it
    NEEDS_OPERATOR = "needs operator"


LOST = frozenset({Place.FAILED, Place.STOPPED, Place.NEEDS_OPERATOR, Place.AWAY})
"""A pair that stands there does not come home unless somebody sees to it."""
AT_REST = LOST | {Place.HOME}


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One pair of a plan at this moment.

    Attributes:
        sentence: why it stands there; empty where the place says all.
        home_s: wall time when its original came into use; None elsewhere than at home, or where it is not known.
        hosts: both sides'.
    """

    pair: str
    place: Place
    sentence: str = ""
    home_s: float | None = None
    hosts: tuple[str, ...] = ()


class TurnKind(enum.Enum):
    """Whether a group may switch."""

    COME = "come"
    DELAYED = "delayed"  # every pair before it is home, the delay is not over
    WAITS = "waits"  # for pairs that are on their way
    HELD = "held"  # a pair before it does not come home by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Whether a group may switch, or why not, in a clause. `left_s`: of its delay."""

    kind: TurnKind
    sentence: str = ""
    left_s: float = 0.0


def turns(plan: FleetPlan, standings: Mapping[str, Standing], now_s: float) -> dict[str, Turn]:
    """Whose turn it is, by the name of the group.

    Args:
        standings: of every pair of the plan.
        now_s: wall time; a clock that was set back never makes a delay longer than the plan says.
    """
    found: dict[str, Turn] = {}
    for group in plan.in_order():
        found[group.name] = _turn(plan, group, found, standings, now_s)
    return found


def _turn(
    plan: FleetPlan, group: Group, found: Mapping[str, Turn], standings: Mapping[str, Standing], now_s: float
) -> Turn:
    before = [other for other in plan.groups if other.name in group.after]
    lost = [(other, standing) for other in before for standing in _lost(other, found, standings)]
    if lost and group.on_failed is OnFailed.HOLD:
        other, standing = lost[0]
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        return Turn(
            kind=TurnKind.HELD,
            sentence=f"held back: {standing.pair} of group {other.name}, which comes before, "
            f"{_lost_words(standing)}{more}",
        )
    gone = {standing.pair for _, standing in lost}
    ahead = [standings[pair] for other in before for pair in other.pairs if pair not in gone]
    away = [standing.pair for standing in ahead if standing.place is not Place.HOME]
    if away:
        return Turn(kind=TurnKind.WAITS, sentence=f"waits for {_some(away)}")
    since_s = max((standing.home_s for standing in ahead if standing.home_s is not None), default=None)
    left_s = 0.0 if since_s is None else group.delay_s - max(0.0, now_s - since_s)
    if left_s > 0:
        names = " and ".join(other.name for other in before)
        return Turn(kind=TurnKind.DELAYED, sentence=f"delay of {group.delay_s:.0f} s after {names}", left_s=left_s)
    return Turn(kind=TurnKind.COME)


def _lost(group: Group, found: Mapping[str, Turn], standings: Mapping[str, Standing]) -> Iterator[Standing]:
    """The pairs of a group that do not come home by themselves."""
    held = found[group.name].kind is TurnKind.HELD
    for pair in group.pairs:
        standing = standings[pair]
        if standing.place in LOST or (held and standing.place not in (Place.HOME, Place.SWITCHING)):
            yield standing


def _lost_words(standing: Standing) -> str:
    match standing.place:
        case Place.FAILED:
            return "failed"
        case Place.STOPPED:
            return "stopped"
        case Place.AWAY:
            return "is failed over and has no run"
        case Place.NEEDS_OPERATOR:
            return "needs an operator"
        case _:
            return "is held back itself"


def _some(pairs: Sequence[str]) -> str:
    named = ", ".join(pairs[:3])
    return f"{named} and {len(pairs) - 3} more" if len(pairs) > 3 else named


def may_begin(plan: FleetPlan, standings: Mapping[str, Standing], copying: frozenset[str]) -> tuple[str, ...]:
    """The queued pairs whose copying may begin now, in the plan's order.

    Args:
        copying: pairs that count against `FleetPlan.parallel` and `FleetPlan.parallel_per_host` already.
    """
    at_work = list(copying)
    begin: list[str] = []
    for pair in plan.pairs:
        if standings[pair].place is not Place.QUEUED or pair in copying:
            continue
        if len(at_work) >= plan.parallel:
            break
        busy = [host for other in at_work for host in standings[other].hosts]
        if any(busy.count(host) >= plan.parallel_per_host for host in set(standings[pair].hosts)):
            continue
        at_work.append(pair)
        begin.append(pair)
    return tuple(begin)
