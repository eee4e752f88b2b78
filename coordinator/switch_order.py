"""What `failback switch` asks, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.errors import UsageError
from coordinator.model import State
from coordinator.status import PairStatus
from coordinator.timing import moment

PAST = "past"
"""Code of the error that the time to switch is past."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchOutcome:
    """What became of a word on when to switch; `taken_up`: the process that works on the run has it."""

    pair: str
    run: str
    at_s: float | None
    state: State
    active: bool
    taken_up: bool
    sentence: str


def check_switch_time(at_s: float | None, now_s: float) -> None:
    """Raise `UsageError` where that time is past."""
    if at_s is not None and at_s < now_s:
        raise UsageError(
            f"the time to switch, {moment(at_s)}, is past: name one to come, as in 2031-01-31T02:00+01:00 or 02:00",
            code=PAST,
        )


def switch_words(pair: str, at_s: float | None, status: PairStatus, *, answered: bool) -> str:
    """What to say of it, for people; `answered`: the process that works on the run has taken it up."""
    if status.state not in (State.SYNCING, State.READY_TO_SWITCH, State.NEEDS_OPERATOR):
        return f"{pair} is in {status.state.value}: the switchover has begun already"
    what = "switches over" if at_s is None else f"switches over at {moment(at_s)}"
    if not status.active:
        return f"{pair} {what} once `failback resume {pair}` works on its run: no process does now"
    when = "" if answered else " as soon as the pass under way is complete"
    return f"{pair} {what}{when}: `failback watch {pair}` shows it"
