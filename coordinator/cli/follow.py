"""Following a run of another process from the database, until it rests."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from coordinator.cli.run_view import RunView
from coordinator.entries import EntryKind, JournalEntry, Phase
from coordinator.events import Event, Notice, Progressed, StateChanged, StepDone, StepFailed, StepStarted
from coordinator.model import State
from coordinator.progress import Progress
from coordinator.runs import Coordinator
from coordinator.states import TABLE
from coordinator.status import PairStatus


class Ending(enum.Enum):
    """Why the following ended."""

    RESTS = "rests"  # the run is over, or waits for a person
    NOBODY = "nobody"  # the run is unfinished and no process works on it


@dataclass(frozen=True, slots=True)
class Followed:
    """How it ended and what the registry said last."""

    ending: Ending
    status: PairStatus


def rests(status: PairStatus, *, audit: bool = False) -> bool:
    """Whether nothing more will happen by itself; `audit`: an audit under way is not at rest."""
    if audit and status.audit.running:
        return False
    return status.state is State.NEEDS_OPERATOR or not TABLE[status.state].unfinished


async def follow(
    coordinator: Coordinator, pair: str, view: RunView, *, poll_s: float, grace_s: float, audit: bool = False
) -> Followed:
    """Show what the run does until it rests.

    Args:
        view: shows the events, made from the journal's new lines and the stored progress.
        poll_s: how often to look.
        grace_s: how long the run may be without a process (its unit may just be starting).
        audit: follow an audit as well, which goes on when the switchover is over.
    """
    status = await coordinator.pair_status(pair)
    run = status.run
    seen = _start_of_news(await coordinator.history(pair, run), run)
    shown: Progress | None = None
    step: str | None = None
    alive_s = trio.current_time()
    view.take(StateChanged(pair=pair, state=status.state))
    if status.step is not None and status.active:
        step = status.step
        view.take(StepStarted(step=step, sentence=status.step_sentence or step, undoing=status.undoing))
    while True:
        for entry in await coordinator.history(pair, run):
            if entry.seq > seen:
                seen = entry.seq
                for event in events_of(entry, step, status):
                    step = event.step if isinstance(event, StepStarted) else step
                    view.take(event)
        if status.progress is not None and status.progress != shown and status.active:
            shown = status.progress
            view.take(Progressed(progress=shown))
        if rests(status, audit=audit):
            return Followed(Ending.RESTS, status)
        if status.active:
            alive_s = trio.current_time()
        elif trio.current_time() - alive_s >= grace_s:
            return Followed(Ending.NOBODY, status)
        await trio.sleep(poll_s)
        status = await coordinator.pair_status(pair)


def _start_of_news(entries: tuple[JournalEntry, ...], run: str | None) -> int:
    return max((entry.seq for entry in entries if run is None or entry.run == run), default=0)


def events_of(entry: JournalEntry, step: str | None, status: PairStatus) -> Iterator[Event]:
    """The events that a line of the journal stands for. `step`: the step already shown as under way."""
    undoing = entry.phase is Phase.UNDO
    match entry.kind:
        case EntryKind.STATE:
            yield StateChanged(pair=entry.pair, state=State(entry.step))
        case EntryKind.INTENT:
            yield StepStarted(step=entry.step, sentence=entry.sentence or entry.step, undoing=undoing)
        case EntryKind.DONE:
            elapsed_s = entry.elapsed_s
            yield StepDone(step=entry.step, undoing=undoing, elapsed_s=elapsed_s or 0.0, found_done=elapsed_s is None)
        case EntryKind.FAILED:
            yield StepFailed(step=entry.step, undoing=undoing, code="", sentence=entry.sentence)
        case EntryKind.NOTE:
            yield Notice(sentence=entry.sentence)
