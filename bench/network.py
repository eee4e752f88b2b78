"""A link of a known speed: two network namespaces joined by a pair of virtual cards that `tc tbf` slows down.

The coordinator has a namespace of its own with a way to either end that does not lead over the link, so that what the
link carries is the data plane's alone. Nothing is set up in the machine's own network. Needs root.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE, TARGET, BESIDE = "10.78.0.1", "10.78.0.2", "10.78.9.254"
GIGABIT = 1_000_000_000
TBF_BURST = "256kb"
"""More than the largest packet that virtual cards hand over (64 KiB), and 2 ms of a gigabit."""
TBF_LATENCY = "20ms"


class NetworkError(Exception):
    """A namespace or a link could not be made; the sentence says which command failed and why."""


@dataclass(frozen=True, slots=True)
class End:
    """One end of the link: its address on it and the process that holds its namespace."""

    address: str
    pid: int

    def inside(self) -> list[str]:
        """Words in front of a command that make it run at this end; signals, files and exit code are its own."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]

    def link_bytes(self) -> int:
        """What this end's card has sent and received so far, link-layer headers included."""
        for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
            card, _, numbers = line.strip().partition(":")
            if card == "eth0":
                fields = numbers.split()
                return int(fields[0]) + int(fields[8])
        raise NetworkError(f"the namespace of process {self.pid} has no eth0: it has ended")


@dataclass(frozen=True, slots=True)
class Link:
    """The link and who is beside it. Use `open_link`."""

    source: End
    target: End
    coordinator: End

    def beside(self) -> list[str]:
        """Words in front of a command that reaches both ends without the link."""
        return self.coordinator.inside()


@contextlib.contextmanager
def open_link(bits_per_s: int | None) -> Iterator[Link]:
    """Make namespaces and link; `bits_per_s` is its speed in either direction, None for as fast as memory.

    Raises:
        NetworkError: no right to make namespaces (root is needed), or `ip` or `tc` failed.
    """
    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(_namespace()) for _ in range(3)]
        source, target, coordinator = (
            End(address, pid) for address, pid in zip((SOURCE, TARGET, BESIDE), pids, strict=True)
        )
        _ip(source, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(target.pid))
        _ip(coordinator, "addr", "add", f"{BESIDE}/32", "dev", "lo")
        for number, end in enumerate((source, target)):
            _ip(end, "addr", "add", f"{end.address}/24", "dev", "eth0")
            _ip(end, "link", "set", "eth0", "up")
            card = f"way{number}"
            _ip(coordinator, "link", "add", card, "type", "veth", "peer", "name", "beside", "netns", str(end.pid))
            _ip(coordinator, "link", "set", card, "up")
            _ip(end, "link", "set", "beside", "up")
            _ip(coordinator, "route", "add", f"{end.address}/32", "dev", card, "src", BESIDE)
            _ip(end, "route", "add", f"{BESIDE}/32", "dev", "beside", "src", end.address)
            if bits_per_s is not None:
                words = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", f"{bits_per_s}bit"]
                _checked([*end.inside(), *words, "burst", TBF_BURST, "latency", TBF_LATENCY])
        yield Link(source, target, coordinator)


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """A network namespace with its loopback up; yields the PID of the process that holds it."""
    words = ["unshare", "--net", "sh", "-ec", "ip link set lo up; echo up; exec sleep infinity"]
    holder = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        if holder.stdout.readline().strip() != "up":
            raise NetworkError("no network namespace could be made: run this benchmark as root")
        yield holder.pid
    finally:
        holder.kill()
        holder.communicate()


def _ip(end: End, *words: str) -> None:
    _checked([*end.inside(), "ip", *words])


def _checked(words: Sequence[str]) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise NetworkError(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
