"""What `status` shows of one pair."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from coordinator import duties, exclusions, journal, registry, rounds
from coordinator.audit import AuditStatus, audit_status
from coordinator.context import LIFT_ORIGINAL_FENCE, PROTECT_ORIGINAL
from coordinator.entries import EntryKind, Phase
from coordinator.limits import in_force
from coordinator.model import FormerOriginal, Newest, OperatorCall, OriginalFlag, Pair, RunLimits, RunOptions, State
from coordinator.progress import Progress
from coordinator.records import DiskEvidence, PassRecord, Prediction, ViewRecord, Waiting
from coordinator.reports import downtime_s, predicted
from coordinator.rounds import PREDICTED, WAITING
from coordinator.runlog import RunLog
from coordinator.states import TABLE, describe

SERVING = frozenset({State.SYNCING, State.READY_TO_SWITCH})
"""The states in which the replica serves and a run works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairStatus:
    """One pair at this moment, from the database alone (no agent is asked).

    Attributes:
        means: one sentence on what the state means and allows.
        active: a process is working on the run now.
        step, step_sentence, step_since_s: the step under way (or the one that stopped the run), wall time of its start.
        undoing: that step is being taken back.
        last_failure: sentence of the last failed step of this run, if the run has not gone on since.
        progress: latest picture of the pass under way; None outside a pass.
        downtime_s: so far, while the replica is down for the switchover; the final one afterwards; None without.
        view: the last view opened in the run.
        limits: in force for the run; none of either where there is no run.
        audit: of the run, after its switchover.
        round: number of the latest round; None before the first.
        evidence: on what the latest complete pass of each disk rested.
        prediction: the latest one of the run: while the replica serves, what the switchover would cost; later, what was
            expected when it began. `expected_s`: its sum.
        waiting: what a run that could switch waits for; None while it does not.
        owed: what must be done at the first contact with a host before anything else there, a sentence each.
        former: while a run to another place is not final: what the original was before, and whether it is kept off.
        left_behind: VMs that runs of this pair left behind, a sentence each.
        outcome, reason: how the run ended (see `coordinator.entries.RunRecord`); None and empty while it has not.
    """

    pair: Pair
    state: State
    means: str
    newest: Newest
    flag: OriginalFlag
    run: str | None
    active: bool
    step: str | None
    step_sentence: str | None
    step_since_s: float | None
    undoing: bool
    last_failure: str | None
    progress: Progress | None
    downtime_s: float | None
    view: str | None
    operator: OperatorCall | None
    limits: RunLimits
    audit: AuditStatus
    outcome: str | None
    reason: str
    round: int | None = None
    evidence: tuple[DiskEvidence, ...] = ()
    prediction: Prediction | None = None
    expected_s: float | None = None
    waiting: str | None = None
    owed: tuple[str, ...] = ()
    former: str | None = None
    left_behind: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoForecast:
    """What `undo` would leave behind: how long the original has been in use since the switchover.

    `original_ran_s` is None when this run never powered it on. `sentence` says it for people.
    """

    original_ran_s: float | None
    sentence: str


def read_status(connection: Connection, name: str, *, active: bool, now_s: float) -> PairStatus:
    """The status of that pair; `active`: some process holds its lock."""
    pair = registry.get_pair(connection, name)
    log = RunLog(journal.entries(connection, name, pair.run) if pair.run is not None else ())
    run = journal.get_run(connection, pair.run) if pair.run is not None else None
    unfinished = TABLE[pair.state].unfinished
    options = run.options if run is not None else RunOptions()
    audit = audit_status(name, options, log, running=active and pair.state is State.FAILBACK)
    under_way = log.open_step() if unfinished or audit.running else None
    begun = None
    if under_way is not None:
        entries = log.of_step(under_way.step, under_way.phase)
        begun = next((e for e in reversed(entries) if e.kind is EntryKind.INTENT), under_way)
    failed = under_way is not None and under_way.kind is EntryKind.FAILED
    picture = journal.load_progress(connection, name) if active and (unfinished or audit.running) else None
    prediction = log.note(PREDICTED, Prediction) if pair.state in SERVING else predicted(log)
    return PairStatus(
        pair=pair,
        state=pair.state,
        means=describe(pair),
        newest=pair.newest,
        flag=pair.flag,
        run=pair.run,
        active=active,
        step=under_way.step if under_way is not None else None,
        step_sentence=begun.sentence if begun is not None else None,
        step_since_s=begun.at_s if begun is not None else None,
        undoing=under_way is not None and under_way.phase is Phase.UNDO,
        last_failure=under_way.sentence if under_way is not None and failed else None,
        progress=picture if picture is not None and picture.run == pair.run else None,
        downtime_s=downtime_s(log, now_s if unfinished else None),
        view=_last_view(log),
        round=rounds.last_round(log) or None,
        evidence=_evidence(log, pair),
        prediction=prediction,
        expected_s=None if prediction is None else prediction.total_s,
        waiting=_waiting(log) if pair.state in SERVING else None,
        operator=pair.operator,
        owed=tuple(duty.sentence for duty in duties.owed(connection, name)),
        former=None if pair.former is None else former_words(pair.former),
        left_behind=tuple(each.sentence for each in exclusions.listed(connection) if each.pair == name),
        limits=in_force(run, log) if run is not None else RunLimits(),
        audit=audit,
        outcome=run.outcome if run is not None else None,
        reason=run.reason if run is not None else "",
    )


def former_words(former: FormerOriginal) -> str:
    """What the pair moves away from, and whether that can come up."""
    kept = "gone from its host" if former.gone else "off and fenced" if former.fenced else "its fence is PENDING"
    return f"{former.vm.host}/{former.vm.name}, {kept}"


def _last_view(log: RunLog) -> str | None:
    for step in ("open_last_view", *(rounds.open_view(number) for number in range(rounds.last_round(log), 0, -1))):
        record = log.result(step, ViewRecord)
        if record is not None:
            return record.view
    return None


def _evidence(log: RunLog, pair: Pair) -> tuple[DiskEvidence, ...]:
    known = rounds.latest_evidence(log)
    last = log.result(rounds.LAST_PASS, PassRecord)
    if last is not None:
        known |= {disk.replica: disk for disk in last.evidence}
    return tuple(known[disk.replica] for disk in pair.disks if disk.replica in known)


def _waiting(log: RunLog) -> str | None:
    """The latest word on what is waited for, unless a step is under way."""
    said = log.note(WAITING, Waiting)
    return None if said is None or log.open_step() is not None else said.sentence


def forecast(pair: Pair, log: RunLog, now_s: float) -> UndoForecast:
    """What undoing this run would leave behind."""
    begun = next((e for e in log.of_step("original_on") if e.kind is EntryKind.INTENT), None)
    name = pair.original.name
    if not log.intended(LIFT_ORIGINAL_FENCE):
        return UndoForecast(
            original_ran_s=None,
            sentence=f"this run has not released the original {name}: it is fenced, and nobody has used it since",
        )
    left = "stays behind on its disks"
    if log.stands(PROTECT_ORIGINAL):
        left = "is dropped with its working snapshot, and its disks are what they were before the run"
    if begun is None:
        return UndoForecast(
            original_ran_s=None,
            sentence=f"this run has not powered the original {name} on; what was done to it by "
            f"hand since the switchover {left}",
        )
    ran_s = max(0.0, now_s - begun.at_s)
    sure = log.is_done("original_on")
    return UndoForecast(
        original_ran_s=ran_s,
        sentence=f"the original {name} {'has been' if sure else 'may have been'} in use for {ran_s:.0f} s since the "
        "switchover: everything written on "
        f"it since then {left}, and the replica serves again what it held when it went off",
    )
