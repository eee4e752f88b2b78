"""How fast a pass may send and read: one limit for the network and one for reads, shared by all disks of the pass.

Whoever is about to send or read so many bytes takes them from the limit first. What was taken is paid for in time by
whoever comes next: so a request need not be cut up, sending and paying overlap, and the average is the limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import trio

BURST_S = 0.05
"""So much of the limit may be saved up while nobody takes anything: makes up for late wake-ups, and is no burst yet."""
DEBT_S = 1.0
"""So much of the limit may be owed. Who takes more than that waits for the rest beforehand, so that a large request
keeps nobody behind it waiting for longer than this, and a limit that is lowered is obeyed within about as long."""
SOON_S = 1e-6
"""Below this nobody waits: clocks are not that fine, and the difference stays on the books."""


class RateLimit:
    """Lets through so many bytes a second, in the order in which they are asked for.

    For trio tasks of one run loop. Nothing ticks: who waits sleeps until it is due, or until the limit is set anew.

    Args:
        bytes_per_s: the limit; None: there is none.

    Attributes:
        bytes_per_s: the limit in force.
        waited_s: how long the limit has held somebody up; the time counts once, however many wait.
    """

    def __init__(self, bytes_per_s: int | None = None) -> None:
        self.bytes_per_s = _checked(bytes_per_s)
        self.waited_s = 0.0
        self._saved_bytes = 0.0  # below zero: owed
        self._beforehand_bytes = 0.0  # what the request at the head must save up
        self._settled_at = -math.inf  # in trio's time
        self._turn = trio.Lock()  # first come, first served (trio's reference)
        self._set_anew = trio.Event()

    async def take(self, size_bytes: int) -> None:
        """Wait until `size_bytes` more may be sent or read. Always a checkpoint; cancelled, it has taken nothing."""
        if self.bytes_per_s is None:
            await trio.lowlevel.checkpoint()
            return
        async with self._turn:
            began = trio.current_time()
            try:
                while (due_in_s := self._due_in_s(size_bytes)) > SOON_S:
                    with trio.move_on_after(due_in_s):
                        await self._set_anew.wait()
            finally:
                self._beforehand_bytes = 0.0
                self.waited_s += trio.current_time() - began
            self._saved_bytes -= size_bytes

    def set(self, bytes_per_s: int | None) -> None:
        """Another limit (None: none) from now on, also for those who wait.

        What is owed neither grows nor takes longer to pay by it, and is forgiven with the limit.

        Raises:
            ValueError: a limit of nothing, or less.
        """
        new = _checked(bytes_per_s)
        old = self.bytes_per_s
        if old is None or new is None:
            self._saved_bytes, self._settled_at = 0.0, -math.inf
        else:
            self._settle(old)
            if self._saved_bytes < 0:
                self._saved_bytes *= min(1.0, new / old)
        self.bytes_per_s = new
        self._set_anew.set()
        self._set_anew = trio.Event()

    def _due_in_s(self, size_bytes: int) -> float:
        """How long the request at the head must still wait."""
        rate = self.bytes_per_s
        if rate is None:
            return 0.0
        self._beforehand_bytes = max(0.0, size_bytes - rate * DEBT_S)
        self._settle(rate)
        return (self._beforehand_bytes - self._saved_bytes) / rate

    def _settle(self, rate: int) -> None:
        """Book what time has brought since the last settling."""
        now = trio.current_time()
        if self._settled_at > -math.inf:
            most_bytes = max(rate * BURST_S, self._beforehand_bytes)
            self._saved_bytes = min(most_bytes, self._saved_bytes + (now - self._settled_at) * rate)
        self._settled_at = now


def _checked(bytes_per_s: int | None) -> int | None:
    if bytes_per_s is not None and bytes_per_s <= 0:
        raise ValueError(f"a limit of {bytes_per_s} bytes/s lets nothing through")
    return bytes_per_s


@dataclass(frozen=True, slots=True)
class Limits:
    """Both limits of one pass on one agent, for all of its disks and connections together.

    Attributes:
        network: take from it before a frame is sent.
        read: take from it before storage is read.
    """

    network: RateLimit = field(default_factory=RateLimit)
    read: RateLimit = field(default_factory=RateLimit)

    def set(self, network_bytes_per_s: int | None, read_bytes_per_s: int | None) -> None:
        """Set both; None: no limit. Raises `ValueError` for a limit of nothing, and then changes neither."""
        for given in (network_bytes_per_s, read_bytes_per_s):
            _checked(given)
        self.network.set(network_bytes_per_s)
        self.read.set(read_bytes_per_s)
