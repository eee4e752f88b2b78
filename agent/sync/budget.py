"""A budget in bytes that tasks take from and give back to: what bounds every stage of a pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio


@dataclass
class ByteBudget:
    """At most `limit_bytes` are taken at any time; takers are served in the order they came.

    One request larger than the whole budget is let through when nothing else is taken, so that it waits, but never
    for ever.
    """

    limit_bytes: int
    taken_bytes: int = 0
    _waiting: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    _turn: trio.StrictFIFOLock = field(default_factory=trio.StrictFIFOLock)

    async def take(self, size_bytes: int) -> None:
        """Wait until `size_bytes` fit, then take them."""
        async with self._turn:
            while self.taken_bytes and self.taken_bytes + size_bytes > self.limit_bytes:
                await self._waiting.park()
            self.taken_bytes += size_bytes

    def give(self, size_bytes: int) -> None:
        """Give back what was taken.

        Raises:
            ValueError: more than was taken comes back.
        """
        if size_bytes > self.taken_bytes:
            raise ValueError(f"{size_bytes} bytes come back to a budget that lent {self.taken_bytes}")
        self.taken_bytes -= size_bytes
        self._waiting.unpark_all()
