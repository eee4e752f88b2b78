"""The coordinator is killed at every place where it writes its journal or speaks to an agent; then a person goes on.

I1, I2 and I3 are watched by `tests.fakes.agent.World` after every order; I4 is what these tests end with.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coordinator import registry
from coordinator.errors import AgentRefused
from coordinator.model import Newest, OnFailure, Pair, RestorePoint, RunLimits, RunOptions, ShutdownPolicy, State
from coordinator.runs import Coordinator
from coordinator.states import TABLE, Verb, allowed_verbs
from protocol.messages import Condition, Power, Protect, Request, RunPass
from tests.fakes.agent import World
from tests.unit.coordinator_house import PAIR, CrashPlan, House, world_of

Act = Callable[[Coordinator], Awaitable[object]]
ENDS = {State.FAILBACK, State.FAILOVER, State.READY}


async def run(coordinator: Coordinator) -> object:
    return await coordinator.execute_run(PAIR)


async def commit(coordinator: Coordinator) -> object:
    return await coordinator.commit(PAIR, RestorePoint.DROP)


async def undo(coordinator: Coordinator) -> object:
    return await coordinator.undo(PAIR)


async def undo_by_word(coordinator: Coordinator) -> object:
    """The production host is gone, with the original on it."""
    return await coordinator.undo(PAIR, original_is_off="prod")


async def cancel(coordinator: Coordinator) -> object:
    return await coordinator.cancel(PAIR)


async def resume(coordinator: Coordinator) -> object:
    return await coordinator.resume(PAIR)


async def broken_run(coordinator: Coordinator) -> object:
    """A run whose first pass breaks off half-way: the original is torn."""
    world = world_of(coordinator)
    whole = world.fault

    def broken(_host: str, request: Request, moment: str) -> None:
        if isinstance(request, RunPass) and moment == "midway":
            raise AgentRefused("the link was cut; resume", code="sync")

    world.fault = broken
    outcome = await coordinator.execute_run(PAIR)
    world.fault = whole
    assert outcome.state is State.SYNCING
    return outcome


async def prepared(folder: Path, *before: Act, world: World | None = None, options: RunOptions | None = None) -> House:
    """A pair with a run, after `before`."""
    house = House(folder, world)
    await house.register()
    async with house.process() as coordinator:
        await coordinator.start_run(PAIR, options or RunOptions())
        for act in before:
            await act(coordinator)
    return house


def pair_of(house: House) -> Pair:
    return house.read(lambda connection: registry.get_pair(connection, PAIR))


def is_fenced(house: House) -> bool:
    """Whether the original is."""
    return house.world.original.fence is not None


def check_end(house: House) -> None:
    """The pair rests in a named state that is true of the VMs, and the newest data exist in full where it says."""
    pair, world = pair_of(house), house.world
    assert pair.state in ENDS, pair
    world.check()
    # An audit that was killed has its view of the frozen replica open until commit, undo or the next audit.
    frozen = pair.state is State.FAILBACK and not any(view.live for view in world.views.values())
    assert not world.views or frozen, "a view was left open"
    if pair.state is not State.FAILBACK:
        assert world.records.is_clear, "a checkpoint or bitmap of ours was left"
    if pair.state is State.FAILOVER:
        assert pair.newest is Newest.REPLICA
        assert (world.original.power, world.replica.power) == (Power.OFF, Power.RUNNING)
        assert world.replica.fence is None
        assert world.replica.autostart
        assert not world.replica.snapshots
        assert not world.original.autostart or world.original.fence is None
        torn = world.original.condition is Condition.TORN
        assert pair.flag.condition == (world.original.condition or Condition.INTACT).value
        assert (world.original.fence is not None) is torn
        return
    assert pair.newest is Newest.ORIGINAL
    assert (world.original.power, world.replica.power) == (Power.RUNNING, Power.OFF)
    assert world.original.autostart
    assert (world.replica.fence is None) is (pair.state is State.READY)


async def killed_in(act: Act, house: House, folder: Path) -> list[House]:
    """Let `act` go through, and return the house as it was left at every place where the process could have died."""
    left: list[House] = []
    whole = house.twin(folder / "whole")
    assert not await whole.dies(CrashPlan(look=lambda place: left.append(whole.twin(folder / str(place)))), act)
    check_end(whole)
    return left


async def finish(house: House, verb: Verb) -> None:
    """One more process does `verb` if the state allows it, and goes on until the pair rests."""
    for _ in range(4):
        pair = pair_of(house)
        if not TABLE[pair.state].unfinished:
            return
        async with house.process() as coordinator:
            if verb in allowed_verbs(pair):
                await {Verb.RESUME: resume, Verb.CANCEL: cancel, Verb.UNDO: undo}[verb](coordinator)
            else:
                await resume(coordinator)


CASES = [
    pytest.param(run, (), Verb.RESUME, id="run-resume"),
    pytest.param(run, (), Verb.CANCEL, id="run-cancel"),
    pytest.param(commit, (run,), Verb.RESUME, id="commit-resume"),
    pytest.param(undo, (run,), Verb.RESUME, id="undo-resume"),
    pytest.param(cancel, (broken_run,), Verb.RESUME, id="cancel-resume"),
]


@pytest.mark.parametrize(("act", "before", "verb"), CASES)
async def test_killed_anywhere_the_pair_comes_to_rest_with_nothing_lost(
    memory_folder: Path, act: Act, before: tuple[Act, ...], verb: Verb
) -> None:
    start = await prepared(memory_folder / "start", *before)
    places = await killed_in(act, start, memory_folder)
    assert len(places) > 10
    # Cancel is possible in the first half of a run only: the rest is what the case before it does.
    for house in places[: len(places) // 2] if verb is Verb.CANCEL else places:
        await finish(house, verb)
        check_end(house)


def killed_once() -> World:
    """The replica's QEMU must be killed at the first switchover, and its bitmaps are lost."""
    world = World()
    world.replica.dies_hard = 1
    return world


def lost_late() -> World:
    """The records of the first switchover break between their reading and the last view."""
    world = World()
    world.records.lost_late = True
    return world


def little_scratch() -> World:
    """A view of both disks fills the scratch files."""
    world = World()
    world.scratch_disks = 1
    return world


def half_tracked() -> World:
    """One of the disks has no bitmaps."""
    world = World()
    world.records.untracked = {"vda"}
    return world


RETURNS = RunOptions(
    shutdown_policy=ShutdownPolicy.FORCE,
    max_downtime_s=40.0,
    limits=RunLimits(read_bytes_s=30_000),
    background_s=2.0,
)
WORLDS = [
    pytest.param(killed_once, RETURNS, id="late-evidence"),
    pytest.param(lost_late, RETURNS, id="late-evidence-of-the-last-view"),
    pytest.param(little_scratch, RunOptions(), id="small-views"),
    pytest.param(half_tracked, RunOptions(), id="half-tracked"),
]


@pytest.mark.parametrize(("make", "options"), WORLDS)
async def test_killed_anywhere_on_the_long_ways_the_pair_comes_to_rest(
    memory_folder: Path, make: Callable[[], World], options: RunOptions
) -> None:
    start = await prepared(memory_folder / "start", world=make(), options=options)
    places = await killed_in(run, start, memory_folder)
    for number, house in enumerate(places[::9]):
        early = Verb.CANCEL if number % 3 == 0 and 9 * number < len(places) // 4 else Verb.RESUME
        await finish(house, early)
        check_end(house)


async def test_killed_twice_the_pair_still_comes_to_rest(memory_folder: Path) -> None:
    start = await prepared(memory_folder / "start")
    places = await killed_in(run, start, memory_folder)
    for house in places[::13]:
        for again in (3, 23, 41):
            second = house.twin(house.folder.with_name(f"{house.folder.name}-{again}"))
            if TABLE[pair_of(second).state].unfinished:
                await second.dies(CrashPlan(again), resume)
            await finish(second, Verb.RESUME)
            check_end(second)


async def test_killed_after_the_point_of_no_return_undo_is_for_a_person_who_was_asked(memory_folder: Path) -> None:
    start = await prepared(memory_folder / "start")
    asked = 0
    for house in (await killed_in(run, start, memory_folder))[::4]:
        house.world.original.fails_to_start = True
        if TABLE[pair_of(house).state].unfinished:
            async with house.process() as coordinator:
                await resume(coordinator)
        if pair_of(house).state is State.NEEDS_OPERATOR:
            asked += 1
            async with house.process() as coordinator:
                await undo(coordinator)
            check_end(house)
    assert asked > 10


async def test_killed_anywhere_in_an_undo_by_word_the_replica_serves_and_the_original_is_fenced_at_first_contact(
    memory_folder: Path,
) -> None:
    start = await prepared(memory_folder / "start", run)
    start.world.original.power = Power.OFF  # its host has lost its power
    start.world.away.add("prod")
    left: list[House] = []
    whole = start.twin(memory_folder / "whole")
    plan = CrashPlan(look=lambda place: left.append(whole.twin(memory_folder / str(place))))
    assert not await whole.dies(plan, undo_by_word)
    assert len(left) > 20
    for number, house in enumerate((*left, whole)):
        for _ in range(3):
            pair = pair_of(house)
            if pair.state is State.FAILOVER:
                break
            async with house.process() as coordinator:
                if TABLE[pair.state].unfinished:
                    await resume(coordinator)
                else:  # killed before the word was written
                    await undo_by_word(coordinator)
        assert not house.world.replica.is_off
        assert not is_fenced(house)
        house.world.away.clear()
        if number % 3 == 0:  # killed again, while what is owed is done
            await house.dies(CrashPlan(2 + number // 3 % 9), lambda coordinator: coordinator.findings(PAIR))
        async with house.process() as coordinator:
            await coordinator.findings(PAIR)
            assert not (await coordinator.pair_status(PAIR)).owed
        assert is_fenced(house)
        house.world.check()
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions(audit=False))
            assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK


@pytest.mark.parametrize("verb", [Verb.RESUME, Verb.UNDO])
async def test_killed_anywhere_around_a_switchover_that_is_held_the_pair_comes_to_rest(
    memory_folder: Path, verb: Verb
) -> None:
    start = await prepared(memory_folder / "start", options=RunOptions(on_failure=OnFailure.HOLD))

    async def held(coordinator: Coordinator) -> object:
        world = world_of(coordinator)
        whole = world.fault

        def broken(host: str, request: Request, moment: str) -> None:
            whole(host, request, moment)
            if isinstance(request, Protect) and moment == "before":
                raise AgentRefused("no room; free some", code="hypervisor")

        world.fault = broken
        return await coordinator.execute_run(PAIR)

    left: list[House] = []
    whole = start.twin(memory_folder / "whole")
    plan = CrashPlan(look=lambda place: left.append(whole.twin(memory_folder / str(place))))
    assert not await whole.dies(plan, held)
    assert pair_of(whole).state is State.NEEDS_OPERATOR
    ends = set()
    for house in (*left[len(left) // 2 :: 3], whole):
        await finish(house, verb)
        check_end(house)
        ends.add(pair_of(house).state)
    assert ends == ({State.FAILBACK} if verb is Verb.RESUME else {State.FAILBACK, State.FAILOVER})
