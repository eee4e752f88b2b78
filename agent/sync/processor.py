"""How busy this host's processors are: whether compressing takes time that nobody else wants."""

from __future__ import annotations

from pathlib import Path

STAT = Path("/proc/stat")


class ProcessorTime:
    """Tells the idle share of all processors between two looks at ``/proc/stat`` (proc(5))."""

    def __init__(self) -> None:
        self._idle, self._total = _read()

    def idle_share(self) -> float:
        """From 0 to 1, since the last look; 1 where the kernel does not tell."""
        idle, total = _read()
        before, self._idle, self._total = (self._idle, self._total), idle, total
        passed = total - before[1]
        return (idle - before[0]) / passed if passed > 0 else 1.0


def _read() -> tuple[int, int]:
    """Idle ticks (waiting for storage included) and all ticks since boot."""
    try:
        with STAT.open("rb") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]  # guest time is part of user time
    except (OSError, ValueError):
        return 0, 0
    return sum(ticks[3:5]), sum(ticks)
