"""Whole runs that carry more than disks: firmware variables, TPM state, the definition, disks that are missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.errors import AgentRefused, ExitCode
from coordinator.events import Event, Notice
from coordinator.model import DiskPair, RestorePoint, RunOptions, State
from coordinator.states import Verb
from protocol.messages import (
    KeepMachine,
    MachineOrder,
    PlaceState,
    PowerOn,
    Request,
    RestoreMachine,
    Side,
    StateKind,
    Tracking,
)
from tests.fakes.agent import World, unreachable
from tests.unit.coordinator_house import PAIR, House
from tests.unit.test_crashes import Act, check_end, finish, killed_in, pair_of, run, undo

NVRAM, TPM = (StateKind.NVRAM, "vars"), (StateKind.TPM, "tpm2-00.permall")
NIC = "<interface type='network'><mac address='52:54:00:00:00:09'/><source network='default'/></interface>"
OLD, NEW = {NVRAM: b"old variables", TPM: b"old"}, {NVRAM: b"new variables!", TPM: b"new state"}
WHOLE = RunOptions(apply_config=True, create_missing=True)


def machines(world: World) -> None:
    """Both VMs have UEFI and a TPM; the replica got more memory, a NIC and a disk while it served."""
    for vm in (world.original, world.replica):
        vm.firmware, vm.has_tpm = "uefi", True
    world.original.machine.state, world.replica.machine.state = dict(OLD), dict(NEW)
    world.replica.machine.memory_kib = 4096
    world.replica.machine.nics = (NIC,)
    world.replica.disks["vdc"] = b"added"


@pytest.fixture
async def house(memory_folder: Path) -> House:
    made = House(memory_folder / "state")
    await made.register()
    machines(made.world)
    return made


def assert_as_before(world: World) -> None:
    """Nothing of the original is left changed but what its disks hold."""
    machine = world.original.machine
    assert machine.state == OLD
    assert (machine.memory_kib, machine.nics) == (1024, ())
    assert set(world.original.disks) == {"vda", "vdb"}
    assert (machine.old_state, machine.old_definition, machine.created) == (None, None, ())


class TestTheWayHome:
    async def test_the_original_starts_with_all_of_the_replica(self, house: House) -> None:
        seen: list[Event] = []
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, WHOLE)
            outcome = await coordinator.execute_run(PAIR, observer=seen.append)
            pair = await coordinator.get_pair(PAIR)
        machine = house.world.original.machine
        assert outcome.state is State.FAILBACK
        assert machine.state == NEW
        assert machine.memory_kib == 4096
        assert "52:54:00:00:00:09" in "".join(machine.nics)
        assert house.world.original.disks["vdc"] == b"added"
        assert pair.disks[-1] == DiskPair(original="vdc", replica="vdc")
        told = [event.sentence for event in seen if isinstance(event, Notice)]
        assert any("created on prod: /vdc" in sentence for sentence in told)
        assert any("memory: 1 MiB → 4 MiB" in sentence for sentence in told)

    async def test_commit_drops_what_was_kept(self, house: House) -> None:
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, WHOLE)
            await coordinator.execute_run(PAIR)
            assert house.world.original.machine.old_state == OLD
            assert (await coordinator.commit(PAIR, RestorePoint.DROP)).state is State.READY
            pair = await coordinator.get_pair(PAIR)
        machine = house.world.original.machine
        assert (machine.old_state, machine.old_definition, machine.created) == (None, None, ())
        assert machine.state == NEW
        assert len(pair.disks) == 3

    async def test_state_is_in_place_before_the_original_starts(self, house: House) -> None:
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            await coordinator.execute_run(PAIR)
        orders = [type(request) for host, request in house.world.orders if host == "prod"]
        assert orders.index(PlaceState) < orders.index(PowerOn)

    async def test_without_being_told_the_definition_stays_and_nothing_is_created(self, house: House) -> None:
        del house.world.replica.disks["vdc"]
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            await coordinator.execute_run(PAIR)
        machine = house.world.original.machine
        assert (machine.memory_kib, machine.nics) == (1024, ())
        assert set(house.world.original.disks) == {"vda", "vdb"}

    async def test_a_bios_vm_without_a_tpm_gets_no_such_order(self, memory_folder: Path) -> None:
        house = House(memory_folder / "bios")
        await house.register()
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            await coordinator.execute_run(PAIR)
            await coordinator.commit(PAIR, RestorePoint.DROP)
        assert not any(isinstance(request, MachineOrder) for _, request in house.world.orders)


class TestTakingBack:
    async def test_undo_gives_the_original_everything_back(self, house: House) -> None:
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, WHOLE)
            await coordinator.execute_run(PAIR)
            assert (await coordinator.undo(PAIR)).state is State.FAILOVER
            pair = await coordinator.get_pair(PAIR)
        assert_as_before(house.world)
        assert len(pair.disks) == 2
        assert not house.world.replica.is_off
        assert len(house.world.told["prod", Side.ORIGINAL][1].mapping.disks) == 2

    async def test_a_rollback_gives_the_original_everything_back(self, house: House) -> None:
        def fault(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, PlaceState) and moment == "after":
                raise AgentRefused("reads back as something else", code="machine-state")

        async with house.process() as coordinator:
            house.world.fault = fault
            await coordinator.start_run(PAIR, WHOLE)
            outcome = await coordinator.execute_run(PAIR)
        assert (outcome.state, outcome.exit_code) == (State.FAILOVER, ExitCode.FAILED)
        assert_as_before(house.world)
        assert not house.world.replica.is_off

    async def test_state_that_somebody_changed_keeps_the_original_off(self, house: House) -> None:
        world = house.world

        def fault(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, PlaceState) and moment == "after":
                world.original.machine.state[NVRAM] = b"somebody else's"

        async with house.process() as coordinator:
            house.world.fault = fault
            await coordinator.start_run(PAIR, RunOptions())
            outcome = await coordinator.execute_run(PAIR)
        assert outcome.state is State.FAILOVER
        assert "does not have the replica's nvram vars" in outcome.sentence
        assert world.original.boots == 0

    async def test_a_production_host_that_is_away_does_not_keep_the_replica_off(self, house: House) -> None:
        def fault(host: str, request: Request, moment: str) -> None:
            if isinstance(request, PlaceState) and moment == "before":
                house.world.away.add("prod")
                raise unreachable(host)

        seen: list[Event] = []
        async with house.process() as coordinator:
            house.world.fault = fault
            await coordinator.start_run(PAIR, WHOLE)
            outcome = await coordinator.execute_run(PAIR, observer=seen.append)
        assert outcome.state is State.FAILOVER
        assert not house.world.replica.is_off
        told = [event.sentence for event in seen if isinstance(event, Notice)]
        assert any("cannot be given back now" in sentence for sentence in told)

    async def test_two_failbacks_in_succession_the_first_undone(self, house: House) -> None:
        async with house.process() as coordinator:
            for _ in range(2):
                await coordinator.start_run(PAIR, WHOLE)
                assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK
                assert house.world.original.machine.state == NEW
                await coordinator.undo(PAIR)
                assert_as_before(house.world)
        restored = [request for _, request in house.world.orders if isinstance(request, RestoreMachine)]
        assert len({request.order.run for request in restored}) == 2
        assert not any(isinstance(request, KeepMachine) for _, request in house.world.orders)


WAYS = [
    pytest.param(run, (), Verb.RESUME, id="run-resume"),
    pytest.param(run, (), Verb.CANCEL, id="run-cancel"),
    pytest.param(undo, (run,), Verb.RESUME, id="undo-resume"),
]


@pytest.mark.parametrize(("act", "before", "verb"), WAYS)
async def test_killed_anywhere_the_original_has_all_of_the_old_or_all_of_the_new(
    memory_folder: Path, act: Act, before: tuple[Act, ...], verb: Verb
) -> None:
    start = House(memory_folder / "start")
    await start.register()
    machines(start.world)
    async with start.process() as coordinator:
        await coordinator.start_run(PAIR, replace(WHOLE, audit=False, track=Tracking.NONE))
        for each in before:
            await each(coordinator)
    for house in (await killed_in(act, start, memory_folder))[::2]:
        await finish(house, verb)
        check_end(house)
        pair = pair_of(house)
        if pair.state is State.FAILOVER:
            assert_as_before(house.world)
            assert len(pair.disks) == 2
        else:
            assert house.world.original.machine.state == NEW
            assert house.world.original.machine.memory_kib == 4096
            assert len(pair.disks) == 3
            kept = house.world.original.machine.old_state is not None
            assert kept is (pair.state is State.FAILBACK)
