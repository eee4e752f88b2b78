"""What proves that a disk equals a view, on real files and locks: believed too seldom, never too often."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from agent.disk.dirty import DirtyRanges
from agent.equals import EqualsBook
from agent.errors import NoEvidence
from agent.evidence import EvidenceDesk
from agent.fences import FenceKeeper
from agent.maps import MapDesk
from agent.opened_view import OpenedView
from agent.passrun import _check_written
from protocol.messages import AskEvidence, Evidence, GrantedDisk, LiftFence, PowerOn
from tests.fakes.memory_dirty import MemoryDirtyRanges
from tests.unit.agent_house import SIZE_BYTES, AgentHouse, open_house, order

VIEW = "r1-1"


@dataclass
class House:
    """A fenced original, and what its agent can prove."""

    agent: AgentHouse

    @property
    def desk(self) -> EvidenceDesk:
        return self.agent.service.evidence

    @property
    def uuid(self) -> str:
        return self.agent.vm.uuid

    def equals(self) -> str | None:
        return self.desk.proof(self.uuid, "vda").view

    def why_not(self) -> str:
        return self.desk.proof(self.uuid, "vda").why_not

    def passed(self, view: str = VIEW) -> None:
        """A pass that compares is verified."""
        self.desk.before_writing(self.uuid, granted(None))
        self.write()
        self.desk.equals_now(self.uuid, view, ["vda"])

    def write(self) -> None:
        with self.agent.image.open("r+b") as file:
            file.write(b"changed")

    def write_unseen(self) -> None:
        """By somebody who sets the file's time back."""
        before = self.agent.image.stat()
        self.write()
        os.utime(self.agent.image, ns=(before.st_atime_ns, before.st_mtime_ns))

    def restarted(self) -> EvidenceDesk:
        """The agent is gone, its locks with it, and another one starts."""
        service = self.agent.service
        service.fences.close()
        service.fences = FenceKeeper(service.ledger, service.hypervisor)
        assert not service.fences.restore()
        service.evidence = EvidenceDesk(
            service.fences,
            EqualsBook.open(service.ledger.folder),
            MapDesk(service.config.state_dir, service.fences),
        )
        return service.evidence


def granted(since: str | None) -> GrantedDisk:
    return GrantedDisk(
        target="vda", peer_target="vda", source_size_bytes=SIZE_BYTES, target_size_bytes=SIZE_BYTES, since=since
    )


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with open_house(tmp_path) as agent:
        agent.service.fences.fence(agent.vm.uuid, pair="web", run="r1", side="original", targets=["vda"])
        yield House(agent)


def test_a_disk_that_no_pass_has_written_equals_nothing(house: House) -> None:
    assert house.equals() is None
    assert "no pass" in house.why_not()


def test_a_verified_disk_equals_its_view_under_its_lock_and_after_a_restart(house: House) -> None:
    house.passed()
    assert house.equals() == VIEW
    house.restarted()
    assert house.equals() == VIEW
    house.desk.require(house.uuid, granted(VIEW))


@pytest.mark.parametrize("restart", [False, True])
def test_an_image_written_behind_the_locks_back_equals_nothing(house: House, restart: bool) -> None:
    house.passed()
    if restart:
        house.restarted()
    house.write()
    assert house.equals() is None
    assert "mtime_ns" in house.why_not()
    with pytest.raises(NoEvidence, match="run a pass that compares"):
        house.desk.require(house.uuid, granted(VIEW))


@pytest.mark.parametrize("restart", [False, True])
def test_times_that_are_put_back_are_betrayed_by_the_inode(house: House, restart: bool) -> None:
    house.passed()
    if restart:
        house.restarted()
    house.write_unseen()
    assert house.equals() is None
    assert "ctime_ns" in house.why_not()


def test_an_owner_that_is_set_anew_costs_the_proof_and_is_not_called_a_write(house: House) -> None:
    house.passed()
    os.chown(house.agent.image, os.getuid(), os.getgid())  # as libvirt does when somebody tries to start the VM
    proof = house.desk.proof(house.uuid, "vda")
    assert proof.view is None
    assert not proof.touched


def test_a_verification_in_full_proves_what_the_files_were_before_it_read_them(house: House) -> None:
    before = house.desk.before_verifying(house.uuid, ["vda"])
    house.desk.verified(house.uuid, VIEW, before)
    assert house.equals() == VIEW
    house.write_unseen()
    assert house.equals() is None


def test_a_write_while_a_verification_reads_leaves_nothing_proven(house: House) -> None:
    house.passed()
    before = house.desk.before_verifying(house.uuid, ["vda"])
    house.write_unseen()
    house.desk.verified(house.uuid, VIEW, before)
    assert house.equals() is None


def test_a_lock_that_was_lost_while_a_verification_read_leaves_what_was_known(house: House) -> None:
    before = house.desk.before_verifying(house.uuid, ["vda"])
    house.restarted()
    house.desk.verified(house.uuid, VIEW, before)
    assert house.equals() is None
    assert "no pass" in house.why_not()


def test_an_image_that_was_replaced_equals_nothing(house: House) -> None:
    house.passed()
    content = house.agent.image.read_bytes()
    house.agent.image.rename(house.agent.folder / "old.raw")
    house.agent.image.write_bytes(content)
    assert house.equals() is None
    house.restarted()
    assert house.equals() is None


def test_after_another_boot_times_prove_nothing(house: House) -> None:
    house.passed()
    record = house.desk.book.of(house.uuid, "vda")
    assert record is not None
    assert record.stamp is not None
    house.desk.book.put(replace(record, stamp=replace(record.stamp, boot="another")))
    house.restarted()
    assert "started anew" in house.why_not()


def test_without_a_stamp_the_lock_alone_proves(house: House) -> None:
    house.passed()
    record = house.desk.book.of(house.uuid, "vda")
    assert record is not None
    house.desk.book.put(replace(record, stamp=None))  # as of a block device
    assert house.equals() == VIEW
    house.restarted()
    assert "lock" in house.why_not()


def test_a_comparing_pass_that_breaks_off_leaves_nothing(house: House) -> None:
    house.passed()
    house.desk.before_writing(house.uuid, granted(None))
    house.write()
    house.desk.broken_off(house.uuid, ["vda"])
    assert house.equals() is None


def test_a_tracked_pass_that_breaks_off_leaves_the_disk_torn_from_its_base(house: House) -> None:
    house.passed()
    house.desk.require(house.uuid, granted(VIEW))
    house.desk.before_writing(house.uuid, granted(VIEW))
    house.write()
    house.desk.broken_off(house.uuid, ["vda"])
    record = house.desk.book.of(house.uuid, "vda")
    assert record is not None
    assert record.torn
    assert house.equals() == VIEW
    house.restarted()
    assert house.equals() == VIEW  # nobody wrote since it was closed
    house.write()
    assert house.equals() is None


def test_an_agent_that_dies_in_a_tracked_pass_leaves_nothing_proven(house: House) -> None:
    house.passed()
    house.desk.require(house.uuid, granted(VIEW))
    house.desk.before_writing(house.uuid, granted(VIEW))
    house.write()
    house.restarted()
    assert house.equals() is None


def test_a_grant_of_another_view_is_refused(house: House) -> None:
    house.passed()
    with pytest.raises(NoEvidence, match=f"it equals the view {VIEW}"):
        house.desk.require(house.uuid, granted("r1-7"))


def test_a_record_that_cannot_be_read_proves_nothing(house: House) -> None:
    house.passed()
    house.desk.book.path.write_text("{", encoding="utf-8")
    house.restarted()
    assert house.equals() is None


async def test_lifting_the_fence_forgets_and_powering_on_does(house: House) -> None:
    house.passed()
    asked = AskEvidence(vm_uuid=house.uuid, targets=("vda",))
    told = await house.agent.ask(asked)
    assert isinstance(told, Evidence)
    assert told.disks[0].equals == VIEW
    await house.agent.ask(LiftFence(order=order(), vm_uuid=house.uuid, restore_autostart=False))
    assert house.desk.book.of(house.uuid, "vda") is None
    house.agent.service.fences.fence(house.uuid, pair="web", run="r1", side="original", targets=["vda"])
    assert house.equals() is None
    house.passed()
    house.agent.service.fences.lift(house.uuid, pair="web", restore_autostart=False)
    await house.agent.ask(PowerOn(order=order(), vm_uuid=house.uuid))
    assert house.desk.book.of(house.uuid, "vda") is None


async def test_a_granted_view_is_proven_again_by_the_target_when_its_pass_begins(house: House) -> None:
    house.passed()
    await house.agent.allow(view="r1-2", since="r1-9")
    with pytest.raises(NoEvidence, match="granted as equal to the view r1-9"):
        await house.agent.ask(house.agent.run_pass())
    assert house.equals() == VIEW  # nothing was written


def test_a_view_that_does_not_tell_what_was_written_is_no_source_of_a_tracked_pass() -> None:
    def view(since: dict[str, str], written: dict[str, DirtyRanges]) -> OpenedView:
        return OpenedView("web", "r1-2", live=True, since=since, dirty=written)

    whole, short = MemoryDirtyRanges(SIZE_BYTES, []), MemoryDirtyRanges(SIZE_BYTES - 512, [])
    _check_written(view({"vda": VIEW}, {"vda": whole}), [granted(VIEW)])
    _check_written(view({}, {}), [granted(None)])
    for wrong in (view({}, {}), view({"vda": "r1-0"}, {"vda": whole}), view({"vda": VIEW}, {"vda": short})):
        with pytest.raises(NoEvidence, match="does not tell what was written"):
            _check_written(wrong, [granted(VIEW)])


async def test_a_disk_that_somebody_else_wrote_to_is_told_apart_from_one_of_which_nothing_is_known(
    house: House,
) -> None:
    async def touched() -> bool:
        told = await house.agent.ask(AskEvidence(vm_uuid=house.uuid, targets=("vda",)))
        assert isinstance(told, Evidence)
        return told.disks[0].touched

    assert not await touched()
    house.passed()
    assert not await touched()
    record = house.desk.book.of(house.uuid, "vda")
    assert record is not None
    assert record.stamp is not None
    house.restarted()
    house.desk.book.put(replace(record, stamp=replace(record.stamp, boot="another")))
    assert house.equals() is None
    assert not await touched()
    house.desk.book.put(record)
    house.write()
    assert await touched()
