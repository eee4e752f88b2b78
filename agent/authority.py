"""Whose orders this agent obeys: one pair's orders take turns, and only under the highest fencing epoch seen (I6)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import trio

from agent.authority_record import EpochRecord
from agent.errors import Held, StaleEpoch
from agent.ledger import FenceRecord, Ledger
from agent.passes import PassDesk
from agent.threads import Threads
from protocol.messages import (
    AllowPass,
    AskAuthority,
    Order,
    OrderRequest,
    PairAuthority,
    RememberPair,
    RunPass,
    SetLimits,
    TakePair,
)
from protocol.tls import PeerIdentity


def vm_of(request: OrderRequest) -> str:
    """UUID of the VM that the order speaks of; empty where it speaks of a granted pass."""
    match request:
        case AllowPass():
            return request.grant.vm_uuid
        case RunPass() | SetLimits() | TakePair() | RememberPair():
            return ""
        case _:
            return request.vm_uuid


@dataclass
class Authority:
    """The pairs' turns and epochs on this agent. `host` is what sentences call it."""

    host: str
    ledger: Ledger
    passes: PassDesk
    threads: Threads
    _turns: dict[str, trio.Lock] = field(default_factory=dict)

    def turn(self, pair: str) -> trio.Lock:
        """Whoever holds it is alone with the pair: no order of it is carried out."""
        return self._turns.setdefault(pair, trio.Lock())

    @asynccontextmanager
    async def of(self, order: Order, peer: PeerIdentity, *, take_over: bool = False) -> AsyncIterator[None]:
        """The order's turn: inside, no other order of the pair is carried out.

        A higher epoch gets its turn only when the order that runs under the lower one has ended, and is written down
        only when its pass has, so whoever is answered under it is alone.

        Raises:
            Held: another coordinator holds the pair, and this is no order to `take_over`.
            StaleEpoch: a newer process of the same coordinator took the pair over.
        """
        async with self.turn(order.pair):
            seen = self.ledger.authority(order.pair)
            self._check(order, peer, seen, take_over=take_over)
            if order.epoch > seen.epoch or (peer.fingerprint and not seen.fingerprint):
                if order.epoch > seen.epoch:
                    await self.passes.end(order.pair)
                fresh = EpochRecord(
                    pair=order.pair,
                    epoch=order.epoch,
                    holder=peer.names[0] if peer.names else "",
                    fingerprint=peer.fingerprint,
                    place=order.place,
                    run=order.run,
                    since_s=time.time(),
                )
                await self.threads.on_libvirt(lambda: self.ledger.put_authority(fresh))
            yield

    def describe(self, request: AskAuthority, peer: PeerIdentity) -> PairAuthority:
        """Who holds that pair."""
        seen = self.ledger.authority(request.pair)
        return PairAuthority(
            epoch=seen.epoch,
            holder=seen.who if seen.epoch else "",
            is_you=seen.is_held_by(peer.fingerprint, request.place),
            run=seen.run,
            since_s=seen.since_s,
        )

    def check_vm(self, request: OrderRequest, fence: FenceRecord | None) -> None:
        """One VM in two pairs, be it of two registries: the pair whose fence is on it, holds it.

        Raises:
            Held: `fence`, the one on the VM that the order speaks of, is another pair's.
        """
        if fence is None or fence.pair == request.order.pair:
            return
        vm, who = fence.vm_name or fence.vm_uuid, self.ledger.authority(fence.pair).who
        cure = f"end that run first, or, if nobody ever will, `failback-agent fence lift {vm} --reason TEXT`"
        raise Held(
            f"the VM {vm} on {self.host} is fenced for the pair {fence.pair} by the run {fence.run}, which {who} "
            f"holds: {cure} on {self.host}",
            pair=fence.pair,
            holder=who,
            run=fence.run,
        )

    def _check(self, order: Order, peer: PeerIdentity, seen: EpochRecord, *, take_over: bool) -> None:
        ours = seen.is_held_by(peer.fingerprint, order.place)
        if ours and order.epoch >= seen.epoch:
            return
        if not ours and take_over and order.epoch > seen.epoch:
            return
        since = datetime.fromtimestamp(seen.since_s, UTC).strftime(" since %Y-%m-%dT%H:%M:%SZ") if seen.since_s else ""
        if ours:
            raise StaleEpoch(
                f"the order for the pair {order.pair} comes under epoch {order.epoch}, but epoch {seen.epoch} has "
                f"taken over on {self.host}: {seen.who}, run {seen.run or 'not known'}{since}: end this process, the "
                "newer one is in charge; if there is none (a registry from a backup, say), repeat with --take-over",
                seen=seen.epoch,
            )
        raise Held(
            f"the pair {order.pair} is held on {self.host} by {seen.who}, run {seen.run or 'not known'}, epoch "
            f"{seen.epoch}{since}: work with that one, or, if it is gone for good, repeat with --take-over",
            seen=seen.epoch,
            holder=seen.who,
            run=seen.run,
        )
