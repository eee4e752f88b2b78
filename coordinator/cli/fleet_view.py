"""A plan of several pairs as people see it: one table that moves on a terminal, a line for each change in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from coordinator.audit import AuditState
from coordinator.cli import human
from coordinator.cli.output import Output, table
from coordinator.cli.run_view import LINE_EVERY_S
from coordinator.fleet import Place, TurnKind
from coordinator.fleet_standing import Picture, Row
from coordinator.model import State
from coordinator.timing import turn_words

WIDE = 120
"""From so many columns on the table has numbers of its own for speed, time left and downtime."""
STYLES = {
    Place.HOME: "green",
    Place.AWAY: "yellow",
    Place.QUEUED: "dim",
    Place.FAILED: "bold red",
    Place.STOPPED: "bold red",
    Place.NEEDS_OPERATOR: "bold red",
}


class ShownPlan(Protocol):
    """A `coordinator.fleet_run.FleetView` that is a context, because a terminal must be left as it was found."""

    def show(self, picture: Picture) -> None:
        """The plan now."""

    def notice(self, sentence: str) -> None:
        """Something to be read now."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""


def plan_view(output: Output) -> ShownPlan:
    """The view that fits where the words go."""
    if output.as_json:
        return SilentPlan()
    return LivePlan(output) if output.live else LinePlan(output)


class SilentPlan:
    """Shows nothing: one JSON object comes at the end."""

    def show(self, picture: Picture) -> None:
        """Nothing."""

    def notice(self, sentence: str) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


class LinePlan(SilentPlan):
    """Plain lines: each pair when it stands somewhere else, those that are copied now and then."""

    def __init__(self, output: Output, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._seen: dict[str, tuple[Place, TurnKind | None, str]] = {}
        self._said_s = clock()

    def show(self, picture: Picture) -> None:
        """Write what is new."""
        for row in picture.rows:
            standing = row.standing
            waits = row.turn.kind if standing.place is Place.WAITING else None
            now = (standing.place, waits, standing.sentence)
            if self._seen.get(standing.pair) != now:
                self._seen[standing.pair] = now
                note = note_of(row, numbers=True)
                self._output.say(f"{standing.pair}: {standing.place.value}{f' ({note})' if note else ''}")
        if self._clock() - self._said_s >= LINE_EVERY_S:
            self._said_s = self._clock()
            for row in picture.rows:
                if row.standing.place in (Place.COPYING, Place.SWITCHING):
                    done = _numbers(row, wide=False)[0]
                    self._output.say(
                        f"    {row.standing.pair}: {done} {note_of(row, numbers=True)}".replace(":  ", ": ")
                    )
            self._output.say(f"    {summary(picture)}")

    def notice(self, sentence: str) -> None:
        """Write it."""
        self._output.say(f"  * {sentence}")


class LivePlan(SilentPlan):
    """The table stays at the bottom and moves; notices scroll up above it."""

    def __init__(self, output: Output) -> None:
        self._picture: Picture | None = None
        self._live = Live(
            console=output.console,
            get_renderable=self._drawn,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._picture = None
        self._live.stop()

    def show(self, picture: Picture) -> None:
        """Draw it from now on."""
        self._picture = picture
        self._live.refresh()

    def notice(self, sentence: str) -> None:
        """Above the table."""
        self._live.console.print(Text.assemble(("  * ", "yellow"), sentence))

    def _drawn(self) -> Group:
        if self._picture is None:
            return Group()
        # The sums come first: of a table that is longer than the terminal is high, the end is cut.
        return Group(Text(summary(self._picture), style="dim"), picture_table(self._picture, self._live.console.width))


def picture_table(picture: Picture, width: int) -> Table:
    """One line a pair, whatever the terminal's width; what does not fit is cut, and told in full at the end."""
    wide = width >= WIDE
    numbers = ("Done", "Rate", "Left", "Downtime") if wide else ("Done",)
    made = table("Group", "Pair", "State", *numbers, "", right=numbers)
    for number, column in enumerate(made.columns):
        column.no_wrap = True
        column.overflow = "ellipsis"
        if number < 2:
            column.max_width = 40 if wide else 16
    made.columns[-1].ratio = 1
    made.expand = True
    group = None
    for row in picture.rows:
        state = Text(row.standing.place.value, style=STYLES.get(row.standing.place, "cyan"))
        name = row.group if row.group != group else ""
        group = row.group
        made.add_row(name, row.standing.pair, state, *_numbers(row, wide=wide), note_of(row, numbers=not wide))
    return made


def _numbers(row: Row, *, wide: bool) -> tuple[str, ...]:
    progress = row.status.progress
    done = human.percent(progress.done_bytes, progress.total_bytes) if progress is not None else ""
    if not wide:
        return (done,)
    rate, left = "", ""
    if progress is not None:
        rate = human.rate(progress.rate_bytes_s)
        left = human.duration(progress.eta_s)
    downtime_s = row.status.downtime_s
    return done, rate, left, "" if downtime_s is None else human.duration(downtime_s)


def note_of(row: Row, *, numbers: bool = False) -> str:
    """What else is to be said of a pair, in a clause. `numbers`: with those of the pass under way."""
    status, standing = row.status, row.standing
    match standing.place:
        case Place.QUEUED:
            return "until fewer pairs are copied"
        case Place.WAITING if row.turn.kind is not TurnKind.COME:
            left = f"{human.duration(row.turn.left_s)} left, " if row.turn.left_s else ""
            return left + row.turn.sentence
        case Place.WAITING:
            # The run says so until it looks at its orders again.
            given = status.waiting == turn_words(standing.pair)
            return "its turn has come" if given else status.waiting or ""
        case Place.COPYING | Place.SWITCHING | Place.TAKING_BACK:
            doing = human.step(status.step) if status.step else ""
            progress = status.progress
            if not numbers or progress is None:
                return doing
            left = f"{human.duration(progress.eta_s)} left, " if progress.eta_s is not None else ""
            return f"{doing}, {left}{human.rate(progress.rate_bytes_s)}"
        case Place.HOME:
            return _home_words(row, numbers=numbers)
        case Place.STOPPED if row.turn.kind is TurnKind.HELD:
            return f"{standing.sentence}; {row.turn.sentence}"
        case _:
            return standing.sentence


def _home_words(row: Row, *, numbers: bool) -> str:
    status = row.status
    if status.state is State.READY:
        return "final" if status.outcome == "committed" else "in use, nothing to fail back"
    words = [] if status.downtime_s is None or not numbers else [f"downtime {human.duration(status.downtime_s)}"]
    if status.audit.running:
        words.append("audit under way")
    elif status.audit.state not in (AuditState.OFF, AuditState.CLEAN):
        words.append(f"audit {status.audit.state.value}")
    return ", ".join(words)


def summary(picture: Picture) -> str:
    """How many pairs stand where, in one line."""
    counts = [(place, picture.count(place)) for place in Place]
    return f"{len(picture.rows)} pairs: " + ", ".join(f"{count} {place.value}" for place, count in counts if count)


def show_picture(output: Output, picture: Picture) -> None:
    """The table as it stands, and below it in full what the table may have cut."""
    if output.console.is_terminal:
        output.show(picture_table(picture, output.console.width))
    else:
        output.show(picture_table(picture, max(output.console.width, WIDE)))
    told = [row for row in picture.rows if row.standing.sentence and row.standing.place is not Place.AWAY]
    if told:
        output.say()
    for row in told:
        output.item("  *", f"{row.standing.pair}: {note_of(row)}")


def picture_object(picture: Picture) -> list[dict[str, Any]]:
    """The JSON form: one object for each pair."""
    return [
        {
            "pair": row.standing.pair,
            "group": row.group,
            "place": row.standing.place,
            "sentence": row.standing.sentence,
            "state": row.status.state,
            "run": row.status.run,
            "active": row.status.active,
            "turn": row.turn.kind,
            "turn_sentence": row.turn.sentence,
            "waiting": row.status.waiting,
            "downtime_s": row.status.downtime_s,
            "progress": row.status.progress,
        }
        for row in picture.rows
    ]
