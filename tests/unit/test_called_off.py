"""A production host that is gone after the point of no return: a person's word, and what is owed for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import duties, registry
from coordinator.errors import AgentRefused, CoordinatorError, ExitCode, Refused, UsageError, WrongState
from coordinator.model import RunOptions, State
from protocol.messages import Condition, DescribeHost, FenceVm, InspectVm, Power, PowerOff, PowerOn, Request
from tests.unit.cli_house import Command
from tests.unit.coordinator_house import PAIR, House


@pytest.fixture
async def house(memory_folder: Path) -> House:
    """A pair in Failback whose production host is gone, the original with it."""
    made = House(memory_folder / "state")
    await made.register()
    async with made.process() as coordinator:
        await coordinator.start_run(PAIR, RunOptions(audit=False))
        assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK
    made.world.original.power = Power.OFF
    made.world.away.add("prod")
    return made


async def undone_by_word(house: House) -> None:
    async with house.process() as coordinator:
        outcome = await coordinator.undo(PAIR, original_is_off="prod")
    assert (outcome.state, outcome.exit_code) == (State.FAILOVER, ExitCode.DONE)


class TestTheWord:
    async def test_without_it_the_replica_stays_off_and_a_person_is_told_of_it(self, house: House) -> None:
        async with house.process() as coordinator:
            outcome = await coordinator.undo(PAIR)
            assert (outcome.state, outcome.exit_code) == (State.NEEDS_OPERATOR, ExitCode.NEEDS_OPERATOR)
            assert "`failback undo web --original-is-off prod`" in outcome.sentence
            assert house.world.replica.is_off
            outcome = await coordinator.undo(PAIR, original_is_off="prod")
        assert outcome.state is State.FAILOVER
        assert not house.world.replica.is_off

    async def test_with_it_the_replica_serves_its_own_data_and_the_journal_names_who_said_it(
        self, house: House
    ) -> None:
        await undone_by_word(house)
        async with house.process() as coordinator:
            entries = await coordinator.history(PAIR)
            status = await coordinator.pair_status(PAIR)
        (said,) = [entry for entry in entries if entry.step == "original_is_off"]
        assert said.actor == "root@test"
        assert "root@test says that prod cannot be asked and the original is off" in said.sentence
        assert not house.world.replica.is_off
        assert not house.world.replica.snapshots
        (owed,) = status.owed
        assert "fenced there at the first contact with prod" in owed

    async def test_another_host_is_no_word_at_all(self, house: House) -> None:
        async with house.process() as coordinator:
            with pytest.raises(UsageError, match="is prod, not dr"):
                await coordinator.undo(PAIR, original_is_off="dr")
        assert house.world.replica.is_off
        assert not house.read(duties.owed)

    @pytest.mark.parametrize(
        ("power", "why"),
        [(Power.OFF, "proves by itself that the original web is off"), (Power.RUNNING, "the original web is running")],
    )
    async def test_a_host_that_answers_is_believed_and_nothing_changes(
        self, house: House, power: Power, why: str
    ) -> None:
        house.world.away.clear()
        house.world.original.power = power
        async with house.process() as coordinator:
            with pytest.raises(Refused, match=why):
                await coordinator.undo(PAIR, original_is_off="prod")
            assert (await coordinator.get_pair(PAIR)).state is State.FAILBACK
        assert not house.read(duties.owed)

    async def test_it_is_for_undo_alone(self, house: House) -> None:
        await undone_by_word(house)
        async with house.process() as coordinator:
            again = await coordinator.undo(PAIR, original_is_off="prod")
            assert again.exit_code is ExitCode.DONE, "repeated, it is a harmless no-op"
            await coordinator.start_run(PAIR, RunOptions())
            with pytest.raises(WrongState):
                await coordinator.undo(PAIR, original_is_off="prod")

    async def test_a_host_that_says_it_runs_in_the_middle_of_the_undo_is_believed(self, house: House) -> None:
        world = house.world

        def back(host: str, request: Request, moment: str) -> None:
            if host == "dr" and moment == "before" and world.away:
                world.away.clear()
                world.original.power = Power.RUNNING
            if isinstance(request, PowerOff) and host == "prod":
                raise AgentRefused("the monitor does not answer", code="hypervisor")

        async with house.process() as coordinator:
            world.fault = back
            outcome = await coordinator.undo(PAIR, original_is_off="prod")
        assert outcome.state is State.NEEDS_OPERATOR
        assert world.replica.is_off
        assert house.read(duties.owed)


class TestTheFirstContact:
    async def test_plan_fences_the_original_before_it_asks_anything(self, house: House) -> None:
        await undone_by_word(house)
        house.world.away.clear()
        asked: list[type[Request]] = []
        async with house.process() as coordinator:
            house.world.fault = lambda host, request, moment: (
                asked.append(type(request)) if (host, moment) == ("prod", "before") else None
            )
            await coordinator.findings(PAIR)
            assert not (await coordinator.pair_status(PAIR)).owed
            notes = [entry for entry in await coordinator.history(PAIR) if entry.step == "fenced_at_first_contact"]
        assert asked[:3] == [PowerOff, InspectVm, FenceVm]
        assert house.world.original.fence is not None
        assert not house.world.original.autostart
        (note,) = notes
        assert note.sentence.endswith("it was off")

    async def test_an_original_that_came_up_with_its_host_is_powered_off(self, house: House) -> None:
        await undone_by_word(house)
        house.world.away.clear()
        house.world.original.power = Power.RUNNING  # its autostart was given back in the switchover
        async with house.process() as coordinator:
            # Of that host alone: of two running VMs the world complains whenever another one is asked.
            await coordinator.agents.agent("prod").ask(DescribeHost(), timeout_s=5)
            (note,) = [e for e in await coordinator.history(PAIR) if e.step == "fenced_at_first_contact"]
        assert note.sentence.endswith("it was running beside the replica and was powered off")
        assert house.world.original.is_off
        assert house.world.original.fence is not None
        pair = house.read(lambda connection: registry.get_pair(connection, PAIR))
        assert (pair.flag.condition, house.world.original.condition) == ("intact", Condition.INTACT)

    async def test_what_is_owed_stays_owed_while_the_host_is_gone(self, house: House) -> None:
        await undone_by_word(house)
        async with house.process() as coordinator:
            findings = await coordinator.findings(PAIR)
            assert findings.original.vm is None
        assert house.read(duties.owed)

    async def test_a_duty_that_cannot_be_done_keeps_everybody_from_that_vm(self, house: House) -> None:
        await undone_by_word(house)
        house.world.away.clear()

        def stuck(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, FenceVm) and moment == "before":
                raise AgentRefused("its image is in use", code="hypervisor")

        async with house.process() as coordinator:
            house.world.fault = stuck
            await coordinator.start_run(PAIR, RunOptions())
            outcome = await coordinator.execute_run(PAIR)
            assert outcome.state is State.SYNCING
            assert "must be fenced before anything else and cannot be: its image is in use" in outcome.sentence
            house.world.fault = lambda *_: None
            assert (await coordinator.resume(PAIR)).state is State.FAILBACK

    async def test_an_agent_that_is_asked_about_another_vm_answers_although_the_duty_fails(self, house: House) -> None:
        await undone_by_word(house)
        house.world.away.clear()

        def stuck(_host: str, request: Request, _moment: str) -> None:
            if isinstance(request, FenceVm):
                raise AgentRefused("its image is in use", code="hypervisor")

        async with house.process() as coordinator:
            house.world.fault = stuck
            with pytest.raises(CoordinatorError, match="no VM other"):
                await coordinator.agents.agent("prod").ask(InspectVm(vm="other"), timeout_s=5)
            with pytest.raises(CoordinatorError, match="must be fenced before anything else"):
                await coordinator.agents.agent("prod").ask(InspectVm(vm="web"), timeout_s=5)


def test_the_command_asks_says_what_is_at_stake_and_shows_what_is_owed(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command.register()
    command.fail_back()
    command.world.original.power = Power.OFF
    command.world.away.add("prod")
    assert command("undo", PAIR, "--original-is-off", "dr", "--yes").exit_code == 2
    done = command("undo", PAIR, "--original-is-off", "prod", "--yes")
    assert done.exit_code == 0, done.output
    assert "Nobody but you proves that the original is off" in done.output
    assert "Owed" in command("status", PAIR).output
    assert len(command.json("status", PAIR)["owed"]) == 1
    command.world.away.clear()
    command("plan", PAIR)
    assert command.json("status", PAIR)["owed"] == []
    order = [type(request) for host, request in command.world.orders if host == "prod"]
    assert order[-2:] == [PowerOff, FenceVm] or order[-3:-1] == [PowerOff, FenceVm]
    assert PowerOn not in order[-3:]
