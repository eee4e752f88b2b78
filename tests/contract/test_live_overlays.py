"""Tracking by live overlays: the same tests on libvirt, with a guest that writes, and in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.errors import HypervisorError
from agent.virt.seam import PowerState
from tests.contract.hypervisor_rigs import LibvirtRig, Rig, Vm
from tests.contract.overlay_rigs import PAIR, Died, Life, chain, content, covered, differences, disk_content


@pytest.fixture
def life(rig: Rig, lab_folder: Path) -> Iterator[Life]:
    life = Life(rig, lab_folder / "state")
    yield life
    life.end()


def own(vm: Vm) -> Path:
    """The image of vdb itself."""
    return vm.disks["vdb"][0]


def definition(rig: Rig, vm: Vm) -> str:
    return rig.inactive_xml(vm) if isinstance(rig, LibvirtRig) else ""


def assert_nothing_left(rig: Rig, vm: Vm, life: Life, before: str) -> None:
    """No overlay in the chain, in the definition, on the disk or in the ledger."""
    assert chain(rig, vm) == [own(vm)]
    assert definition(rig, vm) == before
    assert vm.files() == {path.name for path, _ in vm.disks.values()}
    assert life.records == 0


def test_view_stays_as_it_is_while_the_guest_writes(rig: Rig, life: Life) -> None:
    vm = rig.vm()
    rig.boot(vm)
    frozen = life.open(vm, "v1")
    assert (frozen.image, frozen.format, frozen.since) == (own(vm), "raw", None)
    before = own(vm).read_bytes()
    rig.let_guest_write(vm)
    assert own(vm).read_bytes() == before
    rig.host.force_off(vm.uuid, graceful=True)
    assert disk_content(rig, vm) != before


def test_next_view_knows_what_was_written_since_the_one_before(rig: Rig, life: Life) -> None:
    vm = rig.vm()
    rig.boot(vm)
    first = content(rig, life.open(vm, "v1").image, "raw")
    rig.let_guest_write(vm)
    frozen = life.open(vm, "v2", since="v1")
    second = content(rig, frozen.image, frozen.format)
    dirty = list(life.tracking.dirty(frozen))
    assert frozen.since == "v1"
    assert first != second
    assert covered(differences(first, second), dirty)
    assert sum(length for _, length in dirty) < len(first)
    rig.let_guest_write(vm)
    assert content(rig, frozen.image, frozen.format) == second


def test_overlay_that_is_not_needed_any_more_is_merged_while_the_guest_writes(rig: Rig, life: Life) -> None:
    vm = rig.vm()
    rig.boot(vm)
    life.open(vm, "v1")
    rig.let_guest_write(vm)
    frozen = life.open(vm, "v2", since="v1")
    second = content(rig, frozen.image, frozen.format)
    assert len(chain(rig, vm)) == 3
    life.tracking.drop(vm.uuid, ["v2"])
    life.tracking.drop(vm.uuid, ["v2"])  # harmless when repeated
    assert len(chain(rig, vm)) == 2
    assert not frozen.image.exists()
    assert own(vm).read_bytes() == second
    rig.let_guest_write(vm)
    third = life.open(vm, "v3", since="v2")
    assert third.since == "v2"
    assert covered(differences(second, content(rig, third.image, third.format)), list(life.tracking.dirty(third)))


def test_after_an_aborted_pass_the_next_view_goes_back_to_what_the_target_still_equals(rig: Rig, life: Life) -> None:
    vm = rig.vm()
    rig.boot(vm)
    first = content(rig, life.open(vm, "v1").image, "raw")
    for view in ("v2", "v3", "v4"):
        rig.let_guest_write(vm)
        frozen = life.open(vm, view, since="v1")
        assert frozen.since == "v1"
        assert len(chain(rig, vm)) == 3
    last = content(rig, frozen.image, frozen.format)
    assert covered(differences(first, last), list(life.tracking.dirty(frozen)))


def test_view_that_needs_no_earlier_one_lets_all_overlays_below_be_merged(rig: Rig, life: Life) -> None:
    vm = rig.vm()
    rig.boot(vm)
    life.open(vm, "v1")
    rig.let_guest_write(vm)
    frozen = life.open(vm, "v2")
    assert (frozen.image, frozen.since) == (own(vm), None)
    assert len(chain(rig, vm)) == 2


def test_end_while_the_guest_writes_leaves_nothing(rig: Rig, life: Life) -> None:
    vm = rig.vm()
    before = definition(rig, vm)
    rig.boot(vm)
    life.open(vm, "v1")
    rig.let_guest_write(vm)
    life.open(vm, "v2", since="v1")
    rig.let_guest_write(vm)
    life.tracking.end(vm.uuid)
    life.tracking.end(vm.uuid)
    assert rig.host.state(vm.uuid) is PowerState.RUNNING
    assert_nothing_left(rig, vm, life, before)
    rig.let_guest_write(vm)
    rig.host.request_shutdown(vm.uuid)
    assert rig.host.wait_off(vm.uuid, 60)
    rig.boot(vm)  # its guest checks what it wrote


def test_shut_off_disk_knows_what_was_written_and_is_merged_exactly(rig: Rig, life: Life) -> None:
    vm = rig.vm()
    before = definition(rig, vm)
    rig.boot(vm)
    first = content(rig, life.open(vm, "v1").image, "raw")
    rig.let_guest_write(vm)
    rig.host.force_off(vm.uuid, graceful=True)
    last = disk_content(rig, vm)
    life.fences.fence(vm.uuid, pair=PAIR, run="r1", side="replica", targets=["vda", "vdb"])
    (written,) = life.tracking.read(vm.uuid, {"vdb": "v1"})
    assert (written.since, written.why_not) == ("v1", "")
    assert 0 < written.dirty_bytes < len(first)
    closed = life.tracking.closed(vm.uuid, "vdb", chain(rig, vm)[0], "v1")
    assert covered(differences(first, last), list(life.tracking.dirty(closed)))
    life.tracking.end(vm.uuid)
    life.tracking.end(vm.uuid)
    assert_nothing_left(rig, vm, life, before)
    assert own(vm).read_bytes() == last
    fence = life.fences.required(vm.uuid, "replica", PAIR)
    assert own(vm) in {image.path for image in fence.images}


def test_killed_guest_loses_no_tracking(rig: Rig, life: Life) -> None:
    vm = rig.vm()
    rig.boot(vm)
    first = content(rig, life.open(vm, "v1").image, "raw")
    rig.let_guest_write(vm)
    rig.kill(vm)
    last = disk_content(rig, vm)
    (written,) = life.tracking.read(vm.uuid, {"vdb": "v1"})
    assert written.since == "v1"
    rig.boot(vm)
    rig.let_guest_write(vm)
    frozen = life.open(vm, "v2", since="v1")
    assert frozen.since == "v1"
    assert covered(differences(first, last), list(life.tracking.dirty(frozen)))


def test_base_that_was_written_under_its_overlay_proves_nothing(rig: Rig, life: Life) -> None:
    vm = rig.vm()
    rig.boot(vm)
    life.open(vm, "v1")
    rig.host.force_off(vm.uuid, graceful=True)
    with own(vm).open("r+b") as image:
        image.write(b"edited by hand")
    (written,) = life.tracking.read(vm.uuid, {"vdb": "v1"})
    assert (written.since, written.dirty_bytes) == (None, 0)
    assert "written under its overlays" in written.why_not


def test_view_that_was_never_opened_is_none_to_go_back_to(rig: Rig, life: Life) -> None:
    vm = rig.vm()
    rig.boot(vm)
    life.open(vm, "v1")
    frozen = life.open(vm, "v2", since="v0")
    assert frozen.since is None
    assert "v0" in frozen.why_not
    assert list(life.tracking.dirty(frozen)) == []


def test_same_view_opened_again_is_the_same(rig: Rig, life: Life) -> None:
    vm = rig.vm()
    rig.boot(vm)
    first = life.open(vm, "v1")
    before = content(rig, first.image, first.format)
    rig.let_guest_write(vm)
    again = life.open(vm, "v1")
    assert again == first
    assert content(rig, again.image, again.format) == before


@pytest.mark.parametrize("keep_restore_point", [False, True])
def test_protective_snapshot_on_top_of_an_overlay(rig: Rig, life: Life, keep_restore_point: bool) -> None:
    vm = rig.vm()
    before = definition(rig, vm)
    rig.boot(vm)
    life.open(vm, "v1")
    rig.let_guest_write(vm)
    rig.host.force_off(vm.uuid, graceful=True)
    last = disk_content(rig, vm)
    life.fences.fence(vm.uuid, pair=PAIR, run="r1", side="replica", targets=["vda", "vdb"])
    overlays = life.protect(vm, "failback-web-r1")
    assert len(chain(rig, vm)) == 3
    if keep_restore_point:
        life.tracking.end(vm.uuid)
        assert chain(rig, vm)[1:] == [own(vm)]
        assert disk_content(rig, vm) == last
        overlays = ()  # found by the snapshot's own metadata, which must be true
    rig.host.unprotect(vm.uuid, "failback-web-r1", overlays)
    life.fences.refresh(vm.uuid)
    life.tracking.end(vm.uuid)
    assert own(vm).read_bytes() == last
    assert_nothing_left(rig, vm, life, before)


def test_disk_that_has_bitmaps_is_refused(rig: Rig, life: Life) -> None:
    vm = rig.vm()
    rig.boot(vm)
    domain = rig.host.inspect(vm.uuid)
    assert [life.tracking.takes(domain, target) for target in ("vda", "vdb", "vdx")] == [False, True, False]
    with pytest.raises(HypervisorError, match="no raw image"):
        rig.host.plan_overlays(vm.uuid, ["vda"], "failback-v1")
    life.open(vm, "v1")
    assert life.tracking.takes(rig.host.inspect(vm.uuid), "vdb")


def test_vm_that_is_off_gets_no_live_overlay(rig: Rig, life: Life) -> None:
    vm = rig.vm()
    with pytest.raises(HypervisorError, match="off"):
        life.open(vm, "v1")
    assert life.records == 0


# --- an agent that dies --------------------------------------------------------------------------------------------


def dies_at_every_act(rig: Rig, folder: Path, scene: Callable[[Life], None]) -> int:
    """Play the scene with an agent that dies before its first act, its second and so on, and each time again with one
    that lives; returns how many acts there were."""
    acts = 0
    while True:
        life = Life(rig, folder, acts)
        try:
            scene(life)
        except Died:
            acts += 1
        else:
            assert not life.died
            return acts
        finally:
            life.end()
        heir = Life(rig, folder)
        try:
            scene(heir)
        finally:
            heir.end()


def test_agent_that_dies_anywhere_while_the_vm_runs(rig: Rig, lab_folder: Path) -> None:
    vm = rig.vm()
    before = definition(rig, vm)
    rig.boot(vm)

    def scene(life: Life) -> None:
        first = life.open(vm, "v1")
        content_of_first = content(rig, first.image, first.format)
        rig.let_guest_write(vm)
        frozen = life.open(vm, "v2", since="v1")
        assert frozen.since == "v1"
        now = content(rig, frozen.image, frozen.format)
        assert covered(differences(content_of_first, now), list(life.tracking.dirty(frozen)))
        life.tracking.drop(vm.uuid, ["v2"])
        assert len(chain(rig, vm)) == 2
        life.tracking.end(vm.uuid)
        assert_nothing_left(rig, vm, life, before)

    assert dies_at_every_act(rig, lab_folder / "state", scene) > 10


def test_agent_that_dies_anywhere_after_the_vm_was_shut_off(rig: Rig, lab_folder: Path) -> None:
    vm = rig.vm()
    before = definition(rig, vm)
    rounds = 0

    def scene(life: Life) -> None:
        nonlocal rounds
        if life.mortal:
            rounds += 1
            life.mortal = False
            rig.boot(vm)
            life.open(vm, f"v{rounds}")
            rig.host.force_off(vm.uuid, graceful=True)
            life.mortal = True
        last = disk_content(rig, vm)
        life.fences.fence(vm.uuid, pair=PAIR, run="r1", side="replica", targets=["vda", "vdb"])
        life.protect(vm, "failback-web-r1")
        assert disk_content(rig, vm) == last
        life.tracking.end(vm.uuid)
        assert disk_content(rig, vm) == last
        rig.host.unprotect(vm.uuid, "failback-web-r1", ())
        life.fences.refresh(vm.uuid)
        assert own(vm).read_bytes() == last
        assert_nothing_left(rig, vm, life, before)
        life.release(vm)

    assert dies_at_every_act(rig, lab_folder / "state", scene) > 8
