"""The leader of a plan: what goes wrong in one task, or in the leader itself, ends nothing in its middle."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from coordinator.cli.fleet_view import SilentPlan
from coordinator.cli.plan_file import load_plan
from coordinator.fleet_run import FleetView, Leader
from coordinator.fleet_standing import Picture
from coordinator.model import RunOptions
from coordinator.runs import Coordinator
from tests.unit.fleet_house import Fleet

PAIRS = ("a", "b")


class Failing(SilentPlan):
    """A view that breaks the second time."""

    def __init__(self) -> None:
        self.seen = 0

    def show(self, picture: Picture) -> None:
        """Once."""
        self.seen += 1
        if self.seen > 1:
            raise ZeroDivisionError


@pytest.fixture
def fleet(memory_folder: Path) -> Fleet:
    fleet = Fleet(memory_folder, *PAIRS)
    fleet.plan('[[group]]\nname = "g"\npairs = ["a", "b"]\n')
    return fleet


async def lead(
    fleet: Fleet, work: Callable[[str], Awaitable[object]], view: FleetView, stop: trio.Event
) -> tuple[Picture, dict[str, str]]:
    """Begin both runs and lead them; the picture at the end and what was explained."""
    explained: dict[str, str] = {}

    def explain(pair: str, error: Exception) -> str:
        explained[pair] = type(error).__name__
        return f"{type(error).__name__} happened"

    async with Coordinator(fleet.config, actor="root@test", agents=fleet.worlds) as coordinator:
        for pair in PAIRS:
            await coordinator.start_run(pair, RunOptions())
        leader = Leader(
            coordinator, load_plan(fleet.file), work=work, explain=explain, view=view, stop=stop, poll_s=0.01
        )
        return await leader.lead(frozenset(PAIRS)), explained


async def test_an_error_of_the_leader_lets_every_run_end_at_a_safe_boundary_before_it_is_raised(fleet: Fleet) -> None:
    stop = trio.Event()
    ended: list[str] = []

    async def work(pair: str) -> None:
        await stop.wait()
        await trio.lowlevel.checkpoint()  # a step that must not be cut off
        ended.append(pair)

    with pytest.raises(ZeroDivisionError):
        await lead(fleet, work, Failing(), stop)
    assert sorted(ended) == ["a", "b"]


async def test_an_error_in_one_task_is_told_and_cancels_no_other(fleet: Fleet) -> None:
    goes_on = trio.Event()
    ended: list[str] = []

    async def work(pair: str) -> None:
        if pair == "a":
            goes_on.set()
            raise ExceptionGroup("several", [ValueError(), KeyError()])
        await goes_on.wait()
        await trio.testing.wait_all_tasks_blocked()
        ended.append(pair)

    picture, explained = await lead(fleet, work, SilentPlan(), trio.Event())
    assert ended == ["b"]
    assert explained == {"a": "ExceptionGroup"}
    sentences = {row.standing.pair: row.standing.sentence for row in picture.rows}
    assert sentences["a"] == "ExceptionGroup happened"


async def test_work_that_rests_unfinished_is_not_begun_again(fleet: Fleet) -> None:
    begun: list[str] = []

    async def work(pair: str) -> None:
        begun.append(pair)
        await trio.lowlevel.checkpoint()

    picture, _ = await lead(fleet, work, SilentPlan(), trio.Event())
    assert sorted(begun) == ["a", "b"]
    assert {row.standing.place.value for row in picture.rows} == {"stopped"}
