"""Views that record what is written since: the same tests for libvirt with real guests and for the one in memory."""

from __future__ import annotations

import pytest

from agent.errors import GuestAgentMissing
from agent.virt.images import identity
from agent.virt.seam import EarlierView, PowerState, View
from tests.contract.hypervisor_rigs import SIZE_BYTES, Rig, Vm

V1, V2, V3 = (f"failback-{number:012x}" for number in (1, 2, 3))


def _open(rig: Rig, vm: Vm, tag: str, since: str | None = None) -> View:
    path, _ = vm.disks["vda"]
    earlier = {} if since is None else {"vda": EarlierView(tag=since, path=path, identity=identity(path))}
    return rig.host.open_view(vm.uuid, ["vda", "vdb"], tag, checkpoint=True, since=earlier)


def _pass_over(rig: Rig, vm: Vm, tag: str) -> dict[str, bytes]:
    """Open a first tracked view, read it and close it."""
    view = _open(rig, vm, tag)
    frozen = {target: rig.read_view(view, target) for target in view.exports}
    rig.host.close_view(vm.uuid, tag)
    return frozen


def _changed(before: bytes, after: bytes) -> set[int]:
    """Offsets of 512-byte sectors that differ."""
    return {at for at in range(0, len(before), 512) if before[at : at + 512] != after[at : at + 512]}


def test_a_tracked_view_knows_what_was_written_since_the_one_before(rig: Rig) -> None:
    vm = rig.vm()
    rig.boot(vm)
    first = _open(rig, vm, V1)
    assert (first.tracked, first.checkpoint_is_new, first.since) == (frozenset({"vda"}), True, {})
    assert "bitmap" in first.why_not["vdb"]
    assert set(first.why_not) == {"vdb"}
    before = rig.read_view(first, "vda")
    rig.host.close_view(vm.uuid, V1)
    rig.let_guest_write(vm)
    (written,) = rig.host.written_since(vm.uuid, V1).items()
    assert written[0] == "vda"
    assert 0 < written[1] <= SIZE_BYTES
    assert rig.host.written_since(vm.uuid, V2) == {}
    second = _open(rig, vm, V2, since=V1)
    assert second.since == {"vda": V1}
    after = rig.read_view(second, "vda")
    dirty = rig.dirty(second, "vda")
    rig.host.close_view(vm.uuid, V2)
    changed = _changed(before, after)
    assert changed
    assert all(any(at <= sector < at + length for at, length in dirty) for sector in changed)
    assert sum(length for _, length in dirty) < SIZE_BYTES


def test_the_earlier_view_still_serves_after_one_that_came_to_nothing(rig: Rig) -> None:
    vm = rig.vm()
    rig.boot(vm)
    before = _pass_over(rig, vm, V1)["vda"]
    rig.let_guest_write(vm)
    _pass_over(rig, vm, V2)  # and its pass fails
    rig.let_guest_write(vm)
    third = _open(rig, vm, V3, since=V1)
    after, dirty = rig.read_view(third, "vda"), rig.dirty(third, "vda")
    rig.host.close_view(vm.uuid, V3)
    assert all(any(at <= sector < at + length for at, length in dirty) for sector in _changed(before, after))


def test_only_what_is_kept_stays_and_what_others_made_always_does(rig: Rig) -> None:
    vm = rig.vm()
    rig.boot(vm)
    rig.add_foreign_checkpoint(vm, "weekly")
    for tag in (V1, V2, V3):
        _pass_over(rig, vm, tag)
    rig.host.drop_checkpoints(vm.uuid, [V2])
    rig.host.drop_checkpoints(vm.uuid, [V2])
    assert rig.host.inspect(vm.uuid).checkpoints == ("weekly",)
    assert _open(rig, vm, "failback-00000000000a", since=V2).since == {"vda": V2}
    rig.host.close_view(vm.uuid, "failback-00000000000a")
    assert _open(rig, vm, "failback-00000000000b", since=V1).since == {}
    rig.host.close_view(vm.uuid, "failback-00000000000b")
    rig.host.drop_bitmaps(vm.uuid)
    rig.host.force_off(vm.uuid, graceful=True)
    assert rig.bitmaps(vm) == {"weekly"}


def test_records_survive_a_graceful_end_and_a_new_start(rig: Rig) -> None:
    vm = rig.vm()
    rig.boot(vm)
    before = _pass_over(rig, vm, V1)["vda"]
    rig.let_guest_write(vm)
    rig.host.force_off(vm.uuid, graceful=True)
    assert rig.bitmaps(vm) == {V1}
    rig.boot(vm)
    view = _open(rig, vm, V2, since=V1)
    dirty, after = rig.dirty(view, "vda"), rig.read_view(view, "vda")
    rig.host.close_view(vm.uuid, V2)
    assert view.since == {"vda": V1}
    assert all(any(at <= sector < at + length for at, length in dirty) for sector in _changed(before, after))


def test_after_a_kill_the_view_is_opened_without_and_says_why(rig: Rig) -> None:
    vm = rig.vm()
    rig.boot(vm)
    _pass_over(rig, vm, V1)
    rig.host.force_off(vm.uuid, graceful=True)
    rig.boot(vm)
    _pass_over(rig, vm, V2)  # V1 is in-use in the image by now, V2 in memory alone
    rig.kill(vm)
    rig.boot(vm)
    host = rig.fresh()
    for earlier, tag in ((V1, V3), (V2, "failback-00000000000a")):
        view = _open(rig, vm, tag, since=earlier)
        assert (view.since, view.tracked) == ({}, frozenset({"vda"}))
        assert "lost" in view.why_not["vda"]
        host.close_view(vm.uuid, tag)
    host.drop_bitmaps(vm.uuid)
    host.force_off(vm.uuid, graceful=True)
    assert rig.bitmaps(vm) == set()
    host.drop_checkpoints(vm.uuid)


def test_a_bitmap_that_somebody_removed_is_noticed_and_its_checkpoint_can_go(rig: Rig) -> None:
    vm = rig.vm()
    rig.boot(vm)
    _pass_over(rig, vm, V1)
    rig.lose_bitmap(vm, V1)
    view = _open(rig, vm, V2, since=V1)
    assert view.since == {}
    assert "lost" in view.why_not["vda"]
    rig.host.close_view(vm.uuid, V2)
    rig.host.drop_checkpoints(vm.uuid)
    assert rig.host.inspect(vm.uuid).checkpoints == ()


def test_an_image_that_is_not_the_one_of_then_is_not_believed(rig: Rig) -> None:
    vm = rig.vm()
    rig.boot(vm)
    _pass_over(rig, vm, V1)
    path, _ = vm.disks["vda"]
    other = {"vda": EarlierView(tag=V1, path=path, identity="another")}
    view = rig.host.open_view(vm.uuid, ["vda"], V2, since=other)
    assert (view.since, view.tracked) == ({}, frozenset())
    assert "image" in view.why_not["vda"]
    rig.host.close_view(vm.uuid, V2)


def test_a_view_opened_again_keeps_the_record_that_began_earlier(rig: Rig) -> None:
    vm = rig.vm()
    rig.boot(vm)
    before = _pass_over(rig, vm, V1)["vda"]
    rig.let_guest_write(vm)
    again = _open(rig, vm, V1)
    assert (again.tracked, again.checkpoint_is_new) == (frozenset({"vda"}), False)
    rig.host.close_view(vm.uuid, V1)
    view = _open(rig, vm, V2, since=V1)
    after, dirty = rig.read_view(view, "vda"), rig.dirty(view, "vda")
    rig.host.close_view(vm.uuid, V2)
    assert all(any(at <= sector < at + length for at, length in dirty) for sector in _changed(before, after))


def test_metadata_of_a_domain_that_is_off_goes_and_a_snapshot_can_be_taken(rig: Rig) -> None:
    vm = rig.vm()
    rig.boot(vm)
    _pass_over(rig, vm, V1)
    rig.host.force_off(vm.uuid, graceful=True)
    rig.host.drop_checkpoints(vm.uuid)
    assert rig.bitmaps(vm) == {V1}
    overlays = rig.host.protect(vm.uuid, ["vda", "vdb"], "failback-a", "made by failback")
    rig.host.unprotect(vm.uuid, "failback-a", overlays)
    rig.boot(vm)
    rig.host.drop_bitmaps(vm.uuid)  # the bitmap has no checkpoint any more
    rig.host.force_off(vm.uuid, graceful=True)
    assert rig.bitmaps(vm) == set()
    assert rig.host.state(vm.uuid) is PowerState.OFF


def test_a_guest_without_agent_is_not_frozen_and_thawing_it_is_harmless_when_off(rig: Rig) -> None:
    vm = rig.vm()
    rig.host.thaw_guest(vm.uuid)
    rig.boot(vm)
    assert not rig.host.has_stalled(vm.uuid)
    with pytest.raises(GuestAgentMissing, match="No guest agent"):
        rig.host.freeze_guest(vm.uuid)


def test_inspection_tells_when_an_image_was_written_and_what_it_takes(rig: Rig) -> None:
    vm = rig.vm()
    for disk in rig.host.inspect(vm.uuid).disks:
        (image,) = disk.chain
        status = image.path.stat()
        assert image.modified_s == status.st_mtime
        assert image.allocated_bytes == status.st_blocks * 512
        assert image.keeps_bitmaps is (image.format == "qcow2")
