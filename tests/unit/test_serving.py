"""Rounds and the wait for the moment, over in-memory agents that insist on both proofs and watch every byte."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from coordinator.errors import AgentRefused, UsageError, WrongState
from coordinator.events import Event, Notice, Outcome, StateChanged, StepDone
from coordinator.model import LateEvidence, RestorePoint, RunLimits, RunOptions, ShutdownPolicy, State, SwitchPolicy
from coordinator.runs import Coordinator
from protocol.messages import (
    AllowPass,
    DropCheckpoints,
    EndTracking,
    OpenView,
    Power,
    Protect,
    Request,
    RunPass,
    Tracking,
)
from tests.unit.coordinator_house import PAIR, House

MANUAL = RunOptions(switch=SwitchPolicy.MANUAL, background_s=5.0)
SLOW_READS = RunLimits(read_bytes_s=30_000)
"""So slow that reading a whole disk takes longer than is agreed, and what is recorded does not."""
HARD = RunOptions(shutdown_policy=ShutdownPolicy.FORCE, max_downtime_s=40.0, limits=SLOW_READS)


@pytest.fixture
async def house(memory_folder: Path) -> House:
    made = House(memory_folder / "state")
    await made.register()
    return made


def sinces(house: House) -> list[dict[str, str | None]]:
    """Of every grant to the sender: the view since which each disk is sent."""
    grants = [order.grant for host, order in house.world.orders if isinstance(order, AllowPass) and host == "dr"]
    return [{disk.target: disk.since for disk in grant.disks} for grant in grants]


async def whole_run(house: House, options: RunOptions) -> tuple[Outcome, list[Event]]:
    seen: list[Event] = []
    async with house.process() as coordinator:
        await coordinator.start_run(PAIR, options)
        with trio.fail_after(60):
            return await coordinator.execute_run(PAIR, observer=seen.append), seen


@asynccontextmanager
async def waiting_run(
    house: House, options: RunOptions, *, until: str | None = None
) -> AsyncIterator[tuple[Coordinator, list[Event], trio.Event]]:
    """A run that works until it waits for its moment (or that step is done); the event ends it, as its end does."""
    async with house.process() as coordinator, trio.open_nursery() as nursery:
        await coordinator.start_run(PAIR, options)
        seen: list[Event] = []
        waits, ended = trio.Event(), trio.Event()

        def observe(event: Event) -> None:
            seen.append(event)
            step = event.step if isinstance(event, StepDone) else None
            said = isinstance(event, Notice) and not event.sentence.startswith("round ")
            if step == until and (until is not None or said):
                waits.set()

        async def work() -> None:
            await coordinator.execute_run(PAIR, observer=observe, stop=ended)
            ended.set()

        nursery.start_soon(work)
        with trio.fail_after(60):
            await waits.wait()
            yield coordinator, seen, ended
            ended.set()


class TestEvidence:
    async def test_passes_after_the_first_copy_only_what_was_written_since_the_one_before(self, house: House) -> None:
        outcome, _ = await whole_run(house, RunOptions(audit=False))
        assert outcome.state is State.FAILBACK
        run = outcome.run
        views = [f"{run}-1", f"{run}-2"]
        assert sinces(house) == [{"vda": since, "vdb": since} for since in (None, *views)]
        assert outcome.report is not None
        assert {line.rung for line in outcome.report.disks if line.pass_name == "last_pass"} == {"bitmap"}
        assert "unchanged since the view before by dirty bitmap" in outcome.report.evidence

    async def test_only_the_records_since_the_latest_view_are_kept(self, house: House) -> None:
        outcome, _ = await whole_run(house, RunOptions())
        kept = [order.keep for _, order in house.world.orders if isinstance(order, DropCheckpoints)]
        assert kept == [(f"{outcome.run}-1",), (f"{outcome.run}-2",), ()]

    async def test_disks_without_bitmaps_rest_on_the_map_and_are_told_so(self, house: House) -> None:
        house.world.records.untracked = {"vdb"}
        outcome, _ = await whole_run(house, RunOptions())
        assert outcome.state is State.FAILBACK
        assert outcome.report is not None
        last = {line.replica: line for line in outcome.report.disks if line.pass_name == "last_pass"}
        assert (last["vda"].rung, last["vdb"].rung) == ("bitmap", "map")
        assert last["vdb"].why_not_higher == "nothing was asked since any view"

    @pytest.mark.parametrize("options", [RunOptions(), RunOptions(track=Tracking.NONE)])
    async def test_an_agent_that_does_not_say_what_its_disks_hold_does_not_get_the_original_started(
        self, house: House, options: RunOptions
    ) -> None:
        house.world.knows_evidence = False
        outcome, _ = await whole_run(house, options)
        assert outcome.state is State.FAILOVER
        assert "does not say what the original's disks hold" in outcome.sentence
        assert house.world.replica.power is Power.RUNNING
        assert house.world.original.power is Power.OFF

    @pytest.mark.parametrize("options", [RunOptions(), RunOptions(track=Tracking.NONE)])
    async def test_agents_that_know_nothing_of_evidence_get_full_digests_and_need_a_full_verification(
        self, house: House, options: RunOptions
    ) -> None:
        house.world.knows_evidence = False
        outcome, _ = await whole_run(house, replace(options, verify_full=True))
        assert outcome.state is State.FAILBACK
        assert outcome.report is not None
        assert {line.rung for line in outcome.report.disks} == {"digests"}
        async with house.process() as coordinator:
            assert (await coordinator.undo(PAIR)).state is State.FAILOVER

    async def test_a_tracked_pass_that_breaks_off_is_followed_by_one_since_the_same_view(self, house: House) -> None:
        world, passes = house.world, 0

        def broken(_host: str, request: Request, moment: str) -> None:
            nonlocal passes
            if isinstance(request, RunPass) and moment == "midway":
                passes += 1
                if passes == 2:
                    raise AgentRefused("the link was cut; resume", code="sync")

        async with house.process() as coordinator:
            run = await coordinator.start_run(PAIR, RunOptions())
            world.fault = broken
            assert (await coordinator.execute_run(PAIR)).state is State.SYNCING
            world.fault = lambda *_: None
            assert (await coordinator.resume(PAIR)).state is State.FAILBACK
        assert [grant["vda"] for grant in sinces(house)][:3] == [None, f"{run}-1", f"{run}-1"]

    @pytest.mark.parametrize("kept", [True, False], ids=["still open", "gone"])
    async def test_a_resumed_run_goes_on_with_the_view_of_its_unfinished_pass_where_the_agent_has_it(
        self, house: House, *, kept: bool
    ) -> None:
        world = house.world

        def broken(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, RunPass) and moment == "midway":
                raise AgentRefused("the link was cut; resume", code="sync")

        async with house.process() as coordinator:
            run = await coordinator.start_run(PAIR, RunOptions())
            world.fault = broken
            assert (await coordinator.execute_run(PAIR)).state is State.SYNCING
            world.fault = lambda *_: None
            if not kept:
                world.views.clear()
            assert (await coordinator.resume(PAIR)).state is State.FAILBACK
        orders = [order for host, order in world.orders if isinstance(order, OpenView) and host == "dr"]
        assert (orders[1].view, orders[1].reopen) == (f"{run}-1", True)
        grants = [order.grant.view for host, order in world.orders if isinstance(order, AllowPass) and host == "dr"]
        assert grants[:2] == [f"{run}-1", f"{run}-1" if kept else f"{run}-1.2"]
        assert not world.views  # nothing stays open

    async def test_an_original_that_was_edited_between_passes_is_compared_again(self, house: House) -> None:
        async with waiting_run(house, MANUAL) as (coordinator, seen, ended):
            house.world.original.disks["vdb"] = b"edited by hand"
            await coordinator.switch(PAIR)
            await ended.wait()
        assert house.world.original.disks == house.world.last_words | {"vda": house.world.original.disks["vda"]}
        assert sinces(house)[-1]["vdb"] is None
        assert any(isinstance(e, Notice) and "disk vdb: this pass rests on map" in e.sentence for e in seen)

    async def test_evidence_that_an_agent_does_not_accept_falls_to_full_digests(self, house: House) -> None:
        def strict(host: str, request: Request, moment: str) -> None:
            tracked = isinstance(request, AllowPass) and any(disk.since for disk in request.grant.disks)
            if tracked and (host, moment) == ("prod", "before"):
                raise AgentRefused("the file changed a moment ago", code="evidence")

        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            house.world.fault = strict
            outcome = await coordinator.execute_run(PAIR)
        assert outcome.state is State.FAILBACK
        assert outcome.report is not None
        assert outcome.report.disks[-1].why_not_higher == "the file changed a moment ago"


class TestTheReplicaGoesOff:
    async def test_a_replica_that_dies_under_its_view_is_a_question_to_a_person_and_no_other_view_is_tried(
        self, house: House
    ) -> None:
        def dies(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, RunPass) and moment == "midway":
                house.world.replica.power = Power.OFF
                raise AgentRefused("the VM stopped in the middle of the pass", code="view-lost")

        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            house.world.fault = dies
            outcome = await coordinator.execute_run(PAIR)
        assert outcome.state is State.NEEDS_OPERATOR
        assert "stopped by itself or by hand" in outcome.sentence
        assert len([order for _, order in house.world.orders if isinstance(order, OpenView)]) == 1


class TestScratch:
    async def test_views_shrink_to_what_the_scratch_files_hold(self, house: House) -> None:
        house.world.scratch_disks = 1
        outcome, seen = await whole_run(house, RunOptions(audit=False))
        assert outcome.state is State.FAILBACK
        live = [len(order.targets) for _, order in house.world.orders if isinstance(order, OpenView)]
        assert live[0] == 2
        assert set(live[1:-1]) == {1}
        assert live[-1] == 2
        assert any(isinstance(event, Notice) and "views of 1 disk at a time" in event.sentence for event in seen)

    async def test_where_not_even_one_disk_fits_the_run_stops_with_the_cure(self, house: House) -> None:
        house.world.scratch_disks = 0
        outcome, _ = await whole_run(house, RunOptions())
        assert outcome.state is State.SYNCING
        assert "make room where it keeps scratch files" in outcome.sentence
        async with house.process() as coordinator:
            house.world.scratch_disks = None
            assert (await coordinator.resume(PAIR)).state is State.FAILBACK


class TestTheMoment:
    async def test_a_run_waits_for_a_person_and_keeps_what_is_left_small(self, house: House) -> None:
        async with waiting_run(house, MANUAL, until="drop_checkpoints:4") as (coordinator, seen, ended):
            status = await coordinator.pair_status(PAIR)
            assert status.state is State.READY_TO_SWITCH
            assert status.prediction is not None
            assert status.round == 4
            assert (await coordinator.switch(PAIR)).run == status.run
            await ended.wait()
            again = await coordinator.switch(PAIR)
        assert "the switchover has begun already" in again.sentence
        assert house.world.replica.is_off
        waits = [event for event in seen if isinstance(event, Notice) and "waits for a person" in event.sentence]
        assert len(waits) == 1, "the same reason is told once"

    async def test_a_set_time_can_be_changed_and_a_past_one_is_refused(self, house: House) -> None:
        at = RunOptions(switch=SwitchPolicy.AT, switch_at_s=house.clock.wall_s() + 1e6, background_s=1e6)
        async with waiting_run(house, at) as (coordinator, _, ended):
            with pytest.raises(UsageError, match="is past"):
                await coordinator.switch(PAIR, at_s=1.0)
            await coordinator.switch(PAIR, at_s=house.clock.wall_s() + 60)
            await ended.wait()
        assert house.world.replica.is_off

    async def test_one_more_round_begins_just_before_the_set_time_so_that_little_is_left_by_then(
        self, house: House
    ) -> None:
        at = RunOptions(switch=SwitchPolicy.AT, switch_at_s=house.clock.wall_s() + 1e6, background_s=1e6)
        async with waiting_run(house, at) as (coordinator, _, ended):
            before = (await coordinator.pair_status(PAIR)).round
            assert before is not None
            at_s = house.clock.wall_s() + 200
            await coordinator.switch(PAIR, at_s=at_s)
            await ended.wait()
            journal = await coordinator.history(PAIR)
        begun = [entry.at_s for entry in journal if entry.step == f"open_view:{before + 1}"]
        closed = [entry.at_s for entry in journal if entry.step == f"drop_checkpoints:{before + 1}"]
        switched = next(entry.at_s for entry in journal if entry.step == State.SWITCHING.value)
        assert at_s - 100 < begun[0] < closed[-1] < at_s <= switched
        assert not [entry for entry in journal if entry.step == f"open_view:{before + 2}"], "one is enough"

    async def test_a_replica_that_stopped_by_itself_is_asked_about_before_the_set_time_switches(
        self, house: House
    ) -> None:
        at = RunOptions(switch=SwitchPolicy.AT, switch_at_s=house.clock.wall_s() + 1e6, background_s=1e6)
        async with waiting_run(house, at) as (coordinator, _, ended):
            house.world.replica.power = Power.OFF
            await coordinator.switch(PAIR, at_s=house.clock.wall_s() + 60)
            await ended.wait()
            pair = await coordinator.get_pair(PAIR)
        assert pair.state is State.NEEDS_OPERATOR
        assert pair.operator is not None
        assert "stopped by itself or by hand" in pair.operator.sentence
        assert pair.operator.exits == ("resume", "cancel")

    async def test_a_start_with_a_past_time_changes_nothing(self, house: House) -> None:
        async with house.process() as coordinator:
            with pytest.raises(UsageError, match="is past"):
                await coordinator.start_run(PAIR, RunOptions(switch=SwitchPolicy.AT, switch_at_s=1.0))
            assert (await coordinator.get_pair(PAIR)).state is State.FAILOVER
            with pytest.raises(WrongState, match="`switch` is not possible"):
                await coordinator.switch(PAIR)

    async def test_more_downtime_than_agreed_keeps_the_run_syncing_until_a_person_switches(self, house: House) -> None:
        async with waiting_run(house, RunOptions(max_downtime_s=2.0, background_s=5.0)) as (coordinator, seen, ended):
            assert (await coordinator.get_pair(PAIR)).state is State.SYNCING
            status = await coordinator.pair_status(PAIR)
            assert status.waiting is None or "more than the 2 s agreed" in status.waiting
            await coordinator.switch(PAIR)
            await ended.wait()
        assert house.world.replica.is_off
        assert sum(isinstance(e, Notice) and "more than the 2 s agreed" in e.sentence for e in seen) == 1

    async def test_a_word_that_nobody_heard_is_carried_out_by_resume(self, house: House) -> None:
        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, MANUAL)
            assert "failback resume web" in (await coordinator.switch(PAIR)).sentence
            with trio.fail_after(60):
                assert (await coordinator.resume(PAIR)).state is State.FAILBACK


class TestLateEvidence:
    async def test_a_killed_qemu_puts_the_replica_back_and_the_second_time_waits_for_a_person(
        self, house: House
    ) -> None:
        world = house.world
        world.replica.dies_hard = 2
        states: list[State] = []
        async with house.process() as coordinator, trio.open_nursery() as nursery:
            await coordinator.start_run(PAIR, HARD)
            waits, stop = trio.Event(), trio.Event()

            def observe(event: Event) -> None:
                if isinstance(event, StateChanged):
                    states.append(event.state)
                if isinstance(event, Notice) and "waits for a person" in event.sentence:
                    waits.set()

            async def work() -> None:
                await coordinator.execute_run(PAIR, observer=observe, stop=stop)

            nursery.start_soon(work)
            with trio.fail_after(60):
                await waits.wait()
            stop.set()
        assert states.count(State.SWITCHING) == 2
        assert not world.replica.is_off
        assert not any(isinstance(order, Protect) for _, order in world.orders)
        async with house.process() as coordinator:
            reasons = [e.sentence for e in await coordinator.history(PAIR) if e.step == "late_return"]
            assert len(reasons) == 2
            assert reasons[0].startswith("QEMU had to be killed; the evidence of vda, vdb fell")
            assert (await coordinator.cancel(PAIR)).state is State.FAILOVER
        assert world.records.is_clear

    @pytest.mark.parametrize("late", list(LateEvidence))
    async def test_evidence_that_falls_once_the_replica_is_protected_is_weighed_again(
        self, house: House, late: LateEvidence
    ) -> None:
        world = house.world
        fell = 0
        states: list[State] = []

        def fault(_host: str, request: Request, moment: str) -> None:
            nonlocal fell
            if isinstance(request, Protect) and moment == "before" and not fell:
                fell += 1
                world.records.kill()

        def observe(event: Event) -> None:
            if isinstance(event, StateChanged):
                states.append(event.state)

        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, replace(HARD, late_evidence=late))
            world.fault = fault
            with trio.fail_after(60):
                outcome = await coordinator.execute_run(PAIR, observer=observe)
            history = {entry.step for entry in await coordinator.history(PAIR)}
        assert fell == 1
        assert outcome.state is State.FAILBACK
        returned = late is LateEvidence.RETURN
        assert states.count(State.SWITCHING) == (2 if returned else 1)
        assert ("late_return" in history) == returned
        assert ("weighed_again" in history) == (not returned)
        assert world.replica.is_off
        assert list(world.replica.snapshots) != []

    async def test_records_that_cannot_be_removed_do_not_keep_the_replica_off(self, house: House) -> None:
        world = house.world
        stays = True

        def fault(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, Protect) and moment == "before":
                raise AgentRefused("no room for the snapshot", code="hypervisor")
            if isinstance(request, EndTracking) and moment == "before" and world.replica.is_off:
                raise AgentRefused("the bitmap cannot be removed: the image is damaged", code="disk")
            if isinstance(request, EndTracking) and moment == "before" and world.records.bitmaps and stays:
                raise AgentRefused("libvirt does not delete the bitmap", code="hypervisor")

        async with house.process() as coordinator:
            await coordinator.start_run(PAIR, RunOptions())
            world.fault = fault
            outcome = await coordinator.execute_run(PAIR)
            assert not world.replica.is_off, "nobody is served for want of a bitmap's removal"
            assert outcome.state is State.ROLLING_BACK
            stays = False
            assert (await coordinator.resume(PAIR)).state is State.FAILOVER
        assert world.records.is_clear

    async def test_proceed_bears_the_longer_downtime(self, house: House) -> None:
        house.world.replica.dies_hard = 1
        options = RunOptions(shutdown_policy=ShutdownPolicy.FORCE, late_evidence=LateEvidence.PROCEED)
        outcome, seen = await whole_run(house, options)
        assert outcome.state is State.FAILBACK
        assert any(isinstance(e, Notice) and "the switchover goes on" in e.sentence for e in seen)
        assert sinces(house)[-1] == {"vda": None, "vdb": None}


@pytest.mark.parametrize("end", ["commit", "undo", "cancel"])
async def test_nothing_of_ours_is_left_whichever_way_a_run_ends(house: House, end: str) -> None:
    async def ended(coordinator: Coordinator) -> object:
        ways: dict[str, Callable[[], Awaitable[object]]] = {
            "commit": lambda: coordinator.commit(PAIR, RestorePoint.KEEP),
            "undo": lambda: coordinator.undo(PAIR),
            "cancel": lambda: coordinator.cancel(PAIR),
        }
        return await ways[end]()

    if end == "cancel":
        async with waiting_run(house, MANUAL):
            assert left(house)
    else:
        await whole_run(house, RunOptions())
        assert left(house)
    async with house.process() as coordinator:
        await ended(coordinator)
    assert not left(house)
    assert any(isinstance(order, EndTracking) for _, order in house.world.orders)


def left(house: House) -> bool:
    """Whether any record of ours is in the replica."""
    return not house.world.records.is_clear
