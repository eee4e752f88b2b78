"""Fences: never one too few, whatever happens between two lines, and none that outlives what it fences."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.disk.lock import hold_exclusive, image_in_use
from agent.errors import DiskBusy, DiskError, HypervisorError
from agent.fences import Fenced, FenceKeeper, NotFenced, Torn
from agent.ledger import ConditionRecord, DiskCondition, Ledger, LockKind, ProtectedImage, ProtectionRecord
from agent.virt.seam import PowerState
from tests.fakes.hypervisor import FakeDomain, FakeHypervisor, FakeImage, FakeMachine

SIZE_BYTES = 1 << 20


@dataclass
class House:
    """A machine with one VM, and its agent's fences in successive lives."""

    folder: Path
    machine: FakeMachine
    ledger: Ledger
    keeper: FenceKeeper

    def image(self, name: str) -> Path:
        path = self.folder / name
        path.write_bytes(bytes(SIZE_BYTES))
        return path

    def vm(self, name: str, *images: str) -> FakeDomain:
        disks = {f"vd{chr(ord('a') + n)}": (self.image(image), "raw") for n, image in enumerate(images)}
        return self.machine.define(name, disks)

    def crash(self) -> FenceKeeper:
        """Kill -9 of the agent: its locks are gone, the ledger is what it is."""
        self.keeper.close()
        self.ledger.close()
        self.ledger = Ledger.open(self.folder / "state")
        self.keeper = FenceKeeper(self.ledger, FakeHypervisor(self.machine))
        return self.keeper


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    machine, ledger = FakeMachine(tmp_path), Ledger.open(tmp_path / "state")
    made = House(tmp_path, machine, ledger, FenceKeeper(ledger, FakeHypervisor(machine)))
    yield made
    made.keeper.close()
    made.ledger.close()


def _fence(house: House, domain: FakeDomain, *, side: str = "original", pair: str = "web") -> None:
    house.keeper.fence(domain.uuid, pair=pair, run="r1", side=side, targets=list(domain.disks))


def _is_locked(path: Path) -> bool:
    try:
        hold_exclusive(path).close()
    except DiskBusy:
        return True
    return False


def test_a_repeated_fence_locks_what_the_disks_are_by_now_and_keeps_what_they_were(house: House) -> None:
    vm = house.vm("web", "a")
    _fence(house, vm)
    new = house.image("b")
    vm.disks["vda"] = FakeImage(new, "raw")
    _fence(house, vm)
    assert _is_locked(new)
    assert _is_locked(house.folder / "a")
    fence = house.keeper.required(vm.uuid, "original", "web")
    assert fence.images[0].path == new


def test_an_image_a_disk_was_pointed_away_from_may_go_or_be_used_elsewhere(house: House) -> None:
    vm = house.vm("web", "a", "b")
    _fence(house, vm)
    for target, name in (("vda", "c"), ("vdb", "d")):
        vm.disks[target] = FakeImage(house.image(name), "raw")
    house.crash()
    (house.folder / "a").unlink()
    elsewhere = hold_exclusive(house.folder / "b")
    _fence(house, vm)
    fence = house.keeper.required(vm.uuid, "original", "web")
    assert {image.path.name for image in fence.images} == {"c", "d"}
    elsewhere.close()


def test_a_format_that_was_corrected_is_the_one_that_is_opened(house: House) -> None:
    vm = house.vm("web", "a")
    _fence(house, vm)
    vm.disks["vda"] = FakeImage(house.folder / "a", "qcow2")
    _fence(house, vm)
    assert [image.format for image in house.keeper.required(vm.uuid, "original", "web").images] == ["qcow2"]


def test_a_vm_that_changes_sides_is_held_in_the_new_way_and_nothing_stays_held(house: House) -> None:
    vm = house.vm("web", "a")
    vm.autostart = True
    _fence(house, vm, side="replica")
    _fence(house, vm, side="original")
    held = house.keeper.held(house.folder / "a")
    assert held is not None
    assert held.exclusive
    assert house.keeper.required(vm.uuid, "original", "web").autostart_before
    _fence(house, vm, side="replica")
    held = house.keeper.held(house.folder / "a")
    assert held is not None
    assert not held.exclusive
    house.keeper.lift(vm.uuid, pair="web", restore_autostart=True)
    assert vm.autostart
    assert not _is_locked(house.folder / "a")


def test_a_file_that_takes_the_place_of_a_locked_one_is_noticed_told_and_locked(house: House) -> None:
    vm = house.vm("web", "a")
    _fence(house, vm)
    house.image("other").rename(house.folder / "a")
    with pytest.raises(NotFenced, match="vda"):
        house.keeper.required(vm.uuid, "original", "web")
    assert not _is_locked(house.folder / "a")
    assert house.keeper.mend() == ()
    assert _is_locked(house.folder / "a")
    house.keeper.required(vm.uuid, "original", "web")


def test_death_between_the_record_and_autostart_leaves_a_fence_that_is_made_whole(house: House) -> None:
    vm = house.vm("web", "a")
    vm.autostart = True

    def die(uuid: str, enabled: bool) -> bool:
        raise KeyboardInterrupt

    house.keeper.hypervisor.set_autostart = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        _fence(house, vm)
    keeper = house.crash()
    assert vm.autostart
    assert keeper.restore() == ()
    assert _is_locked(house.folder / "a")
    assert keeper.mend() == ()
    assert not keeper.hypervisor.inspect(vm.uuid).autostart
    _fence(house, vm)
    keeper.lift(vm.uuid, pair="web", restore_autostart=True)
    assert keeper.hypervisor.inspect(vm.uuid).autostart


def test_death_between_a_protective_snapshot_and_its_record_leaves_no_overlay_unlocked(house: House) -> None:
    vm = house.vm("web-replica", "a", "b")
    _fence(house, vm, side="replica")
    overlays = house.keeper.hypervisor.protect(vm.uuid, ["vda", "vdb"], "failback-web-r1", "made by failback")
    keeper = house.crash()
    assert keeper.restore() == ()
    assert keeper.mend() == ()
    assert all(_is_locked(overlay.overlay) for overlay in overlays)
    kinds = {image.path: image.kind for image in keeper.required(vm.uuid, "replica", "web").images}
    assert {kinds[overlay.overlay] for overlay in overlays} == {LockKind.EXCLUSIVE}
    assert {kinds[overlay.base] for overlay in overlays} == {LockKind.FROZEN}


def test_a_snapshot_that_is_dropped_leaves_a_whole_fence_on_the_bases(house: House) -> None:
    vm = house.vm("web-replica", "a")
    _fence(house, vm, side="replica")
    overlays = house.keeper.hypervisor.protect(vm.uuid, ["vda"], "failback-web-r1", "made by failback")
    house.keeper.refresh(vm.uuid)
    house.keeper.hypervisor.unprotect(vm.uuid, "failback-web-r1", overlays)
    house.keeper.refresh(vm.uuid)
    fence = house.keeper.required(vm.uuid, "replica", "web")
    assert [(image.path.name, image.kind) for image in fence.images] == [("a", LockKind.FROZEN)]


def test_an_image_that_vanished_is_told_and_locked_when_it_is_back(house: House) -> None:
    vm = house.vm("web", "a", "b")
    _fence(house, vm)
    house.keeper.close()
    away = (house.folder / "a").rename(house.folder / "away")
    keeper = house.crash()
    (missing,) = keeper.restore()
    assert isinstance(missing, DiskError)
    assert str(house.folder / "a") in missing.sentence
    assert _is_locked(house.folder / "b")
    fence = keeper.fence_of(vm.uuid)
    assert fence is not None
    assert keeper.unlocked(fence) == ("vda",)
    away.rename(house.folder / "a")
    assert keeper.mend() == ()
    assert _is_locked(house.folder / "a")


def test_locks_come_back_without_libvirt_and_the_rest_once_it_answers(house: House) -> None:
    vm = house.vm("web", "a")
    _fence(house, vm)
    keeper = house.crash()
    vm.autostart = True
    answering = keeper.hypervisor.set_autostart

    def down(uuid: str, enabled: bool) -> bool:
        raise HypervisorError("no libvirt")

    keeper.hypervisor.set_autostart = down  # type: ignore[method-assign]
    assert keeper.restore() == ()
    assert [error.sentence for error in keeper.mend()] == ["no libvirt"]
    keeper.hypervisor.set_autostart = answering  # type: ignore[method-assign]
    assert keeper.mend() == ()
    assert not vm.autostart


def test_a_fenced_vm_that_runs_is_told_until_it_is_off(house: House) -> None:
    vm = house.vm("web", "a")
    _fence(house, vm)
    keeper = house.crash()
    vm.state = PowerState.RUNNING
    keeper.restore()
    (told,) = keeper.mend()
    assert isinstance(told, Fenced)
    assert "running" in told.sentence
    vm.state = PowerState.OFF
    assert keeper.mend() == ()


def test_another_pair_can_neither_fence_nor_lift_nor_use_a_fence(house: House) -> None:
    vm = house.vm("web", "a")
    _fence(house, vm)
    with pytest.raises(Fenced, match="web"):
        _fence(house, vm, pair="other")
    with pytest.raises(Fenced, match="web"):
        house.keeper.lift(vm.uuid, pair="other", restore_autostart=False)
    with pytest.raises(NotFenced, match="other"):
        house.keeper.required(vm.uuid, "original", "other")
    assert _is_locked(house.folder / "a")


def test_one_image_is_not_fenced_for_two_vms(house: House) -> None:
    vm = house.vm("web", "a")
    twin = house.machine.define("twin", {"vda": (house.folder / "a", "raw")})
    _fence(house, vm)
    with pytest.raises(Fenced, match=vm.uuid):
        _fence(house, twin, pair="twin")
    assert house.keeper.fence_of(twin.uuid) is None


def test_two_frozen_vms_share_an_image_and_the_first_lift_leaves_the_lock(house: House) -> None:
    vm = house.vm("web", "a")
    twin = house.machine.define("twin", {"vda": (house.folder / "a", "raw")})
    _fence(house, vm, side="replica")
    _fence(house, twin, side="replica", pair="twin")
    house.keeper.lift(vm.uuid, pair="web", restore_autostart=False)
    assert _is_locked(house.folder / "a")
    house.keeper.lift(twin.uuid, pair="twin", restore_autostart=False)
    assert not _is_locked(house.folder / "a")


def test_the_fence_of_a_vm_that_was_deleted_can_be_lifted(house: House) -> None:
    vm = house.vm("web", "a")
    vm.autostart = True
    _fence(house, vm)
    del house.machine.domains[vm.uuid]
    house.keeper.lift(vm.uuid, pair="web", restore_autostart=True)
    assert house.keeper.fence_of(vm.uuid) is None
    assert not _is_locked(house.folder / "a")


def test_a_torn_vm_keeps_its_fence(house: House) -> None:
    vm = house.vm("web", "a")
    _fence(house, vm)
    house.ledger.put_condition(ConditionRecord(vm_uuid=vm.uuid, condition=DiskCondition.TORN))
    with pytest.raises(Torn):
        house.keeper.lift(vm.uuid, pair="web", restore_autostart=True)
    assert _is_locked(house.folder / "a")


def test_our_own_lock_does_not_hide_another_writer(house: House) -> None:
    vm = house.vm("web", "a")
    _fence(house, vm)
    held = house.keeper.held(house.folder / "a")
    assert held is not None
    assert not image_in_use(house.folder / "a", (held,))
    assert image_in_use(house.folder / "a")


def test_threads_of_several_pairs_lose_none_of_each_others_records(house: House) -> None:
    vms = [house.vm(f"vm{number}", f"disk{number}") for number in range(8)]
    start = threading.Barrier(len(vms))

    def work(number: int) -> None:
        start.wait()
        for round_ in range(5):
            uuid = vms[number].uuid
            house.keeper.fence(uuid, pair=f"p{number}", run=f"r{round_}", side="original", targets=["vda"])
            house.ledger.raise_epoch(f"p{number}", round_ + 1)
            house.ledger.put_condition(
                ConditionRecord(vm_uuid=uuid, condition=DiskCondition.EQUALS_VIEW, view=f"{round_}")
            )
            image = ProtectedImage(target="vda", base=Path("/b"), base_format="raw", overlay=Path("/o"))
            snapshot = f"failback-{round_}"
            house.ledger.put_protection(
                ProtectionRecord(vm_uuid=uuid, pair=f"p{number}", snapshot=snapshot, images=(image,))
            )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(vms))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    house.crash()
    contents = house.ledger.contents
    assert {(fence.pair, fence.run) for fence in contents.fences} == {(f"p{n}", "r4") for n in range(8)}
    assert {(epoch.pair, epoch.epoch) for epoch in contents.epochs} == {(f"p{n}", 5) for n in range(8)}
    assert len(contents.conditions) == 8
    assert len(contents.protections) == 40
