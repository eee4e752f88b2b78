"""Runs to a VM restored beforehand: the pair moves, the former original stays off, and everything can be taken back."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import duties, exclusions, registry
from coordinator.differences import differences
from coordinator.errors import AgentRefused, Refused, UsageError, WrongState
from coordinator.exclusions import Why
from coordinator.model import (
    Destination,
    DiskPair,
    Home,
    OriginalFlag,
    Pair,
    PairRequest,
    RestorePoint,
    RunOptions,
    State,
)
from coordinator.runs import Coordinator
from protocol.messages import Condition, FenceVm, Power, Request
from tests.fakes.agent import FakeVm, World
from tests.unit.cli_house import Command
from tests.unit.coordinator_house import PAIR, CrashPlan, House

TO = Destination(home=Home.VM, host="prod2", vm="web-restored")
OPTIONS = RunOptions(to=TO, audit=False)


def moved_world(*, targets: tuple[str, ...] = ("vda", "vdb")) -> World:
    """A world with a destination on a third host. Once the pair is registered, it is what passes write to."""
    world = World()
    world.former = world.original
    world.original = FakeVm("u-dest", "web-restored", "prod2", Power.OFF, {t: b"backup-" + t.encode() for t in targets})
    return world


@pytest.fixture
async def house(memory_folder: Path) -> House:
    """A pair in Failover, and a destination."""
    made = House(memory_folder / "state", moved_world())
    await made.register()
    return made


def former_of(house: House) -> FakeVm:
    assert house.world.former is not None
    return house.world.former


async def to_failback(house: House, options: RunOptions = OPTIONS) -> None:
    async with house.process() as coordinator:
        await coordinator.start_run(PAIR, options)
        outcome = await coordinator.execute_run(PAIR)
    assert outcome.state is State.FAILBACK, outcome.sentence


def pair_of(house: House) -> Pair:
    return house.read(lambda connection: registry.get_pair(connection, PAIR))


class TestToTheEnd:
    async def test_the_destination_is_the_original_from_the_start_and_the_former_one_is_fenced(
        self, house: House
    ) -> None:
        before = pair_of(house)
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, OPTIONS)
        pair = pair_of(house)
        assert (pair.original.host, pair.original.uuid) == ("prod2", "u-dest")
        assert pair.former is not None
        assert (pair.former.vm, pair.former.fenced) == (before.original, False)
        async with house.process() as coordinator:
            assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK
            status = await coordinator.pair_status(PAIR)
        assert status.former == "prod/web, off and fenced"
        assert not house.world.original.is_off
        assert former_of(house).is_off
        assert former_of(house).fence is not None
        assert former_of(house).disks == {"vda": b"old-vda", "vdb": b"old-vdb"}

    async def test_commit_keeps_the_new_original_and_excludes_the_former_one(self, house: House) -> None:
        former = pair_of(house).original
        await to_failback(house)
        async with house.process() as coordinator:
            assert (await coordinator.commit(PAIR, RestorePoint.DROP)).state is State.READY
        pair = pair_of(house)
        assert (pair.original.uuid, pair.former, pair.state) == ("u-dest", None, State.READY)
        (left,) = house.read(exclusions.listed)
        assert (left.vm, left.why) == (former, Why.FORMER)
        assert former_of(house).fence is not None
        assert not former_of(house).autostart

    async def test_undo_gives_the_former_original_back_and_marks_the_destination_overwritten(
        self, house: House
    ) -> None:
        before = pair_of(house)
        await to_failback(house)
        async with house.process() as coordinator:
            assert (await coordinator.undo(PAIR)).state is State.FAILOVER
        after = pair_of(house)
        assert (after.original, after.disks, after.flag, after.former) == (
            before.original,
            before.disks,
            before.flag,
            None,
        )
        assert after.original_autostart is True
        assert former_of(house).fence is None
        assert former_of(house).disks == {"vda": b"old-vda", "vdb": b"old-vdb"}
        assert not house.world.replica.is_off
        assert house.world.original.is_off
        assert house.world.original.fence is not None
        (left,) = house.read(exclusions.listed)
        assert (left.vm.uuid, left.why) == ("u-dest", Why.OVERWRITTEN)

    async def test_a_cancel_before_the_first_write_leaves_no_word_of_the_destination(self, house: House) -> None:
        before = pair_of(house)
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, OPTIONS)
            assert (await coordinator.cancel(PAIR)).state is State.FAILOVER
        assert pair_of(house).original == before.original
        assert house.read(exclusions.listed) == ()
        assert house.world.original.fence is None

    async def test_an_overwritten_destination_can_be_completed_by_another_run(self, house: House) -> None:
        await to_failback(house)
        async with house.process() as coordinator:
            await coordinator.undo(PAIR)
        await to_failback(house)
        async with house.process() as coordinator:
            await coordinator.commit(PAIR, RestorePoint.DROP)
        assert [left.why for left in house.read(exclusions.listed)] == [Why.FORMER]

    async def test_disks_with_the_replicas_names_map_as_well_and_go_back_with_the_former_original(
        self, memory_folder: Path
    ) -> None:
        world = moved_world(targets=("sda",))
        assert world.former is not None
        world.former.disks, world.replica.disks = {"vda": b"old"}, {"sda": b"old"}
        house, before = House(memory_folder / "state", world), (DiskPair(original="vda", replica="sda"),)
        async with house.process() as coordinator:
            await coordinator.register_pair(
                PairRequest(
                    name=PAIR,
                    original_host="prod",
                    original_vm="web",
                    replica_host="dr",
                    replica_vm="web",
                    disks=before,
                    in_failover=True,
                )
            )
        await to_failback(house)
        assert [disk.original for disk in pair_of(house).disks] == ["sda"]
        async with house.process() as coordinator:
            await coordinator.undo(PAIR)
            assert {line.original for line in (await coordinator.report(PAIR)).disks} == {"sda"}
        assert pair_of(house).disks == before


class TestRefusals:
    @pytest.mark.parametrize(
        ("to", "code"),
        [
            (Destination(home=Home.VM, host="prod2", vm="nobody"), "destination-gone"),
            (Destination(home=Home.VM, host="dr", vm="web"), "destination-is-pair"),
            (Destination(home=Home.VM, host="prod", vm="web"), "destination-is-pair"),
        ],
    )
    async def test_a_destination_that_cannot_be(self, house: House, to: Destination, code: str) -> None:
        async with house.process() as coordinator:
            sought = await coordinator.destination(PAIR, RunOptions(to=to))
            assert [refusal.code for refusal in sought.refusals] == [code]
            with pytest.raises(Refused) as refused:
                await coordinator.start_run(PAIR, RunOptions(to=to))
        assert refused.value.code == code
        assert pair_of(house).state is State.FAILOVER

    async def test_disks_that_do_not_map(self, house: House) -> None:
        house.world.original.disks = {"vda": b"backup"}
        await self._refused(house, "destination-disks", "has the disks vda, and vda, vdb are needed")

    async def test_a_destination_that_runs_whatever_is_said_of_the_original(self, house: House) -> None:
        house.world.original.power, house.world.replica.power = Power.PAUSED, Power.OFF
        options = RunOptions(to=TO, power_off_original=True)
        await self._refused(house, "destination-runs", "is paused, and its disks would be overwritten", options)

    async def test_a_destination_of_another_pair(self, house: House) -> None:
        async with house.process() as coordinator:
            other = PairRequest(
                name="other", original_host="prod2", original_vm="web-restored", replica_host="dr", replica_vm="web"
            )
            with pytest.raises(UsageError, match="belongs to the pair web"):
                await coordinator.register_pair(other)  # its replica is taken: one VM is in one pair
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, OPTIONS)
            with pytest.raises(UsageError, match="belongs to the pair web"):
                await coordinator.register_pair(
                    PairRequest(
                        name="other", original_host="prod", original_vm="web", replica_host="prod2",
                        replica_vm="web-restored",
                    )
                )  # fmt: skip

    async def test_a_former_original_that_runs_needs_the_word(self, house: House) -> None:
        former_of(house).power = Power.PAUSED
        house.world.replica.power = Power.OFF
        await self._refused(house, "former-runs", "it would run beside the VM that takes its place")

    async def test_a_former_original_that_runs_is_powered_off_where_that_was_said(self, house: House) -> None:
        house.world.replica.power = Power.OFF
        house.world.last_words = dict(house.world.replica.disks)
        former_of(house).power = Power.RUNNING
        async with house.process() as coordinator:
            sought = await coordinator.destination(PAIR, RunOptions(to=TO, power_off_original=True))
            assert sought.refusals == ()
            await coordinator.start_run(PAIR, RunOptions(to=TO, power_off_original=True, audit=False))
            assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK
        assert former_of(house).is_off

    async def _refused(self, house: House, code: str, words: str, options: RunOptions = OPTIONS) -> None:
        async with house.process() as coordinator:
            sought = await coordinator.destination(PAIR, options)
            with pytest.raises(Refused, match=words) as refused:
                await coordinator.start_run(PAIR, options)
        assert refused.value.code == code
        assert [refusal.code for refusal in sought.refusals] == [code]
        assert pair_of(house).former is None


class TestExclusion:
    async def committed(self, house: House) -> None:
        await to_failback(house)
        async with house.process() as coordinator:
            await coordinator.commit(PAIR, RestorePoint.DROP)

    async def test_register_and_start_refuse_a_former_original_until_it_is_readmitted(self, house: House) -> None:
        await self.committed(house)
        again = PairRequest(
            name="again", original_host="prod", original_vm="web", replica_host="prod2", replica_vm="web-restored"
        )
        async with house.process() as coordinator:
            with pytest.raises(Refused, match=r"former original of web.*`failback readmit prod/web`") as refused:
                await coordinator.register_pair(again)
            assert refused.value.code == "excluded"
            back = RunOptions(to=Destination(home=Home.VM, host="prod", vm="web"))
            assert [r.code for r in (await coordinator.destination(PAIR, back)).refusals] == ["excluded"]
            await coordinator.readmit("prod", "web")
            # The one that took its place runs: nothing else speaks against the way back.
            assert [r.code for r in (await coordinator.destination(PAIR, back)).refusals] == ["former-runs"]
            with pytest.raises(UsageError, match="not on the exclusion list"):
                await coordinator.readmit("prod", "web")

    async def test_the_list_outlives_the_pair(self, house: House) -> None:
        await self.committed(house)
        async with house.process() as coordinator:
            await coordinator.doctor().forget(PAIR)
            assert await coordinator.list_pairs() == ()
            # Its fence is known for what it is, though its pair is not.
            assert [
                d.code for d in differences(await coordinator.doctor().examine()) if d.code == "unknown-fence"
            ] == []
        assert [left.pair for left in house.read(exclusions.listed)] == [PAIR]

    async def test_doctor_tells_of_one_that_nothing_keeps_off(self, house: House) -> None:
        await self.committed(house)
        former_of(house).fence = None
        async with house.process() as coordinator:
            told = differences(await coordinator.doctor().examine())
        (loose,) = [d for d in told if d.code == "excluded-unfenced"]
        assert "nothing keeps web on prod off" in loose.sentence


class TestPendingFence:
    async def test_a_host_that_does_not_answer_owes_the_fence_and_pays_at_its_first_contact(self, house: House) -> None:
        house.world.away.add("prod")
        await to_failback(house)
        async with house.process() as coordinator:
            status = await coordinator.pair_status(PAIR)
            assert status.former == "prod/web, its fence is PENDING"
            assert "pending: it is powered off and fenced there at the first contact with prod" in status.owed[0]
            await coordinator.commit(PAIR, RestorePoint.DROP)
            with pytest.raises(WrongState, match="while its fence is pending"):
                await coordinator.readmit("prod", "web")
        assert former_of(house).fence is None
        async with house.process() as coordinator:
            told = differences(await coordinator.doctor().examine(PAIR))
        (pending,) = [d for d in told if d.code == "fence-pending"]
        assert pending.cure == "bring prod back, then failback doctor web"
        house.world.away.clear()
        async with house.process() as coordinator:
            health = await coordinator.doctor().examine()
        assert [d.code for d in differences(health) if d.code in ("fence-pending", "excluded-unfenced")] == []
        assert former_of(house).fence is not None
        assert house.read(duties.owed) == ()
        async with house.process() as coordinator:
            said = [e.sentence for e in await coordinator.history(PAIR) if e.step == "fenced_at_first_contact"]
        assert said == [
            "the former original web on prod is fenced at the first contact since the pair moved away from it: "
            "it was off"
        ]

    async def test_one_that_came_up_meanwhile_is_powered_off_first(self, house: House) -> None:
        house.world.away.add("prod")
        options = RunOptions(to=TO, audit=False, power_on=False)  # the fake watches that never two VMs run
        await to_failback(house, options)
        former_of(house).power = Power.RUNNING
        house.world.away.clear()
        async with house.process() as coordinator:
            await coordinator.commit(PAIR, RestorePoint.DROP)
        assert former_of(house).is_off
        assert former_of(house).fence is not None
        assert house.read(duties.owed) == ()

    async def test_a_run_taken_back_owes_nothing_any_more(self, house: House) -> None:
        house.world.away.add("prod")
        await to_failback(house)
        async with house.process() as coordinator:
            assert (await coordinator.undo(PAIR)).state is State.FAILOVER
        assert house.read(duties.owed) == ()
        assert pair_of(house).former is None

    async def test_a_vm_that_its_host_no_longer_knows_needs_no_fence(self, house: House) -> None:
        house.world.former = None
        await to_failback(house)
        async with house.process() as coordinator:
            assert (await coordinator.pair_status(PAIR)).former == "prod/web, gone from its host"
            assert (await coordinator.commit(PAIR, RestorePoint.DROP)).state is State.READY
        assert house.read(duties.owed) == ()

    async def test_a_fence_that_cannot_be_taken_stops_the_run_before_anything_is_written(self, house: House) -> None:
        def refuses(host: str, request: Request, moment: str) -> None:
            if host == "prod" and isinstance(request, FenceVm) and moment == "before":
                raise AgentRefused("another process holds /vda: end it", code="disk-busy")

        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, OPTIONS)
            house.world.fault = refuses
            assert (await coordinator.execute_run(PAIR)).state is State.SYNCING
        assert house.world.original.disks == {"vda": b"backup-vda", "vdb": b"backup-vdb"}


async def resumed(coordinator: Coordinator) -> object:
    return await coordinator.resume(PAIR)


@pytest.mark.parametrize("ending", ["commit", "undo"])
async def test_killed_anywhere_a_move_comes_to_its_end(memory_folder: Path, ending: str) -> None:
    """Every ninth event of the way from `start` to the end; the fake agents watch I1 to I3 all along."""

    async def way(coordinator: Coordinator) -> None:
        pair = await coordinator.get_pair(PAIR)
        if pair.state is State.FAILOVER and pair.run is None:
            await coordinator.start_run(PAIR, OPTIONS)
            await coordinator.execute_run(PAIR)
        elif pair.state not in (State.FAILBACK, State.READY, State.FAILOVER):
            await resumed(coordinator)
        if (await coordinator.get_pair(PAIR)).state is State.FAILBACK:
            await (coordinator.commit(PAIR, RestorePoint.DROP) if ending == "commit" else coordinator.undo(PAIR))

    at = 1
    while True:
        house = House(memory_folder / f"state-{at}", moved_world())
        await house.register()
        former = pair_of(house).original
        if not await house.dies(CrashPlan(at), way):
            break
        async with house.process() as coordinator:
            await way(coordinator)
        pair = pair_of(house)
        assert pair.former is None, f"event {at}"
        if ending == "commit":
            assert (pair.state, pair.original.uuid) == (State.READY, "u-dest"), f"event {at}"
            assert former_of(house).fence is not None
            assert [left.vm for left in house.read(exclusions.listed)] == [former]
        else:
            assert (pair.state, pair.original) == (State.FAILOVER, former), f"event {at}"
            assert not house.world.replica.is_off
            assert house.world.original.fence is not None
        at += 9
    assert at > 60


class TestCommandLine:
    def command(self, folder: Path) -> Command:
        made = Command(folder, moved_world())
        made.register()
        return made

    @pytest.mark.parametrize(
        "words",
        [("--to", "vm", "prod2:web-restored"), ("--to", "vm prod2:web-restored"), ("--to=vm prod2:web-restored",)],
    )
    def test_the_words_of_a_destination_are_understood(self, tmp_path: Path, words: tuple[str, ...]) -> None:
        plan = self.command(tmp_path).json("plan", "web", "--no-estimate", *words)["plan"]
        assert plan["refusals"] == []
        assert any("The pair moves: web-restored on prod2 becomes its original" in note for note in plan["notes"])
        assert any("make sure web on prod is off, and fence web" in step for step in plan["steps"])

    @pytest.mark.parametrize("words", ["vm prod2", "vm :x", "host", "host a:b", "elsewhere", "original x"])
    def test_other_words_are_none(self, tmp_path: Path, words: str) -> None:
        told = self.command(tmp_path)("plan", "web", "--to", words)
        assert told.exit_code == 2
        assert "is neither original nor vm HOST:NAME" in told.output

    def test_a_plan_to_nowhere_is_refused_and_says_why(self, tmp_path: Path) -> None:
        told = self.command(tmp_path).json("plan", "web", "--to", "vm", "prod2:nobody", exit_code=3)
        assert [refusal["code"] for refusal in told["plan"]["refusals"]] == ["destination-gone"]

    def test_pairs_and_status_tell_of_the_move_to_its_end(self, tmp_path: Path) -> None:
        command = self.command(tmp_path)
        done = command("start", "web", "--yes", "--foreground", "--to", "vm", "prod2:web-restored")
        assert done.exit_code == 0, done.output
        assert "Moved from" in command("status", "web").output
        assert command.json("status", "web")["former"] == "prod/web, off and fenced"
        assert command("commit", "web", "--yes").exit_code == 0
        (left,) = command.json("pairs")["excluded"]
        assert left["why"] == "former"
        assert "former original of web" in command.json("status", "web")["left_behind"][0]
        assert "Left behind" in command("status", "web").output
        assert command("readmit", "prod/web", "--yes").exit_code == 0
        assert command.json("pairs")["excluded"] == []


def test_a_torn_former_original_stays_torn_and_fenced_when_the_run_is_taken_back(tmp_path: Path) -> None:
    command = Command(tmp_path, moved_world())
    command.register()
    former = command.world.former
    assert former is not None
    former.condition = Condition.TORN
    command.session().run(_call_torn)
    done = command("start", "web", "--yes", "--foreground", "--to", "vm", "prod2:web-restored")
    assert done.exit_code == 0, done.output
    assert command("undo", "web", "--yes").exit_code == 0
    assert former.fence is not None
    assert command.json("status", "web")["original"]["flag"]["condition"] == "torn"


async def _call_torn(coordinator: Coordinator) -> None:
    pair = await coordinator.get_pair(PAIR)
    flag = OriginalFlag(condition=Condition.TORN.value)
    await coordinator._db.write(lambda connection: registry.set_flag(connection, PAIR, pair.epoch, flag))
