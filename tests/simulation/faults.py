"""What can go wrong, and the plan of a seed: which of it, at which events."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import trio

from agent.errors import HypervisorError
from agent.virt.seam import PowerState
from tests.fakes.hypervisor import GuestBehaviour
from tests.simulation.storage import EIO, ENOSPC

if TYPE_CHECKING:
    from tests.simulation.world import World

HORIZON = 620
"""About as many events has a run without faults; later ones strike what goes on after a fault."""
Plan = list[tuple[int, str, Callable[[], None]]]


def kill_coordinator(world: World) -> None:
    """SIGKILL."""
    if world.coordinator is not None:
        world.coordinator.kill()


def jump(name: str, world: World) -> None:
    """A host's wall clock is set, far on or far back."""
    by_s = world.random.choice((-1, 1)) * world.random.expovariate(1 / 100_000)
    world.jumped_s[name] = world.jumped_s.get(name, 0.0) + by_s


def take_for_dead(world: World) -> None:
    """Another one takes the pair over while it stands still."""
    world.take_for_dead()


def kill_agent(name: str, world: World) -> None:
    """SIGKILL: the kernel takes its locks and connections."""
    host = world.hosts[name]
    host.process.kill()
    host._let_go()


def fail_power(name: str, world: World) -> None:
    """The whole host."""
    world.hosts[name].power_fails()


def kill_qemu(world: World) -> None:
    """The replica's."""
    if world.replica.state is not PowerState.OFF:
        world.replica.end(killed=True)


def cut(name: str, world: World, at_most_s: float = 30.0) -> None:
    """A link, for a while."""
    world.links[name].cut()
    world.nursery.start_soon(_mend, world, name, world.random.random() * at_most_s)


def stall(name: str, world: World) -> None:
    """A link falls silent, for a while."""
    world.links[name].stall()
    world.nursery.start_soon(_mend, world, name, world.random.random() * 120)


async def _mend(world: World, name: str, after_s: float) -> None:
    await trio.sleep(after_s)
    world.links[name].mend()


def storage_error(name: str, doing: str, number: int, times: int, world: World) -> None:
    """The next requests of that kind fail."""
    world.hosts[name].storage.failing[doing] = (number, times)


def start_original(world: World) -> None:
    """By hand, by somebody who knows no better."""
    host = world.hosts["prod"]
    if host.powered and world.original.state is PowerState.OFF:
        with contextlib.suppress(HypervisorError):
            world.original.begin("hand")


def start_replica(world: World) -> None:
    """The same; where it is allowed, it serves again."""
    host = world.hosts["dr"]
    if host.powered and world.replica.state is PowerState.OFF:
        with contextlib.suppress(HypervisorError):
            world.replica.begin("hand")


def lose_dirty(world: World) -> None:
    """QEMU's bitmaps forget a write."""
    for top in world.replica.disks.values():
        for ranges in top.bitmaps.values():
            if ranges:
                ranges.pop(world.random.randrange(len(ranges)))
                world.monitor.tampered = True


def wake_stale(name: str, world: World) -> None:
    """A coordinator that was thought dead gives an order of its time."""
    host = world.hosts[name]
    host.spawn(host.hear_stale, world.random.randrange(1000))


def ignore_shutdown(world: World) -> None:
    """The replica's guest does not listen from now on."""
    world.replica.guest = GuestBehaviour.IGNORES


FAULTS: tuple[tuple[int, str, Callable[[World], None]], ...] = (
    (8, "the coordinator is killed", kill_coordinator),
    (3, "the coordinator is taken for dead, and wakes up", take_for_dead),
    (1, "the clock of the coordinator jumps", partial(jump, "")),
    (1, "the clock of the DR host jumps", partial(jump, "dr")),
    (1, "the clock of the production host jumps", partial(jump, "prod")),
    (4, "the source agent is killed", partial(kill_agent, "dr")),
    (5, "the target agent is killed", partial(kill_agent, "prod")),
    (2, "the DR host loses its power", partial(fail_power, "dr")),
    (4, "the production host loses its power", partial(fail_power, "prod")),
    (1, "a stale coordinator wakes up (DR host)", partial(wake_stale, "dr")),
    (1, "a stale coordinator wakes up (production host)", partial(wake_stale, "prod")),
    (2, "the replica's QEMU is killed", kill_qemu),
    (2, "the bulk link is cut", partial(cut, "bulk")),
    (1, "the link to the DR host is cut", partial(cut, "dr")),
    (2, "the link to the production host is cut", partial(cut, "prod")),
    (1, "the bulk link stalls", partial(stall, "bulk")),
    (1, "the link to the production host stalls", partial(stall, "prod")),
    (1, "the link to the DR host stalls", partial(stall, "dr")),
    (2, "EIO on the next write to the original", partial(storage_error, "prod", "writing", EIO, 1)),
    (1, "the original's storage is full", partial(storage_error, "prod", "writing", ENOSPC, 3)),
    (2, "the next flush of the original fails", partial(storage_error, "prod", "flushing", EIO, 1)),
    (1, "EIO on the next read of the original", partial(storage_error, "prod", "reading", EIO, 1)),
    (1, "EIO on the next reading back", partial(storage_error, "prod", "reading back", EIO, 1)),
    (1, "EIO on the next read of the replica", partial(storage_error, "dr", "reading", EIO, 1)),
    (2, "the target's records cannot be written", partial(storage_error, "prod", "recording", ENOSPC, 2)),
    (1, "the source's records cannot be written", partial(storage_error, "dr", "recording", ENOSPC, 2)),
    (1, "the digest map cannot be written", partial(storage_error, "prod", "mapping", EIO, 1)),
    (2, "the next write to the original rots", partial(storage_error, "prod", "rotting", EIO, 1)),
    (3, "the original is started by hand", start_original),
    (1, "the replica is started by hand", start_replica),
    (2, "a dirty bitmap forgets a write", lose_dirty),
    (1, "the replica's guest ignores its shutdown", ignore_shutdown),
)


def plan(world: World, faults: int | None, only: tuple[str, ...] = ()) -> Plan:
    """The seed's: `faults` of them, or as many as it says; `only`: those whose name begins so."""
    random = world.random
    count = random.choice((0, 1, 1, 1, 2, 2, 3)) if faults is None else faults
    known = [fault for fault in FAULTS if fault[1].startswith(only or "")]
    chosen = random.choices(known, [weight for weight, _, _ in known], k=count)
    world.lies = any(act is lose_dirty for _, _, act in chosen)
    places = sorted(random.randint(1, HORIZON) for _ in chosen)
    return [
        (world.chaos.count + place, name, partial(act, world))
        for place, (_, name, act) in zip(places, chosen, strict=True)
    ]
