"""A pass in which nothing moves fails in bounded time, and says who is waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from agent.errors import SyncError
from agent.sync.meter import Meter
from agent.sync.rate import Limits

STALLED_AFTER_S = 300.0
"""Storage that has carried out none of our requests for so long is dead, however slow it may be when it is not. The
side that waits for its peer gives that twice as long, so that of both the one speaks who knows."""
LARGEST_STEP_BYTES = 128 << 20
"""What moves at once at most: under a limit it may take its time."""
LOOK_EVERY_S = 5.0


class PassStalled(SyncError):
    """Nothing of a disk's pass has moved for minutes."""

    code = "stalled"


@dataclass
class StallWatch:
    """One side's watch over one disk.

    Attributes:
        side: ``source`` or ``target``, ours.
        waits_for: ``storage``: our own has requests of ours; ``peer``: it is the other side's turn; ``nobody``: what
            holds us up is not ours to judge.
    """

    disk_name: str
    side: str
    meter: Meter
    limits: Limits
    waits_for: Callable[[], str]

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            PassStalled: nothing has moved.
        """
        seen, since = self._moved(), trio.current_time()
        while True:
            await trio.sleep(LOOK_EVERY_S)
            now, waits_for = self._moved(), self.waits_for()
            if now != seen or waits_for == "nobody":
                seen, since = now, trio.current_time()
                continue
            patience_s = self._patience_s() * (1 if waits_for == "storage" else 2)
            if trio.current_time() - since >= patience_s:
                raise self._stalled(waits_for, trio.current_time() - since)

    def _moved(self) -> tuple[int, ...]:
        meter = self.meter
        return (
            meter.zero_bytes,
            meter.compared_bytes,
            meter.settled_bytes,
            meter.changed_bytes,
            meter.written_bytes,
            meter.zeroed_bytes,
            meter.verified_bytes,
            meter.unchanged_bytes,
            meter.mapped_bytes,
        )

    def _patience_s(self) -> float:
        rates = [limit.bytes_per_s for limit in (self.limits.network, self.limits.read) if limit.bytes_per_s]
        return STALLED_AFTER_S + (LARGEST_STEP_BYTES / min(rates) if rates else 0.0)

    def _stalled(self, waits_for: str, seconds: float) -> PassStalled:
        other = "target" if self.side == "source" else "source"
        if waits_for == "storage":
            what = (
                f"its storage on the {self.side}'s host has answered nothing for {seconds:.0f} s; look at that storage"
            )
        else:
            what = f"the {other} agent has got nowhere for {seconds:.0f} s; look at that host and its storage"
        return PassStalled(
            f"disk {self.disk_name}: {what}, then try again: what is proven is not done again", disk=self.disk_name
        )
