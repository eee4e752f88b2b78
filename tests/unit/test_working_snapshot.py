"""The working snapshot of an original, as its agent takes, drops and merges it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import Forbidden, HypervisorError
from agent.fences import Torn
from agent.ledger import ConditionRecord, DiskCondition
from agent.virt.seam import PowerState
from protocol.messages import (
    FenceVm,
    LiftFence,
    MergeProtection,
    OnTimeout,
    PowerOff,
    PowerOn,
    Protect,
    Protected,
    Side,
    Unprotect,
)
from tests.unit.agent_house import AgentHouse, is_locked, open_house, order

SNAPSHOT = "failback-web-r1"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[AgentHouse]:
    with open_house(tmp_path) as opened:
        yield opened


async def protect(house: AgentHouse) -> Path:
    """Fence and protect the original; its overlay."""
    await house.fence()
    answer = await house.ask(
        Protect(order=order(), vm_uuid=house.vm.uuid, targets=("vda",), snapshot=SNAPSHOT, side=Side.ORIGINAL)
    )
    assert isinstance(answer, Protected)
    return Path(answer.disks[0].overlay)


async def drop(house: AgentHouse) -> None:
    await house.ask(Unprotect(order=order(), vm_uuid=house.vm.uuid, snapshot=SNAPSHOT, side=Side.ORIGINAL))


async def merge(house: AgentHouse) -> None:
    await house.ask(MergeProtection(order=order(), vm_uuid=house.vm.uuid, snapshot=SNAPSHOT))


def torn(house: AgentHouse) -> None:
    """As before the first write."""
    house.service.ledger.put_condition(ConditionRecord(vm_uuid=house.vm.uuid, condition=DiskCondition.TORN))


def top(house: AgentHouse) -> Path:
    return house.vm.disks["vda"].path


async def test_passes_write_to_the_overlay_and_nobody_to_the_base(house: AgentHouse) -> None:
    overlay = await protect(house)
    fences = house.service.fences
    written, base = fences.held(overlay), fences.held(house.image)
    assert written is not None
    assert base is not None
    assert (written.exclusive, base.exclusive) == (True, False)
    fence = fences.fence_of(house.vm.uuid)
    assert fence is not None
    assert fence.images[0].path == overlay  # what a pass opens


async def test_taken_again_after_a_crash_anywhere_it_is_the_same(house: AgentHouse) -> None:
    real = house.service.hypervisor.protect

    def die(*_: object) -> None:
        raise HypervisorError("the agent dies here")

    house.service.hypervisor.protect = die  # type: ignore[method-assign,assignment]
    with pytest.raises(HypervisorError):
        await protect(house)
    assert top(house) == house.image
    house.service.hypervisor.protect = real  # type: ignore[method-assign]
    overlay = await protect(house)
    assert await protect(house) == overlay == top(house)


async def test_dropped_the_original_is_intact_as_it_was_and_fenced_for_writing(house: AgentHouse) -> None:
    before = house.image.read_bytes()
    overlay = await protect(house)
    torn(house)
    overlay.write_bytes(b"x" * len(before))
    for _ in range(2):  # the second time as after a lost answer
        await drop(house)
    assert house.image.read_bytes() == before
    assert top(house) == house.image
    assert not overlay.exists()
    assert house.service.fences.condition(house.vm.uuid) is DiskCondition.INTACT
    held = house.service.fences.held(house.image)
    assert held is not None
    assert held.exclusive


async def test_a_base_that_somebody_wrote_to_is_not_called_intact(house: AgentHouse) -> None:
    await protect(house)
    house.image.write_bytes(b"y" * len(house.image.read_bytes()))
    await drop(house)
    assert house.service.fences.condition(house.vm.uuid) is DiskCondition.TORN


async def test_a_torn_original_is_not_protected(house: AgentHouse) -> None:
    await house.fence()
    torn(house)
    with pytest.raises(Torn):
        await protect(house)
    assert top(house) == house.image
    assert house.service.ledger.protection(house.vm.uuid, SNAPSHOT) is None


async def test_merged_while_it_runs_the_base_holds_what_was_written(house: AgentHouse) -> None:
    overlay = await protect(house)
    size = len(house.image.read_bytes())
    overlay.write_bytes(b"z" * size)
    await house.ask(LiftFence(order=order(), vm_uuid=house.vm.uuid, restore_autostart=False))
    await house.ask(PowerOn(order=order(), vm_uuid=house.vm.uuid))
    for _ in range(2):
        await merge(house)
    assert top(house) == house.image
    assert house.image.read_bytes() == b"z" * size
    assert not overlay.exists()
    assert not is_locked(house.image)
    assert house.vm.state is PowerState.RUNNING


async def test_a_merge_that_has_begun_cannot_be_taken_back(house: AgentHouse) -> None:
    await protect(house)
    await house.ask(LiftFence(order=order(), vm_uuid=house.vm.uuid, restore_autostart=False))
    await house.ask(PowerOn(order=order(), vm_uuid=house.vm.uuid))

    def die(*_: object, **__: object) -> None:
        raise HypervisorError("the block job failed")

    real = house.service.hypervisor.merge_protection
    house.service.hypervisor.merge_protection = die  # type: ignore[method-assign]
    with pytest.raises(HypervisorError):
        await merge(house)
    house.service.hypervisor.merge_protection = real  # type: ignore[method-assign]
    await house.ask(PowerOff(order=order(), vm_uuid=house.vm.uuid, timeout_s=1.0, on_timeout=OnTimeout.FORCE))
    await house.fence()
    with pytest.raises(Forbidden, match="being merged"):
        await drop(house)


async def test_the_fence_of_an_original_that_ran_freezes_its_base_again(house: AgentHouse) -> None:
    overlay = await protect(house)
    await house.ask(LiftFence(order=order(), vm_uuid=house.vm.uuid, restore_autostart=False))
    assert not is_locked(house.image)
    await house.fence()
    held = house.service.fences.held(house.image)
    assert held is not None
    assert not held.exclusive
    assert is_locked(overlay)


async def test_the_fence_of_the_next_run_drops_what_another_run_had_to_leave(house: AgentHouse) -> None:
    overlay = await protect(house)
    torn(house)
    await house.ask(FenceVm(order=order(2, run="r2"), vm_uuid=house.vm.uuid, side=Side.ORIGINAL, targets=("vda",)))
    assert top(house) == house.image
    assert not overlay.exists()
    assert house.service.fences.condition(house.vm.uuid) is DiskCondition.INTACT
