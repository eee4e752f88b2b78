"""The plan: what a run would do, refuse and rest on, computed from findings and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.divergence import divergence_notes
from coordinator.estimates import estimate, last_rung
from coordinator.findings import Case, DiskCase, Findings
from coordinator.model import Pair, Plan, PlannedDisk, RunOptions, ShutdownPolicy
from coordinator.refusals import find_refusals
from coordinator.rooms import rooms
from protocol.messages import Condition, Power, Side

WHY_DIGESTS = (
    "no dirty bitmap and no digest map of the original is known to be usable for the first pass, so it compares what "
    "does not read as zero block by block on both sides (matched, xxh3-128)"
)
WHY_MAP = (
    "no earlier view of the replica is known to equal the original, so the first pass compares the replica with the "
    "digest map of the original (matched, xxh3-128)"
)


def make_plan(pair: Pair, findings: Findings, options: RunOptions) -> Plan:
    """What `start` would do with these options. Refusals come all at once; a plan without any may be started.

    Args:
        pair: the pair as the registry has it.
        findings: what both agents said, or why they did not.
        options: what the administrator chose.
    """
    case = Case(pair=pair, findings=findings, options=options)
    return Plan(
        pair=pair.name,
        refusals=find_refusals(case),
        disks=tuple(_planned(case, here, there) for here, there in case.found_pairs()),
        steps=tuple(_steps(case)),
        notes=(*divergence_notes(case), *_notes(case)),
        estimate=estimate(case),
        rooms=rooms(case),
    )


def _planned(case: Case, original: DiskCase, replica: DiskCase) -> PlannedDisk:
    mapped = any(s.map_known_bytes and s.original == original.disk.target for s in case.findings.samples)
    target, source = original.disk.chain[0], replica.disk.chain[0]
    return PlannedDisk(
        original=original.disk.target,
        replica=replica.disk.target,
        source_size_bytes=source.virtual_size_bytes,
        target_size_bytes=target.virtual_size_bytes,
        source_format=source.format,
        target_format=target.format,
        rung="map" if mapped else "digests",
        why_not_higher=WHY_MAP if mapped else WHY_DIGESTS,
    )


def _power(case: Case, side: Side) -> Power | None:
    vm = case.vm(side)
    return None if vm is None else vm.vm.power


def _steps(case: Case) -> Iterator[str]:
    original, replica, options = case.pair.original, case.pair.replica, case.options
    yield "put the pair's replication on hold: the executables in hooks.d/hold, each exit code obeyed"
    if _power(case, Side.ORIGINAL) is Power.RUNNING and options.power_off_original:
        yield f"power off the original {original.name} on {original.host}"
    yield f"fence the original {original.name}: its autostart off, its images locked"
    if _power(case, Side.REPLICA) is Power.OFF:
        yield f"fence the replica {replica.name}, which is off already, and take the protective snapshot"
        yield "one pass: make the original's disks equal the replica's, and verify"
    else:
        yield f"first pass while the replica {replica.name} on {replica.host} serves"
        yield f"switchover: shut the replica down ({_shutdown(options)}) and prove it off"
        yield "take the protective snapshot of the replica"
        yield "last pass: what the replica wrote since the first one, and verify"
    if options.power_on:
        yield f"point of no return: lift the original's fence and power {original.name} on"
    else:
        yield "point of no return: lift the original's fence and leave it off (--no-power-on)"
    yield f"Failback: until `failback commit {case.pair.name}`, `failback undo {case.pair.name}` takes everything back"


def _shutdown(options: RunOptions) -> str:
    force = options.shutdown_policy is ShutdownPolicy.FORCE
    late = "it is powered off by force" if force else "it stays on and the run rolls back"
    return f"within {options.shutdown_timeout_s:.0f} s, otherwise {late}"


def _notes(case: Case) -> Iterator[str]:
    original, replica = case.pair.original, case.pair.replica
    yield (
        f"The disks of the original {original.name} are overwritten in place: from the first write on, until they are "
        "verified, no bootable copy of the original remains if the replica is lost."
    )
    if case.pair.flag.condition == Condition.TORN.value:
        yield (
            "The original is torn already: an earlier run wrote to it and did not finish, so it must not boot until "
            "this one has."
        )
    if _power(case, Side.REPLICA) is Power.OFF:
        yield f"The replica {replica.name} is off: one pass is enough, and nobody is served meanwhile."
    elif _power(case, Side.REPLICA) is Power.RUNNING:
        yield from _last_pass_notes(case)
    if _power(case, Side.ORIGINAL) is Power.RUNNING and case.options.power_off_original:
        yield (
            f"The original {original.name} runs now; whatever it wrote since the failover is lost "
            "(--power-off-original)."
        )
    yield (
        "Every block written is read back past the page cache and compared with the BLAKE3 digest the source "
        "made of it "
        "before the original may start."
    )
    yield from _limit_notes(case)
    yield from _disk_notes(case)


def _last_pass_notes(case: Case) -> Iterator[str]:
    """What the last pass reads while nobody is served, by what is recorded of the replica's writes."""
    whole = [there.disk.target for _, there in case.found_pairs() if last_rung(case, there) == "map"]
    if not whole:
        yield "The last pass reads what the replica wrote since the pass before and no more: a bitmap or overlay tells."
        return
    yield (
        f"The last pass reads {', '.join(whole)} of the replica whole while nobody is served, because nothing records "
        "what is written there; the time of the first pass is a fair measure of the downtime."
    )


def _limit_notes(case: Case) -> Iterator[str]:
    limits = case.options.limits
    if limits.network_bytes_s is not None or limits.read_bytes_s is not None:
        yield (
            f"Limits: {limits.words}, all disks together. They hold in the last pass too, while nobody is served: "
            f"`failback limit {case.pair.name}` changes or lifts them while the run goes on."
        )


def _disk_notes(case: Case) -> Iterator[str]:
    for name in case.pair.excluded:
        yield f"{name} is left out (--exclude-disk): what it holds stays as it is on both sides."
    for here, there in case.found_pairs():
        extra_bytes = here.disk.chain[0].virtual_size_bytes - there.disk.chain[0].virtual_size_bytes
        if extra_bytes > 0 and case.options.allow_larger_target:
            yield f"Disk {here.disk.target} of the original is {extra_bytes} bytes larger: its tail is zeroed."
    vm = case.vm(Side.ORIGINAL)
    if vm is not None and vm.vm.checkpoints:
        yield (
            f"The original has checkpoints ({', '.join(vm.vm.checkpoints)}): let the next backup of it be a full "
            "one, their "
            "bitmaps may not know what a failback wrote."
        )
