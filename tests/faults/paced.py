"""The `failback` command, stopped at boundaries of the journal: a server that forks a process for each verb.

Each verb is a process of its own, as on any machine, that stops itself (SIGSTOP) when the journal entry it was told of
has become durable. Nothing in the product knows of it: the one method through which every step writes is wrapped here.
A fork costs milliseconds where a program's start costs a second, which makes hundreds of faults affordable.

Orders come on standard input and news go to standard output, a JSON object a line:
``{"id": 1, "argv": […], "stops": [[step, phase, kind], …], "log": path}`` → ``{"id": 1, "pid": 123}``, then for that
process ``{"pid": 123, "stopped": true}`` and ``{"pid": 123, "code": -9}``.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from coordinator.cli.main import main as failback
from coordinator.context import RunContext
from coordinator.entries import EntryKind, Phase

Stop = tuple[str, str, str]


def stop_at(stops: set[Stop]) -> None:
    """From now on this process stops itself at each of those entries, once."""
    write: Callable[..., Any] = RunContext.write

    async def paced(self: RunContext, kind: EntryKind, step: str, *, phase: Phase = Phase.DO, **more: Any) -> None:
        await write(self, kind, step, phase=phase, **more)
        here = (step, phase.value, kind.value)
        if here in stops:
            stops.discard(here)
            os.kill(os.getpid(), signal.SIGSTOP)

    RunContext.write = paced  # type: ignore[method-assign]


def _carry_out(order: dict[str, Any]) -> NoReturn:
    """In the child: the verb, to its end."""
    code = 70
    try:
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(-1)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        stop_at({(step, phase, kind) for step, phase, kind in order["stops"]})
        sys.argv = ["failback", *order["argv"]]
        failback()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell(**news: object) -> None:
    os.write(1, json.dumps(news).encode() + b"\n")


def _reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if os.WIFSTOPPED(status):
            _tell(pid=pid, stopped=True)
        else:
            _tell(pid=pid, code=os.waitstatus_to_exitcode(status))


def main() -> None:
    """Serve until standard input ends."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    os.set_blocking(read, False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    signal.set_wakeup_fd(write)
    waiting = selectors.DefaultSelector()
    waiting.register(0, selectors.EVENT_READ)
    waiting.register(read, selectors.EVENT_READ)
    pending = b""
    while True:
        for key, _ in waiting.select():
            if key.fd == read:
                os.read(read, 4096)
                _reap()
                continue
            chunk = os.read(0, 65536)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                order = json.loads(line)
                if (pid := os.fork()) == 0:
                    _carry_out(order)
                _tell(id=order["id"], pid=pid)


if __name__ == "__main__":
    main()
