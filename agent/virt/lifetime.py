"""Since when a domain runs, and when it was started and stopped last, as far as its host's files tell. Reads only.

libvirt keeps neither. The process has its start time in ``/proc``, and the log of the domain has a line for each start
and stop (https://libvirt.org/drvqemu.html). A log may be rotated or deleted: nothing found means that nothing is known.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

_TAIL_BYTES = 1 << 20
_LINE = re.compile(
    rb"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+)\+0000: (?:(starting up)\b|shutting down, reason=(\w+))", re.MULTILINE
)
_NEVER_RAN = b"failed"
"""Reason of the stop of a domain that did not get as far as running: its images were locked, say."""
_AFTER_NAME = 19
"""Of ``/proc/PID/stat``: ``starttime``, counted from the field behind the command's name (proc(5))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """In seconds since 1970 by the host's clock; 0 is not known, or that it never did.

    Attributes:
        running_since_s: when its process started.
        started_s, stopped_s: when it was started and when it was stopped last, by its log.
    """

    running_since_s: float = 0.0
    started_s: float = 0.0
    stopped_s: float = 0.0


def lifetime(name: str, log_dir: Path, run_dir: Path) -> Lifetime:
    """Of the domain of that name.

    Args:
        log_dir: where the QEMU driver keeps the logs of its domains; run_dir: and their PID files.
    """
    started_s, stopped_s = _from_log(log_dir / f"{name}.log")
    return Lifetime(running_since_s=_of_process(name, run_dir), started_s=started_s, stopped_s=stopped_s)


def _from_log(path: Path) -> tuple[float, float]:
    try:
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = log.read(_TAIL_BYTES)
    except OSError:
        return 0.0, 0.0
    return last_times(text)


def last_times(log: bytes) -> tuple[float, float]:
    """The last start and the last stop that a domain's log tells of; a start that failed is none."""
    started_s = stopped_s = begun_s = 0.0
    for found in _LINE.finditer(log):
        at_s = datetime.strptime(found[1].decode(), "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC).timestamp()
        if found[2]:
            started_s, begun_s = at_s, started_s
        elif found[3] == _NEVER_RAN:
            started_s = begun_s
        else:
            stopped_s = at_s
    return started_s, stopped_s


def _of_process(name: str, run_dir: Path) -> float:
    try:
        pid = int((run_dir / f"{name}.pid").read_text(encoding="ascii"))
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return 0.0
    # A PID file may be stale, or of another PID namespace: the process must say that it is this domain.
    if not any(word.split(b",")[0] == b"guest=" + name.encode() for word in words):
        return 0.0
    ticks = int(status.rpartition(")")[2].split()[_AFTER_NAME])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s
