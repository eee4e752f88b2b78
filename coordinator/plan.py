"""The plan: what a run would do, refuse and rest on, computed from findings and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from coordinator.divergence import divergence_notes
from coordinator.estimates import estimate, last_rung
from coordinator.evidence import HAS_BITMAPS
from coordinator.findings import Case, DiskCase, Findings
from coordinator.machine import missing_disks
from coordinator.model import Home, LateEvidence, Pair, Plan, PlannedDisk, RunOptions
from coordinator.planned_steps import is_off, planned_steps, power_of
from coordinator.protecting import protection_notes, verdict
from coordinator.refusals import find_refusals
from coordinator.refusals_machine import planned_differences
from coordinator.rooms import rooms
from coordinator.steps_sync import lifted_words
from protocol.messages import Condition, Power, Side, Tracking

WHY_DIGESTS = (
    "no earlier view of the replica is known to equal the original, and no digest map of the original was found that "
    "knows anything: what does not read as zero is read on both sides and matched (xxh3-128)"
)
WHY_MAP = (
    "no earlier view of the replica is known to equal the original: the replica is read whole and matched (xxh3-128) "
    "with the original's digest map"
)
WHY_UNTRACKED = "what the replica writes is not recorded (--track none)"


def make_plan(pair: Pair, findings: Findings, options: RunOptions) -> Plan:
    """What `start` would do with these options. Refusals come all at once; a plan without any may be started.

    Args:
        pair: the pair as the registry has it.
        findings: what both agents said, or why they did not.
        options: what the administrator chose.
    """
    case = _case(pair, findings, options)
    costs = estimate(case)
    protection = verdict(case, costs)
    case = replace(case, options=replace(options, protect_original=protection.taken))
    return Plan(
        pair=pair.name,
        refusals=find_refusals(case),
        disks=tuple(_planned(case, here, there) for here, there in case.found_pairs()),
        steps=tuple(planned_steps(case)),
        notes=(
            *(() if pair.former is not None else divergence_notes(case)),
            *(() if options.to.home is Home.HOST else protection_notes(case, protection)),
            *_notes(case),
        ),
        estimate=costs,
        rooms=rooms(case),
        differences=tuple(planned_differences(case)),
        protects_original=protection.taken,
    )


def _case(pair: Pair, findings: Findings, options: RunOptions) -> Case:
    """With `options.create_missing` the disks that the original lacks are in the pair, as they will be in the run."""
    case = Case(pair=pair, findings=findings, options=options)
    original, replica = case.vm(Side.ORIGINAL), case.vm(Side.REPLICA)
    if not options.create_missing or original is None or replica is None:
        return case
    created = missing_disks(pair.disks, pair.excluded, original.vm, replica.vm)
    return replace(case, pair=replace(pair, disks=(*pair.disks, *created)), created=created)


def _planned(case: Case, original: DiskCase, replica: DiskCase) -> PlannedDisk:
    mapped = any(s.map_known_bytes and s.original == original.disk.target for s in case.findings.samples)
    target, source = original.disk.chain[0], replica.disk.chain[0]
    last = last_rung(case, replica)
    return PlannedDisk(
        original=original.disk.target,
        replica=replica.disk.target,
        source_size_bytes=source.virtual_size_bytes,
        target_size_bytes=target.virtual_size_bytes,
        source_format=source.format,
        target_format=target.format,
        rung="map" if mapped else "digests",
        why_not_higher=WHY_MAP if mapped else WHY_DIGESTS,
        last_rung=last,
        why_last_not_higher=_why_not_tracked(case, replica) if last == "map" else "",
    )


def _why_not_tracked(case: Case, replica: DiskCase) -> str:
    """Why nothing will record what the replica writes to this disk."""
    if case.options.track is Tracking.NONE:
        return WHY_UNTRACKED
    format_ = replica.disk.chain[0].format
    if format_ == HAS_BITMAPS:
        return (
            "the image is qcow2 of the old version 2 (compat=0.10), which holds no dirty bitmaps, and overlays are for "
            f"raw disks; `qemu-img amend -f qcow2 -o compat=1.1 {replica.disk.chain[0].path}` while "
            f"{replica.vm.ref.name} is off makes it one that does"
        )
    return f"{format_} has no dirty bitmaps ({HAS_BITMAPS} has); --track overlay records what is written to it"


def _notes(case: Case) -> Iterator[str]:
    original, replica = case.pair.original, case.pair.replica
    if case.pair.flag.condition == Condition.TORN.value:
        yield (
            "The original is torn already: an earlier run wrote to it and did not finish, so it must not boot until "
            "this one has."
        )
    vm = case.vm(Side.ORIGINAL)
    if vm is not None and vm.vm.lifted is not None and vm.vm.fence is None:
        words = lifted_words(vm.vm.lifted, original.host)
        yield f"{words[:1].upper()}{words[1:]}."
    if is_off(case):
        yield f"The replica {replica.name} is off: one pass is enough, and nobody is served meanwhile."
    elif power_of(case, Side.REPLICA) is Power.RUNNING:
        yield from _last_pass_notes(case)
    if power_of(case, Side.ORIGINAL) is Power.RUNNING and case.options.power_off_original:
        yield (
            f"The original {original.name} runs now; whatever it wrote since the failover is lost "
            "(--power-off-original)."
        )
    yield (
        "What is written to the original is read back past the page cache, where its storage can do that, and compared "
        "with the BLAKE3 digest the source made of it, before the original may start."
    )
    if not case.options.audit:
        yield (
            "Without an audit (--no-audit) nothing would find what a record of the replica's writes may have missed"
            + (": nothing but --verify full does." if not case.options.verify_full else "; --verify full does.")
        )
    yield from _limit_notes(case)
    yield from _disk_notes(case)


def _last_pass_notes(case: Case) -> Iterator[str]:
    """What the last pass reads while nobody is served, by what is recorded of the replica's writes."""
    rungs = {there.disk.target: last_rung(case, there) for _, there in case.found_pairs()}
    whole = [target for target, rung in rungs.items() if rung == "map"]
    tracked = [target for target, rung in rungs.items() if rung != "map"]
    if tracked:
        yield (
            f"Of {', '.join(tracked)} the last pass reads what the replica wrote since the pass before, and no more. "
            "Where that record is lost when the replica goes off, it reads the replica whole; "
            + _late_words(case.options)
        )
    if whole:
        yield (
            f"Of {', '.join(whole)} the last pass reads the replica whole while nobody is served, since nothing "
            "records what is written there, and the original where its digest map does not know a block."
        )


def _late_words(options: RunOptions) -> str:
    if options.late_evidence is LateEvidence.PROCEED:
        return "the switchover goes on, however long that takes (--late-evidence proceed)."
    longer = "much longer than expected" if options.max_downtime_s is None else "longer than --max-downtime"
    return f"if that makes the downtime {longer}, the replica goes back into service first (--late-evidence return)."


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
