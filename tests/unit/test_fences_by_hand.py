"""A person lifts a fence on the host: all of it, with an agent or without, and every later run is told."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from agent import hand
from agent.checkup import file_system_of
from agent.errors import HypervisorError, HypervisorUnreachable
from agent.fences import NotFenced
from agent.ledger import ConditionRecord, DiskCondition, Ledger
from agent.local import LocalRefused, NoAgent, asked_lift, asked_listing, listen_locally, serve_locally
from protocol.messages import AskEvidence, Condition, Evidence, InspectVm, LiftFence, Side, VmDescription
from tests.unit.agent_house import AgentHouse, is_locked, open_house, order


@pytest.fixture
def house(tmp_path: Path) -> Iterator[AgentHouse]:
    with open_house(tmp_path) as opened:
        opened.vm.autostart = True
        yield opened


async def _described(house: AgentHouse) -> VmDescription:
    told = await house.ask(InspectVm(vm="web"))
    assert isinstance(told, VmDescription)
    return told


def _down(*_: object, **__: object) -> bool:
    raise HypervisorUnreachable("Cannot connect to libvirt")


def _lift(house: AgentHouse, vm: str = "web") -> None:
    hand.lift(house.service.fences, house.service.evidence, vm, by="root", reason="the DR site is gone")


@pytest.mark.parametrize(
    ("flag", "then"),
    [
        (DiskCondition.TORN, DiskCondition.TORN),
        (DiskCondition.EQUALS_VIEW, DiskCondition.INTACT),
        (DiskCondition.INTACT, DiskCondition.INTACT),
    ],
)
async def test_nothing_of_the_fence_is_left_and_nothing_is_claimed(
    house: AgentHouse, flag: DiskCondition, then: DiskCondition
) -> None:
    await house.fence()
    view = "r1-1" if flag is DiskCondition.EQUALS_VIEW else None
    house.service.evidence.equals_now(house.vm.uuid, "r1-1", ["vda"])
    house.service.ledger.put_condition(ConditionRecord(vm_uuid=house.vm.uuid, condition=flag, view=view))
    assert not (await _described(house)).autostart
    _lift(house)
    assert (await _described(house)).autostart
    assert not is_locked(house.image)
    assert house.service.fences.condition(house.vm.uuid) is then
    evidence = await house.ask(AskEvidence(vm_uuid=house.vm.uuid, targets=("vda",)))
    assert isinstance(evidence, Evidence)
    assert evidence.disks[0].equals is None
    told = await _described(house)
    assert told.fence is None
    assert told.lifted is not None
    assert (told.lifted.by, told.lifted.reason) == ("root", "the DR site is gone")
    assert told.lifted.condition is Condition(flag.value)


async def test_that_it_was_lifted_is_kept_until_a_run_has_fenced_and_released_the_vm(house: AgentHouse) -> None:
    await house.fence()
    _lift(house)
    await house.fence()
    assert (await _described(house)).lifted is not None
    await house.ask(LiftFence(order=order(), vm_uuid=house.vm.uuid, restore_autostart=True))
    assert (await _described(house)).lifted is None


async def test_without_libvirt_the_fence_is_lifted_and_autostart_given_back_later(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.fence()
    with monkeypatch.context() as patched:
        patched.setattr(house.service.hypervisor, "set_autostart", _down)
        record = hand.lift(house.service.fences, house.service.evidence, "web", by="root", reason="libvirt is broken")
        assert record.autostart_due
        assert not is_locked(house.image)
        assert [error.code for error in house.service.fences.mend()] == ["hypervisor-unreachable"]
    assert house.service.fences.fence_of(house.vm.uuid) is None
    assert not (await _described(house)).autostart
    assert not house.service.fences.mend()
    assert (await _described(house)).autostart
    house.service.hypervisor.set_autostart(house.vm.uuid, enabled=False)  # from here on it is the administrator's
    assert not house.service.fences.mend()
    assert not (await _described(house)).autostart


async def test_a_vm_that_is_fenced_again_before_libvirt_answered_keeps_the_autostart_it_is_owed(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.fence()
    with monkeypatch.context() as patched:
        patched.setattr(house.service.hypervisor, "set_autostart", _down)
        _lift(house)
    await house.fence()
    assert not house.service.fences.mend()
    assert not (await _described(house)).autostart  # fenced
    await house.ask(LiftFence(order=order(), vm_uuid=house.vm.uuid, restore_autostart=True))
    assert (await _described(house)).autostart


async def test_a_libvirt_that_answers_and_refuses_keeps_the_fence(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.fence()

    def refuses(*_: object, **__: object) -> bool:
        raise HypervisorError("autostart cannot be set")

    monkeypatch.setattr(house.service.hypervisor, "set_autostart", refuses)
    with pytest.raises(HypervisorError):
        _lift(house)
    assert house.service.fences.fence_of(house.vm.uuid) is not None
    assert is_locked(house.image)


async def test_who_is_not_fenced_is_told_so(house: AgentHouse) -> None:
    with pytest.raises(NotFenced, match="fence list"):
        _lift(house, "nobody")
    await house.fence(Side.REPLICA)
    _lift(house, house.vm.uuid)
    with pytest.raises(NotFenced, match="root lifted"):
        _lift(house)


async def test_a_running_agent_is_asked_on_its_socket(house: AgentHouse) -> None:
    await house.fence()
    runtime = house.service.config.runtime_dir
    asking = partial(trio.to_thread.run_sync, abandon_on_cancel=True)
    with pytest.raises(NoAgent):
        await asking(asked_listing, runtime)
    listener = await listen_locally(house.service.config)
    assert (runtime / "local.sock").stat().st_mode & 0o777 == 0o600
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_locally, house.service, listener)
            listed = await asking(asked_listing, runtime)
            assert listed.agent_runs
            (fence,) = listed.fences
            assert (fence.vm_name, fence.pair, fence.side, fence.unlocked) == ("web", "web", "original", ())
            with pytest.raises(LocalRefused, match="no VM nobody"):
                await asking(partial(asked_lift, runtime, "nobody", by="root", reason="x"))
            lifted = await asking(partial(asked_lift, runtime, "web", by="root", reason="why not"))
            assert (lifted.vm_name, lifted.reason) == ("web", "why not")
            listed = await asking(asked_listing, runtime)
            assert (listed.fences, listed.lifts) == ((), (lifted,))
            nursery.cancel_scope.cancel()
    assert not is_locked(house.image)


async def test_a_lift_ends_the_pass_that_writes_to_the_vm(house: AgentHouse) -> None:
    await house.fence()
    await house.allow()
    listener = await listen_locally(house.service.config)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_locally, house.service, listener)
            await trio.to_thread.run_sync(
                partial(asked_lift, house.service.config.runtime_dir, "web", by="root", reason="x"),
                abandon_on_cancel=True,
            )
            nursery.cancel_scope.cancel()
    with pytest.raises(Exception, match="no pass of the pair web is granted"):
        await house.ask(house.run_pass())


def test_what_a_person_did_is_durable(tmp_path: Path) -> None:
    with open_house(tmp_path) as house:
        house.service.fences.fence(house.vm.uuid, pair="web", run="r1", side="original", targets=["vda"])
        _lift(house)
    ledger = Ledger.open(tmp_path / "state")
    record = ledger.lift_of(house.vm.uuid)
    assert record is not None
    assert (record.by, record.vm_name, record.run) == ("root", "web", "r1")
    ledger.close()


MOUNTS = """22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:5 / /var/lib rw - xfs /dev/sdb rw
31 30 0:9 / /var/lib/my\\040state rw shared:1 - nfs4 server:/x rw
40 22 0:7 / /run rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/etc", "ext4"), ("/var/lib/failback", "xfs"), ("/var/lib/my state/a", "nfs4"), ("/run/x", "tmpfs")],
)
def test_the_file_system_of_the_state_folder_is_told_from_the_mounts(path: str, kind: str) -> None:
    assert file_system_of(Path(path), MOUNTS) == kind
