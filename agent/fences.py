"""Fences: what keeps a VM from starting while its disks are ours.

A fence is durable (the ledger) and enforced three times: autostart off, image locks held by this process (taken again
after a restart), and, where it is installed, libvirt's hook, which reads a list that the ledger keeps. Image locks are
advisory and end with the process that holds them, which is why an unlocked image is always told
(`FenceKeeper.unlocked`), never assumed away. All methods block and may be called from several worker threads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from agent.disk.lock import HeldImage, hold_exclusive, hold_frozen
from agent.errors import AgentError, DiskError, HypervisorError, HypervisorUnreachable, NoSuchDomain
from agent.ledger import ConditionRecord, DiskCondition, FencedImage, FenceRecord, Ledger, LockKind
from agent.lift_record import LiftRecord
from agent.virt.seam import Domain, Hypervisor, PowerState

ORIGINAL = "original"
"""The side of a fence whose VM's disks a pass writes to."""


class Fenced(AgentError):
    """The VM is fenced, and what was asked for must not happen to a fenced VM."""

    code = "fenced"


class Torn(AgentError):
    """The disks are torn: written in part, not verified. They must not boot."""

    code = "torn"


class NotFenced(AgentError):
    """What was asked for is allowed only to a fenced VM."""

    code = "not-fenced"


@dataclass
class FenceKeeper:
    """The fences of this host. Work on one VM is done one call at a time, whichever pair or thread it comes from."""

    ledger: Ledger
    hypervisor: Hypervisor
    _held: dict[Path, HeldImage] = field(default_factory=dict)
    _turns: dict[str, threading.RLock] = field(default_factory=dict)
    _unseen: set[str] = field(default_factory=set)

    # --- asking ---------------------------------------------------------------------------------------------------

    def fence_of(self, vm_uuid: str) -> FenceRecord | None:
        """The durable record of the fence on that VM."""
        return self.ledger.fence(vm_uuid)

    def required(self, vm_uuid: str, side: str, pair: str) -> FenceRecord:
        """The fence on that VM, whole: of that side and pair, every image locked.

        Raises:
            NotFenced: there is none, it is another's, or a lock is missing.
        """
        fence = self.ledger.fence(vm_uuid)
        if fence is None or fence.side != side or fence.pair != pair:
            raise NotFenced(
                f"the VM {vm_uuid} is not fenced on this host as the {side} of the pair {pair}: the run must fence it "
                "first"
            )
        missing = self.unlocked(fence)
        if missing:
            raise NotFenced(
                f"the fence on the {side} {vm_uuid} has lost the lock of {', '.join(missing)}: "
                "make sure that nothing uses the image, then let the run fence it again"
            )
        return fence

    def unlocked(self, fence: FenceRecord) -> tuple[str, ...]:
        """Targets of the fence that have an image whose file, as it is found by its path now, we do not hold."""
        return tuple(dict.fromkeys(image.target for image in fence.images if not self._holds(image)))

    def locked(self, fence: FenceRecord) -> tuple[str, ...]:
        """Targets of the fence whose every image this process holds."""
        missing = self.unlocked(fence)
        return tuple(dict.fromkeys(image.target for image in fence.images if image.target not in missing))

    def held(self, path: Path) -> HeldImage | None:
        """The lock this process holds on that image."""
        return self._held.get(path)

    def condition(self, vm_uuid: str) -> DiskCondition:
        """The flag of that VM's disks."""
        record = self.ledger.condition(vm_uuid)
        return record.condition if record else DiskCondition.INTACT

    # --- after a restart ------------------------------------------------------------------------------------------

    def restore(self) -> tuple[AgentError, ...]:
        """After a restart: take the locks of every durable fence back; returns what could not be taken.

        It needs no libvirt, which may not be up yet, or hang; the rest is for `mend`.
        """
        failed: list[AgentError] = []
        for fence in self.ledger.contents.fences:
            self._unseen.add(fence.vm_uuid)
            with self._turn(fence.vm_uuid):
                failed += self._hold_all(fence)
        return tuple(failed)

    def mend(self) -> tuple[AgentError, ...]:
        """Take what is missing of every durable fence; returns what still is. Cheap where nothing is.

        The former process may have died between any two lines, storage may have come up after us, an image may have
        been replaced: what the ledger promises is brought about, or told.
        """
        failed: list[AgentError] = []
        for known in self.ledger.contents.fences:
            with self._turn(known.vm_uuid):
                fence = self.ledger.fence(known.vm_uuid)
                if fence is None:
                    continue
                failed += self._hold_all(fence)
                if known.vm_uuid in self._unseen:
                    failed += self._look(fence)
        return (*failed, *self._give_autostart_back())

    def _give_autostart_back(self) -> list[AgentError]:
        """To VMs whose fence was lifted by hand while libvirt did not answer, and that are not fenced again."""
        failed: list[AgentError] = []
        for lifted in self.ledger.contents.lifts:
            if not lifted.autostart_due:
                continue
            with self._turn(lifted.vm_uuid):
                if self.ledger.fence(lifted.vm_uuid) is not None:
                    continue
                try:
                    self._set_autostart(lifted.vm_uuid)
                except AgentError as error:
                    failed.append(error)
                    continue
                self.ledger.lift_by_hand(replace(lifted, autostart_due=False), None)
        return failed

    def _set_autostart(self, vm_uuid: str) -> None:
        with contextlib.suppress(NoSuchDomain):  # deleted: nothing is left that could start
            self.hypervisor.set_autostart(vm_uuid, enabled=True)

    def _hold_all(self, fence: FenceRecord) -> list[AgentError]:
        failed: list[AgentError] = []
        for image in fence.images:
            try:
                self._hold(image)
            except DiskError as error:
                failed.append(error)
        return failed

    def _look(self, fence: FenceRecord) -> list[AgentError]:
        try:
            self._look_at(fence)
        except NoSuchDomain:
            pass  # deleted; its images stay locked, for it may be defined again
        except AgentError as error:
            return [error]
        self._unseen.discard(fence.vm_uuid)
        return []

    def _look_at(self, fence: FenceRecord) -> None:
        """Autostart off, and whatever the VM would start through locked: a snapshot of ours may be younger than the
        fence's record."""
        self.hypervisor.set_autostart(fence.vm_uuid, enabled=False)
        domain = self.hypervisor.inspect(fence.vm_uuid)
        if domain.state is not PowerState.OFF:
            raise Fenced(
                f"the VM {domain.name} is fenced for the pair {fence.pair} and yet is {domain.state.value}: it was "
                "started while no agent held its images; power it off"
            )
        self._take(replace(fence, images=self._images(domain, _targets(fence), fence.side, fence)), fence)

    # --- acting ---------------------------------------------------------------------------------------------------

    def fence(self, vm_uuid: str, *, pair: str, run: str, side: str, targets: Sequence[str]) -> FenceRecord:
        """Fence the shut-off VM; repeated, take what is missing, be it that the VM's disks are other images by now.

        The record is durable before the first lock is taken: a crash leaves a fence too many, never one too few.

        Raises:
            Fenced: another pair fences the VM, or an image of it as another VM's.
            DiskBusy: another process holds an image.
            HypervisorError: the VM is not off, or a target is missing.
        """
        with self._turn(vm_uuid):
            domain = self.hypervisor.inspect(vm_uuid)
            if domain.state is not PowerState.OFF:
                raise HypervisorError(
                    f"the VM {domain.name} is {domain.state.value}; only a VM that is off can be fenced: "
                    "power it off first"
                )
            old = self.ledger.fence(vm_uuid)
            if old is not None and old.pair != pair:
                raise Fenced(f"the VM {domain.name} is fenced for the pair {old.pair}: end that run first")
            lifted = self.ledger.lift_of(vm_uuid)
            owed = lifted is not None and lifted.autostart_due  # what the VM has now is not what it ought to have
            fence = FenceRecord(
                vm_uuid=vm_uuid,
                pair=pair,
                run=run,
                side=side,
                autostart_before=(domain.autostart or owed) if old is None else old.autostart_before,
                vm_name=domain.name,
                since_s=time.time() if old is None else old.since_s,
                images=self._images(domain, targets, side, old if old is not None and old.side == side else None),
            )
            self._check_shared(fence)
            self.ledger.put_fence(fence)
            self.hypervisor.set_autostart(vm_uuid, enabled=False)
            self._take(fence, old)
            return fence

    def refresh(self, vm_uuid: str) -> FenceRecord | None:
        """Lock what the fenced VM's disks are by now: a protective snapshot was taken or dropped."""
        with self._turn(vm_uuid):
            fence = self.ledger.fence(vm_uuid)
            if fence is None:
                return None
            domain = self.hypervisor.inspect(vm_uuid)
            fresh = replace(fence, images=self._images(domain, _targets(fence), fence.side, fence))
            self._take(fresh, fence)
            return fresh

    def forget_disks(self, vm_uuid: str, targets: Sequence[str]) -> None:
        """Let go of these disks of the VM, which are about to be removed; harmless where they are not fenced."""
        with self._turn(vm_uuid):
            fence = self.ledger.fence(vm_uuid)
            if fence is not None:
                kept = tuple(image for image in fence.images if image.target not in targets)
                self._take(replace(fence, images=kept), fence)

    def forget_vm(self, vm_uuid: str) -> None:
        """Forget fence, flag and locks of a VM that is removed with its disks; harmless when repeated."""
        with self._turn(vm_uuid):
            fence = self.ledger.fence(vm_uuid)
            self.ledger.drop_condition(vm_uuid)
            if fence is not None:
                self.ledger.drop_fence(vm_uuid)
                self._unseen.discard(vm_uuid)
                for image in fence.images:
                    self._release(image.path)

    def freeze(self, vm_uuid: str) -> None:
        """Let the fenced VM's images be read, and be written by nobody: overlays are about to be put over them. The
        next `fence` or `refresh` locks as the VM's disks are by then.

        Raises:
            NotFenced: there is no fence.
        """
        with self._turn(vm_uuid):
            fence = self.ledger.fence(vm_uuid)
            if fence is None:
                raise NotFenced(f"the VM {vm_uuid} is not fenced on this host: the run must fence it first")
            frozen = tuple(replace(image, kind=LockKind.FROZEN) for image in fence.images)
            self._take(replace(fence, images=frozen), fence)

    def lift(self, vm_uuid: str, *, pair: str, restore_autostart: bool, autostart: bool | None = None) -> None:
        """Release the locks and forget the fence; harmless when there is none.

        `restore_autostart` gives autostart back as it was before the fence, or as `autostart` says where that is known
        better: an earlier fence may have taken it away and been lifted without giving it back.

        Raises:
            Torn: the disks are torn.
            Fenced: the fence is another pair's.
        """
        with self._turn(vm_uuid):
            if self.condition(vm_uuid) is DiskCondition.TORN:
                raise Torn(
                    f"the disks of {vm_uuid} are torn (written in part, not verified) and must not boot: "
                    "let a run verify them"
                )
            fence = self.ledger.fence(vm_uuid)
            if fence is None:
                return
            if fence.pair != pair:
                raise Fenced(f"the VM {vm_uuid} is fenced for the pair {fence.pair}: {pair} cannot lift that fence")
            before = fence.autostart_before if autostart is None else autostart
            if restore_autostart and before:
                self._set_autostart(vm_uuid)
            self.ledger.drop_fence(vm_uuid)
            self._unseen.discard(vm_uuid)
            for image in fence.images:
                self._release(image.path)

    def lift_by_hand(self, fence: FenceRecord, *, by: str, reason: str) -> LiftRecord:
        """Lift the fence at a person's word, whatever it is for and whatever the disks hold; who, when and why stays in
        the ledger. Disks that equalled a view are out of our hands now; torn ones stay called torn. Where libvirt does
        not answer, autostart is owed (`mend` gives it back): a person on a host in trouble needs the fence gone now.

        Raises:
            HypervisorError: libvirt answers and does not give autostart back; nothing is changed then.
        """
        uuid = fence.vm_uuid
        with self._turn(uuid):
            flag = self.condition(uuid)
            due = False
            if fence.autostart_before:
                try:
                    self._set_autostart(uuid)
                except HypervisorUnreachable:
                    due = True
            record = LiftRecord(
                vm_uuid=uuid,
                vm_name=fence.vm_name,
                pair=fence.pair,
                run=fence.run,
                side=fence.side,
                condition=flag.value,
                by=by,
                reason=reason,
                at_s=time.time(),
                autostart_due=due,
            )
            whole = ConditionRecord(vm_uuid=uuid, condition=DiskCondition.INTACT)
            self.ledger.lift_by_hand(record, whole if flag is DiskCondition.EQUALS_VIEW else None)
            self._unseen.discard(uuid)
            for image in fence.images:
                self._release(image.path)
            return record

    def close(self) -> None:
        """Let go of every lock (the process is ending); the durable fences stay."""
        for path in tuple(self._held):
            self._held.pop(path).close()

    def turn(self, vm_uuid: str) -> threading.RLock:
        """Whoever holds this is alone with the fence of that VM: nobody fences or lifts meanwhile."""
        return self._turn(vm_uuid)

    def _turn(self, vm_uuid: str) -> threading.RLock:
        return self._turns.setdefault(vm_uuid, threading.RLock())

    def _check_shared(self, fence: FenceRecord) -> None:
        """One image cannot be held in two ways, nor written for two VMs."""
        for other in self.ledger.contents.fences:
            if other.vm_uuid == fence.vm_uuid:
                continue
            theirs = {image.path: image.kind for image in other.images}
            for image in fence.images:
                if image.path in theirs and {image.kind, theirs[image.path]} != {LockKind.FROZEN}:
                    raise Fenced(
                        f"the image {image.path} is fenced already, as a disk of the VM {other.vm_uuid} "
                        f"for the pair {other.pair}: end that run first"
                    )

    def _images(
        self, domain: Domain, targets: Sequence[str], side: str, old: FenceRecord | None
    ) -> tuple[FencedImage, ...]:
        """What a fence must lock: first what the VM's disks are now, then what the fence has locked before.

        A base under an overlay must stay as it is. An image that a disk was pointed away from stays locked as well,
        lest the disk be pointed back at it, unless it is gone or somebody else's by now.
        """
        before = () if old is None else old.images
        now = tuple(_top_image(domain, target, side, before) for target in targets)
        tops = {image.path for image in now}
        chains = {image.path for disk in domain.disks for image in disk.chain}
        former = [image for image in before if image.path not in tops]
        if side == ORIGINAL:
            now, former = _as_written(now), self._with_bases(domain.uuid, former, chains - tops)
        return now + tuple(image for image in former if image.path in chains or self._can_hold(image))

    def _with_bases(self, vm_uuid: str, former: Sequence[FencedImage], chains: set[Path]) -> list[FencedImage]:
        """What lies below the overlays of an original's working snapshot is frozen: undo gives it back."""
        bases = {
            image.base: FencedImage(
                target=image.target, path=image.base, format=image.base_format, kind=LockKind.FROZEN
            )
            for record in self.ledger.contents.protections
            if record.vm_uuid == vm_uuid
            for image in record.images
            if image.base in chains
        }
        return [*(image for image in former if image.path not in bases), *bases.values()]

    def _can_hold(self, image: FencedImage) -> bool:
        try:
            self._hold(image)
        except DiskError:
            return False
        return True

    def _take(self, fence: FenceRecord, old: FenceRecord | None) -> None:
        """Record the fence, lock its images, let go of those that are no part of it any more."""
        self.ledger.put_fence(fence)
        for image in fence.images:
            self._hold(image)
        for image in () if old is None else old.images:
            if image.path not in {kept.path for kept in fence.images}:
                self._release(image.path)

    def _holds(self, image: FencedImage) -> bool:
        held = self._held.get(image.path)
        return held is not None and held.exclusive is (image.kind is LockKind.EXCLUSIVE) and held.is_named()

    def _hold(self, image: FencedImage) -> None:
        if self._holds(image):
            return
        held = self._held.get(image.path)
        if held is not None and held.is_named():
            # Held in the other way: our own lock would be in the way of the new one.
            self._held.pop(image.path).close()
        hold = hold_exclusive if image.kind is LockKind.EXCLUSIVE else hold_frozen
        fresh = hold(image.path)
        replaced = self._held.pop(image.path, None)
        self._held[image.path] = fresh
        if replaced is not None:
            replaced.close()

    def _release(self, path: Path) -> None:
        if any(image.path == path for fence in self.ledger.contents.fences for image in fence.images):
            return  # another VM's fence holds it too
        held = self._held.pop(path, None)
        if held is not None:
            held.close()


def _as_written(tops: Sequence[FencedImage]) -> tuple[FencedImage, ...]:
    """What the disks of an original are now is what a pass writes to, whatever it was before."""
    return tuple(replace(image, kind=LockKind.EXCLUSIVE) for image in tops)


def _targets(fence: FenceRecord) -> tuple[str, ...]:
    return tuple(dict.fromkeys(image.target for image in fence.images))


def _top_image(domain: Domain, target: str, side: str, before: Sequence[FencedImage]) -> FencedImage:
    disk = next((disk for disk in domain.disks if disk.target == target and disk.chain), None)
    if disk is None:
        raise HypervisorError(f"the VM {domain.name} has no disk {target} whose image can be read: see `failback plan`")
    top, *below = disk.chain
    known = next((image for image in before if image.path == top.path), None)
    if known is not None:
        return replace(known, target=target, format=top.format)
    frozen = {image.path for image in before if image.kind is LockKind.FROZEN}
    # An overlay over a frozen base is a protective snapshot's: nobody has any business in it. Else a replica's image is
    # what a view will read.
    exclusive = side == "original" or any(image.path in frozen for image in below)
    kind = LockKind.EXCLUSIVE if exclusive else LockKind.FROZEN
    return FencedImage(target=target, path=top.path, format=top.format, kind=kind)
