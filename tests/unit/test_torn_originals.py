"""A torn original stays fenced whichever way its run is taken back; one whose fence a person lifted is told of."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.errors import AgentRefused
from coordinator.events import Event, Notice
from coordinator.findings import Findings
from coordinator.model import RunOptions, State
from coordinator.plan import make_plan
from coordinator.runs import Coordinator
from protocol.messages import Condition, LiftDescription, LiftFence, Request, RunPass
from tests.unit.coordinator_house import PAIR, REQUEST, House


@pytest.fixture
async def house(tmp_path: Path) -> House:
    made = House(tmp_path)
    async with made.process() as coordinator:
        await coordinator.register_pair(REQUEST)
    return made


def _break_passes(house: House, *, last: bool) -> None:
    def broken(_host: str, request: Request, moment: str) -> None:
        if isinstance(request, RunPass) and moment == "midway" and house.world.replica.is_off is last:
            raise AgentRefused("the storage failed", code="disk")

    house.world.fault = broken


async def _broken_run(house: House, coordinator: Coordinator, *, last: bool) -> State:
    await coordinator.start_run(PAIR, RunOptions())
    _break_passes(house, last=last)
    return (await coordinator.execute_run(PAIR)).state


async def _assert_torn_and_fenced(house: House, coordinator: Coordinator) -> None:
    assert (await coordinator.get_pair(PAIR)).flag.condition == Condition.TORN.value
    original = house.world.original
    assert original.condition is Condition.TORN
    assert original.fence is not None
    assert not original.autostart
    assert not any(isinstance(request, LiftFence) and host == "prod" for host, request in house.world.orders)
    assert not house.world.replica.is_off


async def test_after_a_rollback_out_of_the_last_pass(house: House) -> None:
    async with house.process() as coordinator:
        assert await _broken_run(house, coordinator, last=True) is State.FAILOVER
        assert (await coordinator.runs(PAIR))[-1].outcome == "rolled-back"
        await _assert_torn_and_fenced(house, coordinator)


async def test_after_a_cancel(house: House) -> None:
    async with house.process() as coordinator:
        assert await _broken_run(house, coordinator, last=False) is State.SYNCING
        assert (await coordinator.cancel(PAIR)).state is State.FAILOVER
        await _assert_torn_and_fenced(house, coordinator)


async def _lifted_by_a_person(house: House, coordinator: Coordinator) -> None:
    await _broken_run(house, coordinator, last=False)
    await coordinator.cancel(PAIR)
    original = house.world.original
    original.fence = None
    original.lifted = LiftDescription(
        pair=PAIR, run="r1", by="root", reason="no DR site", at_s=1e9, condition=Condition.TORN
    )


async def test_a_fence_lifted_by_hand_is_told_by_plan_and_run_and_the_original_stays_torn_until_verified(
    house: House,
) -> None:
    seen: list[Event] = []
    async with house.process() as coordinator:
        await _lifted_by_a_person(house, coordinator)
        findings: Findings = await coordinator.findings(PAIR)
        notes = make_plan(await coordinator.get_pair(PAIR), findings, RunOptions()).notes
        assert any("lifted by hand at 2001-09-09T01:46:40Z by root (no DR site)" in note for note in notes)
        assert any("torn already" in note for note in notes)
        assert (await coordinator.get_pair(PAIR)).flag.condition == Condition.TORN.value
        await coordinator.start_run(PAIR, RunOptions())
        outcome = await coordinator.execute_run(PAIR, observer=seen.append)
        assert outcome.state is State.SYNCING  # the storage still fails: the first pass broke off again
        assert any(isinstance(event, Notice) and "lifted by hand" in event.sentence for event in seen)
        assert house.world.original.condition is Condition.TORN
    async with house.process() as coordinator:
        assert (await coordinator.resume(PAIR)).state is State.FAILBACK
        assert house.world.original.condition is not Condition.TORN
