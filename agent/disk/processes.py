"""Starting processes that must not outlive the agent, not even one that was killed.

prctl(2), PR_SET_PDEATHSIG: the signal comes when the *thread* that made the child ends, not its process. Worker
threads come and go, so all such children are made by one thread that lives as long as the process.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

from agent.disk.priority import idle_priority

_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="process-starter")

# Between fork and prctl the agent may die unnoticed; so, with the signal armed, the child looks who its parent is.
_STILL_OURS = '[ "$PPID" = "$0" ] && exec "$@"'


def start_bound(
    command: Sequence[str],
    *,
    pass_fds: Sequence[int] = (),
    stdout: int = subprocess.DEVNULL,
    stderr: int,
    idle: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a process that the kernel kills (SIGKILL) when this process ends, however it ends.

    It is in a session of its own, so that Ctrl-C on a terminal reaches only us, who then stop it in order.

    Args:
        command: program and arguments.
        pass_fds: descriptors it inherits, under their numbers.
        stdout: descriptor for its output, or ``subprocess.PIPE``; none of it is kept unless asked for.
        stderr: descriptor for its messages.
        idle: it starts, and stays, under idle I/O priority (see `agent.disk.priority`).

    Raises:
        OSError: it could not be started.
    """
    bound = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", _STILL_OURS, str(os.getpid()), *command]

    def start() -> subprocess.Popen[bytes]:
        # A process inherits the priority of the thread that makes it (ioprio_set(2)).
        with idle_priority() if idle else nullcontext():
            return subprocess.Popen(
                bound,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=pass_fds,
                start_new_session=True,
            )

    return _starter.submit(start).result()
