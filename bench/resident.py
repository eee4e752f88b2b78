"""Private resident memory of processes with their children, sampled while something runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

SAMPLE_EVERY_S = 0.1
PRIVATE = ("Private_Clean:", "Private_Dirty:")


def private_bytes(rollup: str) -> int:
    """Private_Clean and Private_Dirty of a ``/proc/PID/smaps_rollup`` (proc(5)), in bytes."""
    lines = (line.split() for line in rollup.splitlines())
    return sum(int(words[1]) << 10 for words in lines if words and words[0] in PRIVATE)


def tree(pid: int) -> list[int]:
    """A process and all below it that still run."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def resident_bytes(pid: int) -> int:
    """Private resident memory of a process and all below it; one that ends meanwhile counts nothing."""
    total = 0
    for member in tree(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += private_bytes(Path(f"/proc/{member}/smaps_rollup").read_text())
    return total


class Sampler:
    """The peak of each process tree so far, in bytes. Use `sampled`."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self.peaks = dict.fromkeys(pids, 0)
        self.samples = 0
        self._pids = dict(pids)
        self._ended = threading.Event()

    def run(self) -> None:
        """Look until `end`."""
        while True:
            for name, pid in self._pids.items():
                self.peaks[name] = max(self.peaks[name], resident_bytes(pid))
            self.samples += 1
            if self._ended.wait(SAMPLE_EVERY_S):
                return

    def end(self) -> None:
        """Look once more at most."""
        self._ended.set()


@contextlib.contextmanager
def sampled(pids: Mapping[str, int]) -> Iterator[Sampler]:
    """Sample the process trees under `pids`, by name, inside the block."""
    sampler = Sampler(pids)
    thread = threading.Thread(target=sampler.run)
    thread.start()
    try:
        yield sampler
    finally:
        sampler.end()
        thread.join()
