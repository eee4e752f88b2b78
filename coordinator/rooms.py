"""Room that a run needs on each host, against what is free there. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.estimates import estimate, map_bytes
from coordinator.findings import Case, Problem
from coordinator.model import Room
from coordinator.protecting import rooms_for_original
from coordinator.refusals_disk import place_of, room_needed_bytes
from protocol.messages import Power, Side, Tracking

Objection = tuple[str, str]
MAP_PLACE = "the agent's state folder"


def rooms(case: Case) -> tuple[Room, ...]:
    """What is needed where: for views and overlays beside the replica's disks, for those of the original where it is
    protected, for digest maps beside the original."""
    original = rooms_for_original(case, estimate(case)) if case.options.protect_original else ()
    return (*_beside_the_replica(case), *original, *_for_maps(case))


def _beside_the_replica(case: Case) -> Iterator[Room]:
    vm = case.vm(Side.REPLICA)
    if vm is None:
        return
    live = vm.vm.power is Power.RUNNING
    needed: dict[str, int] = {}
    free: dict[str, int] = {}
    for disk in case.mapped(Side.REPLICA):
        if not disk.disk.chain:
            continue
        place = place_of(disk.disk)
        # A live overlay takes what the guest writes from view to view, as a scratch file takes what it overwrites.
        overlaid = live and case.options.track is Tracking.OVERLAY and disk.disk.chain[0].format == "raw"
        disk_bytes = room_needed_bytes(disk.disk, live=live) * (2 if overlaid else 1)
        needed[place] = needed.get(place, 0) + disk_bytes
        free[place] = min(free.get(place, disk.disk.free_bytes), disk.disk.free_bytes)
    for place, needed_bytes in needed.items():
        yield Room(
            host=vm.ref.host,
            place=place,
            purpose=f"{'scratch files and ' if live else ''}overlays of the replica",
            needed_bytes=needed_bytes,
            free_bytes=free[place],
        )


def _for_maps(case: Case) -> Iterator[Room]:
    host = case.host(Side.ORIGINAL)
    needed = sum(map_bytes(here.disk.chain[0].virtual_size_bytes) for here, _ in case.found_pairs())
    if isinstance(host, Problem) or not needed:
        return
    free = host.state_free_bytes or None
    yield Room(
        host=host.host, place=MAP_PLACE, purpose="digest maps of the original", needed_bytes=needed, free_bytes=free
    )


def no_room(case: Case) -> Iterator[Objection]:
    """The refusal; its sentence names both numbers."""
    for room in rooms(case):
        if room.free_bytes is not None and room.free_bytes < room.needed_bytes:
            yield (
                room.place,
                f"Host {room.host} has {room.free_bytes} bytes free in {room.place} but {room.needed_bytes} are needed "
                f"there for {room.purpose}; make room there.",
            )
