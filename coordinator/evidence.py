"""On what a pass rests, disk by disk: the cheapest rung that both sides prove. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence

from coordinator.records import DiskEvidence, DiskSizes
from protocol.messages import TargetEvidence, ViewedDisk

HAS_BITMAPS = "qcow2"
"""The only format with persistent dirty bitmaps; what a disk of another one knows, it knows from a live overlay."""


class Rung(enum.Enum):
    """How a block is known not to need sending, the cheapest first."""

    BITMAP = "bitmap"  # a dirty bitmap says what was written since a view that the target equals
    OVERLAY = "overlay"  # a live overlay does
    MAP = "map"  # the target's digest map stands for its blocks: only the source is read
    DIGESTS = "digests"  # both sides are read


HEIGHT = {Rung.BITMAP.value: 3, Rung.OVERLAY.value: 3, Rung.MAP.value: 2, Rung.DIGESTS.value: 0}
"""What falls and what rises; a rung this version does not know is the lowest."""


def unproven(targets: Sequence[str], why: str) -> tuple[TargetEvidence, ...]:
    """What is known of a target that cannot or will not say: nothing."""
    return tuple(
        TargetEvidence(target=target, equals=None, why_not=why, map_seed=None, map_known_bytes=0, why_no_map=why)
        for target in targets
    )


def choose(disk: DiskSizes, viewed: ViewedDisk, target: TargetEvidence | None) -> DiskEvidence:
    """The rung for one disk of a pass.

    Args:
        disk: its names and format.
        viewed: what the source's view knows of it.
        target: what the target's durable record says; None: nothing.
    """
    since, why = _proven_since(viewed, target)
    if since is not None:
        # An overlay of ours is qcow2 as well, so that the format alone does not tell; the view does.
        by_format = Rung.BITMAP if disk.source_format in ("", HAS_BITMAPS) else Rung.OVERLAY
        told = {rung.value: rung for rung in (Rung.BITMAP, Rung.OVERLAY)}
        rung = told.get(viewed.rung, by_format)
        return _evidence(disk, rung, since=since, map_seed=None if target is None else target.map_seed)
    if target is not None and target.map_seed is not None and target.map_known_bytes > 0:
        return _evidence(disk, Rung.MAP, map_seed=target.map_seed, why=why)
    no_map = "" if target is None else target.why_no_map.rstrip(".")
    if no_map and no_map != why:
        why = f"{why}; and no digest map: {no_map}"
    # A map that knows nothing yet is filled by the pass, if that makes its digests with the map's seed.
    return _evidence(disk, Rung.DIGESTS, why=why, map_seed=None if target is None else target.map_seed)


def choose_all(
    disks: Sequence[DiskSizes], viewed: Sequence[ViewedDisk], targets: Sequence[TargetEvidence]
) -> tuple[DiskEvidence, ...]:
    """The rungs of every disk that the view shows."""
    views = {disk.target: disk for disk in viewed}
    known = {evidence.target: evidence for evidence in targets}
    return tuple(choose(disk, views[disk.replica], known.get(disk.original)) for disk in disks if disk.replica in views)


def without(evidence: Sequence[DiskEvidence], why: str) -> tuple[DiskEvidence, ...]:
    """The same disks on full digests, because an agent does not accept what was said of them."""
    return tuple(
        DiskEvidence(
            original=disk.original,
            replica=disk.replica,
            rung=Rung.DIGESTS.value,
            since=None,
            map_seed=disk.map_seed,  # the target judges its own map
            why_not_higher=why,
        )
        for disk in evidence
    )


def fallen(before: Mapping[str, DiskEvidence], now: Sequence[DiskEvidence]) -> tuple[DiskEvidence, ...]:
    """The disks whose rung is lower than in their pass before (`before`: by the replica's target)."""
    return tuple(
        disk
        for disk in now
        if disk.replica in before and HEIGHT.get(disk.rung, 0) < HEIGHT.get(before[disk.replica].rung, 0)
    )


def _proven_since(viewed: ViewedDisk, target: TargetEvidence | None) -> tuple[str | None, str]:
    """The view since which both sides know, or why there is none."""
    if target is None or target.equals is None:
        why = "the target has not said what its disk equals" if target is None else target.why_not
        return None, why.rstrip(".") or "the target does not prove what its disk equals"
    if viewed.since is None:
        return None, viewed.why_not.rstrip(".") or "the source keeps no record of what was written"
    if viewed.since != target.equals:
        return None, f"the source knows what was written since {viewed.since}, the target equals {target.equals}"
    return viewed.since, ""


def _evidence(
    disk: DiskSizes, rung: Rung, *, since: str | None = None, map_seed: int | None = None, why: str = ""
) -> DiskEvidence:
    return DiskEvidence(
        original=disk.original,
        replica=disk.replica,
        rung=rung.value,
        since=since,
        map_seed=map_seed,
        why_not_higher=why,
    )
