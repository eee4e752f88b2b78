"""Whole runs over in-memory agents: the way home, and every way back."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from coordinator.errors import AgentRefused, CoordinatorError, ExitCode, PairBusy, UsageError, WrongState
from coordinator.events import Event, Notice, Progressed, StateChanged, StepFailed
from coordinator.hooks import HookFailed
from coordinator.model import Newest, RestorePoint, RunOptions, ShutdownPolicy, State
from protocol.messages import Condition, FenceVm, LiftFence, OpenView, Power, PowerOn, Protect, Request, RunPass
from tests.fakes.agent import World, unreachable
from tests.unit.coordinator_house import PAIR, REQUEST, House


@pytest.fixture
async def house(memory_folder: Path) -> House:
    made = House(memory_folder / "state")
    await made.register()
    return made


def add_hook(house: House, kind: str, name: str, script: str) -> None:
    path = house.config.hooks_dir / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class TestTheWayHome:
    async def test_a_run_ends_with_the_original_serving_the_replicas_last_words(self, house: House) -> None:
        seen: list[Event] = []
        async with house.process() as coordinator:
            run = await coordinator.start_run(PAIR, RunOptions())
            outcome = await coordinator.execute_run(PAIR, observer=seen.append)
            pair = await coordinator.get_pair(PAIR)
        world = house.world
        assert (outcome.state, outcome.exit_code, outcome.run) == (State.FAILBACK, ExitCode.DONE, run)
        assert (world.original.power, world.replica.power) == (Power.RUNNING, Power.OFF)
        assert world.replica.fence is not None
        assert world.original.autostart
        assert not world.views, "a view was left open"
        assert (pair.newest, pair.flag.condition) == (Newest.ORIGINAL, "equals-view")
        states = [event.state for event in seen if isinstance(event, StateChanged)]
        assert states == [State.READY_TO_SWITCH, State.SWITCHING, State.FAILBACK]
        assert any(isinstance(event, Progressed) and event.progress.total_bytes == 2 << 20 for event in seen)

    async def test_the_report_tells_bytes_evidence_seconds_and_downtime(self, house: House) -> None:
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            report = (await coordinator.execute_run(PAIR)).report
        assert report is not None
        assert [(line.replica, line.pass_name) for line in report.disks] == [
            ("vda", "pass:1"),
            ("vdb", "pass:1"),
            ("vda", "pass:2"),
            ("vdb", "pass:2"),
            ("vda", "last_pass"),
            ("vdb", "last_pass"),
        ]
        line = report.disks[0]
        assert (line.changed_bytes, line.sent_bytes, line.written_bytes, line.verified_bytes) == (
            4096,
            1000,
            4096,
            4608,
        )
        assert report.downtime_s is not None
        assert 0 < report.downtime_s < 200
        assert {step.step for step in report.steps} >= {"pass:1", "replica_off", "verify", "original_on"}

    @pytest.mark.parametrize("kept", list(RestorePoint))
    async def test_commit_releases_the_replica_and_keeps_or_drops_the_restore_point(
        self, house: House, kept: RestorePoint
    ) -> None:
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            await coordinator.execute_run(PAIR)
            seen: list[Event] = []
            outcome = await coordinator.commit(PAIR, kept, observer=seen.append)
            again = await coordinator.commit(PAIR, kept)
            pair = await coordinator.get_pair(PAIR)
        assert outcome.state is again.state is State.READY
        assert again.exit_code is ExitCode.DONE
        assert house.world.replica.fence is None
        assert house.world.replica.autostart
        assert bool(house.world.replica.snapshots) is (kept is RestorePoint.KEEP)
        assert any(isinstance(event, Notice) and "autostart --disable web` on dr" in event.sentence for event in seen)
        assert (pair.newest, pair.flag.condition, pair.original_autostart) == (Newest.ORIGINAL, "intact", None)
        assert outcome.report is not None
        assert outcome.report.outcome == "committed"

    async def test_two_failbacks_in_succession(self, house: House) -> None:
        async with house.process() as coordinator:
            for kept in RestorePoint:
                await coordinator.start_run(PAIR, RunOptions())
                await coordinator.execute_run(PAIR)
                assert (await coordinator.commit(PAIR, kept)).state is State.READY
                house.world.original.power, house.world.replica.power = Power.OFF, Power.RUNNING
                house.world.frozen = None
                assert (await coordinator.record_failover(PAIR)).state is State.FAILOVER
            assert len(await coordinator.runs(PAIR)) == 2

    async def test_without_power_on_the_original_is_verified_released_and_off(self, house: House) -> None:
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions(power_on=False))
            outcome = await coordinator.execute_run(PAIR)
        assert outcome.state is State.FAILBACK
        assert house.world.original.boots == 0
        assert house.world.original.fence is None
        assert house.world.original.disks == house.world.last_words

    async def test_a_replica_that_is_off_already_gets_one_pass(self, house: House) -> None:
        house.world.replica.power = Power.OFF
        house.world.last_words = dict(house.world.replica.disks)
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions(audit=False))
            outcome = await coordinator.execute_run(PAIR)
        assert outcome.state is State.FAILBACK
        assert [type(request) for _, request in house.world.orders].count(OpenView) == 1
        assert outcome.report is not None
        assert outcome.report.downtime_s is None

    async def test_a_running_original_is_powered_off_only_if_that_was_asked_for(self, house: House) -> None:
        house.world.replica.power = Power.OFF  # two running would break I1 before we begin
        house.world.last_words = dict(house.world.replica.disks)
        house.world.original.power = Power.RUNNING
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            outcome = await coordinator.execute_run(PAIR)
            assert (outcome.state, outcome.exit_code) == (State.SYNCING, ExitCode.FAILED)
            assert "--power-off-original" in outcome.sentence
            await coordinator.cancel(PAIR)
            await coordinator.start_run(PAIR, RunOptions(power_off_original=True))
            assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK

    async def test_hooks_run_in_order_and_know_the_pair(self, house: House, tmp_path: Path) -> None:
        told = tmp_path / "told"
        add_hook(house, "hold", "20-second", f'echo "second $FAILBACK_PAIR $FAILBACK_REPLICA_HOST" >> {told}')
        add_hook(house, "hold", "10-first", f'echo "first $FAILBACK_ORIGINAL_VM" >> {told}')
        add_hook(house, "resume", "go", f'echo "resume $FAILBACK_RUN" >> {told}')
        (house.config.hooks_dir / "hold" / "README").write_text("not executable")
        async with house.process() as coordinator:
            run = await coordinator.start_run(PAIR, RunOptions())
            await coordinator.execute_run(PAIR)
            await coordinator.commit(PAIR, RestorePoint.DROP)
        assert told.read_text() == f"first web\nsecond web dr\nresume {run}\n"

    async def test_a_hook_that_fails_stops_the_run_before_anything_is_touched(self, house: House) -> None:
        add_hook(house, "hold", "refuse", "echo rsync still runs >&2; exit 3")
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            outcome = await coordinator.execute_run(PAIR)
        assert outcome.state is State.SYNCING
        assert "ended with 3 and said: rsync still runs" in outcome.sentence
        assert not house.world.orders

    async def test_a_hook_that_does_not_end_is_stopped(self, house: House) -> None:
        add_hook(house, "hold", "sleepy", "exec sleep 60")
        async with house.process() as coordinator:
            pair = await coordinator.get_pair(PAIR)
            from coordinator.hooks import Hook, Hooks

            with pytest.raises(HookFailed, match="did not end within"):
                await Hooks(folder=house.config.hooks_dir, timeout_s=0.2).run(Hook.HOLD, pair, "r1")


class TestUndo:
    @pytest.mark.parametrize("power_on", [True, False])
    async def test_undo_puts_the_replica_back_on_exactly_its_own_data(self, house: House, power_on: bool) -> None:
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions(power_on=power_on))
            await coordinator.execute_run(PAIR)
            assert ("for " in (await coordinator.forecast_undo(PAIR)).sentence) is power_on
            outcome = await coordinator.undo(PAIR)
            again = await coordinator.undo(PAIR)
            pair = await coordinator.get_pair(PAIR)
        assert outcome.state is again.state is State.FAILOVER
        assert outcome.exit_code is again.exit_code is ExitCode.DONE
        assert (house.world.original.power, house.world.replica.power) == (Power.OFF, Power.RUNNING)
        assert house.world.replica.autostart
        assert not house.world.original.autostart, "the original could come up beside the replica"
        assert not house.world.replica.snapshots
        assert (pair.newest, pair.flag.condition, pair.original_autostart) == (Newest.REPLICA, "intact", True)

    async def test_the_next_commit_gives_the_original_its_autostart_back(self, house: House) -> None:
        async with house.process() as coordinator:
            for _ in range(2):
                await coordinator.start_run(PAIR, RunOptions())
                await coordinator.execute_run(PAIR)
                assert house.world.original.autostart
                await coordinator.undo(PAIR)
                assert not house.world.original.autostart

    async def test_undo_waits_for_a_person_when_the_originals_host_is_gone(self, house: House) -> None:
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            await coordinator.execute_run(PAIR)

            def gone(host: str, _request: Request, _moment: str) -> None:
                if host == "prod":
                    raise unreachable(host)

            house.world.fault = gone
            outcome = await coordinator.undo(PAIR)
            assert (outcome.state, outcome.exit_code) == (State.NEEDS_OPERATOR, ExitCode.NEEDS_OPERATOR)
            assert house.world.replica.is_off
            with pytest.raises(WrongState):
                await coordinator.cancel(PAIR)
            assert (await coordinator.execute_run(PAIR)).exit_code is ExitCode.NEEDS_OPERATOR
            house.world.fault = lambda *_: None
            assert (await coordinator.resume(PAIR)).state is State.FAILOVER
        assert not house.world.replica.is_off


class TestFailures:
    async def test_a_failed_first_pass_leaves_the_original_torn_and_the_run_resumable(self, house: House) -> None:
        def broken(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, RunPass) and moment == "midway":
                raise AgentRefused("the link was cut; resume", code="sync")

        seen: list[Event] = []
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions(audit=False))
            house.world.fault = broken
            with trio.fail_after(60):
                outcome = await coordinator.execute_run(PAIR, observer=seen.append)
            status = await coordinator.pair_status(PAIR)
            assert outcome.state is State.SYNCING
            assert "the link was cut" in outcome.sentence
            assert any(isinstance(event, StepFailed) and event.step == "pass:1" for event in seen)
            assert (status.flag.condition, status.step, status.active) == ("torn", "pass:1", False)
            assert status.last_failure is not None
            assert status.progress is None
            house.world.fault = lambda *_: None
            assert (await coordinator.resume(PAIR)).state is State.FAILBACK
        opened = [request for _, request in house.world.orders if isinstance(request, OpenView)]
        views = [request.view for request in opened if not request.reopen]
        assert len(set(views)) == len(views) == 3
        assert [request.view for request in opened if request.reopen] == views[:1]

    async def test_cancel_of_a_stopped_run_leaves_a_torn_original_fenced(self, house: House) -> None:
        def broken(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, RunPass) and moment == "midway":
                raise AgentRefused("the link was cut; resume", code="sync")

        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            house.world.fault = broken
            await coordinator.execute_run(PAIR)
            house.world.fault = lambda *_: None
            outcome = await coordinator.cancel(PAIR)
            again = await coordinator.cancel(PAIR)
            pair = await coordinator.get_pair(PAIR)
        assert outcome.state is again.state is State.FAILOVER
        assert pair.flag.condition == "torn"
        assert house.world.original.fence is not None
        assert not house.world.views
        assert not house.world.replica.is_off

    async def test_a_torn_original_is_whole_again_after_the_next_run(self, house: House) -> None:
        await self.test_cancel_of_a_stopped_run_leaves_a_torn_original_fenced(house)
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK
        assert house.world.original.autostart, "the autostart of before the first run was lost"

    async def test_a_replica_that_ignores_the_shutdown_stays_in_use(self, house: House) -> None:
        house.world.replica.ignores_shutdown = True
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            outcome = await coordinator.execute_run(PAIR)
            assert (outcome.state, outcome.exit_code) == (State.FAILOVER, ExitCode.FAILED)
            assert "the VM web still runs" in outcome.sentence
            assert "may still power off later: look with `virsh domstate web` on dr" in outcome.sentence
            assert not house.world.replica.is_off
            await coordinator.start_run(PAIR, RunOptions(shutdown_policy=ShutdownPolicy.FORCE))
            assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK

    @pytest.mark.parametrize("kind", [FenceVm, Protect, OpenView, RunPass])
    async def test_a_failure_inside_the_switchover_rolls_back(self, house: House, kind: type[Request]) -> None:
        def broken(host: str, request: Request, moment: str) -> None:
            if house.world.replica.is_off and isinstance(request, kind) and host == "dr" and moment == "before":
                raise AgentRefused("no room; free some", code="hypervisor")

        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            house.world.fault = broken
            outcome = await coordinator.execute_run(PAIR)
        assert (outcome.state, outcome.exit_code) == (State.FAILOVER, ExitCode.FAILED)
        assert "no room" in outcome.sentence
        assert not house.world.replica.is_off
        assert not house.world.replica.snapshots
        assert outcome.report is not None
        assert outcome.report.outcome == "rolled-back"

    @pytest.mark.parametrize("silence", [unreachable("prod"), AgentRefused("no answer in time", code="timed-out")])
    async def test_the_replica_comes_back_although_the_original_host_died_in_the_last_pass(
        self, house: House, silence: CoordinatorError
    ) -> None:
        def died(host: str, _request: Request, _moment: str) -> None:
            if house.world.replica.is_off and host == "prod":
                raise silence

        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            house.world.fault = died
            outcome = await coordinator.execute_run(PAIR)
        assert outcome.state is State.FAILOVER
        assert not house.world.replica.is_off

    async def test_after_the_point_of_no_return_a_person_chooses_between_resume_and_undo(self, house: House) -> None:
        house.world.original.fails_to_start = True
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            outcome = await coordinator.execute_run(PAIR)
            pair = await coordinator.get_pair(PAIR)
            assert (outcome.state, outcome.exit_code) == (State.NEEDS_OPERATOR, ExitCode.NEEDS_OPERATOR)
            assert pair.operator is not None
            assert pair.operator.exits == ("resume", "undo")
            assert house.world.replica.is_off
            assert (await coordinator.resume(PAIR)).state is State.NEEDS_OPERATOR
            assert "web may have been in use for" in (await coordinator.forecast_undo(PAIR)).sentence
            assert (await coordinator.undo(PAIR)).state is State.FAILOVER
            assert not house.world.replica.is_off

    async def test_a_replica_that_stopped_by_itself_while_syncing_asks_a_person(self, house: House) -> None:
        def stops(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, RunPass) and moment == "midway":
                house.world.replica.power = Power.OFF
                house.world.views.clear()

        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            house.world.fault = stops
            assert (await coordinator.execute_run(PAIR)).state is State.SYNCING
            house.world.fault = lambda *_: None
            assert (await coordinator.resume(PAIR)).exit_code is ExitCode.NEEDS_OPERATOR
            house.world.last_words = dict(house.world.replica.disks)
            assert (await coordinator.resume(PAIR)).state is State.FAILBACK


class TestPeopleInBetween:
    async def test_the_replica_stays_off_while_somebody_runs_the_original_by_hand(self, house: House) -> None:
        world = house.world

        def started(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, Protect) and moment == "before":
                world.original.fence, world.original.condition = None, None
                world.original.power = Power.RUNNING
                raise AgentRefused("no room; free some", code="hypervisor")

        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            world.fault = started
            outcome = await coordinator.execute_run(PAIR)
            assert (outcome.state, outcome.exit_code) == (State.NEEDS_OPERATOR, ExitCode.NEEDS_OPERATOR)
            assert "power it off" in outcome.sentence
            assert world.replica.is_off
            world.fault = lambda *_: None
            world.original.power = Power.OFF
            assert (await coordinator.resume(PAIR)).state is State.FAILOVER
        assert not world.replica.is_off

    async def test_the_original_stays_off_while_somebody_runs_the_replica_by_hand(self, house: House) -> None:
        world = house.world

        def started(host: str, request: Request, moment: str) -> None:
            if isinstance(request, LiftFence) and host == "prod" and moment == "after":
                world.replica.fence, world.frozen = None, None
                world.replica.power = Power.RUNNING

        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            world.fault = started
            outcome = await coordinator.execute_run(PAIR)
        assert outcome.exit_code is ExitCode.NEEDS_OPERATOR
        assert "the replica on dr is running and must be off" in outcome.sentence
        assert world.original.is_off


class TestTwoProcesses:
    async def test_cancel_meets_the_live_run(self, house: House) -> None:
        house.world.pass_hold = trio.Event()
        async with house.process() as working, trio.open_nursery() as nursery:
            await working.start_run(PAIR, RunOptions())
            begun = trio.Event()
            ended: list[State] = []

            def observe(event: Event) -> None:
                if isinstance(event, Progressed):
                    begun.set()

            async def work() -> None:
                ended.append((await working.execute_run(PAIR, observer=observe)).state)

            nursery.start_soon(work)
            with trio.fail_after(20):
                await begun.wait()
                with pytest.raises(PairBusy):
                    await working.resume(PAIR)
                assert (await working.pair_status(PAIR)).active
                outcome = await working.cancel(PAIR)
        assert outcome.state is State.FAILOVER
        assert ended == [State.FAILOVER]
        assert house.world.original.condition is Condition.TORN

    async def test_stop_ends_a_pass_at_a_safe_boundary_and_resume_goes_on(self, house: House) -> None:
        house.world.pass_hold = trio.Event()
        stop = trio.Event()
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())

            def observe(event: Event) -> None:
                if isinstance(event, Progressed):
                    stop.set()

            with trio.fail_after(20):
                outcome = await coordinator.execute_run(PAIR, observer=observe, stop=stop)
            assert (outcome.state, outcome.exit_code) == (State.SYNCING, ExitCode.FAILED)
            assert f"failback resume {PAIR}" in outcome.sentence
            house.world.pass_hold.set()
            assert (await coordinator.resume(PAIR)).state is State.FAILBACK

    async def test_stop_inside_the_switchover_is_answered_and_not_obeyed(self, house: House) -> None:
        stop = trio.Event()
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())

            def observe(event: Event) -> None:
                if isinstance(event, StateChanged) and event.state is State.SWITCHING:
                    stop.set()

            assert (await coordinator.execute_run(PAIR, observer=observe, stop=stop)).state is State.FAILBACK
            notes = [entry.sentence for entry in await coordinator.history(PAIR) if "not stopped" in entry.sentence]
        assert len(notes) == 1

    async def test_an_agent_that_has_seen_a_higher_epoch_ends_the_stale_process(self, house: House) -> None:
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            house.world.epochs["prod"] = 99
            with pytest.raises(AgentRefused) as caught:
                await coordinator.execute_run(PAIR)
        assert (caught.value.code, caught.value.exit_code) == ("stale-epoch", ExitCode.REFUSED)


class TestRegistration:
    async def test_a_pair_is_registered_once(self, house: House) -> None:
        async with house.process() as coordinator:
            before = await coordinator.get_pair(PAIR)
            assert await coordinator.register_pair(REQUEST) == before
            assert [pair.name for pair in await coordinator.list_pairs()] == [PAIR]
            with pytest.raises(UsageError, match="belongs to the pair web"):
                await coordinator.register_pair(replace(REQUEST, name="another"))

    async def test_an_unknown_pair_is_named_in_the_error(self, house: House) -> None:
        async with house.process() as coordinator:
            with pytest.raises(UsageError, match="there is no pair nobody"):
                await coordinator.pair_status("nobody")

    async def test_the_fence_comes_before_the_first_write_and_goes_after_the_last(self, house: House) -> None:
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions(audit=False))
            await coordinator.execute_run(PAIR)
        kinds = [type(request) for host, request in house.world.orders if host == "prod"]
        assert kinds.index(FenceVm) < kinds.index(RunPass)
        assert max(i for i, kind in enumerate(kinds) if kind is RunPass) < kinds.index(LiftFence) < kinds.index(PowerOn)


class TestProtectedOriginal:
    OPTIONS = RunOptions(protect_original=True)

    async def test_cancel_gives_the_old_original_back_whole(self, house: House) -> None:
        world, before = house.world, dict(house.world.original.disks)

        def cut(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, RunPass) and moment == "midway":
                raise AgentRefused("the link was cut", code="link")

        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, self.OPTIONS)
            world.fault = cut
            await coordinator.execute_run(PAIR)
            world.fault = lambda _host, _request, _moment: None
            assert world.original.condition is Condition.TORN
            outcome = await coordinator.cancel(PAIR)
            pair = await coordinator.get_pair(PAIR)
        assert (outcome.state, pair.flag.condition) == (State.FAILOVER, "intact")
        assert (world.original.disks, world.original.fence) == (before, None)

    async def test_undo_gives_the_old_original_back_and_commit_merges(self, house: House) -> None:
        world, before = house.world, dict(house.world.original.disks)
        async with house.process() as coordinator:
            for verb in ("undo", "commit"):
                await coordinator.start_run(PAIR, self.OPTIONS)
                assert (await coordinator.execute_run(PAIR)).state is State.FAILBACK
                assert world.original.snapshots
                if verb == "undo":
                    await coordinator.undo(PAIR)
                    assert world.original.disks == before
                else:
                    await coordinator.commit(PAIR, RestorePoint.DROP)
                    assert world.original.disks != before
                assert not world.original.snapshots

    async def test_the_replica_serves_again_though_the_originals_host_is_gone(self, house: House) -> None:
        world = house.world
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, self.OPTIONS)

            def die(_host: str, request: Request, moment: str) -> None:
                if isinstance(request, Protect) and request.vm_uuid == world.replica.uuid and moment == "before":
                    world.away.add("prod")

            world.fault = die
            outcome = await coordinator.execute_run(PAIR)
        assert outcome.state is State.FAILOVER
        assert world.replica.power is Power.RUNNING
        assert world.original.snapshots  # the next run drops it


def test_the_world_notices_two_running_vms() -> None:
    world = World()
    world.original.power = Power.RUNNING
    with pytest.raises(AssertionError, match="I1"):
        world.check()
