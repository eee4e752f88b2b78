"""What an agent's views record: remembered, read from closed images, removed; on real images."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent import scratch, sources
from agent.disk.bitmaps import bitmaps_of
from agent.disk.lock import hold_exclusive
from agent.disk.raw import RawDisk
from agent.errors import DiskError, HypervisorError
from agent.fences import NotFenced
from agent.ledger import TrackedImage, TrackingRecord
from agent.scratch import ScratchFull
from agent.sources import ViewDesk
from agent.tags import tag_of
from agent.virt.images import identity
from agent.virt.seam import PowerState
from protocol.messages import (
    AllowPass,
    CloseView,
    Direction,
    DiskTracking,
    DropCheckpoints,
    EndTracking,
    FenceVm,
    Grant,
    GrantedDisk,
    OpenView,
    ReadTracking,
    Side,
    Tracking,
    TrackingRead,
    ViewedDisk,
    ViewOpened,
    ViewSince,
)
from tests.fakes.hypervisor import FakeImage
from tests.fakes.memory_dirty import MemoryDirtyRanges
from tests.unit.agent_house import GRANT, AgentHouse, is_locked, open_house, order

MIB = 1 << 20


@dataclass
class Tracked:
    """An agent whose VM has a real qcow2 image as vdb, and live views that are read from the image itself."""

    house: AgentHouse
    path: Path
    contexts: list[str]

    async def open(self, view: str, since: str | None = None, *, freeze: bool = False) -> ViewedDisk:
        earlier = () if since is None else (ViewSince(target="vdb", view=since),)
        request = OpenView(
            order=order(),
            vm_uuid=self.house.vm.uuid,
            targets=("vdb",),
            view=view,
            track=Tracking.BITMAP,
            since=earlier,
            freeze_guest=freeze,
        )
        answer = await self.house.ask(request)
        assert isinstance(answer, ViewOpened)
        return answer.disks[0]

    async def close(self, view: str) -> None:
        await self.house.ask(CloseView(order=order(), vm_uuid=self.house.vm.uuid, view=view))

    async def read(self, view: str) -> DiskTracking:
        since = (ViewSince(target="vdb", view=view),)
        answer = await self.house.ask(ReadTracking(order=order(), vm_uuid=self.house.vm.uuid, since=since))
        assert isinstance(answer, TrackingRead)
        return answer.disks[0]

    async def end(self) -> None:
        await self.house.ask(EndTracking(order=order(), vm_uuid=self.house.vm.uuid, targets=("vdb",)))

    def record(self, view: str, *, bitmap: str | None = None) -> None:
        """As a view of the running VM leaves it behind: a record, and a bitmap in the closed image."""
        image = TrackedImage(target="vdb", path=self.path, identity=identity(self.path))
        self.house.service.ledger.put_tracking(TrackingRecord(vm_uuid=self.house.vm.uuid, view=view, images=(image,)))
        _run("qemu-img", "bitmap", "--add", "-f", "qcow2", str(self.path), bitmap or tag_of(view))

    def write(self, offset_bytes: int, length_bytes: int) -> None:
        _run("qemu-io", "-f", "qcow2", "-c", f"write -q {offset_bytes} {length_bytes}", str(self.path))

    def bitmaps(self) -> set[str]:
        return {bitmap.name for bitmap in bitmaps_of(self.path, "qcow2")}


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracked]:
    with open_house(tmp_path) as house:
        path = tmp_path / "vdb.qcow2"
        _run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(8 * MIB))
        house.vm.disks["vdb"] = FakeImage(path, "qcow2")

        def from_file(target: str, _socket: Path, _export: str) -> RawDisk:
            return RawDisk.open(target, path, writable=False)

        def contexts(_target: str, _socket: Path, _export: str, context: str) -> MemoryDirtyRanges:
            told.append(context)
            return MemoryDirtyRanges(8 * MIB, [])

        told: list[str] = []
        monkeypatch.setattr(sources, "open_view", from_file)
        monkeypatch.setattr(sources, "open_dirty_view", contexts)
        yield Tracked(house, path, told)
        assert house.service.views.close_all() == ()


async def _fence(tracked: Tracked) -> None:
    await tracked.house.ask(
        FenceVm(order=order(), vm_uuid=tracked.house.vm.uuid, side=Side.REPLICA, targets=("vda", "vdb"))
    )


# --- live views -------------------------------------------------------------------------------------------------------


async def test_a_live_view_says_what_it_records_and_what_it_knows(tracked: Tracked) -> None:
    tracked.house.vm.state = PowerState.RUNNING
    first = await tracked.open("r1-1")
    assert (first.tracked, first.since, first.why_not) == (True, None, "")
    second = await tracked.open("r1-2", since="r1-1")
    assert (second.tracked, second.since, second.why_not) == (True, "r1-1", "")
    opened = tracked.house.service.views._open[tracked.house.vm.uuid]
    assert set(opened.dirty) == {"vdb"}
    assert tracked.contexts == ["qemu:dirty-bitmap:since-vdb"]
    await tracked.close("r1-2")


async def test_an_earlier_view_that_nothing_was_recorded_of_is_not_asked_for(tracked: Tracked) -> None:
    tracked.house.vm.state = PowerState.RUNNING
    disk = await tracked.open("r1-2", since="r1-1")
    assert (disk.tracked, disk.since) == (True, None)
    assert "from the view r1-1 on" in disk.why_not


async def test_an_image_put_in_the_place_of_the_recorded_one_is_not_believed(tracked: Tracked) -> None:
    tracked.house.vm.state = PowerState.RUNNING
    await tracked.open("r1-1")
    await tracked.close("r1-1")
    shutil.copyfile(tracked.path, tracked.path.with_suffix(".new"))
    tracked.path.with_suffix(".new").rename(tracked.path)
    disk = await tracked.open("r1-2", since="r1-1")
    assert disk.since is None
    assert "not the one of then" in disk.why_not


async def test_a_name_whose_record_is_lost_records_nothing_a_second_time(tracked: Tracked) -> None:
    """A target may equal the first view of that name; what was written between the two is in no bitmap."""
    tracked.house.vm.state = PowerState.RUNNING
    await tracked.open("r1-1")
    tracked.house.service.hypervisor.drop_checkpoints(tracked.house.vm.uuid)
    again = await tracked.open("r1-1")
    assert not again.tracked
    assert "lost" in again.why_not
    assert (await tracked.open("r1-2", since="r1-1")).since is None


async def test_a_name_whose_record_goes_on_may_be_used_again(tracked: Tracked) -> None:
    tracked.house.vm.state = PowerState.RUNNING
    await tracked.open("r1-1")
    assert (await tracked.open("r1-1")).tracked
    assert (await tracked.open("r1-2", since="r1-1")).since == "r1-1"


async def test_dropped_views_are_forgotten_and_kept_ones_are_not(tracked: Tracked) -> None:
    tracked.house.vm.state = PowerState.RUNNING
    await tracked.open("r1-1")
    await tracked.open("r1-2", since="r1-1")
    await tracked.close("r1-2")
    for _ in range(2):
        await tracked.house.ask(DropCheckpoints(order=order(), vm_uuid=tracked.house.vm.uuid, keep=("r1-2",)))
    assert set(tracked.house.vm.checkpoints) == {tag_of("r1-2")}
    assert (await tracked.open("r1-3", since="r1-1")).since is None
    assert (await tracked.open("r1-4", since="r1-2")).since == "r1-2"
    await tracked.end()
    assert tracked.house.vm.checkpoints == {}
    assert tracked.house.vm.view is None
    assert tracked.house.service.ledger.contents.trackings == ()


async def test_a_pass_whose_view_was_given_up_says_that_and_not_that_its_disk_failed(
    tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = tracked.house
    house.vm.state = PowerState.RUNNING
    await tracked.open("r1-1")
    size_bytes = house.service.views.disks(house.vm.uuid, "r1-1")["vdb"].size_bytes

    async def broken(*_: object) -> None:
        monkeypatch.setattr(scratch, "free_bytes", lambda _: 1)
        house.service.views.scratch.look()
        raise DiskError("the NBD server closed the connection")

    monkeypatch.setattr(house.service.passes, "send", broken)
    disk = GrantedDisk(target="vdb", peer_target="vdb", source_size_bytes=size_bytes, target_size_bytes=size_bytes)
    grant = Grant(
        grant=GRANT,
        vm_uuid=house.vm.uuid,
        direction=Direction.SEND,
        peer_fingerprint="11" * 32,
        view="r1-1",
        disks=(disk,),
    )
    await house.ask(AllowPass(order=order(), grant=grant))
    with pytest.raises(ScratchFull):
        await house.ask(house.run_pass())
    assert house.vm.view is None
    await tracked.close("r1-1")


# --- frozen guests ----------------------------------------------------------------------------------------------------


async def test_a_guest_is_frozen_for_the_view_and_thawed(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    house = tracked.house
    house.vm.state, house.vm.has_agent = PowerState.RUNNING, True
    seen: list[bool] = []
    begin = house.service.hypervisor.open_view

    def spied(*args: object, **named: object) -> object:
        seen.append(house.vm.frozen)
        return begin(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(house.service.hypervisor, "open_view", spied)
    disk = await tracked.open("r1-1", freeze=True)
    assert seen == [True]
    assert not house.vm.frozen
    assert disk.why_not == ""
    assert house.service.ledger.contents.thaws == ()


async def test_a_guest_without_agent_is_told_and_the_view_opens(tracked: Tracked) -> None:
    tracked.house.vm.state = PowerState.RUNNING
    disk = await tracked.open("r1-1", freeze=True)
    assert disk.tracked
    assert "not frozen" in disk.why_not
    assert tracked.house.service.ledger.contents.thaws == ()


async def test_a_view_that_fails_leaves_no_guest_frozen(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    house = tracked.house
    house.vm.state, house.vm.has_agent = PowerState.RUNNING, True

    def refused(*_args: object, **_named: object) -> None:
        raise HypervisorError("no")

    monkeypatch.setattr(house.service.hypervisor, "open_view", refused)
    with pytest.raises(HypervisorError, match="no"):
        await tracked.open("r1-1", freeze=True)
    assert not house.vm.frozen


def _is_frozen(tracked: Tracked) -> bool:
    return tracked.house.vm.frozen


async def test_a_thaw_that_failed_is_owed_also_by_the_next_agent(tracked: Tracked) -> None:
    house = tracked.house
    house.vm.state, house.vm.has_agent, house.vm.agent_hangs = PowerState.RUNNING, True, True
    await tracked.open("r1-1", freeze=True)
    assert _is_frozen(tracked)
    desk = ViewDesk(house.service.hypervisor, house.service.fences, house.folder)
    assert len(desk.thaw_owed()) == 1
    house.vm.agent_hangs = False
    assert desk.thaw_owed() == ()
    assert not _is_frozen(tracked)
    assert house.service.ledger.contents.thaws == ()


# --- closed images ----------------------------------------------------------------------------------------------------


async def test_a_closed_bitmap_is_counted_under_the_fence(tracked: Tracked) -> None:
    tracked.record("r1-1")
    tracked.write(1 * MIB, 128 * 1024)
    tracked.write(5 * MIB, 4096)
    with pytest.raises(NotFenced):
        await tracked.read("r1-1")
    await _fence(tracked)
    assert await tracked.read("r1-1") == DiskTracking(target="vdb", since="r1-1", dirty_bytes=192 * 1024)


async def test_a_closed_view_knows_where_its_record_is(tracked: Tracked) -> None:
    tracked.record("r1-1")
    await _fence(tracked)
    disk = await tracked.open("r1-2", since="r1-1")
    assert (disk.tracked, disk.since) == (False, "r1-1")
    opened = tracked.house.service.views._open[tracked.house.vm.uuid]
    assert list(opened.dirty["vdb"].ranges(0, 8 * MIB)) == []


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("removed", "holds no dirty bitmap"),
        ("disabled", "disabled"),
        ("unknown", "nothing was recorded"),
        ("replaced", "not the one of the view"),
        ("in-use", "not saved"),
    ],
)
async def test_a_record_that_does_not_hold_is_told_with_its_reason(tracked: Tracked, spoil: str, why: str) -> None:
    tracked.record("r1-1")
    tag = tag_of("r1-1")
    if spoil == "removed":
        _run("qemu-img", "bitmap", "--remove", "-f", "qcow2", str(tracked.path), tag)
    elif spoil == "disabled":
        _run("qemu-img", "bitmap", "--disable", "-f", "qcow2", str(tracked.path), tag)
    elif spoil == "replaced":
        shutil.copyfile(tracked.path, tracked.path.with_suffix(".new"))
        tracked.path.with_suffix(".new").rename(tracked.path)
    elif spoil == "in-use":
        _leave_in_use(tracked.path)
    await _fence(tracked)
    answer = await tracked.read("r1-7" if spoil == "unknown" else "r1-1")
    assert (answer.since, answer.dirty_bytes) == (None, 0)
    assert why in answer.why_not
    assert (await tracked.open("r1-2", since="r1-7" if spoil == "unknown" else "r1-1")).since is None


def _content(path: Path) -> bytes:
    """What a guest would read."""
    flat = path.with_suffix(".flat")
    _run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", str(path), str(flat))
    content = flat.read_bytes()
    assert content
    return content


def _leave_in_use(path: Path) -> None:
    """Open the image for writing, write, and die without saving its bitmaps."""
    commands = "write -q 0 4096\nflush\nabort\n"
    subprocess.run(["qemu-io", "-f", "qcow2", str(path)], input=commands, text=True, capture_output=True, check=False)
    assert any(bitmap.in_use for bitmap in bitmaps_of(path, "qcow2"))


@pytest.mark.parametrize("fenced", [True, False])
async def test_ours_are_removed_from_the_closed_image_and_nothing_else(tracked: Tracked, fenced: bool) -> None:
    tracked.record("r1-1")
    tracked.record("r1-2")
    tracked.record("other", bitmap="weekly")
    tracked.write(1 * MIB, 128 * 1024)
    _leave_in_use(tracked.path)
    before = _content(tracked.path)
    if fenced:
        await _fence(tracked)
    await tracked.end()
    await tracked.end()
    assert tracked.bitmaps() == {"weekly"}
    assert is_locked(tracked.path) is fenced
    after = _content(tracked.path)
    assert after == before


async def test_an_image_that_somebody_uses_keeps_its_bitmaps_until_asked_again(tracked: Tracked) -> None:
    tracked.record("r1-1")
    held = hold_exclusive(tracked.path)
    with pytest.raises(DiskError, match="bitmap"):
        await tracked.end()
    held.close()
    await tracked.end()
    assert tracked.bitmaps() == set()


async def test_what_was_written_is_still_known_once_the_checkpoints_of_a_vm_that_is_off_are_gone(
    tracked: Tracked,
) -> None:
    tracked.record("r1-1")
    await _fence(tracked)
    await tracked.house.ask(DropCheckpoints(order=order(), vm_uuid=tracked.house.vm.uuid))
    assert (await tracked.open("r1-2", since="r1-1")).since == "r1-1"
