"""The journal: runs, their entries, requests to a live run, and the latest progress. Plain functions of a connection.

Entries are only ever added. An entry is written before a step acts and another after it, so that whoever comes after
a crash knows what may have happened.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sqlalchemy import Connection, Row, Select, delete, insert, select, update

from coordinator import schema
from coordinator.entries import JOURNAL_FORMAT, EntryKind, JournalEntry, Phase, Request, RunRecord
from coordinator.errors import UsageError
from coordinator.model import RunOptions
from coordinator.plain import from_json, one_of, to_json
from coordinator.progress import Progress

# --- runs ---------------------------------------------------------------------------------------------------------


def create_run(connection: Connection, run: RunRecord) -> None:
    """Add a run."""
    connection.execute(
        insert(schema.runs).values(
            id=run.id,
            pair=run.pair,
            options=to_json(run.options),
            actor=run.actor,
            started_s=run.started_s,
            ended_s=run.ended_s,
            outcome=run.outcome,
            reason=run.reason,
            software=run.software,
            format=run.format,
        )
    )


def end_run(connection: Connection, run: str, *, outcome: str, reason: str, at_s: float) -> None:
    """Close a run with its outcome."""
    connection.execute(
        update(schema.runs).where(schema.runs.c.id == run).values(outcome=outcome, reason=reason, ended_s=at_s)
    )


def set_reason(connection: Connection, run: str, reason: str) -> None:
    """Note why the run is being taken back."""
    connection.execute(update(schema.runs).where(schema.runs.c.id == run).values(reason=reason))


def get_run(connection: Connection, run: str) -> RunRecord:
    """The run of that id; `UsageError` when there is none."""
    row = connection.execute(select(schema.runs).where(schema.runs.c.id == run)).one_or_none()
    if row is None:
        raise UsageError(f"there is no run {run}: `failback history PAIR` lists them", code="no-such-run")
    return _run(row)


def list_runs(connection: Connection, pair: str) -> tuple[RunRecord, ...]:
    """Every run of the pair, oldest first."""
    query = select(schema.runs).where(schema.runs.c.pair == pair).order_by(schema.runs.c.started_s, schema.runs.c.id)
    return tuple(_run(row) for row in connection.execute(query))


# --- entries ------------------------------------------------------------------------------------------------------


def append(connection: Connection, entry: JournalEntry) -> JournalEntry:
    """Add an entry (its `seq` is ignored) and return it as it stands in the journal."""
    values = {
        "pair": entry.pair,
        "run": entry.run,
        "epoch": entry.epoch,
        "at_s": entry.at_s,
        "kind": entry.kind.value,
        "phase": entry.phase.value,
        "step": entry.step,
        "actor": entry.actor,
        "sentence": entry.sentence,
        "elapsed_s": entry.elapsed_s,
        "result": entry.result,
    }
    key = connection.execute(insert(schema.journal).values(**values)).inserted_primary_key
    assert key is not None
    return replace(entry, seq=int(key[0]))


def entries(connection: Connection, pair: str, run: str | None = None) -> tuple[JournalEntry, ...]:
    """The entries of the pair, or of one of its runs, oldest first."""
    query = select(schema.journal).where(schema.journal.c.pair == pair)
    if run is not None:
        query = query.where(schema.journal.c.run == run)
    return tuple(_entry(row) for row in connection.execute(query.order_by(schema.journal.c.seq)))


def entries_of_step(connection: Connection, pair: str, step: str) -> tuple[JournalEntry, ...]:
    """The entries of that step in every run of the pair, oldest first."""
    query = select(schema.journal).where(schema.journal.c.pair == pair, schema.journal.c.step == step)
    return tuple(_entry(row) for row in connection.execute(query.order_by(schema.journal.c.seq)))


def last_seconds(connection: Connection, pair: str, steps: Iterable[str]) -> dict[str, float]:
    """How long each of those steps took when it was last done: for that pair, or else for any other; those that never
    were are missing."""
    journal = schema.journal.c
    wanted = (journal.step.in_(tuple(steps)), journal.kind == EntryKind.DONE.value, journal.phase == Phase.DO.value)
    query = select(journal.step, journal.elapsed_s).where(*wanted, journal.elapsed_s.is_not(None))
    rows = connection.execute(query.order_by(journal.pair == pair, journal.seq))
    return {str(step): float(elapsed_s) for step, elapsed_s in rows}


# --- requests to a live run ---------------------------------------------------------------------------------------


def ask(connection: Connection, *, pair: str, run: str, verb: str, actor: str, at_s: float) -> int:
    """Leave a request for the process that works on the run; returns its id."""
    values = {"pair": pair, "run": run, "verb": verb, "actor": actor, "asked_s": at_s, "claimed": False}
    key = connection.execute(insert(schema.requests).values(**values)).inserted_primary_key
    assert key is not None
    return int(key[0])


def is_asked(connection: Connection, pair: str, run: str, verb: str) -> bool:
    """Whether the run has an unclaimed request of that verb."""
    return connection.execute(_unclaimed(pair, run, verb)).first() is not None


def _unclaimed(pair: str, run: str, verb: str) -> Select[tuple[object, ...]]:
    table = schema.requests
    where = (table.c.pair == pair, table.c.run == run, table.c.verb == verb, table.c.claimed.is_(False))
    return select(table).where(*where)


def claim(connection: Connection, pair: str, run: str, verb: str) -> Request | None:
    """Take the oldest unclaimed request of that verb of the run, if there is one; nobody else gets it."""
    table = schema.requests
    query = _unclaimed(pair, run, verb)
    row = connection.execute(query.order_by(table.c.id).limit(1)).one_or_none()
    if row is None:
        return None
    connection.execute(update(table).where(table.c.id == row.id).values(claimed=True))
    return _request(connection, row.id)


def answer(connection: Connection, request: int, sentence: str) -> None:
    """Answer a request; only the first answer counts."""
    table = schema.requests
    where = (table.c.id == request, table.c.answer.is_(None))
    connection.execute(update(table).where(*where).values(answer=sentence, claimed=True))


def answer_all(connection: Connection, pair: str, run: str, sentence: str, *, verb: str | None = None) -> None:
    """Answer whatever was asked of the run (or only requests of that verb) and has no answer yet."""
    table = schema.requests
    where = [table.c.pair == pair, table.c.run == run, table.c.answer.is_(None)]
    if verb is not None:
        where.append(table.c.verb == verb)
    connection.execute(update(table).where(*where).values(answer=sentence, claimed=True))


def get_request(connection: Connection, request: int) -> Request:
    """A request by its id."""
    return _request(connection, request)


def is_answered(connection: Connection, request: int | None) -> bool:
    """Whether that request has its answer; one that was not made needs none."""
    return request is None or get_request(connection, request).answer is not None


# --- progress -----------------------------------------------------------------------------------------------------


def save_progress(connection: Connection, pair: str, snapshot: Progress) -> None:
    """Replace the pair's latest picture."""
    clear_progress(connection, pair)
    connection.execute(
        insert(schema.progress).values(pair=pair, run=snapshot.run, snapshot=to_json(snapshot)),
    )


def clear_progress(connection: Connection, pair: str) -> None:
    """The pass is over."""
    connection.execute(delete(schema.progress).where(schema.progress.c.pair == pair))


def load_progress(connection: Connection, pair: str) -> Progress | None:
    """The pair's latest picture, if a pass is under way."""
    query = select(schema.progress.c.snapshot).where(schema.progress.c.pair == pair)
    text = connection.execute(query).scalar_one_or_none()
    return None if text is None else from_json(text, Progress)


def _run(row: Row[tuple[object, ...]]) -> RunRecord:
    return RunRecord(
        id=row.id,
        pair=row.pair,
        # What a newer version wrote there is not for us to read, but its run must be seen to be refused by name.
        options=from_json(row.options, RunOptions) if row.format <= JOURNAL_FORMAT else RunOptions(),
        actor=row.actor,
        started_s=row.started_s,
        ended_s=row.ended_s,
        outcome=row.outcome,
        reason=row.reason,
        software=row.software,
        format=row.format,
    )


def _entry(row: Row[tuple[object, ...]]) -> JournalEntry:
    return JournalEntry(
        seq=row.seq,
        pair=row.pair,
        run=row.run,
        epoch=row.epoch,
        at_s=row.at_s,
        kind=one_of(EntryKind, row.kind),
        phase=one_of(Phase, row.phase),
        step=row.step,
        actor=row.actor,
        sentence=row.sentence,
        elapsed_s=row.elapsed_s,
        result=row.result,
    )


def _request(connection: Connection, request: int) -> Request:
    row = connection.execute(select(schema.requests).where(schema.requests.c.id == request)).one()
    return Request(
        id=row.id,
        pair=row.pair,
        run=row.run,
        verb=row.verb,
        actor=row.actor,
        asked_s=row.asked_s,
        claimed=row.claimed,
        answer=row.answer,
    )
