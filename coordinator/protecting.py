"""Whether a run can keep the original as it is, under a working snapshot, and what that takes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from coordinator.findings import Case, DiskCase
from coordinator.model import Estimate, Plan, Room, RunOptions
from coordinator.refusals_disk import FORMATS, MIB, place_of
from protocol.messages import Condition, Side

UNSAID: bool | None = False
"""What a run does that was not told: None, take the working snapshot where room and format allow; False, take none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the working snapshot is taken; `why_not`: why it is not, as the part of a sentence."""

    taken: bool
    why_not: str = ""


def needed_bytes(here: DiskCase, there: DiskCase, changed_bytes: float | None) -> int:
    """Room beside one disk of the original, in bytes.

    The overlay takes what the pass writes: what differs at most (`changed_bytes`, the upper bound of the estimate), or,
    where that was not estimated, all that the replica's images store. At commit as much again may be new to the base,
    as far as the base has holes left, for the overlay is there until all of it is merged. Its tables take 1/8192 of the
    disk and a MiB.
    """
    top = here.disk.chain[0]
    size_bytes = top.virtual_size_bytes
    stored_bytes = sum(image.allocated_bytes for image in there.disk.chain) or size_bytes
    most_bytes = min(size_bytes, stored_bytes if changed_bytes is None else int(changed_bytes))
    holes_bytes = max(0, size_bytes - top.allocated_bytes)
    return most_bytes + min(most_bytes, holes_bytes) + size_bytes // 8192 + MIB


def rooms_for_original(case: Case, estimate: Estimate | None) -> Iterator[Room]:
    """What the overlays of the original need, place by place."""
    changed = _changed(estimate)
    needed: dict[str, int] = {}
    free: dict[str, int] = {}
    for here, there in case.found_pairs():
        place = place_of(here.disk)
        disk_bytes = needed_bytes(here, there, changed.get(here.disk.target))
        needed[place] = needed.get(place, 0) + disk_bytes
        free[place] = min(free.get(place, here.disk.free_bytes), here.disk.free_bytes)
    for place, place_bytes in needed.items():
        yield Room(
            host=case.pair.original.host,
            place=place,
            purpose="overlays of the original, and merging them",
            needed_bytes=place_bytes,
            free_bytes=free[place],
        )


def _changed(estimate: Estimate | None) -> Mapping[str, float]:
    disks = () if estimate is None else estimate.disks
    return {disk.original: disk.changed_bytes.high for disk in disks if disk.changed_bytes is not None}


def verdict(case: Case, estimate: Estimate | None) -> Verdict:
    """Whether this run takes the working snapshot: as it was told, or else where everything allows it."""
    asked = UNSAID if case.options.protect_original is None else case.options.protect_original
    if asked is False:
        return Verdict(taken=False, why_not="no working snapshot of it is taken (--no-protect-original)")
    why_not = _impossible(case)
    if not why_not and asked is None:
        why_not = next(_without_room(case, estimate), "")
    return Verdict(taken=not why_not, why_not=why_not)


def _impossible(case: Case) -> str:
    vm = case.vm(Side.ORIGINAL)
    if vm is None:
        return "it was not found"
    fenced = vm.vm.fence.condition if vm.vm.fence is not None else None
    if Condition.TORN in (fenced, Condition(case.pair.flag.condition)):
        return "it is torn already, so that a working snapshot would give nothing back"
    if vm.vm.checkpoints:
        return f"it has checkpoints ({', '.join(vm.vm.checkpoints)}), with which libvirt takes no snapshot of a VM off"
    for disk in case.mapped(Side.ORIGINAL):
        if disk.disk.chain and disk.disk.chain[0].format not in FORMATS:
            return f"its disk {disk.disk.target} is neither raw nor qcow2"
    return ""


def _without_room(case: Case, estimate: Estimate | None) -> Iterator[str]:
    for room in rooms_for_original(case, estimate):
        if room.free_bytes is not None and room.free_bytes < room.needed_bytes:
            yield (
                f"its working snapshot may need {room.needed_bytes} bytes in {room.place}, where {room.free_bytes} are "
                "free"
            )


def protection_notes(case: Case, found: Verdict) -> Iterator[str]:
    """What a run costs in safety, or in speed, for the snapshot it takes or does not take."""
    name = case.pair.original.name
    if not found.taken:
        yield (
            f"The disks of the original {name} are overwritten in place, for {found.why_not}: from the first write on, "
            "until they are verified, no bootable copy of the original remains if the replica is lost."
        )
        return
    yield (
        f"The original {name} is kept as it is under a working snapshot: undo, cancel and rollback give it back byte "
        "for byte, and with it goes everything the run has copied, so that the next failback compares anew. What the "
        "original's guest writes between the switchover and an undo is dropped as well. Commit merges the snapshot "
        "into the disks."
    )
    raw = [here.disk.target for here, _ in case.found_pairs() if here.disk.chain[0].format == "raw"]
    if raw:
        yield (
            f"Until commit {', '.join(raw)} of the original {'are' if len(raw) > 1 else 'is'} written through a qcow2 "
            "overlay, which is slower than a raw disk; a digest map of before is not believed for it."
        )


def settled(options: RunOptions, plan: Plan) -> RunOptions:
    """The options of the run that this plan was made for, with what it has decided."""
    return replace(options, protect_original=plan.protects_original)
