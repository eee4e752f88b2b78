"""What could lose data or run two VMs at once: hands and crashes between two steps, told as stories."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from sqlalchemy import Connection

from coordinator import journal
from coordinator.errors import AgentRefused, DatabaseError, ExitCode
from coordinator.events import Event, StepDone
from coordinator.model import RunOptions, State
from coordinator.runs import Coordinator
from protocol.messages import Condition, LiftFence, Power, Protect, Request, RunPass
from tests.unit.coordinator_house import PAIR, Crash, CrashPlan, House


@pytest.fixture
async def house(memory_folder: Path) -> House:
    """A pair with a run that is about to begin."""
    made = House(memory_folder / "state")
    await made.register()
    async with made.process() as coordinator:
        await coordinator.start_run(PAIR, RunOptions())
    return made


def dying_after(step: str) -> Callable[[Coordinator], Awaitable[object]]:
    """Work on the run; the process dies the moment that step is done, durably."""

    def observe(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            raise Crash(step)

    return lambda coordinator: coordinator.execute_run(PAIR, observer=observe)


def ledger_lost(house: House) -> None:
    """The production host's agent comes back with an empty memory: no fence, no flag."""
    house.world.original.fence = house.world.original.condition = house.world.original.view = None


def used_by_hand(house: House) -> None:
    """Nothing kept the original, so somebody had it running for a while."""
    ledger_lost(house)
    house.world.original.disks = dict.fromkeys(house.world.original.disks, b"written by hand")


class TestTheOriginalStartsOnlyVerified:
    async def test_what_was_verified_before_a_crash_is_verified_again_after_it(self, house: House) -> None:
        assert await house.dies(CrashPlan(), dying_after("verify"))
        used_by_hand(house)
        async with house.process() as coordinator:
            outcome = await coordinator.resume(PAIR)
        assert (outcome.state, outcome.exit_code) == (State.FAILOVER, ExitCode.FAILED)
        assert "not proven equal" in outcome.sentence
        assert house.world.original.boots == 0
        assert not house.world.replica.is_off

    async def test_an_original_that_was_edited_under_its_fence_after_the_last_pass_does_not_start(
        self, house: House
    ) -> None:
        assert await house.dies(CrashPlan(), dying_after("last_pass"))
        # Its agent was away for a moment: fence and flag are what they were, the disks are not.
        house.world.original.disks = dict.fromkeys(house.world.original.disks, b"written by hand")
        async with house.process() as coordinator:
            outcome = await coordinator.resume(PAIR)
        assert (outcome.state, outcome.exit_code) == (State.FAILOVER, ExitCode.FAILED)
        assert "is not proven to hold what the last pass verified" in outcome.sentence
        assert house.world.original.boots == 0
        assert not house.world.replica.is_off

    async def test_past_the_point_of_no_return_a_lost_proof_is_for_a_person(self, house: House) -> None:
        def dies(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, LiftFence) and moment == "before":
                raise Crash("the intent is written, the order never left")

        async def work(coordinator: Coordinator) -> object:
            house.world.fault = dies
            return await coordinator.execute_run(PAIR)

        assert await house.dies(CrashPlan(), work)
        # Fenced anew by an agent that forgot: the disks may be anything.
        fence = house.world.original.fence
        used_by_hand(house)
        house.world.original.fence = fence
        async with house.process() as coordinator:
            outcome = await coordinator.resume(PAIR)
            assert (outcome.state, outcome.exit_code) == (State.NEEDS_OPERATOR, ExitCode.NEEDS_OPERATOR)
            assert house.world.original.boots == 0
            assert (await coordinator.undo(PAIR)).state is State.FAILOVER
        assert not house.world.replica.is_off


class TestOnlyOneOfThemCanStart:
    async def test_the_replica_stays_fenced_until_the_original_is_proven_held(self, house: House) -> None:
        world = house.world

        def started(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, Protect) and moment == "before":
                ledger_lost(house)
                world.original.power = Power.RUNNING
                raise AgentRefused("no room; free some", code="hypervisor")

        async with house.process() as coordinator:
            world.fault = started
            assert (await coordinator.execute_run(PAIR)).state is State.NEEDS_OPERATOR
            assert world.replica.fence is not None, "a reboot of its host could start it beside the original"
            assert not world.replica.autostart
            world.fault = lambda *_: None
            world.original.power = Power.OFF
            assert (await coordinator.resume(PAIR)).state is State.FAILOVER
        assert not world.replica.is_off
        assert world.replica.autostart

    async def test_a_torn_original_whose_fence_was_lost_is_fenced_again_by_cancel(self, house: House) -> None:
        def broken(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, RunPass) and moment == "midway":
                raise AgentRefused("the link was cut; resume", code="sync")

        async with house.process() as coordinator:
            house.world.fault = broken
            assert (await coordinator.execute_run(PAIR)).state is State.SYNCING
            house.world.fault = lambda *_: None
            ledger_lost(house)
            assert (await coordinator.cancel(PAIR)).state is State.FAILOVER
            pair = await coordinator.get_pair(PAIR)
        assert pair.flag.condition == "torn"
        assert house.world.original.fence is not None
        assert house.world.original.condition is Condition.TORN


class TestNobodyIsLeftUnserved:
    async def test_a_picture_that_cannot_be_saved_does_not_end_the_last_pass(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        saved = 0

        def full(_connection: Connection, _pair: str, _picture: object) -> None:
            nonlocal saved
            saved += 1
            raise DatabaseError("no room on its file system")

        monkeypatch.setattr(journal, "save_progress", full)
        async with house.process() as coordinator:
            assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK
        assert saved == 4  # the audit is a pass as well

    async def test_a_replica_that_stops_twice_is_asked_about_twice(self, house: House) -> None:
        world = house.world

        def stops(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, RunPass) and moment == "midway":
                world.replica.power = Power.OFF
                world.views.clear()

        async with house.process() as coordinator:
            for _ in range(2):
                world.replica.power = Power.RUNNING
                world.fault = stops
                assert (await coordinator.resume(PAIR)).state is State.SYNCING
                world.fault = lambda *_: None
                assert (await coordinator.resume(PAIR)).state is State.NEEDS_OPERATOR
            with trio.fail_after(20):
                world.last_words = dict(world.replica.disks)
                assert (await coordinator.resume(PAIR)).state is State.FAILBACK
