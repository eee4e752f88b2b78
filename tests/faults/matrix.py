"""Which cells there are, and the order in which one rig goes through them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from tests.faults.boundaries import Boundary, Way, boundaries
from tests.faults.cells import PROTECTED, Cell, Outcome, run_cell
from tests.faults.faults import FAULTS, Fault
from tests.faults.rig import Rig

ON_EVERY_WAY = ("kill-source-agent", "kill-target-agent")
BOTH_WAYS = ("start-original", "start-replica")
BOTH_SIDES = ("altered-original", "lost-bitmaps")
EVERY_STEP = ("kill-qemu", "kill-source-libvirtd", "kill-target-libvirtd", "unwritable-journal", "deaf-guest")
WEIGHTY = frozenset(
    {
        "fence_original",
        "open_view:1",
        "pass:1",
        "replica_off",
        "protect_replica",
        "last_pass",
        "verify",
        "lift_original_fence",
        "original_on",
        "audit",
    }
)
"""Where an agent that is away for a while, or a second coordinator, hurts most."""


IN_SHORT = ("pass:1", "lift_original_fence")
"""Where each other fault strikes in `short`, if it strikes there at all."""


def cells() -> tuple[Cell, ...]:
    """Every cell, in the order of docs/FAULTS.md."""
    return tuple(Cell(fault, place) for fault in FAULTS for place in _places(fault) if fault.applies(place))


def _places(fault: Fault) -> tuple[Boundary, ...]:
    """The coordinator dies on both sides of every step, on every way. To an agent the two sides of a step that is not
    of the run are the same instant but for the journal, and what comes back by itself strikes between a step's intent
    and its act, where most is at stake."""
    if fault.name == "kill-coordinator":
        return boundaries()
    run, before = boundaries(Way.RUN), tuple(place for place in boundaries() if place.side == "before")
    if fault.name in ON_EVERY_WAY:
        return (*run, *(place for place in before if place.way is not Way.RUN))
    if fault.name in BOTH_WAYS:
        return tuple(place for place in before if place.way in (Way.RUN, Way.UNDO))
    if fault.name in BOTH_SIDES:
        return run
    steps = tuple(place for place in before if place.way is Way.RUN)
    return steps if fault.name in EVERY_STEP else tuple(place for place in steps if place.step in WEIGHTY)


def short() -> tuple[Cell, ...]:
    """A few minutes' worth: the coordinator killed at every boundary of the switchover, each other fault where it
    hurts most."""
    first = [c for c in cells() if c.fault.name == "kill-coordinator" and c.boundary.way is Way.RUN]
    switchover = [c for c in first if _in_switchover(c.boundary.step)]
    others: list[Cell] = []
    for fault in FAULTS[1:]:
        struck = [c for c in cells() if c.fault is fault and c.boundary.way is Way.RUN and c.boundary.side == "before"]
        others += [c for c in struck if c.boundary.step in IN_SHORT] or struck[:1]
    return (*switchover, *others)


def _in_switchover(step: str) -> bool:
    names = [place.step for place in boundaries(Way.RUN)]
    return names.index(step) >= names.index("replica_off")


def go_through(rig: Rig, wanted: Sequence[Cell], tell: Callable[[Outcome], bool]) -> None:
    """Let every cell happen, each when the pair is in the state it begins in, until `tell` says that it is enough."""
    waiting = list(wanted)
    while waiting:
        cell = next((c for c in waiting if c.begins_in == rig.state()), None)
        if cell is None:
            _move_on(rig)
            continue
        waiting.remove(cell)
        outcome = run_cell(rig, cell)
        if not tell(outcome):
            return
        if outcome.error:
            _start_over(rig)
        elif cell.fault.leaves_damage:
            rig.renew()


def _move_on(rig: Rig) -> None:
    """To the other state that cells begin in."""
    pair = rig.pair.name
    match rig.state():
        case "Ready":
            rig.failover_again()
        case "Failback":
            rig.verbs.must("undo", "--yes", pair)
        case _:
            rig.serve()
            rig.write()
            rig.verbs.must(*PROTECTED, pair)


def _start_over(rig: Rig) -> None:
    """After a red cell: daemons as they were, and another pair."""
    for agent in rig.site.agents.values():
        if agent.running:
            agent.thaw()
            agent.kill9()
    for host in (rig.site.production, rig.site.dr):
        host.run(["iptables", "-F"])
        host.stop_libvirtd(kill=True)
        host.start_libvirtd()
    for agent in rig.site.agents.values():
        agent.start()
    try:
        rig.renew()
    except (AssertionError, OSError) as error:
        raise RuntimeError(f"the rig cannot go on: {error}") from error
    rig.watch.both = 0


def by_name(words: Sequence[str]) -> Iterator[Cell]:
    """The cells that each of the words occurs in."""
    return (cell for cell in cells() if all(word in cell.name for word in words))


def mixed(wanted: Sequence[Cell]) -> list[Cell]:
    """The same cells in an order in which a run that is broken off has seen something of everything."""
    order = list(wanted)
    random.Random(0).shuffle(order)
    return order
