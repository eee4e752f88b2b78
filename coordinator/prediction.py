"""How long nobody would be served if the switchover began now, from what this run has measured so far. Pure.

Downtime is the guest's own shutdown, the orders around the last pass, and the last pass: what the guest wrote since the
last view, copied as fast as changes were copied before; a disk of which nobody records what was written is read whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.context import LIFT_ORIGINAL_FENCE
from coordinator.entries import EntryKind, JournalEntry, Phase
from coordinator.model import RunLimits
from coordinator.plain import from_json
from coordinator.records import PowerOffRecord, Prediction, TrackingRecord
from coordinator.rounds import DoneRound, close_view, done_rounds, last_round, open_view
from coordinator.runlog import RunLog

GUEST_DEFAULT_S = 10.0
"""A guest's shutdown while it was never seen: Linux servers take 3 to 30 s."""
COPY_DEFAULT_BYTES_S = 100e6
"""Changes copied a second while none were worth measuring: a 1 Gbit/s link."""
READ_DEFAULT_BYTES_S = 200e6
"""A disk read whole a second, while none was: a slow array."""
PASS_DEFAULT_S = 0.3
"""A pass that has nothing to copy: connections, flush, reports."""
MEASURABLE_BYTES = 8 << 20
"""Below this a pass measures its beginning and end, not the copying."""
INTERVALS = 3
"""So many of the latest intervals between two views tell how fast the guest writes."""
DEFAULT_STEP_S: Mapping[str, float] = {
    "prove_replica_off": 0.1,
    "fence_replica": 0.2,
    "read_tracking": 0.2,
    "drop_checkpoints": 0.1,
    "protect_replica": 0.2,
    "open_last_view": 0.3,
    "close_last_view": 0.1,
    "verify": 0.1,
    LIFT_ORIGINAL_FENCE: 0.1,
    "original_on": 0.7,
}
"""The orders around the last pass, by the name of their step, while nothing like them was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a prediction rests on, beside the journal.

    Attributes:
        limits: in force now.
        guest_s: how long this guest's last shutdown took; None: never seen.
        now_s: the monotonic clock of this process; `epoch`: under which it works.
        step_s: how long the orders around a last pass took the last time, by the name of their step; a step that no
            switchover before this one has come to is missing.
    """

    limits: RunLimits
    guest_s: float | None
    now_s: float
    epoch: int
    step_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the rounds have measured.

    Attributes:
        copy_bytes_s: changes copied a second; `read_bytes_s`: a disk read whole.
        pass_s: of a pass with nothing to copy.
        dirty_bytes_s: by the replica's disk: what the guest writes a second; a disk whose rate is not known is missing.
        since_s: by disk: how long ago its latest view was opened, where this process knows.
        whole_bytes: by disk: what a pass without a record of what was written reads.
        tracked: the disks of which what is written since their latest view is recorded.
    """

    copy_bytes_s: float
    read_bytes_s: float
    pass_s: float
    dirty_bytes_s: Mapping[str, float]
    since_s: Mapping[str, float]
    whole_bytes: Mapping[str, int]
    tracked: frozenset[str]


def measure(log: RunLog, known: Known) -> Measured:
    """What the rounds of this run say of speeds."""
    done = done_rounds(log)
    latest = {target: round_ for round_ in done for target in round_.targets}
    return Measured(
        copy_bytes_s=_capped(_copy_rate(done), known.limits),
        read_bytes_s=_limited(_read_rate(done), known.limits.read_bytes_s),
        pass_s=_pass_overhead_s(done),
        dirty_bytes_s=_dirty_rates(done, known.epoch),
        since_s={t: max(0.0, known.now_s - r.view.opened_s) for t, r in latest.items() if r.epoch == known.epoch},
        whole_bytes=_whole_bytes(done),
        tracked=frozenset(
            disk.target
            for target, round_ in latest.items()
            for disk in round_.view.disks
            if disk.target == target and disk.tracked
        ),
    )


def predict(log: RunLog, known: Known, measured: Measured, *, read: TrackingRecord | None = None) -> Prediction:
    """The downtime if the switchover began now.

    Args:
        read: what the records said after the replica went off, where that is known already.
    """
    exact = {disk.target: disk.dirty_bytes if disk.since is not None else None for disk in read.disks} if read else {}
    delta: dict[str, float] = {}
    whole: list[str] = []
    for target in sorted(measured.whole_bytes):
        delta[target] = measured.dirty_bytes_s.get(target, 0.0) * measured.since_s.get(target, 0.0)
        if target in exact and exact[target] is not None:
            delta[target] = float(exact[target] or 0)
        elif target in exact or target not in measured.tracked:
            whole.append(target)
    pass_s = pass_seconds(measured, delta=sum(delta.values()), whole=whole)
    fixed_s, fixed_measured = fixed_seconds(log, known.step_s)
    rates = measured.dirty_bytes_s
    return Prediction(
        guest_s=GUEST_DEFAULT_S if known.guest_s is None else known.guest_s,
        guest_seen=known.guest_s is not None,
        fixed_s=fixed_s,
        fixed_measured=fixed_measured,
        pass_s=pass_s,
        delta_bytes=round(sum(delta.values())),
        read_bytes=round(sum(measured.whole_bytes[t] if t in whole else delta[t] for t in delta)),
        whole=tuple(whole),
        dirty_bytes_s=sum(rates.values()) if rates and set(rates) >= set(measured.whole_bytes) else None,
        copy_bytes_s=measured.copy_bytes_s,
    )


def pass_seconds(measured: Measured, *, delta: float, whole: Sequence[str]) -> float:
    """How long a pass takes that copies `delta` bytes and reads those disks whole."""
    read_s = sum(measured.whole_bytes[target] for target in whole) / measured.read_bytes_s
    return measured.pass_s + read_s + delta / measured.copy_bytes_s


def fixed_seconds(log: RunLog, earlier_s: Mapping[str, float]) -> tuple[float, bool]:
    """The orders around the last pass, and whether any of them was measured: in this run, or (`earlier_s`) before."""
    number = last_round(log)
    alike = {
        "fence_replica": ("fence_original",),
        "open_last_view": tuple(open_view(n) for n in range(1, number + 1)),
        "close_last_view": tuple(close_view(n) for n in range(1, number + 1)),
    }
    total, measured = 0.0, False
    for step, default_s in DEFAULT_STEP_S.items():
        took = _took_s(log, (step,))
        if took is None:
            took = earlier_s.get(step)
        if took is None:
            took = _took_s(log, alike.get(step, ()))
        total += default_s if took is None else took
        measured = measured or took is not None
    return total, measured


def shutdown_seen_s(entries: Sequence[JournalEntry]) -> float | None:
    """How long the pair's replica took to go off the last time it did so by itself, in any of its runs."""
    seen: float | None = None
    for entry in entries:
        if entry.step == "replica_off" and entry.kind is EntryKind.DONE and entry.phase is Phase.DO and entry.result:
            record = from_json(entry.result, PowerOffRecord)
            if record.was_running and record.guest_s > 0:
                seen = record.guest_s
    return seen


def _took_s(log: RunLog, steps: Sequence[str]) -> float | None:
    """The shortest of the latest times these steps were done: none of them waits for anything but its host."""
    took = [
        entry.elapsed_s
        for step in steps
        for entry in log.of_step(step)[-1:]
        if entry.kind is EntryKind.DONE and entry.elapsed_s is not None
    ]
    return min(took) if took else None


def dirty_bytes(done: DoneRound, target: str | None = None) -> int:
    """What of the disk (or of all) a pass found written since the pass before."""
    tracked = {disk.replica for disk in done.passed.evidence if disk.since is not None}
    return sum(
        max(report.changed_bytes, report.compared_bytes if report.target in tracked else 0)
        for report in done.passed.source.disks
        if target in (None, report.target)
    )


def _is_tracked(done: DoneRound) -> bool:
    return all(disk.since is not None for disk in done.passed.evidence) and bool(done.passed.evidence)


def _copy_rate(done: Sequence[DoneRound]) -> float:
    """The latest pass that copied nothing but changes is the best measure; else whichever copied fastest."""
    worth = [(d, dirty_bytes(d) / d.elapsed_s) for d in done if dirty_bytes(d) >= MEASURABLE_BYTES and d.elapsed_s > 0]
    tracked = [rate for d, rate in worth if _is_tracked(d)]
    if tracked:
        return tracked[-1]
    return max((rate for _, rate in worth), default=COPY_DEFAULT_BYTES_S)


def _read_rate(done: Sequence[DoneRound]) -> float:
    rates = [
        compared / d.elapsed_s
        for d in done
        if d.elapsed_s > 0 and (compared := sum(r.compared_bytes for r in d.passed.source.disks)) >= MEASURABLE_BYTES
    ]
    return max(rates, default=READ_DEFAULT_BYTES_S)


def _pass_overhead_s(done: Sequence[DoneRound]) -> float:
    small = [d.elapsed_s for d in done if _is_tracked(d) and dirty_bytes(d) < MEASURABLE_BYTES]
    return min(small, default=PASS_DEFAULT_S)


def _dirty_rates(done: Sequence[DoneRound], epoch: int) -> dict[str, float]:
    """Between two views that one process opened; another process cannot tell how much time lay between."""
    found: dict[str, list[tuple[int, float]]] = {}
    before: dict[str, DoneRound] = {}
    for round_ in done:
        if round_.epoch != epoch:
            continue
        for target in sorted(round_.targets):
            earlier = before.get(target)
            if earlier is not None and round_.view.opened_s > earlier.view.opened_s:
                between_s = round_.view.opened_s - earlier.view.opened_s
                found.setdefault(target, []).append((dirty_bytes(round_, target), between_s))
            before[target] = round_
    latest = {target: intervals[-INTERVALS:] for target, intervals in found.items()}
    return {t: sum(size for size, _ in i) / sum(seconds for _, seconds in i) for t, i in latest.items()}


def _whole_bytes(done: Sequence[DoneRound]) -> dict[str, int]:
    """What a whole pass reads of each disk, as the latest whole one did; else all that is not known to be zero."""
    found: dict[str, int] = {}
    for round_ in done:
        tracked = {disk.replica for disk in round_.passed.evidence if disk.since is not None}
        for report in round_.passed.source.disks:
            if report.target not in tracked:
                found[report.target] = report.compared_bytes
            else:
                found.setdefault(report.target, report.size_bytes)
    return found


def _limited(bytes_s: float, limit_bytes_s: int | None) -> float:
    return bytes_s if limit_bytes_s is None else min(bytes_s, float(limit_bytes_s))


def _capped(bytes_s: float, limits: RunLimits) -> float:
    return _limited(_limited(bytes_s, limits.network_bytes_s), limits.read_bytes_s)
