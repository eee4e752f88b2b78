"""`--on-failure hold`: what a person is told, and both ways on."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.errors import AgentRefused, ExitCode, WrongState
from coordinator.model import OnFailure, RunOptions, State
from protocol.messages import Protect, Request
from tests.fakes.agent import unreachable
from tests.unit.coordinator_house import PAIR, House

HOLD = RunOptions(on_failure=OnFailure.HOLD)


@pytest.fixture
async def house(memory_folder: Path) -> House:
    made = House(memory_folder / "state")
    await made.register()
    async with made.process() as coordinator:
        await coordinator.start_run(PAIR, HOLD)
    return made


def no_room(_host: str, request: Request, moment: str) -> None:
    if isinstance(request, Protect) and moment == "before":
        raise AgentRefused("no room; free some", code="hypervisor")


async def test_a_failure_is_held_and_names_the_vms_and_the_exits(house: House) -> None:
    async with house.process() as coordinator:
        house.world.fault = no_room
        outcome = await coordinator.execute_run(PAIR)
        pair = await coordinator.get_pair(PAIR)
        entries = await coordinator.history(PAIR)
        with pytest.raises(WrongState, match="`failback resume web` or `failback undo web`"):
            await coordinator.cancel(PAIR)
    assert (outcome.state, outcome.exit_code) == (State.NEEDS_OPERATOR, ExitCode.NEEDS_OPERATOR)
    assert outcome.sentence.startswith("the switchover failed and is held (--on-failure hold): no room; free some.")
    assert "the replica on dr is off, the original on prod is off, so nobody is served" in outcome.sentence
    assert pair.operator is not None
    assert pair.operator.exits == ("resume", "undo")
    assert entries[-1].sentence == outcome.sentence
    assert house.world.replica.fence is not None
    assert house.world.original.fence is not None


@pytest.mark.parametrize("verb", ["resume", "undo"])
async def test_both_ways_on_lead_somewhere(house: House, verb: str) -> None:
    async with house.process() as coordinator:
        house.world.fault = no_room
        await coordinator.execute_run(PAIR)
        assert "has not released the original web" in (await coordinator.forecast_undo(PAIR)).sentence
        assert (await coordinator.resume(PAIR)).state is State.NEEDS_OPERATOR, "tried again, and held again"
        house.world.fault = lambda *_: None
        outcome = await (coordinator.resume(PAIR) if verb == "resume" else coordinator.undo(PAIR))
    assert outcome.state is (State.FAILBACK if verb == "resume" else State.FAILOVER)
    assert house.world.replica.is_off is (verb == "resume")
    assert house.world.original.boots == (1 if verb == "resume" else 0)


async def test_a_host_that_does_not_answer_is_said_to_be_unknown(house: House) -> None:
    def died(host: str, _request: Request, _moment: str) -> None:
        if house.world.replica.is_off and host == "prod":
            raise unreachable(host)

    async with house.process() as coordinator:
        house.world.fault = died
        outcome = await coordinator.execute_run(PAIR)
    assert outcome.state is State.NEEDS_OPERATOR
    assert "whether the original is off is not known (prod does not say)" in outcome.sentence


async def test_a_replica_that_may_still_go_off_is_for_a_person_too(house: House) -> None:
    house.world.replica.ignores_shutdown = True
    async with house.process() as coordinator:
        outcome = await coordinator.execute_run(PAIR)
    assert outcome.state is State.NEEDS_OPERATOR, "it was asked, and may still go off"
    assert "the replica on dr is running" in outcome.sentence
    assert "look at both before you go on" in outcome.sentence
