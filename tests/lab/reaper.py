"""A parent that reaps orphans at once, for the processes that run libvirt's QEMU driver.

Every QEMU is daemonized and so orphaned. Where PID 1 is slow to reap (containers, small VMs), libvirt waits 30 s
and more for each QEMU that has already ended. A process under this reaper never waits: orphans come to the reaper
(``PR_SET_CHILD_SUBREAPER``, prctl(2)), which has nothing else to do.

The reaper must not be the process that runs libvirt: waiting for any child there would steal libvirt's own.

As a command: ``python -m tests.lab.reaper -- COMMAND …`` ends with the command's exit code and ends what it left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
UNDER_REAPER = "FAILBACK_LAB_REAPER"  # PID of the reaper that this process descends from
GRACE_S = 5.0


def become_child_of_reaper() -> None:
    """Fork: the parent becomes the reaper and never returns; the child goes on, with orphans below it reaped at once.

    The parent passes SIGTERM, SIGHUP and SIGINT on, ends with the child's exit code, and before that ends whatever the
    child left running. Does nothing when this process runs under such a reaper already. Call it before any
    thread is started.
    """
    if os.environ.get(UNDER_REAPER):
        return
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    os.environ[UNDER_REAPER] = str(os.getpid())
    child = os.fork()
    if child == 0:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        return
    status = _reap_until_end_of(child)
    end_orphans()
    os._exit(status)


def orphans() -> list[int]:
    """PIDs of running orphans that the reaper above this process holds (QEMUs of embedded roots, say)."""
    reaper = os.environ.get(UNDER_REAPER)
    if reaper is None:
        return []
    return [pid for pid in children(int(reaper)) if pid not in _ancestry()]


def children(pid: int) -> list[int]:
    """PIDs of the children of `pid`, zombies left out."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return [child for child in found if _state(child) not in ("Z", "X", "")]


def end_orphans() -> None:
    """In the reaper: ask every remaining child to end, then kill it, until there is none."""
    deadline = time.monotonic() + GRACE_S
    while True:
        number = signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL
        for pid in children(os.getpid()):
            _signal(pid, number)
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


def _reap_until_end_of(child: int) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to the child as well
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: _signal(child, number))
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _ancestry() -> list[int]:
    """This process, its parent, and so on up to PID 1."""
    line = [os.getpid()]
    while line[-1] > 1:
        line.append(int(_stat(line[-1])[1]))
    return line


def _state(pid: int) -> str:
    try:
        return _stat(pid)[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _stat(pid: int) -> list[str]:
    """Fields of proc_pid_stat(5) from the state on: state, parent …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def main(argv: list[str]) -> int:
    """Run the command in `argv` (after an optional ``--``) under a reaper."""
    command = argv[1:] if argv[:1] == ["--"] else argv
    if not command:
        print("usage: python -m tests.lab.reaper -- COMMAND [ARGUMENT …]", file=sys.stderr)
        return 2
    become_child_of_reaper()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
