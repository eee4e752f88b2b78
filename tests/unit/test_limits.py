"""The limits of a run: given at the start, changed in the middle, kept over crashes, refused where no pass may come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from coordinator import registry
from coordinator.database import Database
from coordinator.errors import AgentRefused, WrongState
from coordinator.events import Event, Notice, Outcome
from coordinator.model import MAX_RATE_BYTES_S, MIN_RATE_BYTES_S, Rate, RunLimits, RunOptions, State
from coordinator.registry import Superseded
from coordinator.runs import Coordinator
from protocol.messages import Protect, Request, RunPass, SetLimits
from tests.unit.coordinator_house import PAIR, House

MB = 1_000_000
SLOW = RunOptions(audit=False, limits=RunLimits(network_bytes_s=125 * MB, read_bytes_s=200 * MB))
Pair = tuple[int | None, int | None]


@pytest.fixture
async def house(memory_folder: Path) -> House:
    made = House(memory_folder)
    await made.register()
    return made


class Held:
    """A run whose first (or a later) pass stands still until it is let go."""

    def __init__(self, house: House, number: int = 1) -> None:
        self.reached, self._number, self._seen = trio.Event(), number, 0
        self.outcome: Outcome | None = None
        self.superseded = False
        self.events: list[Event] = []
        self._world = house.world
        house.world.pass_hold = trio.Event()
        house.world.fault = self._fault
        if number > 1:
            house.world.pass_hold.set()

    def _fault(self, _host: str, request: Request, moment: str) -> None:
        if isinstance(request, RunPass) and moment == "midway":
            self._seen += 1
            if self._seen == self._number:
                self._world.pass_hold = self._world.pass_hold if self._number == 1 else trio.Event()
                self.reached.set()

    def let_go(self) -> None:
        assert self._world.pass_hold is not None
        self._world.pass_hold.set()

    async def work(self, coordinator: Coordinator) -> None:
        try:
            self.outcome = await coordinator.execute_run(PAIR, observer=self.events.append)
        except Superseded:
            self.superseded = True


@asynccontextmanager
async def held_run(house: House, options: RunOptions, *, number: int = 1) -> AsyncIterator[tuple[Coordinator, Held]]:
    """A run that stands in the middle of that pass; afterwards it goes on to its end."""
    async with house.process() as coordinator:
        held = Held(house, number)
        await coordinator.start_run(PAIR, options)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(held.work, coordinator)
                await held.reached.wait()
                yield coordinator, held
                held.let_go()


def passes(house: House) -> list[tuple[str, Pair]]:
    """Every order to run a pass so far, by host, with its limits."""
    found = [(host, order) for host, order in house.world.orders if isinstance(order, RunPass)]
    return [(host, (order.limit_network, order.limit_read)) for host, order in found]


async def test_both_agents_get_the_limits_of_the_start_with_every_pass(house: House) -> None:
    async with house.process() as coordinator:
        await coordinator.start_run(PAIR, SLOW)
        assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK
    limits = (125 * MB, 200 * MB)
    assert sorted(passes(house)) == [*[("dr", limits)] * 3, *[("prod", limits)] * 3]


async def test_a_change_in_the_middle_of_a_pass_reaches_both_agents_and_holds_for_the_next(house: House) -> None:
    async with held_run(house, SLOW) as (coordinator, held):
        assert house.world.limits == dict.fromkeys(("dr", "prod"), (125 * MB, 200 * MB))
        outcome = await coordinator.set_limits(PAIR, network=Rate(10 * MB))
        assert outcome.at_work
        assert outcome.limits == RunLimits(network_bytes_s=10 * MB, read_bytes_s=200 * MB)
        assert "both agents obey now" in outcome.sentence
        assert house.world.limits == dict.fromkeys(("dr", "prod"), (10 * MB, 200 * MB))
        assert (await coordinator.pair_status(PAIR)).limits == outcome.limits
    assert held.outcome is not None
    assert held.outcome.state is State.FAILBACK
    assert [limits for _, limits in passes(house)[2:]] == [(10 * MB, 200 * MB)] * 4
    notices = [event.sentence for event in held.events if isinstance(event, Notice)]
    assert [sentence for sentence in notices if not sentence.startswith("round ")] == [
        "limits: network 9.537 MiB/s, reads 190.7 MiB/s"
    ]


async def test_a_limit_can_be_lifted_in_the_last_pass_while_nobody_is_served(house: House) -> None:
    async with held_run(house, SLOW, number=3) as (coordinator, held):
        assert (await coordinator.get_pair(PAIR)).state is State.SWITCHING
        outcome = await coordinator.set_limits(PAIR, network=Rate(None), read=Rate(None))
        assert outcome.at_work
        assert house.world.limits == dict.fromkeys(("dr", "prod"), (None, None))
    assert held.outcome is not None
    assert held.outcome.state is State.FAILBACK


async def test_without_a_process_a_change_is_kept_for_when_the_run_goes_on(house: House) -> None:
    async with house.process() as coordinator:
        run = await coordinator.start_run(PAIR, SLOW)
        outcome = await coordinator.set_limits(PAIR, read=Rate(None))
        assert not outcome.at_work
        assert "still to come" in outcome.sentence
        assert await coordinator.limits(PAIR) == (run, RunLimits(network_bytes_s=125 * MB))
    async with house.process() as coordinator:
        await coordinator.execute_run(PAIR)
        assert await coordinator.limits(PAIR) is None
    assert {limits for _, limits in passes(house)} == {(125 * MB, None)}


async def test_a_coordinator_that_dies_takes_no_limit_with_it(house: House, tmp_path: Path) -> None:
    async with held_run(house, SLOW) as (coordinator, _):
        await coordinator.set_limits(PAIR, network=Rate(5 * MB))
        twin = house.twin(tmp_path / "twin")
    before = len(passes(twin))
    async with twin.process() as coordinator:
        assert (await coordinator.resume(PAIR)).state is State.FAILBACK
    assert {limits for _, limits in passes(twin)[before:]} == {(5 * MB, 200 * MB)}


async def test_a_pass_goes_on_with_an_agent_that_cannot_be_told_and_whoever_asked_learns_why(house: House) -> None:
    async with held_run(house, SLOW) as (coordinator, held):

        def deaf(host: str, request: Request, moment: str) -> None:
            if isinstance(request, SetLimits) and (host, moment) == ("prod", "before"):
                raise AgentRefused("the agent on prod is too old", code="forbidden")

        house.world.fault = deaf
        outcome = await coordinator.set_limits(PAIR, network=Rate(5 * MB))
        assert not outcome.at_work
        assert "not passed on: the agent on prod is too old" in outcome.sentence
        assert house.world.limits["dr"] == (5 * MB, 200 * MB)
    assert held.outcome is not None
    assert held.outcome.state is State.FAILBACK
    assert {limits for _, limits in passes(house)[2:]} == {(5 * MB, 200 * MB)}


async def test_a_change_does_not_stand_in_the_way_of_a_cancel(house: House) -> None:
    async with house.process() as coordinator:
        await coordinator.start_run(PAIR, SLOW)
        await coordinator.set_limits(PAIR, network=Rate(5 * MB))
        await coordinator.set_limits(PAIR, network=Rate(6 * MB))
        assert (await coordinator.cancel(PAIR)).state is State.FAILOVER
        assert await coordinator.limits(PAIR) is None


async def test_a_change_that_nobody_waited_for_is_taken_up_by_the_next_pass_once(house: House) -> None:
    async with house.process() as coordinator:
        await coordinator.start_run(PAIR, SLOW)
        await coordinator.set_limits(PAIR, network=Rate(5 * MB))
        await coordinator.set_limits(PAIR, network=Rate(6 * MB))
        await coordinator.execute_run(PAIR)
    assert {limits for _, limits in passes(house)} == {(6 * MB, 200 * MB)}
    changes = [order for _, order in house.world.orders if isinstance(order, SetLimits)]
    assert {(order.limit_network, order.limit_read) for order in changes} <= {(6 * MB, 200 * MB)}
    assert len(changes) <= 2


async def test_limits_end_with_their_run(house: House) -> None:
    async with house.process() as coordinator:
        await coordinator.start_run(PAIR, SLOW)
        await coordinator.cancel(PAIR)
        await coordinator.start_run(PAIR, RunOptions())
        await coordinator.execute_run(PAIR)
    assert {limits for _, limits in passes(house)} == {(None, None)}


async def test_where_no_pass_may_come_a_change_is_refused_with_what_the_state_allows(house: House) -> None:
    async with house.process() as coordinator:
        with pytest.raises(WrongState, match=r"`limit` is not possible: web is in Failover .*`failback start web`"):
            await coordinator.set_limits(PAIR, network=Rate(None))
        await coordinator.start_run(PAIR, RunOptions())
        await coordinator.execute_run(PAIR)
        with pytest.raises(WrongState, match=r"web is in Failback .*`failback commit web` or `failback undo web`"):
            await coordinator.set_limits(PAIR, network=Rate(None))


@pytest.mark.parametrize("bytes_s", [0, -1, MIN_RATE_BYTES_S - 1, MAX_RATE_BYTES_S + 1])
def test_a_rate_out_of_bounds_cannot_be_made(bytes_s: int) -> None:
    with pytest.raises(ValueError, match="at least 100kB/s and at most 1TB/s"):
        Rate(bytes_s)


async def test_a_change_between_two_passes_is_not_answered_as_if_it_were_a_cancel(house: House) -> None:
    asked: list[str] = []

    async with house.process() as coordinator:
        await coordinator.start_run(PAIR, SLOW)
        async with trio.open_nursery() as nursery:

            async def change() -> None:
                outcome = await coordinator.set_limits(PAIR, network=Rate(7 * MB))
                asked.append(outcome.sentence)

            def before_the_snapshot(_host: str, request: Request, moment: str) -> None:
                if isinstance(request, Protect) and moment == "before":
                    nursery.start_soon(change)

            house.world.fault = before_the_snapshot
            assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK
    assert len(asked) == 1
    assert "switchover" not in asked[0]
    assert passes(house)[-1][1] == (7 * MB, 200 * MB)


async def test_a_process_that_was_superseded_leaves_changes_to_the_one_that_works(house: House) -> None:
    async with held_run(house, SLOW) as (coordinator, held):
        database = Database.open(house.config.database)
        with database.transaction() as connection:
            registry.raise_epoch(connection, PAIR)
        database.close()
        outcome = await coordinator.set_limits(PAIR, network=Rate(7 * MB), wait_s=1.0)
        assert "has not taken them up yet" in outcome.sentence
        assert not any(isinstance(event, Notice) and event.sentence.startswith("limits") for event in held.events)
        assert not any(isinstance(order, SetLimits) for _, order in house.world.orders)
    assert held.superseded
