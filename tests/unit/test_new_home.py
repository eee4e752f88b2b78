"""Runs to an entirely new location: the VM is made, becomes the original, and is removed when the run is taken back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator import exclusions, registry
from coordinator.errors import Refused
from coordinator.exclusions import Why
from coordinator.model import Destination, Home, Pair, RestorePoint, RunOptions, State
from coordinator.place_mapping import PlaceMapping
from coordinator.runs import Coordinator
from protocol.messages import CreateVm, Power, Provisions, StoragePool
from tests.fakes.agent import FakeVm, World
from tests.unit.cli_house import Command
from tests.unit.coordinator_house import PAIR, CrashPlan, House

TO = Destination(home=Home.HOST, host="prod2")
OPTIONS = RunOptions(to=TO, audit=False)
OLD = {"vda": b"old-vda", "vdb": b"old-vdb"}


@pytest.fixture
async def house(memory_folder: Path) -> House:
    """A pair in Failover; a third host, ``prod2``, has a pool."""
    made = House(memory_folder / "state", World())
    await made.register()
    return made


def pair_of(house: House) -> Pair:
    return house.read(lambda connection: registry.get_pair(connection, PAIR))


def has(house: House, **changes: object) -> None:
    """Let the new host have something else."""
    told: Provisions = replace(house.world.homes.provisions, **changes)  # type: ignore[arg-type]
    house.world.homes.provisions = told


async def to_failback(house: House, options: RunOptions = OPTIONS) -> None:
    async with house.process() as coordinator:
        await coordinator.start_run(PAIR, options)
        outcome = await coordinator.execute_run(PAIR)
    assert outcome.state is State.FAILBACK, outcome.sentence


async def refusals(house: House, options: RunOptions = OPTIONS) -> dict[str, str]:
    """What speaks against it, by code; a run is refused for the same."""
    async with house.process() as coordinator:
        sought = await coordinator.destination(PAIR, options)
        if sought.refusals:
            with pytest.raises(Refused):
                await coordinator.start_run(PAIR, options)
    assert pair_of(house).state is State.FAILOVER
    return {refusal.code: refusal.sentence for refusal in sought.refusals}


class TestToTheEnd:
    async def test_the_vm_is_made_filled_and_started(self, house: House) -> None:
        before = pair_of(house)
        await to_failback(house)
        pair, made = pair_of(house), house.world.original
        assert (made.host, made.name, made.is_off) == ("prod2", "web", False)
        assert pair.original.uuid == made.uuid not in (before.original.uuid, before.replica.uuid)
        (order,) = [request for _, request in house.world.orders if isinstance(request, CreateVm)]
        assert [(v.target, v.pool, v.format, v.size_bytes) for v in order.volumes] == [
            ("vda", "default", "raw", 1 << 20),
            ("vdb", "default", "raw", 1 << 20),
        ]
        assert f"<uuid>{made.uuid}</uuid>" in "".join(order.definition)
        assert house.world.former is not None
        assert house.world.former.fence is not None

    async def test_commit_keeps_it_for_good_and_excludes_the_former_original(self, house: House) -> None:
        former = pair_of(house).original
        await to_failback(house)
        async with house.process() as coordinator:
            assert (await coordinator.commit(PAIR, RestorePoint.DROP)).state is State.READY
        assert pair_of(house).original.host == "prod2"
        assert house.world.homes.made == {}  # the agent would not remove it any more
        (left,) = house.read(exclusions.listed)
        assert (left.vm, left.why) == (former, Why.FORMER)

    async def test_undo_removes_what_was_made_and_gives_everything_back(self, house: House) -> None:
        before = pair_of(house)
        await to_failback(house)
        async with house.process() as coordinator:
            assert (await coordinator.undo(PAIR)).state is State.FAILOVER
        after = pair_of(house)
        assert (after.original, after.disks, after.former) == (before.original, before.disks, None)
        assert (house.world.original.uuid, house.world.original.disks) == ("u-orig", OLD)
        assert house.world.original.fence is None
        assert house.world.former is None
        assert not house.world.replica.is_off
        assert house.read(exclusions.listed) == ()

    async def test_a_pool_that_is_full_after_all_stops_the_run_and_cancel_leaves_nothing(self, house: House) -> None:
        house.world.homes.full = True
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, OPTIONS)
            outcome = await coordinator.execute_run(PAIR)
            assert (outcome.state, "no room" in outcome.sentence) == (State.SYNCING, True)
            assert (await coordinator.cancel(PAIR)).state is State.FAILOVER
        assert house.world.original.uuid == "u-orig"
        assert not house.world.replica.is_off

    async def test_a_host_that_is_away_when_the_run_is_taken_back_keeps_it_on_the_exclusion_list(
        self, house: House
    ) -> None:
        house.world.homes.full = True
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, OPTIONS)
            await coordinator.execute_run(PAIR)
            house.world.away.add("prod2")
            assert (await coordinator.cancel(PAIR)).state is State.FAILOVER
        (left,) = house.read(exclusions.listed)
        assert (left.vm.host, left.why) == ("prod2", Why.OVERWRITTEN)

    async def test_the_identity_of_an_original_that_never_comes_back_is_used_again(self, house: House) -> None:
        house.world.away.add("prod")
        await to_failback(house, replace(OPTIONS, former_original_gone=True, mapping=PlaceMapping(name="www")))
        assert (house.world.original.uuid, house.world.original.name) == ("u-orig", "www")
        async with house.process() as coordinator:
            assert (await coordinator.commit(PAIR, RestorePoint.DROP)).state is State.READY


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "code", "words"),
        [
            ({"machines": ()}, "machine-type", "runs no VMs of the type kvm for x86_64"),
            ({"machines": ("pc-i440fx-9.0",)}, "machine-type", "no machine type pc (it has: pc-i440fx-9.0)"),
            ({"pools": ()}, "pool-missing", "no storage pool default, for the disk vd"),
            (
                {"pools": (StoragePool(name="default", kind="dir", path="/p", active=False, free_bytes=0),)},
                "pool-missing",
                "has the pool default, but it is not active",
            ),
            (
                {"pools": (StoragePool(name="vg", kind="logical", path="/dev/vg", active=True, free_bytes=9),)},
                "pool-missing",
                "(it can use: none)",
            ),
        ],
    )
    async def test_what_the_host_cannot_give(
        self, house: House, changes: dict[str, object], code: str, words: str
    ) -> None:
        has(house, **changes)
        found = await refusals(house)
        assert words in found[code]

    async def test_a_network_is_missing_until_it_is_mapped(self, house: House) -> None:
        house.world.replica.machine.nics = ("<interface type='bridge'><source bridge='br0'/></interface>",)
        found = await refusals(house)
        assert "no bridge br0, to which a NIC is attached (it has: network default)" in found["network-missing"]
        assert "--map network:br0=NAME" in found["network-missing"]
        mapped = replace(OPTIONS, mapping=PlaceMapping(networks=(("br0", "default"),)))
        assert await refusals(house, mapped) == {}

    async def test_names_and_uuids_that_are_taken_there(self, house: House) -> None:
        to = replace(OPTIONS, to=replace(TO, host="prod"))
        found = await refusals(house, to)
        assert "has a VM of that name already (web, u-orig)" in found["name-clash"]
        assert await refusals(house, replace(to, mapping=PlaceMapping(name="www"))) == {}
        house.world.former = FakeVm("u-orig", "twin", "prod2", Power.OFF, {})
        found = await refusals(house, replace(OPTIONS, former_original_gone=True))
        assert "with that UUID already (twin, u-orig)" in found["uuid-clash"]
        assert await refusals(house) == {}

    async def test_options_that_speak_of_what_is_not_there_yet(self, house: House) -> None:
        found = await refusals(house, replace(OPTIONS, apply_config=True))
        assert "--apply-config is not for --to host" in found["not-with-new-location"]

    async def test_a_host_that_does_not_answer(self, house: House) -> None:
        house.world.away.add("prod2")
        assert list(await refusals(house)) == ["new-location"]


class TestCrashes:
    async def test_a_process_that_dies_anywhere_is_followed_by_one_that_ends_the_run_or_takes_it_back(
        self, house: House, tmp_path: Path
    ) -> None:
        async def whole(coordinator: Coordinator) -> None:
            await coordinator.start_run(PAIR, OPTIONS)
            await coordinator.execute_run(PAIR)

        twins: list[House] = []
        looks = CrashPlan(look=lambda at: twins.append(house.twin(tmp_path / f"at{at}")) if at % 5 == 0 else None)
        assert not await house.dies(looks, whole)
        assert len(twins) > 10
        for number, twin in enumerate(twins):
            if pair_of(twin).state is State.FAILOVER:
                continue
            async with twin.process() as coordinator:
                state = pair_of(twin).state
                if number % 2 and state is State.SYNCING:
                    assert (await coordinator.cancel(PAIR)).state is State.FAILOVER
                else:
                    assert (await coordinator.resume(PAIR)).state is State.FAILBACK
                    if number % 4:
                        assert (await coordinator.undo(PAIR)).state is State.FAILOVER
            if pair_of(twin).state is State.FAILOVER:
                assert twin.world.homes.made == {}
                assert (twin.world.original.uuid, twin.world.original.disks) == ("u-orig", OLD)


def test_a_plan_tells_what_is_made_and_drafts_the_mapping(tmp_path: Path) -> None:
    command, file, to = Command(tmp_path), tmp_path / "web.toml", ("--no-estimate", "--to", "host", "prod2")
    command.register()
    plan = command("plan", PAIR, *to, "--write-mapping", str(file), "--map", "name=www")
    assert plan.exit_code == 0, plan.output
    assert "make the VM www on prod2, with a volume for each disk" in " ".join(plan.output.split())
    assert file.read_text().splitlines()[1:] == [
        'name = "www"',
        "",
        "# the host has: default",
        "[pool]",
        '"vda" = "default"',
        '"vdb" = "default"',
    ]
    assert "make the VM www" in command("plan", PAIR, *to, "--mapping", str(file)).output
    assert command("plan", PAIR, *to, "--write-mapping", str(file)).exit_code == 2  # it is there already
    for words in (("--map", "name=www"), ("--former-original-gone",)):
        assert command("plan", PAIR, "--no-estimate", *words).exit_code == 2


def test_the_whole_from_the_command_line(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command.register()
    done = command("start", PAIR, "--yes", "--foreground", "--to", "host", "prod2")
    assert done.exit_code == 0, done.output
    assert command.json("status", PAIR)["original"]["host"] == "prod2"
    assert command("undo", PAIR, "--yes").exit_code == 0
    assert command.world.original.uuid == "u-orig"
