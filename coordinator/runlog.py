"""One run's part of the journal, read: what was intended, done, failed and taken back. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from coordinator.entries import EntryKind, JournalEntry, Phase
from coordinator.plain import from_json

T = TypeVar("T")
_OF_STEPS = (EntryKind.INTENT, EntryKind.DONE, EntryKind.FAILED)


class RunLog:
    """The entries of one run, oldest first; grows as the run goes on."""

    def __init__(self, entries: Iterable[JournalEntry] = ()) -> None:
        self.entries: list[JournalEntry] = list(entries)

    def add(self, entry: JournalEntry) -> None:
        """Take in an entry that has just become durable."""
        self.entries.append(entry)

    def of_step(self, step: str, phase: Phase = Phase.DO) -> tuple[JournalEntry, ...]:
        """Every entry of that step."""
        return tuple(e for e in self.entries if e.step == step and e.phase is phase and e.kind in _OF_STEPS)

    def last(self, step: str, phase: Phase = Phase.DO) -> JournalEntry | None:
        """The step's latest entry."""
        found = self.of_step(step, phase)
        return found[-1] if found else None

    def intended(self, step: str) -> bool:
        """Whether the step was ever begun: it may have acted."""
        return any(entry.kind is EntryKind.INTENT for entry in self.of_step(step))

    def attempts(self, step: str) -> int:
        """How often the step was begun."""
        return sum(entry.kind is EntryKind.INTENT for entry in self.of_step(step))

    def is_done(self, step: str, phase: Phase = Phase.DO) -> bool:
        """Whether the step's latest word is that it is done."""
        last = self.last(step, phase)
        return last is not None and last.kind is EntryKind.DONE

    def stands(self, step: str) -> bool:
        """Whether the step was begun and has not been taken back since."""
        standing = False
        for entry in self.entries:
            if entry.step != step or entry.kind not in _OF_STEPS:
                continue
            if entry.phase is Phase.DO:
                standing = standing or entry.kind is EntryKind.INTENT
            elif entry.kind is EntryKind.DONE:
                standing = False
        return standing

    def results(self, step: str, kind: type[T]) -> tuple[T, ...]:
        """The records of every time the step was done, oldest first."""
        done = (e for e in self.of_step(step) if e.kind is EntryKind.DONE and e.result is not None)
        return tuple(from_json(e.result, kind) for e in done if e.result is not None)

    def result(self, step: str, kind: type[T]) -> T | None:
        """The record of the last time the step was done."""
        found = self.results(step, kind)
        return found[-1] if found else None

    def note(self, step: str, kind: type[T]) -> T | None:
        """The record of the last note of that name."""
        notes = [e.result for e in self.entries if e.kind is EntryKind.NOTE and e.step == step and e.result]
        return from_json(notes[-1], kind) if notes else None

    def seq_of_state(self, state: str) -> int:
        """`seq` of the latest time the pair came to that state in this run; -1: never."""
        return max((e.seq for e in self.entries if e.kind is EntryKind.STATE and e.step == state), default=-1)

    def notes(self, step: str) -> tuple[JournalEntry, ...]:
        """Every note of that name."""
        return tuple(e for e in self.entries if e.kind is EntryKind.NOTE and e.step == step)

    def moved(self, state: str) -> JournalEntry | None:
        """The first time the pair came to that state in this run."""
        return next((e for e in self.entries if e.kind is EntryKind.STATE and e.step == state), None)

    def open_step(self) -> JournalEntry | None:
        """The step under way or failed: the latest entry of any step, unless that is a DONE."""
        found = [entry for entry in self.entries if entry.kind in _OF_STEPS]
        return found[-1] if found and found[-1].kind is not EntryKind.DONE else None
