"""The audit after the switchover and the verification in full before it: what they find, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from coordinator.audit import AuditDiffers, AuditMissing, AuditState
from coordinator.errors import AgentRefused, ExitCode
from coordinator.events import Event, StepFailed
from coordinator.model import RestorePoint, RunOptions, State
from coordinator.runs import Coordinator
from protocol.messages import CloseView, Grant, PassKind, Power, Request, RunPass
from tests.unit.cli_house import Command
from tests.unit.coordinator_house import PAIR, Crash, CrashPlan, House

KEEP = RestorePoint.KEEP


@pytest.fixture
async def house(memory_folder: Path) -> House:
    made = House(memory_folder / "state")
    await made.register()
    return made


async def fail_back(house: House, coordinator: Coordinator, options: RunOptions | None = None) -> str:
    await coordinator.start_run(PAIR, options or RunOptions())
    outcome = await coordinator.execute_run(PAIR)
    assert outcome.state is State.FAILBACK
    return outcome.sentence


def spoil_map(house: House) -> None:
    """As if a dirty bitmap had missed a block: what the original started from is not what the replica holds. The map is
    spoilt when the last view is closed, between pass and power-on."""

    def fault(_host: str, request: Request, moment: str) -> None:
        if isinstance(request, CloseView) and moment == "after":
            house.world.maps.maps["vda"] = b"stale"

    house.world.fault = fault


def grants(house: House, kind: PassKind) -> list[Grant]:
    return [grant for grant in house.world.grants.values() if grant.kind is kind]


def in_audit(house: House, host: str, request: Request, moment: str) -> bool:
    if not isinstance(request, RunPass) or moment != "midway":
        return False
    return house.world.grants[host, request.grant].kind is PassKind.AUDIT


async def until(reached: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not reached():  # noqa: ASYNC110 - the world has no event for it
            await trio.sleep(0.005)


async def test_a_clean_audit_is_told_and_state_stays_failback(house: House) -> None:
    async with house.process() as coordinator:
        sentence = await fail_back(house, coordinator)
        status = await coordinator.pair_status(PAIR)
    assert "the audit found no difference in 2 MiB" in sentence
    assert (status.state, status.audit.state) == (State.FAILBACK, AuditState.CLEAN)
    seeds = {disk.digest_seed for grant in grants(house, PassKind.AUDIT) for disk in grant.disks}
    assert seeds == set(house.world.proofs.maps.values())
    assert not house.world.views


async def test_the_audit_runs_after_the_original_is_in_use(house: House) -> None:
    power: list[Power] = []

    def fault(_host: str, request: Request, moment: str) -> None:
        if isinstance(request, RunPass) and moment == "midway":
            power.append(house.world.original.power)

    async with house.process() as coordinator:
        house.world.fault = fault
        await fail_back(house, coordinator)
    assert (power[0], power[-2:]) == (Power.OFF, [Power.OFF, Power.RUNNING])


async def test_a_difference_forbids_commit_and_recommends_undo(house: House) -> None:
    async with house.process() as coordinator:
        spoil_map(house)
        await coordinator.start_run(PAIR, RunOptions())
        outcome = await coordinator.execute_run(PAIR)
        assert (outcome.state, outcome.exit_code) == (State.FAILBACK, ExitCode.FAILED)
        assert "disk vda in 65536 bytes (65536 bytes at 65536)" in outcome.sentence
        assert f"`failback undo {PAIR}`" in outcome.sentence
        for waits in (True, False):
            with pytest.raises(AuditDiffers, match="disk vda in 65536 bytes") as caught:
                await coordinator.commit(PAIR, KEEP, wait_audit=waits)
            assert caught.value.exit_code is ExitCode.REFUSED
            assert caught.value.facts["disks"] == "vda"
        assert (await coordinator.get_pair(PAIR)).state is State.FAILBACK
        assert (await coordinator.undo(PAIR)).state is State.FAILOVER
    assert house.world.replica.power is Power.RUNNING


async def test_an_audit_that_differed_is_repeated_by_resume_and_its_last_word_counts(house: House) -> None:
    async with house.process() as coordinator:
        spoil_map(house)
        await coordinator.start_run(PAIR, RunOptions())
        await coordinator.execute_run(PAIR)
        house.world.fault = lambda *_: None
        house.world.maps.maps["vda"] = house.world.last_words["vda"]
        assert "found no difference" in (await coordinator.resume(PAIR)).sentence
        assert (await coordinator.commit(PAIR, KEEP)).state is State.READY


async def test_without_a_map_commit_waits_for_what_cannot_be_unless_told_not_to(house: House) -> None:
    house.world.maps.missing = {"vdb"}
    async with house.process() as coordinator:
        sentence = await fail_back(house, coordinator)
        assert "the audit could not be carried out: the agent on prod keeps no digest map of disk vdb" in sentence
        with pytest.raises(AuditMissing, match="--no-wait-audit"):
            await coordinator.commit(PAIR, KEEP)
        assert (await coordinator.commit(PAIR, KEEP, wait_audit=False)).state is State.READY
        notes = [entry.sentence for entry in await coordinator.history(PAIR)]
    assert "committed without waiting for the audit" in notes


async def test_a_map_that_proves_nothing_at_power_on_is_nothing_to_audit_against(house: House) -> None:
    house.world.maps.doubted = {"vdb"}
    async with house.process() as coordinator:
        sentence = await fail_back(house, coordinator)
    assert "the audit could not be carried out: the agent on prod keeps no digest map of disk vdb" in sentence
    assert "the file was changed since" in sentence


async def test_no_audit_where_none_is_wanted(house: House) -> None:
    async with house.process() as coordinator:
        await fail_back(house, coordinator, RunOptions(audit=False))
        assert (await coordinator.pair_status(PAIR)).audit.state is AuditState.OFF
        assert (await coordinator.commit(PAIR, KEEP)).state is State.READY
    assert grants(house, PassKind.AUDIT) == []


def hold_audit(house: House) -> Callable[[str, Request, str], None]:
    """A fault that lets the audit begin and wait for `World.pass_hold`."""

    def fault(host: str, request: Request, moment: str) -> None:
        if isinstance(request, RunPass) and moment == "midway":
            grant = house.world.grants[host, request.grant]
            house.world.pass_hold = trio.Event() if grant.kind is PassKind.AUDIT else None

    return fault


@pytest.mark.parametrize("verb", ["commit", "commit-at-once", "undo"])
async def test_a_verb_meets_the_process_that_audits(house: House, verb: str) -> None:
    """Commit waits for the result; undo, and a commit that does not wait, end the audit first."""
    outcomes: list[str] = []

    async def work(coordinator: Coordinator) -> None:
        outcomes.append((await coordinator.execute_run(PAIR)).sentence)

    async with house.process() as coordinator, trio.open_nursery() as nursery:
        house.world.fault = hold_audit(house)
        await coordinator.start_run(PAIR, RunOptions())
        nursery.start_soon(work, coordinator)
        await until(lambda: house.world.pass_hold is not None)
        status = await coordinator.pair_status(PAIR)
        assert (status.audit.running, status.step, status.state) == (True, "audit", State.FAILBACK)
        if verb == "commit":
            nursery.start_soon(partial(coordinator.commit, PAIR, KEEP))
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert (await coordinator.get_pair(PAIR)).state is State.FAILBACK
            assert house.world.pass_hold is not None
            house.world.pass_hold.set()
        elif verb == "undo":
            assert (await coordinator.undo(PAIR)).state is State.FAILOVER
        else:
            assert (await coordinator.commit(PAIR, KEEP, wait_audit=False)).state is State.READY
    assert not house.world.views
    assert ("found no difference" in outcomes[0]) == (verb == "commit")


@pytest.mark.parametrize("verb", ["commit", "resume"])
async def test_an_audit_that_was_killed_is_done_again(house: House, verb: str) -> None:
    def killed(host: str, request: Request, moment: str) -> None:
        if in_audit(house, host, request, moment):
            raise Crash("in the audit")

    async def run(coordinator: Coordinator) -> None:
        house.world.fault = killed
        await coordinator.start_run(PAIR, RunOptions())
        await coordinator.execute_run(PAIR)

    assert await house.dies(CrashPlan(), run)
    async with house.process() as coordinator:
        found = (await coordinator.pair_status(PAIR)).audit
        assert (found.state, found.running) == (AuditState.DUE, False)
        if verb == "resume":
            assert "found no difference" in (await coordinator.resume(PAIR)).sentence
        assert (await coordinator.commit(PAIR, KEEP)).state is State.READY
    assert len(grants(house, PassKind.AUDIT)) == 4
    assert not house.world.views


async def test_verify_full_reads_before_the_point_of_no_return(house: House) -> None:
    async with house.process() as coordinator:
        await fail_back(house, coordinator, RunOptions(verify_full=True))
        steps = [entry.step for entry in await coordinator.history(PAIR)]
    assert steps.index("last_pass") < steps.index("verify_full") < steps.index("lift_original_fence")
    assert len(grants(house, PassKind.VERIFY)) == 2
    assert not house.world.views


async def test_verify_full_that_differs_rolls_back_and_names_disk_and_place(house: House) -> None:
    house.world.maps.rotten = {"vdb"}
    seen: list[Event] = []
    async with house.process() as coordinator:
        await coordinator.start_run(PAIR, RunOptions(verify_full=True))
        outcome = await coordinator.execute_run(PAIR, observer=seen.append)
    assert (outcome.state, outcome.exit_code) == (State.FAILOVER, ExitCode.FAILED)
    assert "disk vdb in 65536 bytes (65536 bytes at 65536)" in outcome.sentence
    assert [event.code for event in seen if isinstance(event, StepFailed)] == ["verify-differs"]
    assert (house.world.replica.power, house.world.original.boots) == (Power.RUNNING, 0)
    assert not house.world.views


async def test_a_write_past_the_locks_after_a_full_verification_keeps_the_original_off(house: House) -> None:
    told: set[str] = set()

    def written(host: str, request: Request, moment: str) -> None:
        if not isinstance(request, RunPass) or moment != "after":
            return
        if house.world.grants[host, request.grant].kind is PassKind.VERIFY:
            told.add(host)
        if told == {"prod", "dr"}:
            house.world.original.disks["vda"] = b"somebody else's"

    async with house.process() as coordinator:
        house.world.fault = written
        await coordinator.start_run(PAIR, RunOptions(verify_full=True))
        outcome = await coordinator.execute_run(PAIR)
    assert outcome.state is State.FAILOVER
    assert "disk vda of the original" in outcome.sentence
    assert "not proven to hold what the last pass verified" in outcome.sentence
    assert (house.world.replica.power, house.world.original.boots) == (Power.RUNNING, 0)


async def test_an_agent_that_fails_in_the_audit_changes_nothing(house: House) -> None:
    def broken(host: str, request: Request, moment: str) -> None:
        if in_audit(house, host, request, moment):
            raise AgentRefused("the storage of dr gives an error; look at it", code="disk")

    async with house.process() as coordinator:
        house.world.fault = broken
        sentence = await fail_back(house, coordinator)
        assert "could not be carried out: the storage of dr gives an error" in sentence
        house.world.fault = lambda *_: None
        assert (await coordinator.commit(PAIR, KEEP)).state is State.READY


class TestTheCommand:
    def failed_back(self, memory_folder: Path) -> Command:
        command = Command(memory_folder)
        command.register()

        def fault(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, CloseView) and moment == "after":
                command.world.maps.maps["vda"] = b"stale"

        command.world.fault = fault
        return command

    def test_a_difference_is_shown_by_start_status_and_history_and_refuses_commit(self, memory_folder: Path) -> None:
        command = self.failed_back(memory_folder)
        assert command("start", PAIR, "--yes", "--foreground").exit_code == 1
        status = command.json("status", PAIR)
        assert status["audit"]["state"] == "differs"
        assert status["audit"]["record"]["disks"][0]["differing"] == [{"offset_bytes": 65536, "length_bytes": 65536}]
        report = command.json("history", PAIR, "--report")["report"]
        assert report["audit"]["disks"][0]["differing_bytes"] == 65536
        assert "Audit" in command("status", PAIR).output
        refused = command.json("commit", PAIR, "--yes", "--no-wait-audit", exit_code=3)
        assert refused["error"]["code"] == "audit-differs"

    def test_verify_full_and_no_audit_are_options_of_start(self, memory_folder: Path) -> None:
        command = Command(memory_folder)
        command.register()
        done = command("start", PAIR, "--yes", "--foreground", "--verify", "full", "--no-audit")
        assert done.exit_code == 0, done.output
        assert {grant.kind for grant in command.world.grants.values()} == {PassKind.SYNC, PassKind.VERIFY}
