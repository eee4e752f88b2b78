"""When the connections of a disk are lost: how long to wait before they are made again, and when to give that up."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from protocol.errors import ConnectionLost

DEADLINE_S = 120.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0
LASTING_S = 60.0
"""Connections that held for so long are progress, whatever came of them: where little differs nothing may be proven."""
TARGET_WAITS_LONGER_S = 30.0
"""So that of both sides the source gives up first, who knows why its connections do not come about."""


@dataclass
class Reconnecting:
    """One disk's attempts, as its source counts them.

    Attributes:
        deadline_s: how long it may take from the first loss on, counted anew whenever more is proven.
        jitter: 0 to 1, at random, so that the disks of many runs do not come at once.
        attempt: the number of the present one.
    """

    disk_name: str
    deadline_s: float = DEADLINE_S
    jitter: Callable[[], float] = random.random
    attempt: int = 1
    _pauses: int = 0
    _proven_bytes: int = -1
    _ends_at: float | None = None
    _connected_at: float | None = field(default=None)

    @property
    def ever_connected(self) -> bool:
        """Whether any attempt was welcomed: a target that cannot be reached at all is told at once."""
        return self._proven_bytes >= 0

    def connected(self, proven_bytes: int) -> None:
        """The target let an attempt in, of which so much is proven already."""
        self._connected_at = trio.current_time()
        self._pauses = 0
        if proven_bytes > self._proven_bytes:
            self._proven_bytes, self._ends_at = proven_bytes, None

    async def pause(self, error: ConnectionLost) -> None:
        """An attempt was lost, or did not come about: wait for the next one's turn.

        Raises:
            ConnectionLost: it has taken too long.
        """
        now = trio.current_time()
        if self._connected_at is not None and now - self._connected_at >= LASTING_S:
            self._ends_at = None
        self._connected_at = None
        if self._ends_at is None:
            self._ends_at = now + self.deadline_s
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self._pauses) * (0.5 + self.jitter() / 2)
        if now + pause_s > self._ends_at:
            raise ConnectionLost(
                f"disk {self.disk_name}: the connections with the target agent were lost and could not be made again "
                f"for {self.deadline_s:g} s ({error.sentence}); mend the network and resume: what is proven is not "
                "sent again"
            ) from error
        await trio.sleep(pause_s)
        self._pauses += 1
        self.attempt += 1
