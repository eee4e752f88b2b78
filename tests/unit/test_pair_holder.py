"""Two registries for one pair: the second touches nothing, and takes the pair only where a person says so."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.config import Config
from coordinator.errors import AgentRefused, ExitCode, HostUnreachable
from coordinator.model import RestorePoint, RunOptions, State
from coordinator.pair_holder import place_of
from protocol.messages import Request
from tests.unit.coordinator_house import PAIR, REQUEST, House


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "one")


def _second(house: House, folder: Path) -> House:
    """Another registry over the same agents, with a copy of the first one's database."""
    folder.mkdir()
    for file in house.folder.glob("registry.sqlite*"):
        shutil.copy(file, folder)
    return House(folder, house.world)


async def _run_once(house: House) -> None:
    """The pair's run of that registry, up to *Failback*."""
    async with house.process() as coordinator:
        await coordinator.register_pair(REQUEST)
        await coordinator.start_run(PAIR, RunOptions())
        assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK


async def test_a_copied_database_is_refused_before_it_changes_anything(house: House, tmp_path: Path) -> None:
    await _run_once(house)
    second = _second(house, tmp_path / "two")
    orders = len(house.world.orders)
    async with second.process() as coordinator:
        before = await coordinator.get_pair(PAIR)
        for verb in (coordinator.undo, coordinator.resume):
            with pytest.raises(AgentRefused, match="--take-over") as caught:
                await verb(PAIR)
            assert (caught.value.code, caught.value.exit_code) == ("held", ExitCode.REFUSED)
        assert await coordinator.get_pair(PAIR) == before
    assert len(house.world.orders) == orders


async def test_a_pair_that_two_registries_know_is_started_once(house: House, tmp_path: Path) -> None:
    async with house.process() as coordinator:
        await coordinator.register_pair(REQUEST)
    second = _second(house, tmp_path / "two")
    async with house.process() as coordinator:
        await coordinator.start_run(PAIR, RunOptions())
        assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK
    orders = len(house.world.orders)
    async with second.process() as coordinator:
        with pytest.raises(AgentRefused, match="held"):
            await coordinator.start_run(PAIR, RunOptions())
        assert (await coordinator.get_pair(PAIR)).state is State.FAILOVER
        assert await coordinator.runs(PAIR) == ()
    assert len(house.world.orders) == orders


async def test_taken_over_the_first_is_the_one_refused_and_the_run_goes_on(house: House, tmp_path: Path) -> None:
    await _run_once(house)
    second = _second(house, tmp_path / "two")
    async with second.process() as coordinator:
        assert "is taken over from" in await coordinator.take_pair(PAIR)
        assert (await coordinator.undo(PAIR)).state is State.FAILOVER
        assert any("--take-over" in entry.sentence for entry in await coordinator.history(PAIR))
    async with house.process() as coordinator:
        with pytest.raises(AgentRefused, match="held"):
            await coordinator.commit(PAIR, RestorePoint.KEEP)


async def test_a_database_from_a_backup_is_behind_and_says_so(house: House, tmp_path: Path) -> None:
    async with house.process() as coordinator:
        await coordinator.register_pair(REQUEST)
        await coordinator.start_run(PAIR, RunOptions())
    shutil.copy(house.folder / "registry.sqlite", tmp_path / "backup")
    async with house.process() as coordinator:
        await coordinator.execute_run(PAIR)
        epoch = (await coordinator.get_pair(PAIR)).epoch
    for file in house.folder.glob("registry.sqlite*"):
        file.unlink()
    shutil.copy(tmp_path / "backup", house.folder / "registry.sqlite")
    async with house.process() as coordinator:
        with pytest.raises(AgentRefused, match="is behind") as caught:
            await coordinator.resume(PAIR)
        assert caught.value.code == "stale-epoch"
        await coordinator.take_pair(PAIR)
        assert (await coordinator.get_pair(PAIR)).epoch > epoch


async def test_a_fresh_process_of_the_same_registry_needs_nothing_also_in_another_folder(
    house: House, tmp_path: Path
) -> None:
    async with house.process() as coordinator:
        await coordinator.register_pair(REQUEST)
        await coordinator.start_run(PAIR, RunOptions())
    moved = house.twin(tmp_path / "moved")
    async with moved.process() as coordinator:
        assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK


async def test_what_no_agent_answers_cannot_be_taken(house: House) -> None:
    async with house.process() as coordinator:
        await coordinator.register_pair(REQUEST)

        def down(host: str, _request: Request, _moment: str) -> None:
            raise HostUnreachable(f"{host} does not answer")

        house.world.fault = down
        before = await coordinator.get_pair(PAIR)
        with pytest.raises(HostUnreachable):
            await coordinator.take_pair(PAIR)
        assert await coordinator.get_pair(PAIR) == before


def test_places_differ_by_registry_and_stay_when_a_folder_is_moved(tmp_path: Path) -> None:
    configs = [Config(state_dir=tmp_path / name) for name in ("a", "b")]
    for config in configs:
        config.state_dir.mkdir()
    one, other = map(place_of, configs)
    assert one.startswith(f"{one.partition(':')[0]}:{tmp_path}/a #")
    assert one.partition("#")[2] != other.partition("#")[2]
    assert place_of(configs[0]) == one
    (tmp_path / "a").rename(tmp_path / "c")
    assert place_of(replace(configs[0], state_dir=tmp_path / "c")).partition("#")[2] == one.partition("#")[2]
    assert {file.name for file in (tmp_path / "c").iterdir()} == {"registry.mark"}
