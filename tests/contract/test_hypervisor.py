"""What every hypervisor must do: the same tests for libvirt with real guests and for the in-memory one of the tests."""

from __future__ import annotations

import pytest

from agent.errors import HypervisorError, NoSuchDomain
from agent.virt.names import scratch_name
from agent.virt.seam import PowerState, SourceKind
from tests.contract.hypervisor_rigs import SIZE_BYTES, Rig, digest

OFF_TIMEOUT_S = 60.0

# --- looking ---------------------------------------------------------------------------------------------------


def test_host_says_what_it_is(rig: Rig) -> None:
    facts = rig.host.facts()
    assert facts.hostname
    assert facts.libvirt_version.count(".") == 2
    assert facts.qemu_version.count(".") == 2


def test_domain_is_found_by_name_and_by_uuid(rig: Rig) -> None:
    vm = rig.vm()
    assert rig.host.find(vm.name) == vm.uuid
    assert rig.host.find(vm.uuid) == vm.uuid


@pytest.mark.parametrize("wrong", ["nobody", "00000000-0000-4000-8000-000000000000"])
def test_unknown_domain_is_named_in_the_error(rig: Rig, wrong: str) -> None:
    with pytest.raises(NoSuchDomain, match=wrong):
        rig.host.find(wrong)
    with pytest.raises(NoSuchDomain, match=wrong):
        rig.host.state(wrong)


def test_inspection_of_a_domain_that_is_off(rig: Rig) -> None:
    vm = rig.vm()
    domain = rig.host.inspect(vm.uuid)
    assert (domain.uuid, domain.name, domain.state) == (vm.uuid, vm.name, PowerState.OFF)
    assert domain.persistent
    assert not domain.autostart
    assert not domain.managed_save
    assert (domain.on_poweroff, domain.firmware, domain.has_tpm) == ("destroy", "bios", False)
    assert domain.machine.startswith("pc")
    assert (domain.passthrough, domain.snapshots, domain.checkpoints) == ((), (), ())
    assert domain.job is None
    by_target = {disk.target: disk for disk in domain.disks}
    assert set(by_target) == {"vda", "vdb"}
    for target, (path, image_format) in vm.disks.items():
        disk = by_target[target]
        assert (disk.kind, disk.sector_bytes, disk.problem) == (SourceKind.FILE, 512, None)
        assert not disk.shareable
        assert not disk.readonly
        assert disk.free_bytes > 0
        (image,) = disk.chain
        assert (image.path, image.format, image.virtual_size_bytes) == (path, image_format, SIZE_BYTES)


def test_two_names_of_one_image_have_one_identity(rig: Rig) -> None:
    vm = rig.vm()
    before = rig.host.inspect(vm.uuid).disks
    assert before[0].chain[0].identity != before[1].chain[0].identity
    path, _ = vm.disks["vda"]
    (vm.folder / "moved").mkdir()
    moved = vm.folder / "moved" / path.name
    path.rename(moved)
    path.symlink_to(moved)
    after = rig.host.inspect(vm.uuid).disks
    assert after[0].chain[0].identity == before[0].chain[0].identity


def test_missing_image_is_a_problem_and_no_exception(rig: Rig) -> None:
    vm = rig.vm()
    path, _ = vm.disks["vdb"]
    path.unlink()
    disks = rig.host.inspect(vm.uuid).disks
    assert disks[0].problem is None
    assert disks[1].chain == ()
    assert disks[1].problem is not None
    assert str(path) in disks[1].problem


# --- power -----------------------------------------------------------------------------------------------------


def test_guest_that_obeys_is_seen_off(rig: Rig) -> None:
    vm = rig.vm()
    assert rig.host.wait_off(vm.uuid, 0)
    rig.host.request_shutdown(vm.uuid)  # no-op when off
    rig.boot(vm)
    rig.host.power_on(vm.uuid)  # no-op when on
    assert rig.host.state(vm.uuid) is PowerState.RUNNING
    assert rig.host.inspect(vm.uuid).state is PowerState.RUNNING
    assert not rig.host.wait_off(vm.uuid, 0.2)
    rig.host.request_shutdown(vm.uuid)
    assert rig.host.wait_off(vm.uuid, OFF_TIMEOUT_S)
    assert rig.host.state(vm.uuid) is PowerState.OFF


def test_guest_that_ignores_the_request_is_ended_by_force(rig: Rig) -> None:
    vm = rig.vm(obeys=False)
    rig.boot(vm)
    rig.host.request_shutdown(vm.uuid)
    assert not rig.host.wait_off(vm.uuid, 2)
    assert rig.host.state(vm.uuid) is PowerState.RUNNING
    rig.host.force_off(vm.uuid, graceful=True)
    assert rig.host.state(vm.uuid) is PowerState.OFF
    rig.host.force_off(vm.uuid, graceful=True)
    rig.host.force_off(vm.uuid, graceful=False)


def test_paused_guest_cannot_be_asked_or_started(rig: Rig) -> None:
    vm = rig.vm()
    rig.boot(vm)
    rig.pause(vm)
    assert rig.host.state(vm.uuid) is PowerState.PAUSED
    with pytest.raises(HypervisorError, match="paused"):
        rig.host.request_shutdown(vm.uuid)
    with pytest.raises(HypervisorError, match="paused"):
        rig.host.power_on(vm.uuid)
    rig.host.force_off(vm.uuid, graceful=True)
    assert rig.host.state(vm.uuid) is PowerState.OFF


def test_domain_whose_image_is_missing_does_not_start(rig: Rig) -> None:
    vm = rig.vm()
    path, _ = vm.disks["vda"]
    path.unlink()
    with pytest.raises(HypervisorError, match=path.name):
        rig.host.power_on(vm.uuid)
    assert rig.host.state(vm.uuid) is PowerState.OFF


def test_autostart_tells_what_it_was(rig: Rig) -> None:
    vm = rig.vm()
    assert rig.host.set_autostart(vm.uuid, True) is False
    assert rig.host.inspect(vm.uuid).autostart
    assert rig.host.set_autostart(vm.uuid, True) is True
    assert rig.host.set_autostart(vm.uuid, False) is True
    assert not rig.host.inspect(vm.uuid).autostart


# --- views -----------------------------------------------------------------------------------------------------


def test_view_stays_frozen_while_the_guest_writes(rig: Rig) -> None:
    vm = rig.vm()
    before = vm.files()
    rig.boot(vm)
    rig.let_guest_write(vm)
    view = rig.host.open_view(vm.uuid, ["vda", "vdb"], "v1")
    assert rig.host.inspect(vm.uuid).job == "backup"
    first = {target: rig.read_view(view, target) for target in view.exports}
    assert set(first) == {"vda", "vdb"}
    assert {len(content) for content in first.values()} == {SIZE_BYTES}
    rig.let_guest_write(vm)
    assert {target: rig.read_view(view, target) for target in view.exports} == first
    rig.host.close_view(vm.uuid, "v1")
    rig.host.close_view(vm.uuid, "v1")
    assert rig.host.inspect(vm.uuid).job is None
    assert vm.files() == before
    assert not view.socket.exists()

    view = rig.host.open_view(vm.uuid, ["vda", "vdb"], "v2")
    second = {target: rig.read_view(view, target) for target in view.exports}
    assert all(second[target] != first[target] for target in first)
    rig.host.close_view(vm.uuid, "v2")
    assert vm.files() == before


def test_view_has_only_the_disks_asked_for(rig: Rig) -> None:
    vm = rig.vm()
    rig.boot(vm)
    view = rig.host.open_view(vm.uuid, ["vdb"], "v1")
    assert set(view.exports) == {"vdb"}
    assert len(rig.read_view(view, "vdb")) == SIZE_BYTES
    rig.host.close_view(vm.uuid, "v1")
    with pytest.raises(HypervisorError, match="vdx"):
        rig.host.open_view(vm.uuid, ["vda", "vdx"], "v2")
    assert rig.host.inspect(vm.uuid).job is None


def test_second_view_is_refused_until_the_first_is_closed(rig: Rig) -> None:
    vm = rig.vm()
    rig.boot(vm)
    view = rig.host.open_view(vm.uuid, ["vda"], "v1")
    for tag in ("v1", "v2"):
        with pytest.raises(HypervisorError, match="backup"):
            rig.host.open_view(vm.uuid, ["vda"], tag)
    rig.host.close_view(vm.uuid, "v2")  # another tag: not this view
    assert len(rig.read_view(view, "vda")) == SIZE_BYTES
    rig.host.close_view(vm.uuid, "v1")
    rig.host.open_view(vm.uuid, ["vda"], "v2")
    rig.host.close_view(vm.uuid, "v2")


def test_view_of_a_domain_that_is_off_is_refused(rig: Rig) -> None:
    vm = rig.vm()
    with pytest.raises(HypervisorError, match="off"):
        rig.host.open_view(vm.uuid, ["vda"], "v1")
    rig.host.close_view(vm.uuid, "v1")


@pytest.mark.parametrize("tag", ["", "../x", "a b", "x" * 65])
def test_tag_that_could_leave_its_folder_is_refused(rig: Rig, tag: str) -> None:
    vm = rig.vm()
    with pytest.raises(HypervisorError, match="name"):
        rig.host.open_view(vm.uuid, ["vda"], tag)
    with pytest.raises(HypervisorError, match="name"):
        rig.host.close_view(vm.uuid, tag)


def test_restarted_agent_closes_the_view_it_no_longer_knows(rig: Rig) -> None:
    vm = rig.vm()
    before = vm.files()
    rig.boot(vm)
    rig.host.open_view(vm.uuid, ["vda", "vdb"], "v1")
    rig.fresh().close_view(vm.uuid, "v1")
    assert rig.host.inspect(vm.uuid).job is None
    assert vm.files() == before


def test_view_of_a_domain_that_died_leaves_nothing(rig: Rig) -> None:
    vm = rig.vm()
    before = vm.files()
    rig.boot(vm)
    view = rig.host.open_view(vm.uuid, ["vda", "vdb"], "v1")
    rig.kill(vm)
    # What libvirt leaves depends on how QEMU died: the worst is that it leaves everything.
    (vm.folder / scratch_name(vm.uuid, "vda", "v1")).touch()
    rig.fresh().close_view(vm.uuid, "v1")
    assert vm.files() == before
    assert not view.socket.exists()


def test_backup_of_someone_else_is_left_alone(rig: Rig) -> None:
    vm = rig.vm()
    rig.boot(vm)
    rig.begin_foreign_backup(vm)
    with pytest.raises(HypervisorError, match="backup"):
        rig.host.open_view(vm.uuid, ["vda"], "v1")
    rig.host.close_view(vm.uuid, "v1")
    assert rig.host.inspect(vm.uuid).job == "backup"
    rig.end_foreign_backup(vm)


# --- protective snapshots ----------------------------------------------------------------------------------------


def test_protected_bases_stay_as_they_are_and_come_back(rig: Rig) -> None:
    vm = rig.vm()
    untouched, before = vm.digests(), rig.host.inspect(vm.uuid)
    overlays = rig.host.protect(vm.uuid, ["vda", "vdb"], "failback-a", "made by failback")
    assert [(o.target, o.base, o.base_format) for o in overlays] == [(t, *vm.disks[t]) for t in ("vda", "vdb")]
    assert rig.host.protect(vm.uuid, ["vda", "vdb"], "failback-a", "made by failback") == overlays
    protected = rig.host.inspect(vm.uuid)
    assert [(s.name, s.ours, s.external) for s in protected.snapshots] == [("failback-a", True, True)]
    for disk, overlay in zip(protected.disks, overlays, strict=True):
        assert [image.path for image in disk.chain] == [overlay.overlay, overlay.base]
        assert overlay.overlay.parent == overlay.base.parent
        assert disk.chain[0].format == "qcow2"
        assert disk.chain[0].virtual_size_bytes == SIZE_BYTES

    rig.boot(vm)
    rig.let_guest_write(vm)
    with pytest.raises(HypervisorError, match="power it off"):
        rig.host.unprotect(vm.uuid, "failback-a", overlays)
    with pytest.raises(HypervisorError, match="power it off"):
        rig.host.protect(vm.uuid, ["vda"], "failback-b", "made by failback")
    rig.host.force_off(vm.uuid, graceful=True)
    assert vm.digests() == untouched

    rig.host.unprotect(vm.uuid, "failback-a", overlays)
    rig.host.unprotect(vm.uuid, "failback-a", overlays)
    after = rig.host.inspect(vm.uuid)
    assert after.snapshots == ()
    assert [disk.chain for disk in after.disks] == [disk.chain for disk in before.disks]
    assert vm.digests() == untouched
    assert vm.files() == {path.name for path, _ in vm.disks.values()}
    rig.boot(vm)
    rig.let_guest_write(vm)
    assert vm.digests() != untouched


def test_only_the_disks_asked_for_are_protected(rig: Rig) -> None:
    vm = rig.vm()
    (overlay,) = rig.host.protect(vm.uuid, ["vdb"], "failback-a", "made by failback")
    assert overlay.target == "vdb"
    lengths = {disk.target: len(disk.chain) for disk in rig.host.inspect(vm.uuid).disks}
    assert lengths == {"vda": 1, "vdb": 2}
    rig.host.unprotect(vm.uuid, "failback-a", [overlay])
    with pytest.raises(HypervisorError, match="vdx"):
        rig.host.protect(vm.uuid, ["vdx"], "failback-a", "made by failback")


def test_restarted_agent_undoes_a_snapshot_it_was_never_told_of(rig: Rig) -> None:
    vm = rig.vm()
    rig.host.protect(vm.uuid, ["vda", "vdb"], "failback-a", "made by failback")
    rig.fresh().unprotect(vm.uuid, "failback-a", [])
    assert [len(disk.chain) for disk in rig.host.inspect(vm.uuid).disks] == [1, 1]
    assert vm.files() == {path.name for path, _ in vm.disks.values()}


def test_restore_points_pile_up_and_are_undone_from_the_top(rig: Rig) -> None:
    vm = rig.vm()
    first = rig.host.protect(vm.uuid, ["vda", "vdb"], "failback-a", "made by failback")
    rig.boot(vm)
    rig.let_guest_write(vm)
    rig.host.request_shutdown(vm.uuid)
    assert rig.host.wait_off(vm.uuid, OFF_TIMEOUT_S)
    kept = [digest(overlay.overlay) for overlay in first]
    second = rig.host.protect(vm.uuid, ["vda", "vdb"], "failback-b", "made by failback")
    assert [(o.base, o.base_format) for o in second] == [(o.overlay, "qcow2") for o in first]
    assert rig.host.protect(vm.uuid, ["vda", "vdb"], "failback-a", "made by failback") == first
    domain = rig.host.inspect(vm.uuid)
    assert {snapshot.name for snapshot in domain.snapshots} == {"failback-a", "failback-b"}
    assert [len(disk.chain) for disk in domain.disks] == [3, 3]
    with pytest.raises(HypervisorError, match="failback-a"):
        rig.host.unprotect(vm.uuid, "failback-a", first)
    rig.host.unprotect(vm.uuid, "failback-b", second)
    domain = rig.host.inspect(vm.uuid)
    assert [[image.path for image in disk.chain] for disk in domain.disks] == [[o.overlay, o.base] for o in first]
    assert [digest(overlay.overlay) for overlay in first] == kept
    rig.host.unprotect(vm.uuid, "failback-a", first)
    assert vm.files() == {path.name for path, _ in vm.disks.values()}


def test_snapshot_name_that_is_not_ours_is_refused(rig: Rig) -> None:
    vm = rig.vm()
    for name in ("before-upgrade", "failback-../x"):
        with pytest.raises(HypervisorError, match="snapshot of ours"):
            rig.host.protect(vm.uuid, ["vda"], name, "made by failback")


def test_view_of_a_protected_domain_is_cleaned_up_beside_its_base(rig: Rig) -> None:
    vm = rig.vm()
    (vm.folder / scratch_name(vm.uuid, "vda", "v1")).touch()
    overlays = rig.host.protect(vm.uuid, ["vda"], "failback-a", "made by failback")
    rig.host.close_view(vm.uuid, "v1")
    rig.host.unprotect(vm.uuid, "failback-a", overlays)
    assert vm.files() == {path.name for path, _ in vm.disks.values()}
