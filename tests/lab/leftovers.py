"""Finding what a test run left behind on the machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from tests.lab import reaper

ENDING_S = 3.0  # a process that was told to end may take this long to be gone


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What was there before, so that only what is new counts."""

    FOLDER_PREFIX: ClassVar[str] = f"fb-{os.getpid()}-"

    mounts: frozenset[str]
    network: frozenset[str]

    @classmethod
    def watch(cls) -> Self:
        """Remember the machine as it is now."""
        return cls(_mounts(), _network())

    def found(self) -> list[str]:
        """One line for each process, mount, network namespace and folder of this run that is still there."""
        deadline = time.monotonic() + ENDING_S
        while processes := {*reaper.orphans(), *reaper.children(os.getpid())}:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        lines = [f"process {pid}: {_command_line(pid)}" for pid in sorted(processes)]
        lines += [f"mount: {mount}" for mount in sorted(_mounts() - self.mounts) if self.FOLDER_PREFIX in mount]
        lines += [f"network namespace: {name}" for name in sorted(_network() - self.network)]
        if not os.environ.get("FAILBACK_LAB_KEEP"):
            lines += [f"folder: {folder}" for folder in sorted(Path("/tmp").glob(f"{self.FOLDER_PREFIX}*"))]
        return lines


def _mounts() -> frozenset[str]:
    return frozenset(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())


def _network() -> frozenset[str]:
    """Named network namespaces; the lab's own are nameless and end with their last process."""
    named = Path("/run/netns")
    return frozenset(path.name for path in named.iterdir()) if named.is_dir() else frozenset()


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except (FileNotFoundError, ProcessLookupError):
        return "(ended meanwhile)"
