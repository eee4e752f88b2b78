"""Showing a run as it works: bars on a terminal, a line now and then in a pipe, nothing or JSON lines for programs."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator.cli import human
from coordinator.cli.output import Output
from coordinator.events import Event, Notice, Progressed, StateChanged, StepDone, StepFailed, StepStarted
from coordinator.progress import Progress

LINE_EVERY_S = 10.0
"""In a pipe, progress is a line this often."""


class RunView(Protocol):
    """Takes events as they come; a context, because a terminal must be left as it was found."""

    def take(self, event: Event) -> None:
        """Show it."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""


def run_view(output: Output, *, json_lines: bool = False) -> RunView:
    """The view that fits where the words go."""
    if output.as_json:
        return JsonView(output) if json_lines else SilentView()
    return LiveView(output) if output.live else LineView(output)


class SilentView:
    """Shows nothing: one JSON object comes at the end."""

    def take(self, event: Event) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


class JsonView(SilentView):
    """Each event as a JSON object on a line of its own: ``{"event": "step-started", …}``."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def take(self, event: Event) -> None:
        """Write it."""
        self._output.line(event_object(event))


EVENT_NAMES: dict[type, str] = {
    StateChanged: "state-changed",
    StepStarted: "step-started",
    StepDone: "step-done",
    StepFailed: "step-failed",
    Progressed: "progressed",
    Notice: "notice",
}


def event_object(event: Event) -> dict[str, Any]:
    """The event with its name, for JSON."""
    return {"event": EVENT_NAMES[type(event)], "about": event}


class LineView(SilentView):
    """Plain lines: each step once, progress now and then."""

    def __init__(self, output: Output, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._said_s: float | None = None
        self._step: StepStarted | None = None

    def take(self, event: Event) -> None:
        """Write a line where the event is worth one."""
        match event:
            case Progressed(progress=progress):
                now = self._clock()
                due = self._said_s is None or now - self._said_s >= LINE_EVERY_S
                if due and progress.done_bytes:
                    self._said_s = now
                    self._output.say(f"    {progress_line(progress)}")
            case StepStarted():
                self._said_s = None
                self._step = event
                self._output.say(f"... {_started(event)}")
            case _:
                text = event_text(event, self._step)
                if text is not None:
                    self._output.say(text.plain)


class LiveView(SilentView):
    """What is done scrolls up; the step under way and its bars stay at the bottom and move."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._step: StepStarted | None = None
        self._since_s = time.monotonic()
        self._progress: Progress | None = None
        self._live = Live(
            console=output.console,
            get_renderable=self._picture,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._step = None
        self._progress = None
        self._live.stop()

    def take(self, event: Event) -> None:
        """Show it."""
        match event:
            case Progressed(progress=progress):
                self._progress = progress
            case StepStarted():
                self._step = event
                self._since_s = time.monotonic()
                self._progress = None
            case _:
                text = event_text(event, self._step)
                if isinstance(event, StepDone | StepFailed):
                    self._step = None
                    self._progress = None
                if text is not None:
                    self._live.console.print(text)

    def _picture(self) -> Group:
        parts: list[Text | Table] = []
        if self._step is not None:
            took = f"  {human.duration(time.monotonic() - self._since_s)}"
            parts.append(Text.assemble(("  > ", "cyan"), _started(self._step), (took, "dim")))
        if self._progress is not None:
            parts.append(bars(self._progress))
            parts.append(Text(f"    {progress_line(self._progress)}"))
        return Group(*parts)


def bars(progress: Progress) -> Table:
    """One bar a disk."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0), expand=False)
    made.add_column(no_wrap=True)
    made.add_column(width=26)
    for _ in range(2):
        made.add_column(justify="right", no_wrap=True)
    made.add_column(no_wrap=True, overflow="ellipsis")
    for disk in progress.disks:
        made.add_row(
            f"    {disk.target}",
            ProgressBar(total=max(1, disk.total_bytes), completed=disk.done_bytes, width=26),
            human.percent(disk.done_bytes, disk.total_bytes),
            human.size(disk.total_bytes),
            "reconnecting" if disk.reconnecting else f"{human.size(disk.changed_bytes)} changed",
        )
    return made


def progress_line(progress: Progress) -> str:
    """The sums, in one line of at most 80 columns."""
    parts = [
        f"{human.percent(progress.done_bytes, progress.total_bytes)} of {human.size(progress.total_bytes)}",
        human.rate(progress.rate_bytes_s),
        _time_left(progress),
        f"{human.size(progress.wire_bytes)} sent",
        f"{human.size(progress.saved_bytes)} saved",
    ]
    return ", ".join(parts)


def _time_left(progress: Progress) -> str:
    if any(disk.reconnecting for disk in progress.disks):
        return "reconnecting"
    return f"{human.duration(progress.eta_s)} left" if progress.eta_s is not None else "time left unknown"


def event_text(event: Event, begun: StepStarted | None) -> Text | None:
    """The line an event leaves behind; None where it leaves none. `begun`: the step under way, with its sentence."""
    match event:
        case StateChanged(state=state):
            return Text(f"=== {state.value}", style="bold")
        case StepDone(elapsed_s=elapsed_s, found_done=found):
            took = " (was done already)" if found else f"  {human.duration(elapsed_s)}"
            return Text.assemble((" ok ", "green"), _step_words(event, begun), (took, "dim"))
        case StepFailed(sentence=sentence):
            return Text.assemble((" !! ", "bold red"), f"{_step_words(event, begun)}: {sentence}")
        case Notice(sentence=sentence):
            return Text.assemble(("  * ", "yellow"), sentence)
        case _:
            return None


def _step_words(event: StepDone | StepFailed, begun: StepStarted | None) -> str:
    known = begun is not None and (begun.step, begun.undoing) == (event.step, event.undoing)
    if known and begun is not None:
        return _started(begun)
    return f"{'taking back: ' if event.undoing else ''}{human.step(event.step)}"


def _started(event: StepStarted) -> str:
    return f"taking back: {event.sentence}" if event.undoing else event.sentence
