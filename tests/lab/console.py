"""Reading what a lab guest said on its serial console (a file that QEMU appends to)."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

READY = r"FAILBACK READY"
POLL_S = 0.05  # a console file has no other way to tell; the wait ends on the line itself


@dataclass(frozen=True, slots=True)
class Record:
    """State of a disk's journal: its last sequence number, and the checksum chained over all records up to it.

    `checksum` is ``-`` on a disk without records, and ``corrupt-…`` when the guest found the disk inconsistent.
    """

    sequence: int
    checksum: str

    @property
    def consistent(self) -> bool:
        """Whether the guest found the record and every slot it speaks of intact."""
        return not self.checksum.startswith("corrupt")


class ConsoleTimeout(AssertionError):
    """The guest did not say it in time."""


def read(log: Path) -> str:
    """Everything said so far; empty before QEMU made the file. Half a last line is left out."""
    try:
        text = log.read_bytes().decode(errors="replace").replace("\r", "")
    except FileNotFoundError:
        return ""
    return text[: text.rfind("\n") + 1]


def last_boot(log: Path) -> str:
    """What was said since the guest last booted: from the first FOUND line after the READY line before it."""
    said = [line for line in read(log).splitlines() if line.startswith("FAILBACK ")]
    boot: list[str] = []
    ready = False
    for line in said:
        if ready and line.startswith(("FAILBACK FOUND", READY)):
            boot, ready = [], False
        boot.append(line)
        ready = ready or line == READY
    return "".join(f"{line}\n" for line in boot)


def wait_for_line(log: Path, pattern: str, timeout_s: float, *, after: int = 0) -> re.Match[str]:
    """The first whole line that `pattern` (a regular expression) matches.

    Args:
        log: the console's file; need not exist yet.
        pattern: matched against whole lines.
        timeout_s: seconds until `ConsoleTimeout`.
        after: characters of `read` to skip (``len(read(log))`` taken earlier), to wait for something new.
    """
    expression = re.compile(pattern)
    deadline = time.monotonic() + timeout_s
    while True:
        for line in read(log)[after:].splitlines():
            if matched := expression.fullmatch(line.strip()):
                return matched
        if time.monotonic() > deadline:
            tail = "\n".join(read(log).splitlines()[-15:])
            raise ConsoleTimeout(f"{log} has no line {pattern!r} after {timeout_s} s; it ends with:\n{tail}")
        time.sleep(POLL_S)


def wait_ready(log: Path, timeout_s: float = 120.0, *, after: int = 0) -> None:
    """Wait until the guest has read its disks and listens to its power button."""
    wait_for_line(log, READY, timeout_s, after=after)


def wait_for_writes(log: Path, disk: str, count: int, timeout_s: float = 120.0) -> int:
    """Wait until `count` more writes of `disk` are durable than now; returns the last sequence number."""
    start = len(read(log))
    deadline = time.monotonic() + timeout_s
    while True:
        matched = wait_for_line(log, rf"FAILBACK WROTE {disk} (\d+)", deadline - time.monotonic(), after=start)
        start = read(log).index(matched[0], start) + len(matched[0])
        count -= 1
        if count <= 0:
            return int(matched[1])


def wrote(log: Path) -> dict[str, int]:
    """Last durable sequence number by disk, as far as the guest has said so in its last boot."""
    return {disk: int(number) for disk, number in re.findall(r"^FAILBACK WROTE (\S+) (\d+)$", last_boot(log), re.M)}


def found(log: Path) -> dict[str, Record]:
    """What the last boot found on each disk."""
    return _records(log, "FOUND")


def last(log: Path) -> dict[str, Record]:
    """What the last boot left on each disk when it powered off; empty when it did not power off by itself."""
    return _records(log, "LAST")


def failures(log: Path) -> list[str]:
    """Whatever the guest complained about."""
    return re.findall(r"^FAILBACK FAIL (.*)$", read(log), re.M)


def _records(log: Path, word: str) -> dict[str, Record]:
    lines = re.findall(rf"^FAILBACK {word} (\S+) (\d+) (\S+)$", last_boot(log), re.M)
    return {disk: Record(int(number), checksum) for disk, number, checksum in lines}
