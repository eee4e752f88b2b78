"""Which further connections of a disk may take part in its pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import trio
from trio.testing import wait_all_tasks_blocked

from agent.arrivals import Arrivals
from agent.passes import PassDesk, Session
from agent.sync.buffers import Windows
from agent.sync.target import TargetPass
from agent.threads import Threads
from protocol.bulk import BulkSocket
from protocol.errors import ConnectionLost
from protocol.limits import MAX_LANES
from protocol.messages import PROTOCOL_VERSIONS, BulkHello, Direction, Grant, GrantedDisk, Order

SEED = 7


@dataclass
class Caller:
    """A connection that only remembers how it was received."""

    is_lost: bool = False
    received: list[str] = field(default_factory=list)
    window_bytes: int = 0

    def welcome(self, *, window_bytes: int, ahead_bytes: int, lanes: int, proven: tuple[tuple[int, int], ...]) -> None:
        if self.is_lost:
            raise ConnectionLost("it is gone")
        assert ahead_bytes > 0
        assert lanes == MAX_LANES
        self.window_bytes = window_bytes
        self.received.append("welcome")

    def refuse(self, code: str, sentence: str) -> None:
        assert "vda" in sentence
        self.received.append(code)

    def close(self) -> None:
        self.received.append("closed")


@dataclass
class Joined:
    """A pass that only remembers who joined."""

    callers: list[object] = field(default_factory=list)

    def join(self, wire: object) -> None:
        self.callers.append(wire)


class House:
    """A receiving pass over one disk, whose first connection has come."""

    def __init__(self) -> None:
        grant = Grant(
            grant="00" * 16,
            vm_uuid="vm",
            direction=Direction.RECEIVE,
            peer_fingerprint="",
            view="1",
            disks=(GrantedDisk(target="vda", peer_target="vda", source_size_bytes=1, target_size_bytes=1),),
        )
        self.session = Session(Order(pair="web", run="1", epoch=1), grant)
        self.desk = PassDesk(Threads(), windows=Windows())
        self.arrivals = Arrivals(self.desk.threads, self.desk.windows, self.session.waiting["vda"], "vda", SEED)
        self.target = Joined()

    async def let_join(self, *callers: tuple[Caller, int]) -> None:
        """Those come, with those seeds."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.arrivals.let_join, cast("TargetPass", self.target))
            for caller, seed in callers:
                hello = BulkHello(
                    versions=PROTOCOL_VERSIONS, software="test", grant="00" * 16, target="vda", digest_seed=seed
                )
                await self.session.arrivals["vda"].send((cast("BulkSocket", caller), hello))
            while any(not (caller.received or caller.is_lost) for caller, _ in callers):
                await wait_all_tasks_blocked()
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()


async def test_a_further_connection_of_the_same_pass_joins_with_a_window_of_its_own() -> None:
    house, caller = House(), Caller()
    await house.let_join((caller, SEED))
    assert house.target.callers == [caller]
    assert caller.received == ["welcome"]
    assert caller.window_bytes > 0


async def test_a_connection_with_another_seed_is_refused_and_the_pass_goes_on() -> None:
    house, other, same = House(), Caller(), Caller()
    await house.let_join((other, SEED + 1), (same, SEED))
    assert other.received == ["forbidden"]
    assert house.target.callers == [same]


async def test_no_more_connections_join_than_were_offered() -> None:
    house = House()
    callers = [Caller() for _ in range(MAX_LANES + 1)]
    await house.let_join(*((caller, SEED) for caller in callers))
    assert [caller.received[0] for caller in callers] == ["welcome"] * MAX_LANES + ["forbidden"]
    assert len(house.target.callers) == MAX_LANES


async def test_a_connection_that_is_lost_at_once_does_not_join_and_keeps_nobody_out() -> None:
    house, lost, good = House(), Caller(is_lost=True), Caller()
    await house.let_join((lost, SEED), (good, SEED))
    assert house.target.callers == [good]


async def test_at_the_end_all_are_hung_up_on_and_their_windows_given_back() -> None:
    house = House()
    before = Windows().lease()
    callers = [Caller() for _ in range(4)]
    await house.let_join(*((caller, SEED) for caller in callers))
    await house.arrivals.hang_up()
    assert all(caller.received == ["welcome", "closed"] for caller in callers)
    assert house.desk.windows.lease() == before
