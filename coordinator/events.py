"""What a run tells whoever watches it in the same process, and how an operation ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.errors import ExitCode
from coordinator.model import State
from coordinator.progress import Progress
from coordinator.reports import ClosingReport


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """The pair is in another state."""

    pair: str
    state: State


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarted:
    """A step begins. `undoing`: it is being taken back. `sentence`: what is done, for people."""

    step: str
    sentence: str
    undoing: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """The step ended well after `elapsed_s`. `found_done`: an earlier process had done it already."""

    step: str
    undoing: bool
    elapsed_s: float
    found_done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed:
    """The step failed; `sentence` says why and what to do."""

    step: str
    undoing: bool
    code: str
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """A pass moved on (about twice a second)."""

    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something the administrator should read now."""

    sentence: str


Event = StateChanged | StepStarted | StepDone | StepFailed | Progressed | Notice
Observer = Callable[[Event], None]
"""Called in the run's own task; must be quick and must not raise."""


def unobserved(_event: Event) -> None:
    """The observer of nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an operation ended. Not an exception: a run that rolled back ended in a named state.

    Attributes:
        state: the pair's state now.
        exit_code: DONE, FAILED (rolled back, stopped, or stopped by an error: `sentence` says how to go on) or
            NEEDS_OPERATOR.
        sentence: for people: what happened and, unless all is done, what to do next.
        report: the closing report of the run so far; None when no run was touched.
    """

    pair: str
    run: str | None
    state: State
    exit_code: ExitCode
    sentence: str
    report: ClosingReport | None = None
