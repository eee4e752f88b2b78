"""What the command shows: text and tables for people, or exactly one JSON object for programs.

Nothing here knows a verb. Text for people goes through rich, which leaves out colour and cursor movement where the
output is no terminal. A terminal or pipe that goes away never ends a run: `LastingStream` falls silent instead.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from coordinator.errors import CoordinatorError

TRAILING = re.compile(r" +$", re.MULTILINE)
"""Blanks that fill the last column of a table; of no use in a pipe."""

PIPED_WIDTH = 160
"""Columns of a table that goes into a pipe or file, where no terminal says how wide it is."""


NOBODY_READS = frozenset({errno.EPIPE, errno.EIO, errno.EBADF})
"""A closed pipe, a lost terminal, no stream at all: whoever asked has gone, and misses nothing."""


class LastingStream(io.TextIOBase):
    """Passes text on until that fails, then drops it.

    Attributes:
        lost: it has failed.
        why_incomplete: why somebody who reads on would miss something (a full disk, for one); None where nobody does.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self.lost = False
        self.why_incomplete: str | None = None

    def _lose(self, error: OSError | ValueError) -> None:
        self.lost = True
        if isinstance(error, OSError) and error.errno not in NOBODY_READS:
            self.why_incomplete = error.strerror or str(error)

    def write(self, text: str) -> int:
        """Write `text`; a stream that is gone takes nothing and says so by `lost` alone."""
        if not self.lost:
            try:
                self._stream.write(text if self.isatty() else TRAILING.sub("", text))
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or fall silent."""
        if not self.lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def isatty(self) -> bool:
        """Whether people look at it directly."""
        try:
            return not self.lost and self._stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        """The descriptor beneath, for the size of the terminal."""
        return self._stream.fileno()

    def detach_descriptor(self) -> None:
        """Point the lost stream's descriptor at /dev/null, so that the interpreter's last flush does not complain."""
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError):
            return

    @property
    def encoding(self) -> str:  # type: ignore[override]  # rich asks the stream which glyphs it can show
        """What the stream beneath is written in."""
        return getattr(self._stream, "encoding", None) or "utf-8"


def plain(value: Any) -> Any:
    """The value as JSON knows it: dataclasses as objects, enums by value, tuples as lists, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    return value


def error_object(error: CoordinatorError) -> dict[str, Any]:
    """The JSON form of every error: stable code, sentence, facts."""
    return {"error": {"code": error.code, "sentence": error.sentence, "facts": plain(error.facts)}}


class Output:
    """Where a verb's words go.

    Args:
        as_json: people's text is dropped; `finish` writes the one object.
        no_color: no colours, whatever the terminal can do (NO_COLOR is obeyed anyway).
        stdout, stderr: streams of text.
    """

    def __init__(self, *, as_json: bool, no_color: bool, stdout: TextIO, stderr: TextIO) -> None:
        self.as_json = as_json
        self._no_color = no_color
        self.stdout = LastingStream(stdout)
        self.stderr = LastingStream(stderr)
        self.console = self._console(self.stdout)
        self.errors = self._console(self.stderr)

    def _console(self, stream: LastingStream) -> Console:
        width = None if stream.isatty() or os.environ.get("COLUMNS") else PIPED_WIDTH
        return Console(
            file=stream,  # type: ignore[arg-type]  # rich wants IO[str]; it only writes, flushes and asks isatty
            no_color=True if self._no_color else None,
            highlight=False,
            emoji=False,
            markup=False,
            width=width,
        )

    @property
    def live(self) -> bool:
        """Whether bars may be drawn and redrawn: people look at a terminal that can do it."""
        return not self.as_json and self.console.is_terminal and not self.console.is_dumb_terminal

    # --- for people -------------------------------------------------------------------------------------------

    def say(self, sentence: str = "", style: str = "") -> None:
        """A line of text; wrapped at the terminal's width, never in a pipe."""
        if not self.as_json:
            self.console.print(Text(sentence, style=style), soft_wrap=not self.console.is_terminal)

    def item(self, mark: str, sentence: str) -> None:
        """A line of a list; on a terminal what does not fit stands below the sentence, not below the mark."""
        if self.as_json:
            return
        if not self.console.is_terminal:
            self.say(f"{mark} {sentence}")
            return
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column()
        grid.add_row(mark, Text(sentence))
        self.console.print(grid)

    def show(self, renderable: Any) -> None:
        """Something rich can draw."""
        if not self.as_json:
            self.console.print(renderable)

    def warn(self, sentence: str) -> None:
        """A line for the error stream; dropped for programs, which read the JSON object."""
        if not self.as_json:
            self.errors.print(Text(sentence, style="yellow"), soft_wrap=not self.errors.is_terminal)

    # --- for programs -----------------------------------------------------------------------------------------

    def line(self, value: Any) -> None:
        """One JSON object on a line of its own (`watch`); nothing for people."""
        if self.as_json:
            self.stdout.write(json.dumps(plain(value), ensure_ascii=False) + "\n")
            self.stdout.flush()

    def finish(self, value: Mapping[str, Any]) -> None:
        """The one object that a verb ends with."""
        self.line(value)

    def fail(self, error: CoordinatorError) -> None:
        """How a verb ends that could not do its work."""
        if self.as_json:
            self.finish(error_object(error))
            return
        text = Text("failback: ", style="bold red")
        text.append(error.sentence, style="")
        self.errors.print(text, soft_wrap=not self.errors.is_terminal)


def table(*columns: str, right: Iterable[str] = (), title: str | None = None) -> Table:
    """An empty table without rules, the same on a terminal and in a pipe. `right`: columns of numbers."""
    numbers = set(right)
    made = Table(
        box=None,
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


def facts(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and values below each other."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, value)
    return made
