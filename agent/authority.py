"""Whose orders this agent obeys: one pair's orders take turns, and only under the highest fencing epoch seen (I6)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from agent.errors import StaleEpoch
from agent.ledger import Ledger
from agent.passes import PassDesk
from agent.threads import Threads
from protocol.messages import Order


@dataclass
class Authority:
    """The pairs' turns and epochs on this agent. `host` is what sentences call it."""

    host: str
    ledger: Ledger
    passes: PassDesk
    threads: Threads
    _turns: dict[str, trio.Lock] = field(default_factory=dict)

    @asynccontextmanager
    async def of(self, order: Order) -> AsyncIterator[None]:
        """The order's turn: inside, no other order of the pair is carried out.

        A higher epoch gets its turn only when the order that runs under the lower one has ended, and is written down
        only when its pass has, so whoever is answered under it is alone.

        Raises:
            StaleEpoch: another coordinator took the pair over.
        """
        async with self._turns.setdefault(order.pair, trio.Lock()):
            seen = self.ledger.epoch(order.pair)
            if order.epoch < seen:
                raise StaleEpoch(
                    f"the order for the pair {order.pair} comes under epoch {order.epoch}, but epoch {seen} has taken "
                    f"over on {self.host}: end this process, the newer one is in charge",
                    seen=seen,
                )
            if order.epoch > seen:
                await self.passes.end(order.pair)
                await self.threads.on_libvirt(lambda: self.ledger.raise_epoch(order.pair, order.epoch))
            yield
