"""The words of the journal: runs, entries, requests, as frozen values."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from coordinator.model import RunOptions

JOURNAL_FORMAT = 3
"""What step names, records and options of a run mean. Raised when a run's journal says something that an earlier
version would misread: 1, from before there was `RunOptions.on_failure`; 2, from before `RunOptions.to` and
`SwitchPolicy.TURN`; 3. A run of a higher one is left to its version."""


class EntryKind(enum.Enum):
    """What an entry of the journal says."""

    INTENT = "intent"  # written before the step acts
    DONE = "done"  # written after it, with its result
    FAILED = "failed"
    STATE = "state"  # the pair moved to the state named in `step`
    NOTE = "note"  # something worth knowing later


class Phase(enum.Enum):
    """Whether a step was being done or taken back."""

    DO = "do"
    UNDO = "undo"


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """One line of the append-only journal.

    Attributes:
        seq: rising over the whole database.
        at_s: wall time, seconds since 1970 (for people: nothing is decided by it).
        epoch: the fencing epoch of the process that wrote it.
        step: the step's name; for STATE the state's value; empty for a NOTE of no step.
        actor: who: ``user@host`` or the unit.
        sentence: reason, failure or note, for people; may be empty.
        elapsed_s: of DONE and FAILED.
        result: the step's record as JSON, of DONE.
    """

    seq: int
    pair: str
    run: str
    epoch: int
    at_s: float
    kind: EntryKind
    phase: Phase
    step: str
    actor: str
    sentence: str
    elapsed_s: float | None
    result: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One failback of one pair. `outcome`: None while unfinished, else ``committed``, ``undone``, ``cancelled`` or
    ``rolled-back``. `software`: the version that began it (empty: from before that was kept), with the `format` of
    its journal (see `JOURNAL_FORMAT`)."""

    id: str
    pair: str
    options: RunOptions
    actor: str
    started_s: float
    ended_s: float | None
    outcome: str | None
    reason: str
    software: str = ""
    format: int = JOURNAL_FORMAT


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Something asked of the process that works on a pair's run. Claimed once; answered once."""

    id: int
    pair: str
    run: str
    verb: str
    actor: str
    asked_s: float
    claimed: bool
    answer: str | None
