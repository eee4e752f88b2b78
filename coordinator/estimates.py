"""What a run will cost, from samples of the disks: bytes, seconds and room, each with how sure it is. Pure.

Nothing here is evidence. A running replica writes while it is sampled, storage is faster or slower tomorrow, and nobody
knows yet what the guest will write before the switchover: where a number cannot be known, none is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from coordinator.evidence import HAS_BITMAPS
from coordinator.findings import Case, DiskCase, DiskSample, Problem
from coordinator.model import DiskEstimate, Estimate, Interval
from protocol.messages import BlockSamples, Power, Side, Tracking

DIGEST_BYTES = 16
BLOCK_BYTES = 64 * 1024
MAP_PART = BLOCK_BYTES // DIGEST_BYTES
"""A digest map takes this part of its disk: 16 bytes for each 64 KiB."""
Z_95 = 1.96
"""Of the normal distribution: 95 of 100 intervals hold the true share."""
AROUND_S = 3.0
"""What a switchover takes besides its copying and the guest's own shutdown: fences, snapshot, views, power-on."""


def share(differing: int, sampled: int) -> Interval:
    """The share of blocks that differ, with the Wilson interval at 95 %: honest for small shares and few samples, where
    the usual interval claims to know that nothing differs."""
    if sampled == 0:
        return Interval(low=0.0, likely=0.0, high=1.0)
    found, spread = differing / sampled, Z_95 * Z_95 / sampled
    middle = (found + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(found * (1 - found) / sampled + spread / (4 * sampled)) / (1 + spread)
    return Interval(low=max(0.0, min(found, middle - half)), likely=found, high=min(1.0, max(found, middle + half)))


def differing_blocks(source: BlockSamples, target: BlockSamples) -> tuple[int, int]:
    """How many of the sampled blocks differ, and how many both sides had the time to read."""
    count = min(len(source.digests), len(target.digests)) // DIGEST_BYTES
    places = range(0, count * DIGEST_BYTES, DIGEST_BYTES)
    differ = sum(source.digests[at : at + DIGEST_BYTES] != target.digests[at : at + DIGEST_BYTES] for at in places)
    return differ, count


def map_bytes(size_bytes: int) -> int:
    """What the digest map of a disk takes."""
    return -(-size_bytes // BLOCK_BYTES) * DIGEST_BYTES


def last_rung(case: Case, replica: DiskCase) -> str:
    """The rung that the last pass of a disk is to be expected to rest on; empty where the replica is off already, so
    that there is one pass alone."""
    track = case.options.track
    if replica.vm.vm.power is Power.OFF:
        return ""
    if track is Tracking.NONE:
        return "map"
    image = replica.disk.chain[0]
    if image.format == HAS_BITMAPS:
        # One of version 2 has none, and overlays are made over raw disks alone.
        return "map" if image.keeps_bitmaps is False else "bitmap"
    return "overlay" if track is Tracking.OVERLAY else "map"


def estimate(case: Case) -> Estimate | None:
    """What the run would cost; None where no samples were asked for."""
    samples = {sample.original: sample for sample in case.findings.samples}
    if not samples:
        return None
    disks = tuple(
        _disk(case, here, there, samples[here.disk.target])
        for here, there in case.found_pairs()
        if here.disk.target in samples
    )
    return Estimate(
        disks=disks,
        first_pass_s=_sum([disk.first_pass_s for disk in disks]),
        downtime_s=_downtime(case, disks),
        sentence=_sentence(case, disks),
    )


def _disk(case: Case, here: DiskCase, there: DiskCase, sample: DiskSample) -> DiskEstimate:
    size_bytes = there.disk.chain[0].virtual_size_bytes
    source, target = sample.source, sample.target
    rung = last_rung(case, there)
    if isinstance(source, Problem) or isinstance(target, Problem):
        problem = next(side for side in (source, target) if isinstance(side, Problem))
        return DiskEstimate(
            original=sample.original,
            replica=sample.replica,
            why_not=problem.sentence,
            last_rung=rung,
            map_bytes=map_bytes(size_bytes),
        )
    differ, sampled = differing_blocks(source, target)
    changed = share(differ, sampled) if source.data_bytes else Interval(low=0.0, likely=0.0, high=0.0)
    changed_bytes = changed.times(source.data_bytes)
    # The target reads what it has data in and the source too; what its map knows it does not read.
    target_bytes = max(0, min(target.data_bytes, source.data_bytes) - sample.map_known_bytes)
    read_s = _read_s(case, source, source.data_bytes), _read_s(case, target, target_bytes)
    first_s = None if None in read_s else _first_pass_s(case, read_s, target, changed_bytes)
    tracked = rung in ("bitmap", "overlay")
    return DiskEstimate(
        original=sample.original,
        replica=sample.replica,
        why_not="",
        sampled_blocks=sampled,
        differing_blocks=differ,
        source_read_bytes=source.data_bytes,
        target_read_bytes=target_bytes,
        changed_bytes=changed_bytes,
        first_pass_s=first_s,
        last_rung=rung,
        last_pass_s=0.0 if tracked else read_s[0] if rung else None,
        map_bytes=map_bytes(size_bytes),
    )


def _read_s(case: Case, samples: BlockSamples, size_bytes: int) -> float | None:
    """Seconds to read so much at the pace that was measured, or at the limit where that is lower."""
    pace, limit = samples.read_bytes_s, case.options.limits.read_bytes_s
    if limit is not None:
        pace = min(pace, limit) if pace > 0 else float(limit)
    if size_bytes == 0:
        return 0.0
    return size_bytes / pace if pace > 0 else None


def _first_pass_s(
    case: Case, read_s: Sequence[float | None], target: BlockSamples, changed_bytes: Interval
) -> Interval:
    """Both sides read at the same time; what differs is sent, written and read back."""
    reading_s = max(seconds or 0.0 for seconds in read_s)
    network = case.options.limits.network_bytes_s

    def seconds(changed: float) -> float:
        sending_s = changed / network if network is not None else 0.0
        writing_s = 2 * changed / target.read_bytes_s if target.read_bytes_s > 0 else 0.0
        return max(reading_s, sending_s) + writing_s

    return Interval(
        low=seconds(changed_bytes.low), likely=seconds(changed_bytes.likely), high=seconds(changed_bytes.high)
    )


def _sum(parts: Sequence[Interval | None]) -> Interval | None:
    """Disks share their storage, so their times are added; None as soon as one is not known."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not parts:
        return None
    return Interval(
        low=sum(part.low for part in known),
        likely=sum(part.likely for part in known),
        high=sum(part.high for part in known),
    )


def _downtime(case: Case, disks: Sequence[DiskEstimate]) -> float | None:
    """Without the guest's own shutdown; None where it cannot be told, or nobody is served already."""
    vm = case.vm(Side.REPLICA)
    if vm is None or vm.vm.power is not Power.RUNNING or not disks:
        return None
    parts = [disk.last_pass_s for disk in disks]
    return None if None in parts else AROUND_S + sum(part for part in parts if part is not None)


def _sentence(case: Case, disks: Sequence[DiskEstimate]) -> str:
    """What the numbers leave out."""
    whole = [disk.replica for disk in disks if disk.last_rung == "map"]
    said = "the guest's own shutdown and boot are not in the downtime, nor what it writes in the last minutes"
    if case.options.limits.network_bytes_s is None:
        said += "; the network was not measured and counts as fast enough"
    vm = case.vm(Side.REPLICA)
    if whole and vm is not None and vm.vm.power is Power.RUNNING:
        said += f"; the last pass reads {', '.join(whole)} of the replica whole while nobody is served"
        if case.options.track is Tracking.BITMAP:
            said += " (--track overlay would not)"
    return said
