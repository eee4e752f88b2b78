"""What `plan --plan` and `start --plan` share: a plan of each pair, every reason against the whole at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from coordinator.cli import human
from coordinator.cli.output import Output, plain, table
from coordinator.cli.planning import plan_run
from coordinator.errors import CoordinatorError, Refused
from coordinator.fleet import FleetPlan, Group, OnFailed, Place
from coordinator.fleet_standing import place_of
from coordinator.model import Pair, Plan, Refusal, State
from coordinator.runs import Coordinator
from coordinator.status import PairStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class PairPlan:
    """One pair of a plan.

    Attributes:
        plan: of the run that would begin; None where none begins.
        goes_on: its unfinished run would be worked on.
        note: why no run begins; empty where one does.
        refusals: against this pair.
    """

    pair: Pair | None
    name: str
    group: str
    plan: Plan | None = None
    goes_on: bool = False
    note: str = ""
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WholePlan:
    """Every pair's plan, and what speaks against them together."""

    pairs: tuple[PairPlan, ...]
    together: tuple[Refusal, ...] = field(default=())

    @property
    def begin(self) -> tuple[str, ...]:
        """Pairs whose run would begin."""
        return tuple(one.name for one in self.pairs if one.plan is not None)

    @property
    def go_on(self) -> tuple[str, ...]:
        """Pairs whose unfinished run would go on."""
        return tuple(one.name for one in self.pairs if one.goes_on)

    @property
    def refusals(self) -> tuple[tuple[str, Refusal], ...]:
        """All of them, with the pair's name; empty: of several pairs together."""
        own = tuple((one.name, refusal) for one in self.pairs for refusal in one.refusals)
        return (*own, *(("", refusal) for refusal in self.together))


async def plan_whole(coordinator: Coordinator, plan: FleetPlan, *, estimate: bool) -> WholePlan:
    """Ask the agents about every pair; changes nothing. What cannot be found out about a pair is a refusal."""
    found: dict[str, PairPlan] = {}
    limiter = trio.CapacityLimiter(plan.parallel)

    async def one(pair: str) -> None:
        async with limiter:
            found[pair] = await _plan_pair(coordinator, plan, pair, estimate=estimate)

    async with trio.open_nursery() as nursery:
        for pair in plan.pairs:
            nursery.start_soon(one, pair)
    pairs = tuple(found[pair] for pair in plan.pairs)
    return WholePlan(pairs=pairs, together=tuple(no_room_together(pairs)))


async def _plan_pair(coordinator: Coordinator, plan: FleetPlan, name: str, *, estimate: bool) -> PairPlan:
    group = plan.group_of(name).name
    try:
        status = await coordinator.pair_status(name)
        note = _why_none(status)
        if note is not None:
            goes_on = place_of(status) is Place.STOPPED
            return PairPlan(pair=status.pair, name=name, group=group, note=note, goes_on=goes_on)
        if status.state is State.NEEDS_OPERATOR:
            sentence = status.operator.sentence if status.operator is not None else status.means
            return _refused(name, group, status.pair, Refusal(code="needs-operator", about=name, sentence=sentence))
        made = await plan_run(coordinator, name, plan.options[name], estimate=estimate)
    except CoordinatorError as error:
        return _refused(name, group, None, Refusal(code=error.code, about=name, sentence=f"{error.sentence}."))
    return PairPlan(pair=status.pair, name=name, group=group, plan=made, refusals=made.refusals)


def _refused(name: str, group: str, pair: Pair | None, refusal: Refusal) -> PairPlan:
    return PairPlan(pair=pair, name=name, group=group, refusals=(refusal,))


def _why_none(status: PairStatus) -> str | None:
    """Why no run begins for that pair though nothing is wrong; None: one does, or something is."""
    if status.state is State.FAILBACK:
        return "home already"
    if status.state is State.READY and status.outcome == "committed":
        return "home already, and final"
    if status.state in (State.READY, State.FAILOVER, State.NEEDS_OPERATOR):
        return None
    if status.active:
        return f"a process works on its run already ({status.state.value})"
    return f"its unfinished run goes on ({status.state.value})"


def no_room_together(pairs: Sequence[PairPlan]) -> Iterator[Refusal]:
    """Places where each pair has room, and all of them together have not."""
    needed: dict[tuple[str, str], int] = {}
    free: dict[tuple[str, str], int] = {}
    who: dict[tuple[str, str], list[str]] = {}
    for one in pairs:
        for room in one.plan.rooms if one.plan is not None else ():
            key = (room.host, room.place)
            if room.free_bytes is None or room.free_bytes < room.needed_bytes:
                continue  # not told, or refused for the pair by itself
            needed[key] = needed.get(key, 0) + room.needed_bytes
            free[key] = min(free.get(key, room.free_bytes), room.free_bytes)
            who.setdefault(key, []).append(one.name)
    for key, needed_bytes in needed.items():
        if needed_bytes > free[key]:
            host, place = key
            yield Refusal(
                code="no-room-together",
                about=place,
                sentence=f"Host {host} has {free[key]} bytes free in {place}, but {', '.join(who[key])} need "
                f"{needed_bytes} there together; make room there, or put some of them into another plan.",
            )


def refused_whole(whole: WholePlan, file: str) -> Refused:
    """The error that a plan with refusals ends in."""
    count = len(whole.refusals)
    return Refused(
        f"the plan {file} has {count} reason{'s' if count != 1 else ''} against starting, nothing was touched: see to "
        "them and plan again",
        file=file,
        refusals=count,
    )


def show_whole(output: Output, plan: FleetPlan, whole: WholePlan, file: str) -> None:
    """What would happen, in a line for each pair; then notes and every reason against it."""
    output.say(f"Plan {file}: {len(whole.pairs)} pairs in {len(plan.groups)} groups", style="bold")
    output.say()
    for number, group in enumerate(plan.in_order(), start=1):
        output.item(f"{number:3}.", _group_words(group))
    output.say(
        f"At most {plan.parallel} pairs are copied at once, at most {plan.parallel_per_host} of them with the same "
        "host."
    )
    output.say()
    numbers = ("Disks", "Size", "First pass", "Downtime")
    rows = table("Group", "Pair", *numbers, "", right=numbers)
    for one in whole.pairs:
        count = len(one.refusals)
        note = f"refused, {count} reason{'s' if count != 1 else ''}" if count else one.note
        rows.add_row(one.group, one.name, *_cost_words(one.plan), note)
    output.show(rows)
    notes = _notes(whole.pairs)
    if notes:
        output.say()
    for note in notes:
        output.item("  *", note)
    refusals = whole.refusals
    if refusals:
        output.say()
        output.say(f"Refused, {len(refusals)} reason{'s' if len(refusals) != 1 else ''}:", style="bold red")
    for name, refusal in refusals:
        output.item("  -", f"{name or 'together'} [{refusal.code}] {refusal.sentence}")


def _group_words(group: Group) -> str:
    when = "at once"
    if group.after:
        when = f"when all of {' and '.join(group.after)} are home"
        when += f", {human.duration(group.delay_s)} later" if group.delay_s else ""
        if group.on_failed is OnFailed.GO_ON:
            when += ", or cannot be"
    return f"{group.name} ({', '.join(group.pairs)}): copied from the start, switched {when}"


def _cost_words(plan: Plan | None) -> tuple[str, ...]:
    if plan is None or not plan.disks:
        return "", "", "", ""
    size = human.size(sum(disk.source_size_bytes for disk in plan.disks))
    estimate = plan.estimate
    first = estimate.first_pass_s if estimate is not None else None
    return (
        str(len(plan.disks)),
        size,
        human.duration(None if first is None else first.likely),
        human.duration(None if estimate is None else estimate.downtime_s),
    )


def _notes(pairs: Sequence[PairPlan]) -> list[str]:
    """Each note once, with the pairs that it is about."""
    about: dict[str, list[str]] = {}
    exact: dict[str, str] = {}
    for one in pairs:
        if one.plan is None or one.pair is None:
            continue
        for note in one.plan.notes:
            general = note
            for role, vm in (("original", one.pair.original), ("replica", one.pair.replica)):
                for article in ("the", "The"):
                    general = general.replace(f"{article} {role} {vm.name}", f"{article} {role}")
            general = general.replace(f"`failback limit {one.name}`", "`failback limit PAIR`")
            about.setdefault(general, []).append(one.name)
            exact[general] = note
    return [f"{', '.join(names)}: {general if len(names) > 1 else exact[general]}" for general, names in about.items()]


def whole_object(whole: WholePlan) -> dict[str, Any]:
    """The JSON form."""
    return {
        "pairs": [
            {
                "pair": one.name,
                "group": one.group,
                "plan": plain(one.plan),
                "goes_on": one.goes_on,
                "note": one.note,
                "refusals": plain(one.refusals),
            }
            for one in whole.pairs
        ],
        "refusals": [{"pair": name or None, **plain(refusal)} for name, refusal in whole.refusals],
    }
