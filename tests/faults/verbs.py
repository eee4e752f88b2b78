"""Verbs of `failback` as processes that stop where they are told to: the lab's side of `tests.faults.paced`."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.faults.paced import Stop
from tests.lab.coordinator_process import CoordinatorProcess

REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT_S = 60.0
NEWS_TIMEOUT_S = 120.0


class VerbError(AssertionError):
    """A verb did not do what it was waited for."""


class Verb:
    """One verb under way."""

    def __init__(self, server: Verbs, pid: int, words: Sequence[str], log: Path) -> None:
        self._server = server
        self.pid = pid
        self.words = tuple(words)
        self.log = log
        self.stopped = False
        self.code: int | None = None

    def wait(self, timeout_s: float = NEWS_TIMEOUT_S) -> int | None:
        """Return at its next stop (None), or at its end (the exit code, negative for a signal)."""
        self._server.wait(self, timeout_s)
        return self.code

    def go_on(self) -> None:
        """Let a stopped one go on."""
        if self.code is None:
            self.stopped = False
            os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):  # its end is on its way to us
                os.kill(self.pid, signal.SIGKILL)
            self.stopped = False
            while self.code is None:
                self._server.wait(self, NEWS_TIMEOUT_S)

    def said(self) -> dict[str, Any]:
        """The JSON object it ended with; empty when it had none to say."""
        text = self.log.read_text(errors="replace")
        assert "Traceback" not in text, f"`failback {' '.join(self.words)}`:\n{text}"
        for line in reversed(text.splitlines()):
            if line.startswith("{"):
                found = json.loads(line)
                assert isinstance(found, dict)
                return found
        return {}

    def sentence(self) -> str:
        """What its last object says for people."""
        said = self.said()
        error = said.get("error")
        if isinstance(error, dict):
            return str(error["sentence"])
        return str(said.get("sentence", ""))


class Verbs:
    """A server of verbs; a context manager.

    Args:
        coordinator: whose configuration, environment and network namespace the verbs run in.
        folder: for their output.
    """

    def __init__(self, coordinator: CoordinatorProcess, folder: Path) -> None:
        self._folder = folder
        self._coordinator = coordinator
        self._process: subprocess.Popen[bytes] | None = None
        self._verbs: dict[int, Verb] = {}
        self._started: dict[int, int] = {}
        self._early: list[dict[str, Any]] = []
        self._pending = b""
        self._number = 0

    def __enter__(self) -> Self:
        self._folder.mkdir(exist_ok=True)
        environment = {**self._coordinator.environment, "PYTHONPATH": str(REPOSITORY)}
        argv = self._coordinator.wrapped([sys.executable, "-m", "tests.faults.paced"])
        self._process = subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for verb in tuple(self._verbs.values()):
            verb.kill()
        assert self._process is not None
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait(START_TIMEOUT_S)

    def start(self, *words: str, stops: Sequence[Stop] = ()) -> Verb:
        """Start a verb that stops at those entries of the journal."""
        self._number += 1
        number, log = self._number, self._folder / f"verb{self._number % 40}.log"
        argv = ["--json", *words]
        order = {"id": number, "argv": argv, "stops": [list(stop) for stop in stops], "log": str(log)}
        assert self._process is not None
        assert self._process.stdin is not None
        log.unlink(missing_ok=True)
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        deadline = time.monotonic() + START_TIMEOUT_S
        while number not in self._started:
            self._listen(deadline)
        verb = Verb(self, self._started.pop(number), words, log)
        self._verbs[verb.pid] = verb
        early, self._early = self._early, []
        for news in early:
            self._take(news)
        return verb

    def run(self, *words: str) -> Verb:
        """Run a verb to its end."""
        verb = self.start(*words)
        verb.wait()
        return verb

    def must(self, *words: str) -> dict[str, Any]:
        """Run a verb that has to end well; what it says."""
        verb = self.run(*words)
        if verb.code != 0:
            raise VerbError(f"`failback {' '.join(words)}` ended with {verb.code}:\n{verb.log.read_text()}")
        return verb.said()

    def wait(self, verb: Verb, timeout_s: float) -> None:
        """Wait for the verb's next stop or its end."""
        deadline = time.monotonic() + timeout_s
        while not verb.stopped and verb.code is None:
            try:
                self._listen(deadline)
            except VerbError:
                text = verb.log.read_text(errors="replace")[-2000:] if verb.log.exists() else ""
                raise VerbError(f"`failback {' '.join(verb.words)}` neither stops nor ends:\n{text}") from None
        if verb.code is not None:
            self._verbs.pop(verb.pid, None)

    def _listen(self, deadline: float) -> None:
        if not self._selector.select(max(0.0, deadline - time.monotonic())):
            raise VerbError("the server of verbs has nothing to tell")
        assert self._process is not None
        assert self._process.stdout is not None
        chunk = os.read(self._process.stdout.fileno(), 65536)
        if not chunk:
            raise VerbError("the server of verbs has ended")
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, news: dict[str, Any]) -> None:
        if "id" in news:
            self._started[news["id"]] = news["pid"]
        elif (verb := self._verbs.get(news["pid"])) is None:
            self._early.append(news)
        elif "code" in news:
            verb.code = news["code"]
        else:
            verb.stopped = True
