"""Fences: what keeps a VM from starting while its disks are ours.

A fence is durable (the ledger) and enforced (autostart off, image locks held by this process, taken again after a
restart). Image locks are advisory and end with the process that holds them, which is why an unlocked image is always
told (`FenceKeeper.unlocked`), never assumed away. All methods block; the agent calls them from worker threads, one
order at a time for each pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from agent.disk.lock import HeldImage, hold_exclusive, hold_frozen
from agent.errors import AgentError, DiskError, HypervisorError
from agent.ledger import DiskCondition, FencedImage, FenceRecord, Ledger, LockKind
from agent.virt.seam import Domain, Hypervisor, Overlay, PowerState


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
    """The fences of this host."""

    ledger: Ledger
    hypervisor: Hypervisor
    _held: dict[Path, HeldImage] = field(default_factory=dict)

    # --- asking ---------------------------------------------------------------------------------------------------

    def fence_of(self, vm_uuid: str) -> FenceRecord | None:
        """The durable record of the fence on that VM."""
        return self.ledger.fence(vm_uuid)

    def required(self, vm_uuid: str, side: str) -> FenceRecord:
        """The fence on that VM, whole: of that side, every image locked.

        Raises:
            NotFenced: there is none, it is another's, or a lock is missing.
        """
        fence = self.ledger.fence(vm_uuid)
        if fence is None or fence.side != side:
            raise NotFenced(f"the {side} {vm_uuid} is not fenced on this host; the run must fence it first")
        missing = self.unlocked(fence)
        if missing:
            raise NotFenced(
                f"the fence on the {side} {vm_uuid} has lost the lock of {', '.join(missing)}: "
                "make sure that nothing uses the image, then let the run fence it again"
            )
        return fence

    def unlocked(self, fence: FenceRecord) -> tuple[str, ...]:
        """Targets of the fence whose image this process does not hold."""
        return tuple(dict.fromkeys(image.target for image in fence.images if image.path not in self._held))

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

    # --- acting ---------------------------------------------------------------------------------------------------

    def restore(self) -> tuple[AgentError, ...]:
        """After a restart: take the locks of every durable fence back; returns what could not be taken."""
        failed: list[AgentError] = []
        for fence in self.ledger.contents.fences:
            for image in fence.images:
                try:
                    self._hold(image)
                except DiskError as error:
                    failed.append(error)
        return tuple(failed)

    def fence(self, vm_uuid: str, *, pair: str, run: str, side: str, targets: Sequence[str]) -> FenceRecord:
        """Fence the shut-off VM; repeated, take what is missing.

        The record is durable before the first lock is taken: a crash leaves a fence too many, never one too few.

        Raises:
            Fenced: another pair fences the VM.
            DiskBusy: another process holds an image.
            HypervisorError: the VM is not off, or a target is missing.
        """
        domain = self.hypervisor.inspect(vm_uuid)
        if domain.state is not PowerState.OFF:
            raise HypervisorError(
                f"the VM {domain.name} is {domain.state.value}; only a VM that is off can be fenced: power it off first"
            )
        old = self.ledger.fence(vm_uuid)
        if old is not None and old.pair != pair:
            raise Fenced(f"the VM {domain.name} is fenced for the pair {old.pair}: end that run first")
        if old is None or old.side != side:
            kind = LockKind.EXCLUSIVE if side == "original" else LockKind.FROZEN
            fence = FenceRecord(
                vm_uuid=vm_uuid,
                pair=pair,
                run=run,
                side=side,
                autostart_before=domain.autostart if old is None else old.autostart_before,
                images=tuple(_top_image(domain, target, kind) for target in targets),
            )
        else:
            fence = replace(old, run=run)
        self.ledger.put_fence(fence)
        self.hypervisor.set_autostart(vm_uuid, enabled=False)
        for image in fence.images:
            self._hold(image)
        return fence

    def cover(self, vm_uuid: str, overlays: Iterable[Overlay]) -> FenceRecord:
        """Lock the overlays of a new protective snapshot too: the VM would start through them."""
        fence = self.required(vm_uuid, "replica")
        known = {image.path for image in fence.images}
        added = tuple(
            FencedImage(target=o.target, path=o.overlay, format="qcow2", kind=LockKind.EXCLUSIVE)
            for o in overlays
            if o.overlay not in known
        )
        if added:
            fence = replace(fence, images=(*fence.images, *added))
            self.ledger.put_fence(fence)
        for image in fence.images:
            self._hold(image)
        return fence

    def uncover(self, vm_uuid: str, overlays: Iterable[Path]) -> None:
        """Let go of overlays that are about to be removed; the bases stay locked."""
        gone = set(overlays)
        fence = self.ledger.fence(vm_uuid)
        if fence is not None:
            self.ledger.put_fence(replace(fence, images=tuple(i for i in fence.images if i.path not in gone)))
        for path in gone:
            self._release(path)

    def lift(self, vm_uuid: str, *, restore_autostart: bool, autostart: bool | None = None) -> None:
        """Release the locks and forget the fence; harmless when there is none.

        `restore_autostart` gives autostart back as it was before the fence, or as `autostart` says where that is known
        better: an earlier fence may have taken it away and been lifted without giving it back.

        Raises:
            Torn: the disks are torn.
        """
        if self.condition(vm_uuid) is DiskCondition.TORN:
            raise Torn(
                f"the disks of {vm_uuid} are torn (written in part, not verified) and must not boot: "
                "let a run verify them"
            )
        fence = self.ledger.fence(vm_uuid)
        if fence is None:
            return
        before = fence.autostart_before if autostart is None else autostart
        if restore_autostart and before:
            self.hypervisor.set_autostart(vm_uuid, enabled=True)
        self.ledger.drop_fence(vm_uuid)
        for image in fence.images:
            self._release(image.path)

    def close(self) -> None:
        """Let go of every lock (the process is ending); the durable fences stay."""
        for path in tuple(self._held):
            self._release(path)

    def _hold(self, image: FencedImage) -> None:
        if image.path in self._held:
            return
        hold = hold_exclusive if image.kind is LockKind.EXCLUSIVE else hold_frozen
        self._held[image.path] = hold(image.path)

    def _release(self, path: Path) -> None:
        held = self._held.pop(path, None)
        if held is not None:
            held.close()


def _top_image(domain: Domain, target: str, kind: LockKind) -> FencedImage:
    for disk in domain.disks:
        if disk.target == target and disk.chain:
            return FencedImage(target=target, path=disk.chain[0].path, format=disk.chain[0].format, kind=kind)
    raise HypervisorError(f"the VM {domain.name} has no disk {target} whose image can be read: see `failback plan`")
