"""The rounds of a run, read from its journal: which comes next, over which disks, and what the target equals. Pure.

A round is a view of the running replica, a pass, the end of the view, and the dropping of what nobody needs any more.
It is about all disks of the pair unless their scratch files were too large for the host: then rounds take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.entries import EntryKind, JournalEntry
from coordinator.plain import from_json
from coordinator.records import DiskEvidence, PassRecord, RoundFailure, ViewRecord
from coordinator.runlog import RunLog

ROUND_FAILED = "round_failed"
"""Name of the note that a round was given up."""
PREDICTED = "predicted"
"""Name of the note with what was predicted after a round, and when the switchover began."""
WAITING = "waiting"
"""Name of the note that says what the run waits for."""
SCRATCH_FULL = "scratch-full"
AGAIN_AFTER = frozenset({SCRATCH_FULL, "view-lost", "evidence"})
"""Codes of a round that failed for the view's sake: the next one may do better."""
MOST_FAILURES = 3
"""In a row, before the run stops and says what to do."""
LAST_PASS = "last_pass"


def open_view(number: int) -> str:
    """Name of the step that opens the view of that round."""
    return f"open_view:{number}"


def pass_of(number: int) -> str:
    """Name of its pass."""
    return f"pass:{number}"


def close_view(number: int) -> str:
    """Name of the step that closes its view."""
    return f"close_view:{number}"


def drop_checkpoints(number: int) -> str:
    """Name of the step that drops what it made superfluous."""
    return f"drop_checkpoints:{number}"


def is_pass(step: str | None) -> bool:
    """Whether the step of that name is a pass."""
    return step is not None and (step in (LAST_PASS, "verify_full") or step.startswith("pass:"))


def last_round(log: RunLog) -> int:
    """Number of the latest round that was begun; 0: none."""
    number = 0
    while log.intended(open_view(number + 1)):
        number += 1
    return number


def next_round(log: RunLog) -> int:
    """Number of the round to work on: one that was broken off, else a new one."""
    number = last_round(log)
    if number == 0:
        return 1
    given_up = _seq(log, close_view(number), EntryKind.DONE) > _seq(log, open_view(number), EntryKind.INTENT)
    if not given_up:
        return number
    # Where nothing is recorded there is nothing to drop, and that step is never carried out.
    to_drop = ever_tracked(log) and not log.is_done(drop_checkpoints(number))
    return number if log.is_done(pass_of(number)) and to_drop else number + 1


def _seq(log: RunLog, step: str, kind: EntryKind) -> int:
    return max((entry.seq for entry in log.of_step(step) if entry.kind is kind), default=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneRound:
    """A complete round.

    Attributes:
        epoch: of the process that opened its view.
        view, passed: what the steps left; `targets`: the replica's disks it was about.
        elapsed_s: of its pass, as the source counted.
    """

    number: int
    epoch: int
    view: ViewRecord
    passed: PassRecord
    targets: frozenset[str]

    @property
    def elapsed_s(self) -> float:
        """Of its pass, as the source counted."""
        return self.passed.source.elapsed_s


def done_rounds(log: RunLog) -> tuple[DoneRound, ...]:
    """Every round whose pass is complete, oldest first."""
    found: list[DoneRound] = []
    for number in range(1, last_round(log) + 1):
        view, passed = log.result(open_view(number), ViewRecord), log.result(pass_of(number), PassRecord)
        if view is None or passed is None or view.view != passed.view:
            continue
        opened = [entry for entry in log.of_step(open_view(number)) if entry.kind is EntryKind.DONE]
        found.append(
            DoneRound(
                number=number,
                epoch=opened[-1].epoch,
                view=view,
                passed=passed,
                targets=frozenset(disk.target for disk in passed.source.disks),
            )
        )
    return tuple(found)


def views_of(run: str, log: RunLog) -> frozenset[str]:
    """The views of this run whose pass was complete: the only ones that anything may be asked since."""
    return frozenset(done.passed.view for done in done_rounds(log) if done.passed.view.startswith(f"{run}-"))


def latest_views(log: RunLog) -> dict[str, str]:
    """The view that the latest complete pass made each disk (by the replica's target) equal."""
    return {target: done.passed.view for done in done_rounds(log) for target in sorted(done.targets)}


def latest_evidence(log: RunLog) -> dict[str, DiskEvidence]:
    """On what the latest complete pass of each disk rested, by the replica's target."""
    return {disk.replica: disk for done in done_rounds(log) for disk in done.passed.evidence}


def ever_tracked(log: RunLog) -> bool:
    """Whether any view of this run recorded what was written after it."""
    return any(
        disk.tracked
        for number in range(1, last_round(log) + 1)
        for view in log.results(open_view(number), ViewRecord)
        for disk in view.disks
    )


# --- which disks ----------------------------------------------------------------------------------------------------


def failures(log: RunLog, epoch: int) -> tuple[RoundFailure, ...]:
    """The rounds that this process gave up. Another process begins anew: a person who resumed may have made room."""
    return tuple(from_json(entry.result or "", RoundFailure) for entry in _given_up(log, epoch))


def _given_up(log: RunLog, epoch: int) -> tuple[JournalEntry, ...]:
    return tuple(entry for entry in log.notes(ROUND_FAILED) if entry.epoch == epoch)


def in_a_row(log: RunLog, epoch: int) -> tuple[RoundFailure, ...]:
    """The rounds that this process gave up since one was complete."""
    done = max(
        (_seq(log, pass_of(number), EntryKind.DONE) for number in range(1, last_round(log) + 1)),
        default=-1,
    )
    return tuple(from_json(e.result or "", RoundFailure) for e in _given_up(log, epoch) if e.seq > done)


def is_hopeless(failed: Sequence[RoundFailure], row: Sequence[RoundFailure]) -> bool:
    """Whether so many rounds failed that the next one would as well.

    Args:
        failed: what this process gave up, `row`: since its last complete round.
    """
    alone = [failure.targets for failure in failed if failure.code == SCRATCH_FULL and len(failure.targets) == 1]
    if any(alone.count(targets) >= MOST_FAILURES for targets in alone):
        return True
    return len([failure for failure in row if failure.code != SCRATCH_FULL]) >= MOST_FAILURES


def group_size(log: RunLog, epoch: int, disks: int) -> int:
    """How many disks a view may show: half as many as the smallest one whose scratch files were too large."""
    too_large = [len(failure.targets) for failure in failures(log, epoch) if failure.code == SCRATCH_FULL]
    return max(1, min([disks, *(size // 2 for size in too_large)]))


def next_group(log: RunLog, epoch: int, targets: Sequence[str]) -> tuple[str, ...]:
    """The replica's disks of the next round: those whose latest pass is longest ago, in the pair's order."""
    size = group_size(log, epoch, len(targets))
    age = dict.fromkeys(targets, 0)
    for done in done_rounds(log):
        for target in done.targets & age.keys():
            age[target] = done.number
    for failure in failures(log, epoch):
        # A disk that has just failed waits for its neighbours.
        for target in set(failure.targets) & age.keys():
            age[target] = max(age[target], failure.number)
    chosen = sorted(targets, key=lambda target: (age[target], targets.index(target)))[:size]
    return tuple(target for target in targets if target in chosen)


def is_fresh(log: RunLog, epoch: int, targets: Sequence[str]) -> bool:
    """Whether this very process has brought every disk up to date."""
    fresh = {target for done in done_rounds(log) if done.epoch == epoch for target in done.targets}
    return fresh >= set(targets)
