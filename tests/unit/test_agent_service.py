"""The agent's orders: epochs, grants and fences hold whatever runs, is cancelled or dies at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from agent import opened_view, passrun, sources
from agent.disk.open import open_target
from agent.disk.raw import RawDisk
from agent.errors import DiskError, Forbidden, Held, HypervisorError, HypervisorUnreachable, StaleEpoch
from agent.fences import Fenced, NotFenced, Torn
from agent.ledger import ConditionRecord, DiskCondition, ViewRecord
from agent.passes import PassEnded
from agent.service import failure_of
from agent.sources import NoSuchView, ViewDesk
from agent.tags import tag_of
from agent.virt.seam import PowerState
from protocol.messages import (
    AskPower,
    CloseView,
    Condition,
    FenceDescription,
    InspectVm,
    LiftFence,
    OpenView,
    PowerAnswer,
    PowerOn,
    Protect,
    Protected,
    SetCondition,
    Side,
    Unprotect,
    ViewOpened,
    VmDescription,
)
from tests.unit.agent_house import AgentHouse, Outcome, descriptors, is_locked, open_house, order, until


@pytest.fixture
def house(tmp_path: Path) -> Iterator[AgentHouse]:
    with open_house(tmp_path) as opened:
        yield opened


def _lift(house: AgentHouse, epoch: int = 1) -> LiftFence:
    return LiftFence(order=order(epoch), vm_uuid=house.vm.uuid, restore_autostart=True)


def _condition(house: AgentHouse, condition: Condition, view: str | None = None) -> SetCondition:
    return SetCondition(order=order(), vm_uuid=house.vm.uuid, condition=condition, view=view)


async def _begin_pass(house: AgentHouse, nursery: trio.Nursery) -> Outcome:
    """A receiving pass that waits for the source to connect."""
    await house.fence()
    await house.allow()
    outcome = Outcome()
    nursery.start_soon(outcome.watch, partial(house.ask, house.run_pass()))
    await until(lambda: house.service.passes.is_running("web"))
    return outcome


# --- epochs ---------------------------------------------------------------------------------------------------------


async def test_a_lower_epoch_is_refused_and_told_the_higher(house: AgentHouse) -> None:
    await house.fence(epoch=3)
    with pytest.raises(StaleEpoch) as caught:
        await house.ask(_lift(house, 2))
    assert caught.value.facts["seen"] == 3
    assert is_locked(house.image)


async def test_a_higher_epoch_is_answered_only_when_the_lower_ones_pass_has_ended(house: AgentHouse) -> None:
    async with trio.open_nursery() as nursery:
        outcome = await _begin_pass(house, nursery)
        await house.fence(epoch=2)
        assert not house.service.passes.is_running("web")
        await until(lambda: outcome.over)
        assert isinstance(outcome.error, PassEnded)


class _SlowTargets:
    """Opening the targets takes until the test lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go_on, self.closed = threading.Event(), threading.Event(), False
        really, slow = open_target, self

        def slowly(*arguments: object, **options: bool) -> object:
            slow.began.set()
            assert slow.go_on.wait(20)
            disk = really(*arguments, **options)  # type: ignore[arg-type]
            close = disk.close

            def closing() -> None:
                close()
                slow.closed = True

            disk.close = closing  # type: ignore[method-assign]
            return disk

        monkeypatch.setattr(passrun, "open_target", slowly)


async def test_a_pass_that_is_only_opening_its_disks_counts_as_running(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = _SlowTargets(monkeypatch)
    async with trio.open_nursery() as nursery:
        passing = await _begin_pass(house, nursery)
        await until(slow.began.is_set)
        newer = Outcome()
        nursery.start_soon(newer.watch, partial(house.fence, epoch=2))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not newer.over, "a higher epoch was acknowledged while the pass of the lower one was on its way"
        assert house.service.ledger.epoch("web") == 1
        slow.go_on.set()
        await until(lambda: newer.over)
        assert newer.error is None
        assert slow.closed
        await until(lambda: passing.over)
        assert isinstance(passing.error, PassEnded)


async def test_an_order_that_is_cancelled_while_it_ends_a_pass_leaves_the_ending_to_the_next(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = _SlowTargets(monkeypatch)
    async with trio.open_nursery() as nursery:
        await _begin_pass(house, nursery)
        await until(slow.began.is_set)
        with trio.move_on_after(0.05):  # the coordinator's connection is lost
            await house.fence(epoch=2)
        newer = Outcome()
        nursery.start_soon(newer.watch, partial(house.fence, epoch=3))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not newer.over
        slow.go_on.set()
        await until(lambda: newer.over)
        assert newer.error is None
        assert slow.closed


# --- grants ---------------------------------------------------------------------------------------------------------


async def test_one_grant_is_good_for_one_pass(house: AgentHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = _SlowTargets(monkeypatch)
    async with trio.open_nursery() as nursery:
        outcome = await _begin_pass(house, nursery)
        with pytest.raises(Forbidden, match="runs already"):
            await house.ask(house.run_pass())
        slow.go_on.set()
        await house.ask(_lift(house))
        await until(lambda: outcome.over)
        with pytest.raises(Forbidden, match="grant it first"):
            await house.ask(house.run_pass())


async def test_a_grant_with_odd_letters_is_refused_like_any_other(house: AgentHouse) -> None:
    await house.fence()
    await house.allow()
    odd = house.run_pass()
    with pytest.raises(Forbidden):
        await house.ask(type(odd)(order=odd.order, grant="ä" * 32, peer_name="", peer_host="", peer_port=0))


async def test_a_pass_that_fails_uses_its_grant_up_and_closes_every_disk(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.fence()
    await house.allow()
    closed: list[str] = []
    really = open_target

    def opening(*arguments: object, **options: bool) -> RawDisk:
        disk = really(*arguments, **options)  # type: ignore[arg-type]
        assert isinstance(disk, RawDisk)
        close = disk.close

        def closing() -> None:
            close()
            closed.append(disk.name)
            raise DiskError("it did not end in order")

        monkeypatch.setattr(disk, "close", closing)
        return disk

    def fail(*_: object) -> None:
        raise DiskError("they do not fit")

    monkeypatch.setattr(passrun, "open_target", opening)
    monkeypatch.setattr(house.service.runner, "_check_sizes", fail)
    with pytest.raises(DiskError, match="they do not fit"):
        await house.ask(house.run_pass())
    assert closed == ["vda"]
    with pytest.raises(Forbidden):
        await house.ask(house.run_pass())


# --- fences and passes ----------------------------------------------------------------------------------------------


async def test_lifting_a_fence_ends_the_pass_that_writes_behind_it_first(house: AgentHouse) -> None:
    async with trio.open_nursery() as nursery:
        outcome = await _begin_pass(house, nursery)
        await house.ask(_lift(house))
        assert not house.service.passes.is_running("web")
        assert not is_locked(house.image)
        await until(lambda: outcome.over)


async def test_a_torn_original_is_neither_lifted_nor_started_nor_called_whole(house: AgentHouse) -> None:
    await house.fence()
    await house.ask(_condition(house, Condition.TORN))
    for request in (
        _lift(house),
        _condition(house, Condition.INTACT),
        _condition(house, Condition.EQUALS_VIEW, "r1-1"),
    ):
        with pytest.raises(Torn):
            await house.ask(request)
    with pytest.raises(Fenced):
        await house.ask(PowerOn(order=order(), vm_uuid=house.vm.uuid))
    assert house.vm.state is PowerState.OFF
    assert is_locked(house.image)


async def test_nobody_calls_disks_whole_that_a_pass_is_writing_to(house: AgentHouse) -> None:
    async with trio.open_nursery() as nursery:
        outcome = await _begin_pass(house, nursery)
        with pytest.raises(Torn, match="still writing"):
            await house.ask(_condition(house, Condition.INTACT))
        await house.ask(_lift(house))
        await until(lambda: outcome.over)


async def test_another_pairs_orders_do_not_touch_a_fence(house: AgentHouse) -> None:
    await house.fence()
    other = order(7, pair="other")
    with pytest.raises(Held, match="web"):
        await house.ask(LiftFence(order=other, vm_uuid=house.vm.uuid, restore_autostart=False))
    with pytest.raises(Held):
        await house.ask(SetCondition(order=other, vm_uuid=house.vm.uuid, condition=Condition.TORN, view=None))
    with pytest.raises(Held, match="web"):
        await house.ask(PowerOn(order=other, vm_uuid=house.vm.uuid))
    assert house.service.ledger.condition(house.vm.uuid) is None


async def test_a_start_that_may_have_happened_leaves_no_claim_that_the_disks_equal_a_view(house: AgentHouse) -> None:
    record = ConditionRecord(vm_uuid=house.vm.uuid, condition=DiskCondition.EQUALS_VIEW, view="r1-2")
    house.service.ledger.put_condition(record)

    def die(uuid: str) -> None:
        house.machine.domains[uuid].state = PowerState.RUNNING
        raise HypervisorError("the connection was lost, its outcome is unknown")

    house.service.hypervisor.power_on = die  # type: ignore[method-assign]
    with pytest.raises(HypervisorError):
        await house.ask(PowerOn(order=order(), vm_uuid=house.vm.uuid))
    said = house.service.ledger.condition(house.vm.uuid)
    assert said is not None
    assert said.condition is DiskCondition.INTACT


async def test_protecting_and_going_back_leaves_the_fence_whole(house: AgentHouse) -> None:
    await house.fence(Side.REPLICA)
    uuid, snapshot = house.vm.uuid, "failback-web-r1"
    answer = await house.ask(Protect(order=order(), vm_uuid=uuid, targets=("vda",), snapshot=snapshot))
    assert isinstance(answer, Protected)
    overlay = Path(answer.disks[0].overlay)
    assert is_locked(overlay)
    # The agent dies after dropping it and before it says so: the order comes again.
    for _ in range(2):
        await house.ask(Unprotect(order=order(2), vm_uuid=uuid, snapshot=snapshot))
    fence = await house.fence(Side.REPLICA, epoch=2)
    assert isinstance(fence, FenceDescription)
    assert (fence.locked, fence.unlocked) == (("vda",), ())
    assert not await trio.Path(overlay).exists()


# --- questions ------------------------------------------------------------------------------------------------------


async def test_our_own_lock_does_not_count_as_somebody_elses(house: AgentHouse) -> None:
    await house.fence()
    answer = await house.ask(AskPower(vm_uuid=house.vm.uuid))
    assert isinstance(answer, PowerAnswer)
    assert answer.images_free
    described = await house.ask(InspectVm(vm="web"))
    assert isinstance(described, VmDescription)
    assert described.fence is not None
    assert described.fence.locked == ("vda",)


async def test_images_that_cannot_be_looked_at_are_not_called_free(house: AgentHouse) -> None:
    house.image.unlink()
    with pytest.raises(HypervisorError, match="vda"):
        await house.ask(AskPower(vm_uuid=house.vm.uuid))


async def test_a_view_of_a_vm_that_is_gone_can_be_closed(house: AgentHouse) -> None:
    del house.machine.domains[house.vm.uuid]
    await house.ask(CloseView(order=order(), vm_uuid=house.vm.uuid, view="r1-1"))


def _kill_agent_with_view(house: AgentHouse, view: str) -> ViewDesk:
    """An agent opens a view of the running VM and is killed; returns the desk of the one after it."""
    house.vm.state = PowerState.RUNNING
    ledger = house.service.ledger
    ledger.put_view(ViewRecord(vm_uuid=house.vm.uuid, view=view))
    house.service.hypervisor.open_view(house.vm.uuid, ["vda"], tag_of(view))
    return ViewDesk(house.service.hypervisor, house.service.fences, house.folder)


async def test_a_view_that_a_killed_agent_left_is_closed_by_the_next(house: AgentHouse) -> None:
    desk = _kill_agent_with_view(house, "r1-1")
    assert house.vm.view is not None
    assert desk.close_orphans() == ()
    assert house.machine.domains[house.vm.uuid].view is None
    assert house.service.ledger.contents.views == ()


async def test_an_orphaned_view_is_closed_when_libvirt_answers_again(house: AgentHouse) -> None:
    desk = _kill_agent_with_view(house, "r1-1")
    closing = desk.hypervisor.close_view

    def down(uuid: str, tag: str) -> None:
        raise HypervisorUnreachable("no libvirt")

    desk.hypervisor.close_view = down  # type: ignore[method-assign]
    assert [error.sentence for error in desk.close_orphans()] == ["no libvirt"]
    desk.hypervisor.close_view = closing  # type: ignore[method-assign]
    assert desk.close_orphans() == ()
    assert house.service.ledger.contents.views == ()


async def test_a_view_of_a_vm_that_is_off_needs_this_pairs_fence(house: AgentHouse) -> None:
    view = OpenView(order=order(), vm_uuid=house.vm.uuid, targets=("vda",), view="r1-2")
    with pytest.raises(NotFenced):
        await house.ask(view)
    await house.fence(Side.REPLICA)
    await house.ask(view)
    # A newer view of the same pair takes the place of one that nobody closed.
    await house.ask(OpenView(order=order(2), vm_uuid=house.vm.uuid, targets=("vda",), view="r2-2"))
    await house.service.stop()
    assert not house.service.views.is_open(house.vm.uuid)
    assert not is_locked(house.image)


async def test_stopping_ends_passes_and_leaves_no_descriptor(house: AgentHouse) -> None:
    before = descriptors()
    async with trio.open_nursery() as nursery:
        outcome = await _begin_pass(house, nursery)
        await house.service.stop()
        await until(lambda: outcome.over)
    assert descriptors() <= before


async def test_errors_cross_the_wire_with_their_code_and_defects_do_not(house: AgentHouse) -> None:
    failure = failure_of(StaleEpoch("an order", seen=4))
    assert failure is not None
    assert (failure.code, failure.facts) == ("stale-epoch", {"seen": 4})
    assert failure_of(ZeroDivisionError()) is None


# --- views that outlive their agent -----------------------------------------------------------------------------------


def _served(house: AgentHouse, monkeypatch: pytest.MonkeyPatch) -> OpenView:
    """A view of the running VM is opened, whose NBD server is the image itself; the order that opens it again."""

    def from_file(target: str, _socket: Path, _export: str) -> RawDisk:
        return RawDisk.open(target, house.image, writable=False)

    for module in (sources, opened_view):
        monkeypatch.setattr(module, "open_view", from_file)
    house.vm.state = PowerState.RUNNING
    house.service.views.open("web", house.vm.uuid, ("vda",), "r1-1", track=True)
    return OpenView(order=order(), vm_uuid=house.vm.uuid, targets=("vda",), view="r1-1", reopen=True)


def _restarted(house: AgentHouse) -> ViewDesk:
    """The desk of the next agent process, with the ledger of the one that was killed."""
    house.service.views = ViewDesk(house.service.hypervisor, house.service.fences, house.folder)
    return house.service.views


async def test_the_next_agent_reads_the_view_of_a_killed_one_again(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = _served(house, monkeypatch)
    frozen = house.vm.view
    desk = _restarted(house)
    assert desk.close_orphans() == ()
    opened = await house.ask(again)
    assert isinstance(opened, ViewOpened)
    assert (opened.view, opened.live, [disk.target for disk in opened.disks]) == ("r1-1", True, ["vda"])
    assert house.vm.view is frozen
    await house.ask(CloseView(order=order(), vm_uuid=house.vm.uuid, view="r1-1"))
    assert house.vm.view is None
    assert house.service.ledger.contents.views == ()


async def test_a_view_that_nobody_asks_for_is_closed_in_time(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    _served(house, monkeypatch)
    desk = _restarted(house)
    assert desk.close_orphans() == ()
    assert house.machine.domains[house.vm.uuid].view is not None
    monkeypatch.setattr(sources, "UNCLAIMED_FOR_S", -1.0)
    assert desk.close_orphans() == ()
    assert house.machine.domains[house.vm.uuid].view is None


@pytest.mark.parametrize("change", ["other name", "other disks", "job ended", "vm off", "record damaged"])
async def test_a_view_that_is_not_what_it_was_is_not_opened_again(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    again = _served(house, monkeypatch)
    match change:
        case "other name":
            again = replace(again, view="r1-2")
        case "other disks":
            again = replace(again, targets=("vda", "vdb"))
        case "job ended":
            house.vm.view = None
        case "vm off":
            house.vm.state, house.vm.view = PowerState.OFF, None
        case _:
            (house.service.ledger.folder / "views" / f"{house.vm.uuid}.json").write_text("{")
    desk = _restarted(house)
    with pytest.raises(NoSuchView):
        await house.ask(again)
    assert desk.close_orphans() == ()
