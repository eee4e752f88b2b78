"""The closing report of a run: what was compared, changed, sent and proven, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator import rounds
from coordinator.entries import EntryKind, Phase, RunRecord
from coordinator.evidence import Rung
from coordinator.evidence_words import evidence_sentence
from coordinator.model import DiskPair, State
from coordinator.plain import from_json
from coordinator.records import CheckRecord, PassRecord, PowerOffRecord, Prediction, SurveyRecord
from coordinator.rounds import PREDICTED
from coordinator.runlog import RunLog
from protocol.messages import Power

TRACKED = frozenset({Rung.BITMAP.value, Rung.OVERLAY.value})
"""Rungs of which the source knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskLine:
    """One disk in one pass, both sides' books together, in bytes.

    Attributes:
        original, replica: its target names.
        pass_name: ``pass:1``, ``pass:2`` … or ``last_pass``; `view`: the view the original's disk was made equal to.
        size_bytes: the replica's size.
        compared_bytes: read and hashed at the source.
        zero_bytes: known to read as zero at the source, not read.
        changed_bytes: what differed, of blocks or pages.
        sent_bytes: what the disk's connections carried, both ways, before TLS.
        written_bytes, zeroed_bytes: what the target wrote and zeroed.
        verified_bytes: read back at the target and proven equal.
        past_cache: whether the read-back went past the page cache.
        rung, why_not_higher: the rung of evidence, and why no higher one.
        frames: how many frames of data were sent, by how they were stored (``raw``, ``zstd 1`` …).
        stored_bytes: what `changed_bytes` became in them.
        reconnects: how often the link was lost and came back; resumed_bytes: proven by an earlier attempt, and not done
            again.
        lanes: connections used; source_access, target_access: how either side read its disk.
    """

    original: str
    replica: str
    pass_name: str
    view: str
    size_bytes: int
    compared_bytes: int
    zero_bytes: int
    changed_bytes: int
    sent_bytes: int
    written_bytes: int
    zeroed_bytes: int
    verified_bytes: int
    past_cache: bool
    rung: str
    why_not_higher: str
    frames: dict[str, int]
    stored_bytes: int
    lanes: int
    source_access: str
    target_access: str
    reconnects: int = 0
    resumed_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLine:
    """One step with the seconds it took. `undone`: this line is its taking back. `outcome`: done or failed."""

    step: str
    sentence: str
    undone: bool
    outcome: str
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosingReport:
    """What the journal says of one run.

    Attributes:
        outcome: None while unfinished, else ``committed``, ``undone``, ``cancelled`` or ``rolled-back``.
        started_s, ended_s: wall time, seconds since 1970.
        downtime_s: from the order to power the replica off until the original ran (or the replica ran again, or the
            state Failback was reached without power-on); None when the replica was not touched or is still off.
        audit, verify_full: what the comparisons of whole disks found; None where none was completed.
        evidence: one sentence on what the blocks that were not written rest on.
        predicted: the downtime that was expected when the switchover began; None before that, or where the replica was
            off already.
        guest_s: how much of the downtime was the guest's own shutdown.
    """

    pair: str
    run: str
    outcome: str | None
    reason: str
    started_s: float
    ended_s: float | None
    downtime_s: float | None
    disks: tuple[DiskLine, ...]
    steps: tuple[StepLine, ...]
    evidence: str
    audit: CheckRecord | None = None
    verify_full: CheckRecord | None = None
    predicted: Prediction | None = None
    guest_s: float | None = None


def closing_report(run: RunRecord, disks: tuple[DiskPair, ...], log: RunLog) -> ClosingReport:
    """The report of a run, from its journal."""
    names = [rounds.pass_of(number) for number in range(1, rounds.last_round(log) + 1)]
    lines = tuple(
        _disk_line(name, passed, pair)
        for name in (*names, rounds.LAST_PASS)
        for passed in log.results(name, PassRecord)
        for pair in _disks_of(log) or disks
        if any(report.target == pair.replica for report in passed.source.disks)
    )
    return ClosingReport(
        pair=run.pair,
        run=run.id,
        outcome=run.outcome,
        reason=run.reason,
        started_s=run.started_s,
        ended_s=run.ended_s,
        downtime_s=downtime_s(log),
        disks=lines,
        steps=_step_lines(log),
        evidence=evidence_sentence(_final(lines)),
        audit=log.result("audit", CheckRecord),
        verify_full=log.result("verify_full", CheckRecord),
        predicted=predicted(log),
        guest_s=_guest_s(log),
    )


def _disks_of(log: RunLog) -> tuple[DiskPair, ...]:
    """The disks as the run had them: once it is taken back, the pair may have another original again."""
    survey = log.result("survey", SurveyRecord)
    return () if survey is None else tuple(DiskPair(original=d.original, replica=d.replica) for d in survey.disks)


def predicted(log: RunLog) -> Prediction | None:
    """The downtime that was expected when the latest switchover began."""
    begun = log.seq_of_state(State.SWITCHING.value)
    notes = [entry for entry in log.notes(PREDICTED) if entry.seq < begun and entry.result]
    return from_json(notes[-1].result or "", Prediction) if notes else None


def _guest_s(log: RunLog) -> float | None:
    record = log.result("replica_off", PowerOffRecord)
    return record.guest_s if record is not None and record.was_running else None


def downtime_s(log: RunLog, now_s: float | None = None) -> float | None:
    """Seconds nobody was served, by the journal's wall clock; with `now_s` also while it lasts.

    None when the run did not take the replica out of service, or (without `now_s`) it still is. Where the replica came
    back into service and went off again, of the last time.
    """
    surveys = log.results("survey", SurveyRecord)
    since = log.seq_of_state(State.SYNCING.value)
    begun = next((e for e in log.of_step("replica_off") if e.kind is EntryKind.INTENT and e.seq > since), None)
    if begun is None:
        begun = next((e for e in reversed(log.of_step("replica_off")) if e.kind is EntryKind.INTENT), None)
    if begun is None or not any(found.replica_power is not Power.OFF for found in surveys):
        return None
    served = [
        e.at_s
        for e in (
            next((e for e in log.of_step("original_on") if e.kind is EntryKind.DONE), None),
            log.moved(State.FAILBACK.value),
            *(e for e in log.of_step("replica_off", Phase.UNDO) if e.kind is EntryKind.DONE),
        )
        if e is not None and e.seq >= begun.seq
    ]
    end_s = min(served) if served else now_s
    # A wall clock that was set back would make it negative.
    return None if end_s is None else max(0.0, end_s - begun.at_s)


def _disk_line(name: str, passed: PassRecord, pair: DiskPair) -> DiskLine:
    here = next(report for report in passed.source.disks if report.target == pair.replica)
    there = next(report for report in passed.target.disks if report.target == pair.original)
    chosen = next((disk for disk in passed.evidence if disk.replica == pair.replica), None)
    # What was written is known at the source, what the map spared at the target.
    rung = here.rung if here.rung in TRACKED else there.rung
    return DiskLine(
        original=pair.original,
        replica=pair.replica,
        pass_name=name,
        view=passed.view,
        size_bytes=here.size_bytes,
        compared_bytes=here.compared_bytes,
        zero_bytes=here.zero_bytes,
        changed_bytes=here.changed_bytes,
        sent_bytes=here.wire_bytes,
        written_bytes=there.written_bytes,
        zeroed_bytes=there.zeroed_bytes,
        verified_bytes=there.verified_bytes,
        past_cache=there.past_cache,
        rung=rung,
        why_not_higher=("" if chosen is None else chosen.why_not_higher) or there.why_not_higher,
        frames=here.frames,
        stored_bytes=here.stored_bytes,
        lanes=here.lanes,
        source_access=here.access,
        target_access=there.access,
        reconnects=max(here.reconnects, there.reconnects),
        resumed_bytes=max(here.resumed_bytes, there.resumed_bytes),
    )


def _step_lines(log: RunLog) -> tuple[StepLine, ...]:
    sentences = {(e.step, e.phase): e.sentence for e in log.entries if e.kind is EntryKind.INTENT}
    return tuple(
        StepLine(
            step=e.step,
            sentence=sentences.get((e.step, e.phase), ""),
            undone=e.phase is Phase.UNDO,
            outcome=e.kind.value,
            elapsed_s=e.elapsed_s or 0.0,
        )
        for e in log.entries
        if e.kind in (EntryKind.DONE, EntryKind.FAILED)
    )


def _final(lines: tuple[DiskLine, ...]) -> tuple[DiskLine, ...]:
    """The lines that tell what the original rests on at the end: of the last pass, if there was one."""
    return tuple(line for line in lines if line.pass_name == rounds.LAST_PASS) or lines
