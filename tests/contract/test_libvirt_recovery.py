"""What only libvirt can get into: half-done snapshots, lost metadata, other people's jobs and files, block devices."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import HypervisorError
from agent.virt.names import scratch_name
from agent.virt.seam import PowerState, SourceKind
from tests.contract.hypervisor_rigs import LibvirtRig, Rig, digest


@pytest.fixture
def real(rig: Rig) -> LibvirtRig:
    assert isinstance(rig, LibvirtRig)
    return rig


only_libvirt = pytest.mark.parametrize("rig", [pytest.param("libvirt", marks=pytest.mark.real)], indirect=True)


@only_libvirt
def test_redefinition_keeps_what_is_not_ours(real: LibvirtRig) -> None:
    vm = real.vm()
    before = real.inactive_xml(vm)
    assert "keep me" in before
    overlays = real.host.protect(vm.uuid, ["vda", "vdb"], "failback-a", "made by failback")
    assert real.inactive_xml(vm) != before
    real.host.unprotect(vm.uuid, "failback-a", overlays)
    assert real.inactive_xml(vm) == before


@only_libvirt
def test_snapshot_that_was_cut_short_before_the_domain_changed(real: LibvirtRig) -> None:
    vm = real.vm()
    path, _ = vm.disks["vda"]
    stray = vm.folder / "system.failback-a.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(path), "-F", "qcow2", str(stray)]
    subprocess.run(command, check=True)
    real.host.unprotect(vm.uuid, "failback-a", [])
    assert not stray.exists()
    subprocess.run(command, check=True)
    overlays = real.host.protect(vm.uuid, ["vda", "vdb"], "failback-a", "made by failback")
    assert overlays[0].overlay == stray
    real.host.unprotect(vm.uuid, "failback-a", overlays)
    assert vm.files() == {path.name for path, _ in vm.disks.values()}


@only_libvirt
def test_snapshot_that_lost_its_metadata_is_still_in_force(real: LibvirtRig) -> None:
    vm = real.vm()
    overlays = real.host.protect(vm.uuid, ["vda", "vdb"], "failback-a", "made by failback")
    real.forget_snapshots(vm)
    assert real.host.protect(vm.uuid, ["vda", "vdb"], "failback-a", "made by failback") == overlays
    real.fresh().unprotect(vm.uuid, "failback-a", [])
    assert [len(disk.chain) for disk in real.host.inspect(vm.uuid).disks] == [1, 1]
    assert vm.files() == {path.name for path, _ in vm.disks.values()}


@only_libvirt
def test_undoing_that_was_cut_short_after_the_domain_changed(real: LibvirtRig) -> None:
    vm = real.vm()
    before = real.inactive_xml(vm)
    overlays = real.host.protect(vm.uuid, ["vda", "vdb"], "failback-a", "made by failback")
    real.redefine(before)
    real.fresh().unprotect(vm.uuid, "failback-a", overlays)
    assert real.host.inspect(vm.uuid).snapshots == ()
    assert vm.files() == {path.name for path, _ in vm.disks.values()}


@only_libvirt
def test_file_in_the_way_of_an_overlay_is_not_overwritten(real: LibvirtRig) -> None:
    vm = real.vm()
    precious = vm.folder / "system.failback-a.qcow2"
    precious.write_bytes(b"precious")
    with pytest.raises(HypervisorError, match="not ours"):
        real.host.protect(vm.uuid, ["vda", "vdb"], "failback-a", "made by failback")
    real.host.unprotect(vm.uuid, "failback-a", [])
    assert precious.read_bytes() == b"precious"
    assert real.host.inspect(vm.uuid).snapshots == ()


@only_libvirt
def test_saved_memory_is_never_resumed(real: LibvirtRig) -> None:
    vm = real.vm()
    real.boot(vm)
    real.save_memory(vm)
    assert real.host.inspect(vm.uuid).managed_save
    with pytest.raises(HypervisorError, match="managedsave-remove"):
        real.host.power_on(vm.uuid)
    assert real.host.state(vm.uuid) is PowerState.OFF


@only_libvirt
def test_socket_path_that_is_too_long_is_named(real: LibvirtRig) -> None:
    vm = real.vm()
    real.boot(vm)
    with pytest.raises(HypervisorError, match="107 bytes"):
        real.host.open_view(vm.uuid, ["vda"], "x" * 64)
    assert real.host.inspect(vm.uuid).job is None


@only_libvirt
def test_block_job_is_a_job(real: LibvirtRig) -> None:
    vm = real.vm()
    real.boot(vm)
    real.begin_block_copy(vm)
    assert real.host.inspect(vm.uuid).job == "block copy of vda"
    with pytest.raises(HypervisorError, match="block copy of vda"):
        real.host.open_view(vm.uuid, ["vdb"], "v1")


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
@only_libvirt
def test_block_device_keeps_its_files_in_the_scratch_folder(
    loop_device: Path, real: LibvirtRig, lab_folder: Path
) -> None:
    scratch = lab_folder / "scratch"
    scratch.mkdir()
    vm = real.define(lab_folder, {"vda": (loop_device, "raw")})
    before = real.inactive_xml(vm)
    (disk,) = real.host.inspect(vm.uuid).disks
    assert disk.kind is SourceKind.BLOCK
    assert disk.chain[0].virtual_size_bytes == 8 * 1024 * 1024
    real.boot(vm)
    view = real.host.open_view(vm.uuid, ["vda"], "v1")
    assert [path.name for path in scratch.iterdir()] == [scratch_name(vm.uuid, "vda", "v1")]
    assert len(real.read_view(view, "vda")) == 8 * 1024 * 1024
    real.host.close_view(vm.uuid, "v1")
    real.host.force_off(vm.uuid, graceful=True)
    untouched = digest(loop_device)
    (overlay,) = real.host.protect(vm.uuid, ["vda"], "failback-a", "made by failback")
    assert (overlay.base, overlay.overlay.parent) == (loop_device, scratch)
    real.boot(vm)
    real.host.force_off(vm.uuid, graceful=True)
    real.host.unprotect(vm.uuid, "failback-a", [overlay])
    assert digest(loop_device) == untouched
    assert real.inactive_xml(vm) == before
    assert list(scratch.iterdir()) == []
