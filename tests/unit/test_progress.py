"""What a target keeps of an unfinished pass, and what makes it worth believing."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from agent import passrun, progress
from agent.disk.raw import RawDisk
from agent.errors import DiskError
from agent.progress import ProgressDesk
from agent.sync import conversation, writing
from agent.sync import source as source_side
from agent.sync.proven import Proven
from protocol.messages import GrantedDisk, PassReport
from tests.unit.agent_house import SIZE_BYTES, AgentHouse, open_house
from tests.unit.two_agents import TwoAgents, open_two_agents

B = 64 << 10
HALF = SIZE_BYTES // 2
GRANTED = GrantedDisk(target="vda", peer_target="vda", source_size_bytes=SIZE_BYTES, target_size_bytes=SIZE_BYTES)
VIEW = "r1-7"


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[AgentHouse]:
    """An agent whose VM is fenced."""
    with open_house(tmp_path) as opened:
        await opened.fence()
        yield opened


def desk_of(house: AgentHouse) -> ProgressDesk:
    """A desk as a new process has it."""
    return ProgressDesk(house.folder / "state", house.service.fences)


def half_done(house: AgentHouse, desk: ProgressDesk, *, suspect: bool = False) -> None:
    """A pass that is broken off in the middle."""
    begun = desk.begin(house.vm.uuid, GRANTED, VIEW)
    begun.proven.add(0, HALF)
    desk.broken_off(house.vm.uuid, "vda", begun.proven, suspect=suspect)


def proven(house: AgentHouse, desk: ProgressDesk, view: str = VIEW) -> tuple[tuple[int, int], ...]:
    """What a pass of that view begins with."""
    return desk.begin(house.vm.uuid, GRANTED, view).proven.runs()


def overwrite(path: Path) -> None:
    """Write past every lock."""
    with path.open("r+b") as file:
        file.write(b"else")


async def test_a_pass_of_the_same_view_begins_with_what_is_proven(house: AgentHouse) -> None:
    desk = desk_of(house)
    half_done(house, desk)
    assert proven(house, desk) == ((0, HALF),)


async def test_after_a_restart_an_unchanged_file_proves_it(house: AgentHouse) -> None:
    half_done(house, desk_of(house))
    assert proven(house, desk_of(house)) == ((0, HALF),)


async def test_another_view_begins_with_nothing_and_leaves_nothing_to_the_first(house: AgentHouse) -> None:
    desk = desk_of(house)
    half_done(house, desk)
    assert proven(house, desk, "r1-8") == ()
    assert proven(house, desk, VIEW) == ()


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_file_that_was_written_to_proves_nothing(house: AgentHouse, *, restarted: bool) -> None:
    desk = desk_of(house)
    half_done(house, desk)
    overwrite(house.image)
    assert proven(house, desk_of(house) if restarted else desk) == ()


async def test_an_agent_killed_while_it_writes_leaves_nothing_that_counts(house: AgentHouse) -> None:
    desk = desk_of(house)
    begun = desk.begin(house.vm.uuid, GRANTED, VIEW)
    begun.proven.add(0, HALF)
    begun.proven.is_quiet = lambda: False
    desk.keep(house.vm.uuid, "vda", begun.proven)
    assert proven(house, desk_of(house)) == ()


async def test_an_agent_killed_while_it_waits_leaves_what_is_proven(house: AgentHouse) -> None:
    desk = desk_of(house)
    begun = desk.begin(house.vm.uuid, GRANTED, VIEW)
    begun.proven.add(0, HALF)
    desk.keep(house.vm.uuid, "vda", begun.proven)
    assert proven(house, desk_of(house)) == ((0, HALF),)


async def test_a_lock_that_was_let_go_meanwhile_proves_nothing_while_something_is_written(house: AgentHouse) -> None:
    desk = desk_of(house)
    begun = desk.begin(house.vm.uuid, GRANTED, VIEW)
    begun.proven.add(0, HALF)
    begun.proven.is_quiet = lambda: False
    desk.keep(house.vm.uuid, "vda", begun.proven)
    house.service.fences.lift(house.vm.uuid, pair="web", restore_autostart=False)
    await house.fence()
    assert proven(house, desk) == ()


@pytest.mark.parametrize("damage", ["{", '{"version": 9}', ""])
async def test_a_damaged_record_proves_nothing_and_the_page_cache_is_not_believed(
    house: AgentHouse, damage: str
) -> None:
    desk = desk_of(house)
    half_done(house, desk)
    (record,) = (house.folder / "state" / progress.FOLDER).iterdir()
    record.write_text(damage)
    begun = desk.begin(house.vm.uuid, GRANTED, VIEW)
    assert (begun.proven.runs(), begun.suspect) == ((), True)


async def test_a_failed_flush_is_remembered_over_restarts_and_views_until_a_pass_is_complete(house: AgentHouse) -> None:
    half_done(house, desk_of(house), suspect=True)
    begun = desk_of(house).begin(house.vm.uuid, GRANTED, VIEW)
    assert (begun.proven.runs(), begun.suspect) == (((0, HALF),), True)
    assert desk_of(house).begin(house.vm.uuid, GRANTED, "r1-8").suspect
    desk = desk_of(house)
    assert desk.begin(house.vm.uuid, GRANTED, "r1-9").suspect
    desk.finished(house.vm.uuid, "vda")
    assert not desk.begin(house.vm.uuid, GRANTED, "r1-10").suspect


async def test_a_vm_let_loose_on_its_disks_leaves_no_record(house: AgentHouse) -> None:
    desk = desk_of(house)
    half_done(house, desk)
    desk.forget(house.vm.uuid)
    assert proven(house, desk) == ()


# --- two agents -------------------------------------------------------------------------------------------------------


@pytest.fixture
async def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TwoAgents]:
    """Two agents; every block differs, and everything is told and proven at once."""
    monkeypatch.setattr(source_side, "TELL_EVERY_BYTES", 1)
    monkeypatch.setattr(writing, "VERIFY_WHEN_IDLE_BYTES", 1)
    monkeypatch.setattr(passrun, "RECORD_EVERY_S", 0.01)
    monkeypatch.setattr(conversation, "SIGN_OF_LIFE_S", 0.05)
    async with open_two_agents(tmp_path) as opened:
        opened.source.image.write_bytes(random.Random(5).randbytes(SIZE_BYTES))
        for house in (opened.source, opened.target):
            house.service.passes.buffers.buffer_bytes = 2 * B
        yield opened


async def broken_off(pair: TwoAgents, monkeypatch: pytest.MonkeyPatch) -> int:
    """A pass whose source fails at the end of the disk when something is proven; how much that is."""
    began = ProgressDesk.begin
    seen: list[Proven] = []

    def begin(desk: ProgressDesk, vm_uuid: str, granted: GrantedDisk, view: str) -> progress.Begun:
        begun = began(desk, vm_uuid, granted, view)
        seen.append(begun.proven)
        return begun

    reads = RawDisk.read_runs

    def read_runs(disk: RawDisk, runs: list[tuple[int, int]], buffer: memoryview) -> None:
        if runs[-1][0] + runs[-1][1] == SIZE_BYTES and not disk._gate.writable:
            with_deadline = trio.from_thread.run(_until_some, seen)
            assert with_deadline
            raise DiskError("the storage is gone")
        reads(disk, runs, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressDesk, "begin", begin)
        patch.setattr(RawDisk, "read_runs", read_runs)
        ends = await pair.run_pass(view=VIEW)
    assert isinstance(ends[0].error, DiskError)
    return seen[0].size_bytes


async def _until_some(seen: list[Proven]) -> bool:
    with trio.move_on_after(20):
        while not seen or not seen[0].size_bytes:  # noqa: ASYNC110 - threads have no trio event to set
            await trio.sleep(0.005)
    return bool(seen and seen[0].size_bytes)


async def test_a_resumed_pass_neither_reads_nor_sends_what_is_proven(
    pair: TwoAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    proven_bytes = await broken_off(pair, monkeypatch)
    assert proven_bytes > 0
    here, there = await pair.must(view=VIEW)
    assert pair.target.image.read_bytes() == pair.source.image.read_bytes()
    for report in (here.disks[0], there.disks[0]):
        assert report.resumed_bytes >= proven_bytes
    assert here.disks[0].compared_bytes == SIZE_BYTES - here.disks[0].resumed_bytes
    assert here.disks[0].changed_bytes <= here.disks[0].compared_bytes
    assert there.disks[0].written_bytes == here.disks[0].changed_bytes


async def test_a_pass_of_another_view_does_everything(pair: TwoAgents, monkeypatch: pytest.MonkeyPatch) -> None:
    await broken_off(pair, monkeypatch)
    here, _ = await pair.must(view="r1-8")
    assert (here.disks[0].resumed_bytes, here.disks[0].compared_bytes) == (0, SIZE_BYTES)
    assert pair.target.image.read_bytes() == pair.source.image.read_bytes()


async def test_after_a_failed_flush_what_is_not_proven_is_compared_past_the_page_cache(
    pair: TwoAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(disk: RawDisk) -> None:
        with disk._gate.request("flushing", 0, 0, writes=True):
            disk._gate.poison("an earlier flush failed")
            raise OSError(5, "Input/output error")

    flush = RawDisk.flush
    calls: list[int] = []

    def flush_once(disk: RawDisk) -> None:
        calls.append(1)
        (flush if len(calls) == 1 else fails)(disk)

    with monkeypatch.context() as patch:
        patch.setattr(RawDisk, "flush", flush_once)
        ends = await pair.run_pass(view=VIEW)
    assert not isinstance(ends[1].reply, PassReport)
    _, there = await pair.must(view=VIEW)
    assert there.disks[0].access.endswith("past the page cache")
    assert pair.target.image.read_bytes() == pair.source.image.read_bytes()
    _, after = await pair.must(view="r1-9")
    assert "past the page cache" not in after.disks[0].access
