"""Overlay tracking through the orders, on libvirt: mixed disks, block devices, other people's overlays."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.disk.dirty import DirtyRanges
from agent.disk.seam import Disk
from agent.errors import DiskError, HypervisorError
from agent.scratch import ScratchLimits
from agent.sources import ViewDesk
from agent.tracking_desk import TrackingDesk
from agent.virt.seam import PowerState
from protocol.messages import ViewSince
from tests.contract.hypervisor_rigs import LibvirtRig, Rig, Vm
from tests.contract.overlay_rigs import PAIR, Life, chain, covered, differences, disk_content

pytestmark = pytest.mark.parametrize("rig", [pytest.param("libvirt", marks=pytest.mark.real)], indirect=True)


@pytest.fixture
def real(rig: Rig, lab_folder: Path) -> LibvirtRig:
    assert isinstance(rig, LibvirtRig)
    (lab_folder / "scratch").mkdir()
    return rig


@pytest.fixture
def desk(real: LibvirtRig, lab_folder: Path) -> Iterator[TrackingDesk]:
    life = Life(real, lab_folder / "state")
    (lab_folder / "run").mkdir()
    views = ViewDesk(real.host, life.fences, lab_folder / "run")
    yield TrackingDesk(real.host, life.fences, views, lab_folder / "run")
    assert views.close_all() == ()
    life.end()


def read(disk: Disk) -> bytes:
    """All of it."""
    buffer = bytearray(disk.size_bytes)
    disk.read_into(0, memoryview(buffer))
    return bytes(buffer)


def overlayed(dirty: DirtyRanges) -> list[tuple[int, int]]:
    assert dirty.rung == "overlay"
    return list(dirty.ranges(0, dirty.size_bytes))


def test_disks_with_and_without_bitmaps_are_tracked_side_by_side(real: LibvirtRig, desk: TrackingDesk) -> None:
    vm = real.vm()
    before = real.inactive_xml(vm)
    both = list(vm.disks)
    real.boot(vm)
    opened = desk.views.open(PAIR, vm.uuid, both, "v1", track=True, overlay=True)
    assert (opened.tracked, opened.since) == ({"vda", "vdb"}, {})
    first = read(opened.disks["vdb"])
    real.let_guest_write(vm)
    assert read(opened.disks["vdb"]) == first
    since = dict.fromkeys(both, "v1")
    opened = desk.views.open(PAIR, vm.uuid, both, "v2", track=True, overlay=True, since=since)
    assert (opened.since, opened.why_not) == (since, {})
    assert opened.dirty["vda"].rung == "bitmap"
    second = read(opened.disks["vdb"])
    assert covered(differences(first, second), overlayed(opened.dirty["vdb"]))
    desk.drop(vm.uuid, ["v2"])
    assert len(chain(real, vm)) == 3  # its view is still being read
    real.let_guest_write(vm)
    assert read(opened.disks["vdb"]) == second
    desk.views.close(vm.uuid, "v2")
    desk.drop(vm.uuid, ["v2"])
    assert len(chain(real, vm)) == 2
    real.let_guest_write(vm)
    assert_switchover_and_end(real, desk, vm, before, second)


def assert_switchover_and_end(real: LibvirtRig, desk: TrackingDesk, vm: Vm, before: str, second: bytes) -> None:
    both = list(vm.disks)
    real.host.force_off(vm.uuid, graceful=True)
    last = disk_content(real, vm)
    desk.fences.fence(vm.uuid, pair=PAIR, run="r1", side="replica", targets=both)
    told = desk.read(PAIR, vm.uuid, [ViewSince(target=target, view="v2") for target in both])
    assert [(disk.target, disk.since) for disk in told] == [("vda", "v2"), ("vdb", "v2")]
    assert all(disk.dirty_bytes > 0 for disk in told)
    opened = desk.views.open(PAIR, vm.uuid, both, "v3", since=dict.fromkeys(both, "v2"))
    assert opened.since == dict.fromkeys(both, "v2")
    assert read(opened.disks["vdb"]) == last
    assert covered(differences(second, last), overlayed(opened.dirty["vdb"]))
    desk.end(vm.uuid)
    desk.end(vm.uuid)
    assert real.inactive_xml(vm) == before
    assert vm.files() == {path.name for path, _ in vm.disks.values()}
    domain = real.host.inspect(vm.uuid)
    assert domain.checkpoints == ()
    assert [image.bitmaps for disk in domain.disks for image in disk.chain] == [(), ()]
    assert disk_content(real, vm) == last


@pytest.fixture
def loop_device(lab_folder: Path) -> Iterator[Path]:
    image = lab_folder / "device.img"
    subprocess.run(["truncate", "-s", "8M", str(image)], check=True)
    command = ["losetup", "--find", "--show", str(image)]
    device = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)


@pytest.mark.root
def test_block_device_has_its_overlays_in_the_scratch_folder(
    real: LibvirtRig, desk: TrackingDesk, loop_device: Path, lab_folder: Path
) -> None:
    scratch = lab_folder / "scratch"
    vm = real.define(lab_folder, {"vda": (loop_device, "raw")})
    before = real.inactive_xml(vm)
    real.boot(vm)
    opened = desk.views.open(PAIR, vm.uuid, ["vda"], "v1", track=True, overlay=True)
    first = read(opened.disks["vda"])
    assert len(list(scratch.iterdir())) == 1
    real.let_guest_write(vm)
    opened = desk.views.open(PAIR, vm.uuid, ["vda"], "v2", track=True, overlay=True, since={"vda": "v1"})
    second = read(opened.disks["vda"])
    assert covered(differences(first, second), overlayed(opened.dirty["vda"]))
    desk.views.close(vm.uuid, "v2")
    desk.drop(vm.uuid, ["v2"])
    assert loop_device.read_bytes() == second
    real.let_guest_write(vm)
    real.host.force_off(vm.uuid, graceful=True)
    last = disk_content(real, vm, "vda")
    desk.fences.fence(vm.uuid, pair=PAIR, run="r1", side="replica", targets=["vda"])
    desk.end(vm.uuid)
    assert loop_device.read_bytes() == last
    assert real.inactive_xml(vm) == before
    assert list(scratch.iterdir()) == []


def test_overlay_of_somebody_else_on_top_is_never_touched(real: LibvirtRig, desk: TrackingDesk) -> None:
    vm = real.vm()
    real.boot(vm)
    desk.views.open(PAIR, vm.uuid, ["vdb"], "v1", track=True, overlay=True)
    desk.views.close(vm.uuid, "v1")
    foreign = vm.folder / "someone-elses.qcow2"
    real.take_foreign_snapshot(vm, "vdb", foreign)
    real.let_guest_write(vm)
    opened = desk.views.open(PAIR, vm.uuid, ["vda"], "v2", track=True, overlay=True)
    assert opened.tracked == {"vda"}
    desk.views.close(vm.uuid, "v2")
    desk.end(vm.uuid)  # ours below it is merged, theirs stays
    assert chain(real, vm) == [foreign, vm.disks["vdb"][0]]
    real.host.force_off(vm.uuid, graceful=True)
    assert str(foreign) in real.inactive_xml(vm)


def test_end_of_a_vm_that_is_off_refuses_to_pull_an_overlay_from_under_a_foreign_one(
    real: LibvirtRig, desk: TrackingDesk
) -> None:
    vm = real.vm()
    real.boot(vm)
    desk.views.open(PAIR, vm.uuid, ["vdb"], "v1", track=True, overlay=True)
    foreign = vm.folder / "someone-elses.qcow2"
    real.take_foreign_snapshot(vm, "vdb", foreign)
    real.host.force_off(vm.uuid, graceful=True)
    last = disk_content(real, vm)
    with pytest.raises(HypervisorError, match=r"someone-elses\.qcow2"):
        desk.end(vm.uuid)
    assert disk_content(real, vm) == last
    assert len(chain(real, vm)) == 3


@pytest.fixture
def small(lab_folder: Path) -> Iterator[Path]:
    """A file system of its own, of 64 MiB."""
    folder = lab_folder / "disks"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
def test_overlays_are_merged_before_they_fill_their_file_system(
    real: LibvirtRig, small: Path, lab_folder: Path
) -> None:
    image = small / "data.raw"
    subprocess.run(["truncate", "-s", "8M", str(image)], check=True)
    vm = real.define(small, {"vda": (image, "raw")})
    real.boot(vm)
    life = Life(real, lab_folder / "state")
    (lab_folder / "run").mkdir()
    views = ViewDesk(real.host, life.fences, lab_folder / "run", ScratchLimits(reserve_bytes=1 << 20))
    opened = views.open(PAIR, vm.uuid, ["vda"], "v1", track=True, overlay=True)
    disk = opened.disks["vda"]
    filler = small / "filler"
    filler.write_bytes(bytes(40 << 20))
    views.room.look()  # its thread may have been first
    assert chain(real, vm, "vda") == [image]
    assert real.host.state(vm.uuid) is PowerState.RUNNING
    real.let_guest_write(vm)
    with pytest.raises(DiskError):
        read(disk)
    reason = views.given_up(vm.uuid, "v1")
    assert reason is not None
    assert reason.code == "scratch-full"
    filler.unlink()
    opened = views.open(PAIR, vm.uuid, ["vda"], "v2", track=True, overlay=True, since={"vda": "v1"})
    assert opened.since == {}
    assert "merged lest they fill" in opened.why_not["vda"][0]
    views.close(vm.uuid, "v2")
    views.end_overlays(vm.uuid)
    life.end()
    real.host.force_off(vm.uuid, graceful=True)
    assert vm.files() == {"data.raw"}
