"""The working snapshot of an original: overlays over its disks that passes write to, so that undo gives the disks back.

The bases are frozen for as long as it stands; what a run writes, and later the guest, is in the overlays. Undo drops
them, commit merges them into the bases. What is about to be done is in the ledger before it is done, and what is in
force is read from the VM's disks: a crash between any two acts is found out by the next order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from agent.disk.commit import commit_overlays
from agent.disk.lock import hold_frozen
from agent.disk.stamp import Stamp, stamp_of
from agent.errors import Forbidden
from agent.evidence import EvidenceDesk
from agent.fences import ORIGINAL, FenceKeeper, Torn
from agent.ledger import ConditionRecord, DiskCondition, ProtectedImage, ProtectionRecord
from agent.progress import ProgressDesk
from agent.virt.seam import Hypervisor, Overlay, PowerState
from protocol.messages import Order

log = structlog.get_logger("failback.agent")

MERGE_TIMEOUT_S = 3600.0
"""How long merging one disk may take: all that the run wrote, and the original's guest since, may have to be moved."""


@dataclass
class WorkingSnapshots:
    """The working snapshots of this host's originals. All methods block; calls for one VM come one at a time."""

    hypervisor: Hypervisor
    fences: FenceKeeper
    evidence: EvidenceDesk
    progress: ProgressDesk

    def take(self, order: Order, vm_uuid: str, targets: Sequence[str], snapshot: str) -> tuple[Overlay, ...]:
        """Put overlays over the disks of the shut-off, fenced original. Harmless when repeated.

        Raises:
            Torn: the disks hold nothing that could be given back.
            AgentError: it was not taken, or not written down; repeat it, or drop it.
        """
        with self.fences.turn(vm_uuid):
            self.fences.required(vm_uuid, ORIGINAL, order.pair)
            known = self.fences.ledger.protection(vm_uuid, snapshot)
            if known is None:
                known = self._intend(order.pair, vm_uuid, targets, snapshot)
            elif known.merging:
                raise _is_merging(vm_uuid, snapshot)
            before = {target: self.evidence.proof(vm_uuid, target).view for target in targets}
            if not self._stands(known):
                self.fences.freeze(vm_uuid)
            text = f"made by failback for the pair {order.pair}, run {order.run}"
            overlays = self.hypervisor.protect(vm_uuid, targets, snapshot, text)
            self.fences.refresh(vm_uuid)
            for target, view in before.items():
                # Nothing is in the overlay yet: it equals what its base was proven to equal a moment ago.
                if view is not None:
                    self.evidence.equals_now(vm_uuid, view, (target,))
            return overlays

    def _intend(self, pair: str, vm_uuid: str, targets: Sequence[str], snapshot: str) -> ProtectionRecord:
        if self.fences.condition(vm_uuid) is DiskCondition.TORN:
            raise Torn(
                f"the disks of {vm_uuid} are torn (written in part, not verified): a snapshot of them would give "
                "nothing back; start the run with --no-protect-original"
            )
        planned = self.hypervisor.plan_protection(vm_uuid, targets, snapshot)
        record = ProtectionRecord(
            vm_uuid=vm_uuid,
            pair=pair,
            snapshot=snapshot,
            images=tuple(
                ProtectedImage(
                    target=o.target,
                    base=o.base,
                    base_format=o.base_format,
                    overlay=o.overlay,
                    base_stamp=self._stamp(o.base),
                )
                for o in planned
            ),
            side=ORIGINAL,
        )
        self.fences.ledger.put_protection(record)
        return record

    def _stands(self, record: ProtectionRecord) -> bool:
        """Whether the VM's disks are its overlays; they all change in one step."""
        tops = {disk.chain[0].path for disk in self.hypervisor.inspect(record.vm_uuid).disks if disk.chain}
        return all(image.overlay in tops for image in record.images)

    def _stamp(self, base: Path) -> Stamp | None:
        held = self.fences.held(base)
        try:
            return None if held is None else stamp_of(held.fd)
        except OSError:
            return None

    # --- giving the original back -----------------------------------------------------------------------------------

    def drop(self, pair: str, vm_uuid: str, snapshot: str) -> None:
        """Point the shut-off, fenced original's disks at their bases again. They are *intact* then, unless somebody
        wrote to a base meanwhile: such an original is *torn*. Harmless when repeated.

        Raises:
            Forbidden: the overlays are being merged already.
        """
        with self.fences.turn(vm_uuid):
            ledger = self.fences.ledger
            record = ledger.protection(vm_uuid, snapshot)
            if record is None:
                return
            if record.merging:
                raise _is_merging(vm_uuid, snapshot)
            self.fences.required(vm_uuid, ORIGINAL, pair)
            changed = [image for image in record.images if self._is_changed(image)]
            self.hypervisor.unprotect(vm_uuid, snapshot, _overlays(record))
            self.evidence.forget(vm_uuid)
            self.progress.forget(vm_uuid)
            condition = DiskCondition.TORN if changed else DiskCondition.INTACT
            for image in changed:
                log.error("a frozen base was written to by somebody else", vm=vm_uuid, path=str(image.base))
            ledger.put_condition(ConditionRecord(vm_uuid=vm_uuid, condition=condition))
            self.fences.refresh(vm_uuid)
            ledger.drop_protection(vm_uuid, snapshot)

    def _is_changed(self, image: ProtectedImage) -> bool:
        now = self._stamp(image.base)
        then = image.base_stamp
        return then is not None and now is not None and then.content_changed_to(now)

    def drop_stale(self, order: Order, vm_uuid: str, snapshot_of_run: str) -> None:
        """Drop what another run of the pair had to leave, for this host could not be reached when it was taken back."""
        for record in self.fences.ledger.contents.protections:
            stale = record.side == ORIGINAL and record.snapshot != snapshot_of_run and not record.merging
            if stale and (record.vm_uuid, record.pair) == (vm_uuid, order.pair):
                self.drop(order.pair, vm_uuid, record.snapshot)

    # --- commit -----------------------------------------------------------------------------------------------------

    def merge(self, vm_uuid: str, snapshot: str) -> None:
        """Put what the overlays hold into the bases and remove them, while the original runs or with it off. Harmless
        when repeated, and after a crash at any point.

        Raises:
            AgentError: nothing is lost; repeat it.
        """
        with self.fences.turn(vm_uuid):
            ledger = self.fences.ledger
            record = ledger.protection(vm_uuid, snapshot)
            if record is None or record.side != ORIGINAL:
                return
            ledger.put_protection(replace(record, merging=True))
            self.evidence.forget(vm_uuid)
            if self.hypervisor.state(vm_uuid) is PowerState.OFF:
                self._merge_closed(record)
            else:
                self.hypervisor.merge_protection(vm_uuid, snapshot, _overlays(record), timeout_s=MERGE_TIMEOUT_S)
            if self.fences.fence_of(vm_uuid) is not None:
                self.fences.refresh(vm_uuid)
            ledger.drop_protection(vm_uuid, snapshot)

    def _merge_closed(self, record: ProtectionRecord) -> None:
        domain = self.hypervisor.inspect(record.vm_uuid)
        tops = {disk.target: disk.chain[0].path for disk in domain.disks if disk.chain}
        standing = [image for image in record.images if tops.get(image.target) == image.overlay]
        with self._locked(standing):
            for image in standing:
                commit_overlays(image.target, [image.overlay], image.base, image.base_format, timeout_s=MERGE_TIMEOUT_S)
            # What they hold is below by now: pointing the disks at their bases is all that is left.
            self.hypervisor.unprotect(record.vm_uuid, record.snapshot, _overlays(record))

    @contextmanager
    def _locked(self, images: Sequence[ProtectedImage]) -> Iterator[None]:
        """The VM must not start meanwhile; whoever reads may go on."""
        with ExitStack() as locks:
            for path in (path for image in images for path in (image.overlay, image.base)):
                if self.fences.held(path) is None:
                    locks.callback(hold_frozen(path).close)
            yield


def _overlays(record: ProtectionRecord) -> list[Overlay]:
    return [Overlay(target=i.target, base=i.base, base_format=i.base_format, overlay=i.overlay) for i in record.images]


def _is_merging(vm_uuid: str, snapshot: str) -> Forbidden:
    return Forbidden(
        f"the working snapshot {snapshot} of the VM {vm_uuid} is being merged into its disks, which are not what they "
        "were any more: let the commit end"
    )
