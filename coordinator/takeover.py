"""Taking a pair's run into this process's hands: one transaction checks the verb, raises the epoch, moves on."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from coordinator import exclusions, journal, registry
from coordinator.audit import AuditState, audit_status, check_commit
from coordinator.called_off import ORIGINAL_IS_OFF, owe
from coordinator.entries import JOURNAL_FORMAT, EntryKind, JournalEntry, Phase, RunRecord
from coordinator.errors import NewerRun, WrongState
from coordinator.limits import LIMITS, VERB, LimitsChange, read_limits
from coordinator.mapping import mapping_words, revised
from coordinator.model import Newest, Pair, Rate, RestorePoint, RunOptions, State
from coordinator.moving import repoint
from coordinator.plain import to_json
from coordinator.records import Record, RestorePointRecord, SwitchOrder
from coordinator.runlog import RunLog
from coordinator.states import Verb, allowed_verbs, check_verb
from coordinator.steps_commit import RESTORE_POINT
from coordinator.steps_sync import OPERATOR_SAID_GO_ON
from coordinator.timing import SWITCH, Trigger, moment, order_in_force
from coordinator.version import SOFTWARE

TAKES_BACK = {Verb.UNDO: State.UNDOING, Verb.CANCEL: State.CANCELLING}
REASONS = {Verb.UNDO: "undone by the administrator", Verb.CANCEL: "cancelled by the administrator"}
COMMITTED = "committed by the administrator"


MOVED = "moved"
"""Name of the note that the run goes to another VM: which, and away from which."""
TAKEN_OVER = "taken_over"
"""Name of the note that a process has the run now: who, with which version, for which verb."""
RESUMED = "resumed by the administrator"


def check_format(run: RunRecord, pair: str) -> None:
    """Raise `NewerRun` where a newer version began the run and its journal would be misread."""
    if run.format > JOURNAL_FORMAT:
        raise NewerRun(
            f"the run {run.id} of {pair} was begun by {run.software or 'a newer failback'} (journal format "
            f"{run.format}, {SOFTWARE} knows {JOURNAL_FORMAT}): go on with that version or a newer one; nothing was "
            "changed",
            pair=pair,
            run=run.id,
            format=run.format,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Author:
    """Who writes, and when (wall time)."""

    actor: str
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A run that is in our hands."""

    pair: Pair
    run: RunRecord
    log: RunLog


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchAsked:
    """A word on when to switch that is in the journal of `run`; `request`: None: there was nothing left to ask."""

    run: str
    request: int | None


def note(
    connection: Connection,
    pair: Pair,
    author: Author,
    kind: EntryKind,
    step: str,
    *,
    run: str | None = None,
    sentence: str = "",
    record: Record | None = None,
) -> None:
    """Add an entry outside the engine: a move of the pair, or a person's word."""
    entry = JournalEntry(
        seq=0,
        pair=pair.name,
        run=run if run is not None else pair.run or "",
        epoch=pair.epoch,
        at_s=author.at_s,
        kind=kind,
        phase=Phase.DO,
        step=step,
        actor=author.actor,
        sentence=sentence,
        elapsed_s=None,
        result=None if record is None else to_json(record),
    )
    journal.append(connection, entry)


def register(connection: Connection, pair: Pair, author: Author, *, in_failover: bool) -> Pair:
    """Take a pair in, or change the one of that name; with `in_failover`, which has been proven, on to Failover."""
    exclusions.check(connection, pair.original, pair.replica)
    known = registry.find_pair(connection, pair.name)
    if known is None:
        registry.add_pair(connection, pair)
        note(connection, pair, author, EntryKind.STATE, pair.state.value, run="", sentence="registered")
    else:
        pair = revised(known, pair)
        registry.change_pair(connection, pair)
        sentence = f"registered again: {mapping_words(pair)}"
        note(connection, pair, author, EntryKind.NOTE, "", run="", sentence=sentence)
    if in_failover and pair.state is State.READY:
        return record_failover(connection, pair.name, author)
    return pair


def start(
    connection: Connection, name: str, run: str, options: RunOptions, author: Author, wanted: Pair | None = None
) -> None:
    """Failover → Syncing, with a new run and its options. `wanted`: the pair as a run to another place makes it.

    Raises:
        Refused: a VM of the pair is on the exclusion list; `UsageError`: the destination belongs to another pair.
    """
    pair = registry.get_pair(connection, name)
    check_verb(pair, Verb.START)
    exclusions.check(connection, pair.replica, *(() if options.to.moves else (pair.original,)))
    if wanted is not None and wanted.former is not None:
        repoint(connection, wanted)
    epoch = registry.raise_epoch(connection, name)
    record = RunRecord(
        id=run,
        pair=name,
        options=options,
        actor=author.actor,
        started_s=author.at_s,
        ended_s=None,
        outcome=None,
        reason="",
        software=SOFTWARE,
    )
    journal.create_run(connection, record)
    registry.set_run(connection, name, epoch, run)
    pair = registry.move(connection, name, epoch, State.SYNCING)
    note(connection, pair, author, EntryKind.STATE, State.SYNCING.value, sentence=f"started with {SOFTWARE}")
    if pair.former is not None:
        was = pair.former.vm
        sentence = f"to {pair.original.name} on {pair.original.host}, away from {was.name} on {was.host}"
        note(connection, pair, author, EntryKind.NOTE, MOVED, sentence=sentence)


def record_failover(connection: Connection, name: str, author: Author) -> Pair:
    """Ready → Failover; what it says has been proven."""
    check_verb(registry.get_pair(connection, name), Verb.FAILOVER)
    epoch = registry.raise_epoch(connection, name)
    pair = registry.move(connection, name, epoch, State.FAILOVER)
    registry.set_newest(connection, name, epoch, Newest.REPLICA)
    note(connection, pair, author, EntryKind.STATE, State.FAILOVER.value, run="", sentence="the replica took over")
    return registry.get_pair(connection, name)


def change_limits(
    connection: Connection, name: str, author: Author, network: Rate | None, read: Rate | None
) -> LimitsChange:
    """Other limits for the pair's unfinished run; None: that one stays.

    The epoch is not raised: nothing is taken from the process that works on the run.

    Raises:
        WrongState: no pass of a run is to come.
    """
    pair = registry.get_pair(connection, name)
    check_verb(pair, Verb.LIMIT)
    run = pair.run or ""
    check_format(journal.get_run(connection, run), name)
    limits = read_limits(connection, run).changed(network, read)
    note(connection, pair, author, EntryKind.NOTE, LIMITS, sentence=f"limits: {limits.words}", record=limits)
    request = journal.ask(connection, pair=name, run=run, verb=VERB, actor=author.actor, at_s=author.at_s)
    return LimitsChange(run=run, limits=limits, request=request)


def order_switch(connection: Connection, name: str, author: Author, at_s: float | None) -> SwitchAsked:
    """A person's word on when to switch; `at_s`: None: now. Harmless when repeated, also once it is carried out.

    Raises:
        WrongState: the pair is in no state that leads to a switchover.
    """
    pair = registry.get_pair(connection, name)
    if at_s is None and pair.state in (State.SWITCHING, State.FAILBACK):
        return SwitchAsked(run=pair.run or "", request=None)
    check_verb(pair, Verb.SWITCH)
    run = pair.run or ""
    log = RunLog(journal.entries(connection, name, run))
    record = journal.get_run(connection, run)
    check_format(record, name)
    now = order_in_force(record.options, log)
    repeated = now.trigger is (Trigger.NOW if at_s is None else Trigger.AT) and now.at_s == at_s and not now.used
    if not repeated:
        sentence = "switch now" if at_s is None else f"switch at {moment(at_s)}"
        note(connection, pair, author, EntryKind.NOTE, SWITCH, sentence=sentence, record=SwitchOrder(at_s=at_s))
    request = journal.ask(connection, pair=name, run=run, verb=SWITCH, actor=author.actor, at_s=author.at_s)
    return SwitchAsked(run=run, request=request)


def give_turn(connection: Connection, name: str, author: Author) -> bool:
    """Note that the pair's turn in its plan has come. Whether that is new: harmless when repeated, and where the run
    waits for something else, a person has spoken, or the switchover has begun already."""
    pair = registry.get_pair(connection, name)
    if Verb.SWITCH not in allowed_verbs(pair) or pair.run is None:
        return False
    record = journal.get_run(connection, pair.run)
    check_format(record, name)
    if order_in_force(record.options, RunLog(journal.entries(connection, name, pair.run))).trigger is not Trigger.TURN:
        return False
    turn = SwitchOrder(at_s=None, turn=True)
    note(connection, pair, author, EntryKind.NOTE, SWITCH, sentence="its turn in the plan has come", record=turn)
    journal.ask(connection, pair=name, run=pair.run, verb=SWITCH, actor=author.actor, at_s=author.at_s)
    return True


def take_over(
    connection: Connection,
    name: str,
    verb: Verb,
    author: Author,
    restore_point: RestorePoint | None = None,
    *,
    called_off: bool = False,
) -> Taken:
    """Take the pair's run over for `verb` (resume, cancel, commit, undo), under a new epoch. `called_off`: a person
    says that the original is off, which its host cannot prove.

    Raises:
        WrongState: the pair's state does not allow the verb.
        AuditDiffers: the run's audit forbids the commit.
    """
    pair = registry.get_pair(connection, name)
    check_verb(pair, verb)
    if pair.run is None:
        raise WrongState(f"{name} has no run: `failback start {name}` begins one", pair=name)
    check_format(journal.get_run(connection, pair.run), name)
    before = pair
    skipped = verb is Verb.COMMIT and _commits_without_audit(connection, pair)
    epoch = registry.raise_epoch(connection, name)
    pair = registry.get_pair(connection, name)
    to = _destination(before, verb)
    sentence = f"{SOFTWARE} works on the run, under epoch {epoch}"
    if verb is not Verb.RESUME:
        sentence += f", to {verb.value} it"
    note(connection, pair, author, EntryKind.NOTE, TAKEN_OVER, sentence=sentence)
    if verb is Verb.COMMIT:
        record = RestorePointRecord(restore_point=restore_point or RestorePoint.KEEP)
        sentence = f"the protective snapshot: {record.restore_point.value}"
        note(connection, pair, author, EntryKind.NOTE, RESTORE_POINT, sentence=sentence, record=record)
    if skipped:
        note(connection, pair, author, EntryKind.NOTE, "", sentence="committed without waiting for the audit")
    if before.state is State.NEEDS_OPERATOR:
        note(connection, pair, author, EntryKind.NOTE, OPERATOR_SAID_GO_ON, sentence=f"{verb.value} by {author.actor}")
    if called_off:
        sentence = owe(connection, pair, author.actor, author.at_s)
        note(connection, pair, author, EntryKind.NOTE, ORIGINAL_IS_OFF, sentence=sentence)
    if to is not None:
        pair = registry.move(connection, name, epoch, to)
        reason = REASONS.get(verb, COMMITTED if verb is Verb.COMMIT else RESUMED)
        note(connection, pair, author, EntryKind.STATE, to.value, sentence=reason)
    if verb in REASONS:
        journal.set_reason(connection, pair.run or "", REASONS[verb])
    return Taken(
        pair=pair,
        run=journal.get_run(connection, pair.run or ""),
        log=RunLog(journal.entries(connection, name, pair.run)),
    )


def _commits_without_audit(connection: Connection, pair: Pair) -> bool:
    """Whether the audit that was chosen has no result yet; `AuditDiffers` where its result forbids the commit."""
    run = pair.run or ""
    log = RunLog(journal.entries(connection, pair.name, run))
    found = audit_status(pair.name, journal.get_run(connection, run).options, log)
    check_commit(found, pair.name)
    return found.state in (AuditState.DUE, AuditState.FAILED)


def _destination(pair: Pair, verb: Verb) -> State | None:
    """The state the verb moves the pair to; None: it goes on where it is."""
    if verb is Verb.COMMIT:
        return State.COMMITTING
    if verb in TAKES_BACK:
        return TAKES_BACK[verb]
    if pair.state is State.NEEDS_OPERATOR and pair.operator is not None:
        return pair.operator.before
    return None
