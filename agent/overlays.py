"""Tracking by live overlays, for disks whose format has no dirty bitmap (raw files, block devices).

A view of a running VM is made by an overlay of ours over the disk: what lies below is frozen and is the view; what the
overlay holds by the next view is what changed since. Merged overlays leave the base as the guest sees it. What is in
force is read from the VM's disks and their chains; the ledger says what is ours and what we were about to do, written
before it is done. So an agent or a QEMU may die between any two steps: the next call finds out where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from agent.disk.allocated import Range, allocated_ranges
from agent.disk.commit import commit_overlays, stand_on
from agent.disk.lock import hold_frozen
from agent.errors import AgentError, DiskError, HypervisorError
from agent.fences import FenceKeeper
from agent.ledger import Ledger
from agent.overlay_chain import FrozenDisk, Written, chain_of, groups, known_since, stamp_of
from agent.overlay_record import OverlayRecord
from agent.virt.seam import Domain, Hypervisor, Image, PowerState, TrackOverlay

log = structlog.get_logger("failback.agent")

MERGE_TIMEOUT_S = 900.0
"""How long merging the overlays of one disk may take: minutes of a guest's writes are gigabytes to be moved."""

STAND_ON_TIMEOUT_S = 60.0


@dataclass
class OverlayTracking:
    """The live overlays of this host. All methods block; calls for one VM come one at a time.

    Attributes:
        allocated: reads what overlays hold (`agent.disk.allocated.allocated_ranges`).
        commit, stand_on: merge closed overlays (`agent.disk.commit`).
    """

    hypervisor: Hypervisor
    fences: FenceKeeper
    allocated: Callable[[str, Path, int], Iterator[Range]] = allocated_ranges
    commit: Callable[..., None] = commit_overlays
    stand_on: Callable[..., None] = stand_on

    @property
    def _ledger(self) -> Ledger:
        return self.fences.ledger

    def _records(self, vm_uuid: str, target: str | None = None) -> list[OverlayRecord]:
        records = self._ledger.contents.overlays
        return [r for r in records if r.vm_uuid == vm_uuid and target in (None, r.target)]

    def files(self, vm_uuid: str) -> list[Path]:
        """The files of that VM's overlays."""
        return [record.overlay for record in self._records(vm_uuid)]

    def size_since(self, vm_uuid: str, target: str, view: str) -> int | None:
        """What the overlay of that view takes of its storage by now: about what was written since; None without one."""
        for record in self._records(vm_uuid, target):
            if record.view == view:
                try:
                    return record.overlay.stat().st_blocks * 512
                except OSError:
                    return None
        return None

    def has(self, vm_uuid: str, target: str) -> bool:
        """Whether that disk has overlays of ours."""
        return bool(self._records(vm_uuid, target))

    def takes(self, domain: Domain, target: str) -> bool:
        """Whether that disk is one for overlays: a raw image that the guest alone may write, under overlays of ours or
        without any."""
        ours = {record.overlay for record in self._records(domain.uuid, target)}
        disk = next((disk for disk in domain.disks if disk.target == target), None)
        if disk is None or disk.readonly or disk.shareable:
            return False
        own = next((image for image in disk.chain if image.path not in ours), None)
        return own is not None and own.format == "raw"

    # --- a view of a running VM -----------------------------------------------------------------------------------

    def open(
        self, pair: str, vm_uuid: str, targets: Sequence[str], view: str, tag: str, since: Mapping[str, str]
    ) -> dict[str, FrozenDisk]:
        """Freeze these disks at one instant, and track from it on. Overlays that nobody needs any more are merged.

        Args:
            pair: whose run it is.
            vm_uuid: the running VM.
            targets: disks that `takes` says yes to; may be empty.
            view: the view's name.
            tag: what its files carry in their names.
            since: by target, the earlier view since which changes shall be known.

        Raises:
            AgentError: what is in force by then is found, and used or merged, by a later call.
        """
        if not targets:
            return {}
        with self.fences.turn(vm_uuid):
            return self._open(pair, vm_uuid, targets, view, tag, since)

    def _open(
        self, pair: str, vm_uuid: str, targets: Sequence[str], view: str, tag: str, since: Mapping[str, str]
    ) -> dict[str, FrozenDisk]:
        self.settle(vm_uuid)
        planned = self.hypervisor.plan_overlays(vm_uuid, targets, tag)
        fresh = [self._intent(pair, vm_uuid, overlay, view) for overlay in planned]
        self._ledger.put_overlays(*fresh)
        self.hypervisor.begin_overlays(vm_uuid, planned)
        self._ledger.put_overlays(*(replace(r, answered=True, base_stamp=stamp_of(r.base)) for r in fresh))
        for target in targets:
            keep = {view, since.get(target, view)}
            try:
                self._merge_others(vm_uuid, target, keep)
            except AgentError as error:
                # The chain is longer for it, no more: the next view, or the end, tries again.
                log.warning("overlays could not be merged", vm=vm_uuid, disk=target, reason=error.sentence)
        domain = self.hypervisor.inspect(vm_uuid)
        return {target: self._frozen_disk(domain, target, view, since.get(target)) for target in targets}

    def _intent(self, pair: str, vm_uuid: str, overlay: TrackOverlay, view: str) -> OverlayRecord:
        older = [r for r in self._records(vm_uuid, overlay.target) if r.base == overlay.base]
        known = next((r for r in older if r.overlay == overlay.overlay), None)
        if known is not None:
            return known
        return OverlayRecord(
            vm_uuid=vm_uuid,
            pair=pair,
            target=overlay.target,
            view=view,
            overlay=overlay.overlay,
            base=overlay.base,
            base_format=overlay.base_format,
            definition=older[0].definition if older else overlay.definition,
        )

    def _frozen_disk(self, domain: Domain, target: str, view: str, since: str | None) -> FrozenDisk:
        chain = chain_of(domain, target)
        tops = [r.overlay for r in self._records(domain.uuid, target) if r.view == view]
        at = next((number for number, image in enumerate(chain) if image.path in tops), None)
        if at is None or at + 1 >= len(chain):
            raise HypervisorError(
                f"VM {domain.name}: the overlay of its disk {target} is not in force any more: somebody changed the "
                "disk; open the view again.",
                vm=domain.name,
                disk=target,
            )
        return known_since(target, chain[at + 1 :], self._records(domain.uuid, target), since)

    # --- a view of a VM that is off -------------------------------------------------------------------------------

    def closed(self, vm_uuid: str, target: str, image: Path, since: str) -> FrozenDisk:
        """What is known of a disk whose frozen top is `image`, of the VM that is off, since that view.

        Raises:
            HypervisorError: the disk does not read through the image.
        """
        domain = self.hypervisor.inspect(vm_uuid)
        chain = chain_of(domain, target)
        at = next((number for number, member in enumerate(chain) if member.path == image), None)
        if at is None:
            raise HypervisorError(f"VM {domain.name}: its disk {target} does not read through {image}: fence it again.")
        return known_since(target, chain[at:], self._records(vm_uuid, target), since)

    def read(self, vm_uuid: str, since: Mapping[str, str]) -> tuple[Written, ...]:
        """How much was written to these disks of the VM that is off, since these views."""
        domain = self.hypervisor.inspect(vm_uuid)
        protective = {i.overlay for r in self._ledger.contents.protections if r.vm_uuid == vm_uuid for i in r.images}
        read: list[Written] = []
        for target, view in since.items():
            chain = [image for image in chain_of(domain, target) if image.path not in protective]
            known = known_since(target, chain, self._records(vm_uuid, target), view)
            try:
                dirty = sum(length for _, length in self.dirty(known))
            except DiskError as error:
                read.append(Written(target=target, since=None, dirty_bytes=0, why_not=error.sentence))
                continue
            read.append(Written(target=target, since=known.since, dirty_bytes=dirty, why_not=known.why_not))
        return tuple(read)

    def dirty(self, disk: FrozenDisk) -> Iterator[Range]:
        """The ranges that may differ from the view `since`; none where it is not known."""
        return self.allocated(disk.target, disk.image, disk.layers) if disk.layers else iter(())

    # --- merging --------------------------------------------------------------------------------------------------

    def drop(self, vm_uuid: str, keep: Collection[str]) -> None:
        """Merge the overlays of the running VM that no view in `keep` needs; nothing while it is off, for then nothing
        grows and `end` does it all. No view of it may be open.

        Raises:
            AgentError: of the first disk where that failed; the others are done.
        """
        with self.fences.turn(vm_uuid):
            if self.hypervisor.state(vm_uuid) is not PowerState.OFF:
                self.settle(vm_uuid)
                self._each_disk(vm_uuid, lambda target: self._merge_others(vm_uuid, target, keep))

    def end(self, vm_uuid: str) -> None:
        """Merge every overlay of ours, of the running VM or of the one that is off, and remove its files: the disks are
        what they were before, with what the guest wrote. Harmless when repeated.

        Raises:
            AgentError: of the first disk where that failed; the others are done.
        """
        with self.fences.turn(vm_uuid):
            if not self._records(vm_uuid):
                return
            self.settle(vm_uuid)
            if self.hypervisor.state(vm_uuid) is PowerState.OFF:
                self._each_disk(vm_uuid, lambda target: self._merge_closed(vm_uuid, target))
            else:
                self._each_disk(vm_uuid, lambda target: self._merge_others(vm_uuid, target, ()))

    def _each_disk(self, vm_uuid: str, act: Callable[[str], None]) -> None:
        failed: list[AgentError] = []
        for target in sorted({record.target for record in self._records(vm_uuid)}):
            try:
                act(target)
            except AgentError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def _merge_others(self, vm_uuid: str, target: str, keep: Collection[str]) -> None:
        """While the VM runs: each group of adjoining overlays not kept, into what lies below it, the lowest first."""
        records = {record.overlay: record for record in self._records(vm_uuid, target)}
        chain = chain_of(self.hypervisor.inspect(vm_uuid), target)
        for group, into in groups(chain, records, keep):
            merged = [records[image.path] for image in group]
            self._ledger.put_overlays(*(replace(record, merging_into=into.path) for record in merged))
            stamps = self._valid_stamps(vm_uuid, target)
            self.hypervisor.merge_overlays(
                vm_uuid, [r.overlay for r in merged], into.path, _as_overlay(merged[-1]), timeout_s=MERGE_TIMEOUT_S
            )
            self._forget(merged, stamps)

    def _merge_closed(self, vm_uuid: str, target: str) -> None:
        """While the VM is off: all of them into the base, with the images locked against every writer."""
        records = {record.overlay: record for record in self._records(vm_uuid, target)}
        domain = self.hypervisor.inspect(vm_uuid)
        chain = chain_of(domain, target)
        for group, into in groups(chain, records, ()):
            merged = [records[image.path] for image in group]
            above = chain[: chain.index(group[0])]
            self._require_ours(domain, above)
            self._ledger.put_overlays(*(replace(record, merging_into=into.path) for record in merged))
            stamps = self._valid_stamps(vm_uuid, target)
            with self._locked(chain):
                overlays = [record.overlay for record in merged]
                self.commit(target, overlays, into.path, into.format, timeout_s=MERGE_TIMEOUT_S)
                if above:
                    top = above[-1].path
                    self.stand_on(target, top, into.path, into.format, timeout_s=STAND_ON_TIMEOUT_S)
                self._forget_closed(merged, into.path)
                self._forget(merged, stamps)
                self.fences.refresh(vm_uuid)

    def _require_ours(self, domain: Domain, above: Sequence[Image]) -> None:
        records = self._ledger.contents.protections
        protective = {i.overlay for record in records if record.vm_uuid == domain.uuid for i in record.images}
        foreign = next((image.path for image in above if image.path not in protective), None)
        if foreign is not None:
            raise HypervisorError(
                f"VM {domain.name}: {foreign}, which failback did not make, stands on its overlays: remove or merge "
                "that snapshot first, then end the run again.",
                vm=domain.name,
                path=str(foreign),
            )

    @contextmanager
    def _locked(self, chain: Sequence[Image]) -> Iterator[None]:
        """Every image of the chain locked against writers, by the fence or by us, lest the VM starts meanwhile."""
        with ExitStack() as locks:
            for image in chain:
                if self.fences.held(image.path) is None:
                    locks.callback(hold_frozen(image.path).close)
            yield

    def _forget_closed(self, merged: Sequence[OverlayRecord], into: Path) -> None:
        """Definition, snapshots and the record of a protective snapshot name `into` instead of what is merged."""
        vm_uuid, gone = merged[0].vm_uuid, {record.overlay for record in merged}
        self.hypervisor.forget_overlays(vm_uuid, [r.overlay for r in merged], into, _as_overlay(merged[-1]))
        for known in self._ledger.contents.protections:
            if known.vm_uuid == vm_uuid and any(image.base in gone for image in known.images):
                images = tuple(
                    replace(i, base=into, base_format=merged[-1].base_format) if i.base in gone else i
                    for i in known.images
                )
                self._ledger.put_protection(replace(known, images=images))

    def _valid_stamps(self, vm_uuid: str, target: str) -> set[Path]:
        """Overlays whose base is as we left it: after we have changed it, it is again."""
        records = self._records(vm_uuid, target)
        return {r.overlay for r in records if r.base_stamp and r.base_stamp == stamp_of(r.base)}

    def _forget(self, merged: Sequence[OverlayRecord], valid: Collection[Path]) -> None:
        """Remove the files of merged overlays, then their records; the others learn what the base is by now."""
        left = [
            replace(record, base_stamp=stamp_of(record.base) if record.overlay in valid else "")
            for record in self._records(merged[0].vm_uuid, merged[0].target)
            if record not in merged and record.overlay not in {gone.overlay for gone in merged}
        ]
        self._ledger.put_overlays(*left)
        for record in merged:
            _remove(record.overlay)
        self._ledger.drop_overlays(*merged)

    # --- after a crash --------------------------------------------------------------------------------------------

    def settle(self, vm_uuid: str) -> None:
        """End what was cut short: overlays that are in no chain any more, or never were.

        Raises:
            AgentError: it could not be found out, or not be done.
        """
        if not self._records(vm_uuid):
            return
        domain = self.hypervisor.inspect(vm_uuid)
        for record in self._records(vm_uuid):
            disk = next((disk for disk in domain.disks if disk.target == record.target), None)
            if disk is not None and disk.problem is not None:
                raise HypervisorError(f"VM {domain.name}: {disk.problem}", vm=domain.name, disk=record.target)
            if disk is not None and any(image.path == record.overlay for image in disk.chain):
                continue
            if record.merging_into is not None and disk is not None and disk.chain[-1].path == record.base:
                # Its content is below, and the chain says so: what is left is our writing it down.
                self._finish_merge(domain, record, record.merging_into)
            else:
                self._give_up(record)

    def _finish_merge(self, domain: Domain, record: OverlayRecord, into: Path) -> None:
        if domain.state is PowerState.OFF:
            self._forget_closed([record], into)
        else:
            self.hypervisor.merge_overlays(
                domain.uuid, [record.overlay], into, _as_overlay(record), timeout_s=MERGE_TIMEOUT_S
            )
        self._forget([record], ())
        self.fences.refresh(domain.uuid)

    def _give_up(self, record: OverlayRecord) -> None:
        """It is in no chain, and we did not take it out of one: it goes if it holds nothing, and stays otherwise."""
        if record.overlay.exists():
            try:
                holds = record.overlay.stat().st_size and any(self.allocated(record.target, record.overlay, 1))
            except (DiskError, OSError):
                holds = True
            if holds:
                log.error(
                    "an overlay was taken out of its disk by somebody else and holds data: the file is left alone",
                    vm=record.vm_uuid,
                    disk=record.target,
                    path=str(record.overlay),
                )
            else:
                _remove(record.overlay)
        self._ledger.drop_overlays(record)


def _as_overlay(record: OverlayRecord) -> TrackOverlay:
    return TrackOverlay(
        target=record.target,
        below=record.base,
        base=record.base,
        base_format=record.base_format,
        overlay=record.overlay,
        definition=record.definition,
    )


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(f"{path} cannot be removed: {error.strerror}; remove it by hand.", path=str(path)) from error
