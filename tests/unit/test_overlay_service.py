"""Overlay tracking as a coordinator orders it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import AgentError
from agent.virt.seam import PowerState
from protocol.messages import (
    CloseView,
    DiskTracking,
    DropCheckpoints,
    EndTracking,
    OpenView,
    ReadTracking,
    Side,
    Tracking,
    TrackingRead,
    ViewOpened,
    ViewSince,
)
from tests.contract.overlay_rigs import differences
from tests.unit.agent_house import AgentHouse, open_house, order


@pytest.fixture
def house(tmp_path: Path) -> Iterator[AgentHouse]:
    with open_house(tmp_path) as house:
        overlays = house.service.views.overlays
        # In memory every image is whole: what an overlay holds is where it differs from the disk's own image.
        overlays.allocated = lambda _name, image, _layers: iter(
            differences(image.read_bytes(), house.image.read_bytes())
        )
        overlays.commit = lambda _name, paths, into, _format, **_: into.write_bytes(paths[0].read_bytes())
        yield house


def guest_writes(house: AgentHouse) -> None:
    house.machine.guest_writes(house.vm.uuid, "vda", 4096, b"written")


async def open_view(house: AgentHouse, track: Tracking) -> ViewOpened:
    view = OpenView(order=order(), vm_uuid=house.vm.uuid, targets=("vda",), view="r1-1", track=track)
    reply = await house.ask(view)
    assert isinstance(reply, ViewOpened)
    return reply


async def test_raw_disk_is_tracked_read_and_given_back(house: AgentHouse) -> None:
    house.vm.state = PowerState.RUNNING
    (disk,) = (await open_view(house, Tracking.OVERLAY)).disks
    assert (disk.tracked, disk.since, disk.why_not) == (True, None, "")
    await house.ask(CloseView(order=order(), vm_uuid=house.vm.uuid, view="r1-1"))
    guest_writes(house)
    await house.ask(DropCheckpoints(order=order(), vm_uuid=house.vm.uuid, keep=("r1-1",)))
    house.vm.end()
    await house.fence(Side.REPLICA)
    since = (ViewSince(target="vda", view="r1-1"),)
    told = await house.ask(ReadTracking(order=order(), vm_uuid=house.vm.uuid, since=since))
    assert told == TrackingRead(disks=(DiskTracking(target="vda", since="r1-1", dirty_bytes=64 * 1024),))
    for _ in range(2):
        await house.ask(EndTracking(order=order(), vm_uuid=house.vm.uuid, targets=("vda",)))
    assert [image.path for image in house.vm.disks["vda"].chain()] == [house.image]
    assert house.image.read_bytes()[4096:4103] == b"written"
    assert house.service.ledger.contents.overlays == ()
    assert list(house.folder.glob("*.qcow2")) == []
    assert house.service.fences.unlocked(house.service.fences.required(house.vm.uuid, "replica", "web")) == ()


async def test_running_vm_is_given_back_with_what_it_wrote(house: AgentHouse) -> None:
    house.vm.state = PowerState.RUNNING
    await open_view(house, Tracking.OVERLAY)
    guest_writes(house)
    await house.ask(EndTracking(order=order(), vm_uuid=house.vm.uuid, targets=("vda",)))
    assert house.vm.state is PowerState.RUNNING
    assert [image.path for image in house.vm.disks["vda"].chain()] == [house.image]
    assert house.image.read_bytes()[4096:4103] == b"written"
    assert not house.service.views.is_open(house.vm.uuid)


@pytest.mark.parametrize("track", [Tracking.NONE, Tracking.BITMAP])
async def test_no_overlay_without_being_asked(house: AgentHouse, track: Tracking) -> None:
    house.vm.state = PowerState.RUNNING
    with pytest.raises(AgentError, match="NBD"):  # in memory nobody serves the backup job
        await open_view(house, track)
    assert house.service.ledger.contents.overlays == ()
    assert house.vm.disks["vda"].path == house.image
