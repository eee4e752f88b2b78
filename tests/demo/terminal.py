"""What the demo shows: remarks, and commands as a person types them, with their own real output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

PROGRAM = Path(sys.executable).with_name("failback")
PIPED_WIDTH = 100
COMMAND_TIMEOUT_S = 900.0
ENDING_S = 10.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class CommandFailed(Exception):
    """A command did not end with exit code 0."""


class Interrupted(KeyboardInterrupt):
    """A person, or the system, ended the demo. `number`: the signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """The first of `SIGNALS` raises `Interrupted`; later ones are ignored, so that cleaning up comes to its end."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Terminal:
    """Standard output, and the `failback` commands that write to it.

    Args:
        environment: variables that every command gets, as an ``export`` would.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = {**os.environ, **environment}
        self._started_s = time.monotonic()
        width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPED_WIDTH
        self._console = Console(highlight=False, markup=False, emoji=False, width=width)

    def remark(self, sentence: str) -> None:
        """What happens next, as a comment in a shell."""
        self._console.print()
        for line in textwrap.wrap(sentence, self._console.width - 2, break_on_hyphens=False):
            self._console.print(Text(f"# {line}", style="cyan"))
        sys.stdout.flush()

    def echo(self, line: str) -> None:
        """A command line that the demo carries out itself."""
        self._console.print(Text(f"$ {line}", style="bold"), soft_wrap=True)
        sys.stdout.flush()

    def show(self, renderable: RenderableType = "") -> None:
        """A line or a table."""
        self._console.print(renderable)
        sys.stdout.flush()

    def failback(self, *words: str) -> None:
        """Type ``failback WORDS`` and let it speak for itself.

        Raises:
            CommandFailed: its exit code is not 0.
        """
        self.echo(f"failback {' '.join(words)}")
        process = subprocess.Popen([PROGRAM, *words], env=self.environment, stdin=subprocess.DEVNULL)
        try:
            code = process.wait(COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _end(process, signal.SIGTERM)
            raise CommandFailed(f"`failback {' '.join(words)}` did not end in {COMMAND_TIMEOUT_S:.0f} s") from None
        except Interrupted as interrupted:
            # Ctrl-C reaches every process of the terminal's foreground; other signals reached this one alone.
            heard = interrupted.number == signal.SIGINT and sys.stdin.isatty()
            _end(process, None if heard else interrupted.number)
            raise
        if code:
            raise CommandFailed(f"`failback {' '.join(words)}` ended with exit code {code}")

    def ask(self, *words: str) -> dict[str, Any]:
        """The JSON object of a ``failback`` verb, not shown.

        Raises:
            CommandFailed: its exit code is not 0.
        """
        argv: Sequence[str | Path] = [PROGRAM, "--json", *words]
        done = subprocess.run(
            argv, env=self.environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
        if done.returncode:
            raise CommandFailed(f"`failback --json {' '.join(words)}` ended with {done.returncode}: {done.stdout}")
        answer = json.loads(done.stdout)
        assert isinstance(answer, dict)
        return answer

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._started_s


def _end(process: subprocess.Popen[bytes], number: int | None) -> None:
    """Tell the command, unless it knows, wait for its own end, and then wait no more."""
    if number is not None:
        process.send_signal(number)
    try:
        process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
