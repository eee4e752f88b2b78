"""Which cells there are, and the order in which one rig goes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tests.faults.boundaries import Boundary, Way, boundaries
from tests.faults.cells import START, Cell, Outcome, run_cell
from tests.faults.faults import FAULTS, Fault
from tests.faults.rig import Rig
from tests.lab.private_host import HostError

EVERYWHERE = ("kill-coordinator", "kill-source-agent", "kill-target-agent")
"""Faults that strike on both sides of every step, on every way."""
OF_RUN = ("kill-qemu",)
"""Faults that strike on both sides of every step of a run."""


def cells() -> tuple[Cell, ...]:
    """Every cell, in the order of docs/FAULTS.md."""
    return tuple(Cell(fault, place) for fault in FAULTS for place in _places(fault) if fault.applies(place))


def _places(fault: Fault) -> tuple[Boundary, ...]:
    if fault.name in EVERYWHERE:
        return boundaries()
    if fault.name in OF_RUN:
        return boundaries(Way.RUN)
    # What comes back by itself strikes between a step's intent and its act, where most is at stake.
    return tuple(place for place in boundaries(Way.RUN, Way.UNDO) if place.side == "before")


def short() -> tuple[Cell, ...]:
    """A few minutes' worth: the coordinator killed at every boundary of the switchover, each other fault where it
    hurts most."""
    first = [c for c in cells() if c.fault.name == "kill-coordinator" and c.boundary.way is Way.RUN]
    switchover = [c for c in first if _in_switchover(c.boundary.step)]
    others = [
        c
        for c in cells()
        if c.fault.name != "kill-coordinator"
        and c.boundary.way is Way.RUN
        and c.boundary.step in ("pass:1", "last_pass", "lift_original_fence")
        and c.boundary.side == "before"
    ]
    return (*switchover, *others)


def _in_switchover(step: str) -> bool:
    names = [place.step for place in boundaries(Way.RUN)]
    return names.index(step) >= names.index("replica_off")


def go_through(rig: Rig, wanted: Sequence[Cell], tell: Callable[[Outcome], None]) -> None:
    """Let every cell happen, each when the pair is in the state it begins in."""
    waiting = list(wanted)
    while waiting:
        outcome = None
        cell = next((c for c in waiting if c.begins_in == rig.state()), None)
        if cell is None:
            _move_on(rig)
            continue
        waiting.remove(cell)
        outcome = run_cell(rig, cell)
        tell(outcome)
        if outcome.error:
            _start_over(rig)


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
            rig.verbs.must(*START, pair)


def _start_over(rig: Rig) -> None:
    """After a red cell: daemons as they were, and another pair."""
    for host in (rig.site.production, rig.site.dr):
        host.run(["iptables", "-F"])
        host.stop_libvirtd(kill=True)
        host.start_libvirtd()
    for agent in rig.site.agents.values():
        if agent.running:
            agent.kill9()
        agent.start()
    try:
        rig.renew()
    except (AssertionError, HostError) as error:
        raise RuntimeError(f"the rig cannot go on: {error}") from error
    rig.watch.both = 0


def by_name(words: Sequence[str]) -> Iterator[Cell]:
    """The cells that each of the words occurs in."""
    return (cell for cell in cells() if all(word in cell.name for word in words))
