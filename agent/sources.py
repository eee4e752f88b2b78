"""Views this agent has open: frozen states of a VM's disks, ready to be read by a pass."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

import structlog

from agent.disk.dirty import open_dirty_closed, open_dirty_view
from agent.disk.lock import hold_frozen
from agent.disk.open import open_source, open_view
from agent.disk.seam import Disk
from agent.errors import (
    AgentError,
    GuestAgentMissing,
    HypervisorError,
    HypervisorUnreachable,
    NoSuchDomain,
    SyncError,
)
from agent.fences import FenceKeeper
from agent.ledger import LockKind, TrackedImage, TrackingRecord, ViewRecord
from agent.opened_view import OpenedView, attached, record_of
from agent.overlay_chain import FrozenDisk
from agent.overlay_room import OverlayWatch, raw_disks
from agent.overlays import OverlayTracking
from agent.scratch import ScratchFull, ScratchLimits, ScratchWatch
from agent.served_views import ServedViews
from agent.tags import tag_of
from agent.tracking import closed_record, earlier_views
from agent.virt.seam import Hypervisor, PowerState, View

log = structlog.get_logger("failback.agent")

NOTICES_DEATH_WITHIN_S = 2.0
"""How long libvirt may take to notice that a QEMU whose view broke off has died."""
UNCLAIMED_FOR_S = 900.0
"""How long a view of a former agent process is kept for a run that is resumed: its guest pays for it meanwhile."""


class NoSuchView(SyncError):
    """A view that was asked for again is not there any more."""

    code = "no-view"


@dataclass
class ViewDesk:
    """The open views of this host, one for each VM. All methods block."""

    hypervisor: Hypervisor
    fences: FenceKeeper
    runtime_dir: Path
    limits: ScratchLimits = field(default_factory=ScratchLimits)
    _open: dict[str, OpenedView] = field(default_factory=dict)
    _freezing: set[str] = field(default_factory=set)
    _unclaimed: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ledger = self.fences.ledger
        self._served = ServedViews(self._ledger.folder)
        self.scratch = ScratchWatch(
            self.limits,
            lambda vm_uuid, view: self.hypervisor.close_view(vm_uuid, tag_of(view)),
            self.hypervisor.has_stalled,
        )
        self.overlays = OverlayTracking(self.hypervisor, self.fences)
        self.room = OverlayWatch(self.limits, self._merge_early, self.hypervisor.has_stalled, self._is_off)
        for vm_uuid in {record.vm_uuid for record in self._ledger.contents.overlays}:
            self.room.watch(vm_uuid, self.overlays.files(vm_uuid))
        self._orphans = list(self._ledger.contents.views)

    def close_orphans(self) -> tuple[AgentError, ...]:
        """Take over the views that an agent process before this one was killed over, where QEMU still serves them
        whole, and end those that it does not, or that no run has asked for since. Returns what went wrong; asked again,
        it tries again."""
        failed: list[AgentError] = []
        for orphan in tuple(self._orphans):
            try:
                if not self._attach(orphan):
                    self.close(orphan.vm_uuid, orphan.view)
            except AgentError as error:
                failed.append(error)
        for vm_uuid, since_s in tuple(self._unclaimed.items()):
            if time.monotonic() - since_s > UNCLAIMED_FOR_S:
                log.info("a view that nobody asked for is closed", vm=vm_uuid, view=self._open[vm_uuid].view)
                try:
                    self.close_of(vm_uuid)
                except AgentError as error:
                    failed.append(error)
        return tuple(failed)

    def _attach(self, orphan: ViewRecord) -> bool:
        """Read a view of a former agent process again. False where it is not what it was, or not whole."""
        record = self._served.of(orphan.vm_uuid, orphan.view)
        if record is None or orphan.vm_uuid in self._open:
            return False
        try:
            if not self.hypervisor.serves_view(orphan.vm_uuid, tag_of(orphan.view)):
                return False
        except NoSuchDomain:
            return False
        opened = attached(record)
        if opened is None:
            return False
        self.scratch.begin(orphan.vm_uuid, record.view, record.scratch.values(), sum(opened.sizes.values()))
        self._open[orphan.vm_uuid] = opened
        self._unclaimed[orphan.vm_uuid] = time.monotonic()
        self._orphans.remove(orphan)
        log.info("a view of a former agent is taken over", vm=orphan.vm_uuid, view=orphan.view)
        return True

    def reopen(self, pair: str, vm_uuid: str, targets: Sequence[str], view: str) -> OpenedView:
        """That very view of those disks, as it was frozen, if it is still there.

        Raises:
            NoSuchView: it is not; nothing has been changed.
        """
        for orphan in tuple(self._orphans):
            if (orphan.vm_uuid, orphan.view) == (vm_uuid, view):
                self._attach(orphan)
        opened = self._open.get(vm_uuid)
        if opened is None or (opened.pair, opened.view) != (pair, view) or set(opened.disks) != set(targets):
            raise NoSuchView(f"the view {view} of those disks is not open on this host any more", vm=vm_uuid)
        if self.scratch.reason(vm_uuid, view) is not None:
            raise NoSuchView(f"the view {view} was given up for want of room for its scratch files", vm=vm_uuid)
        if opened.live and not self._is_served(vm_uuid, opened):
            raise NoSuchView(f"the VM does not serve the view {view} any more", vm=vm_uuid)
        self._unclaimed.pop(vm_uuid, None)
        return opened

    def _is_served(self, vm_uuid: str, opened: OpenedView) -> bool:
        if self._served.of(vm_uuid, opened.view) is None:  # overlays are part of it: they stay as long as the VM
            return self.hypervisor.state(vm_uuid) is not PowerState.OFF
        return self.hypervisor.serves_view(vm_uuid, tag_of(opened.view))

    def thaw_owed(self) -> tuple[AgentError, ...]:
        """Thaw the guests that are owed it since an agent was killed, or since their own agent did not answer; returns
        what went wrong; asked again, it tries again."""
        failed: list[AgentError] = []
        for owed in self._ledger.contents.thaws:
            if owed.vm_uuid in self._freezing:
                continue
            try:
                self._thaw(owed.vm_uuid)
            except AgentError as error:
                failed.append(error)
        return tuple(failed)

    def _thaw(self, vm_uuid: str) -> None:
        with contextlib.suppress(NoSuchDomain):  # deleted, and its guest is gone
            self.hypervisor.thaw_guest(vm_uuid)
        self._ledger.drop_thaw(vm_uuid)

    def is_open(self, vm_uuid: str) -> bool:
        """Whether a live view of that VM is open here, so that its backup job is ours."""
        opened = self._open.get(vm_uuid)
        return opened is not None and opened.live

    def closed_views(self) -> tuple[tuple[str, str, str], ...]:
        """VM, pair and name of each open view of a VM that was off when it was opened."""
        return tuple((vm_uuid, view.pair, view.view) for vm_uuid, view in tuple(self._open.items()) if not view.live)

    def disks(self, vm_uuid: str, view: str) -> dict[str, Disk]:
        """The disks of that open view; raises as `opened`."""
        return self.opened(vm_uuid, view).disks

    def opened(self, vm_uuid: str, view: str) -> OpenedView:
        """That open view.

        Raises:
            SyncError: it is not open (any more).
        """
        opened = self._open.get(vm_uuid)
        if opened is None or opened.view != view:
            raise SyncError(f"the view {view} is not open on this host: open it again")
        given_up = self.scratch.reason(vm_uuid, view)
        if given_up is not None:
            raise given_up
        return opened

    def given_up(self, vm_uuid: str, view: str) -> ScratchFull | None:
        """Why that view, which was open, was given up; None when it was not."""
        opened = self._open.get(vm_uuid)
        return self.scratch.reason(vm_uuid, view) or (None if opened is not None else self.room.why(vm_uuid))

    def _is_off(self, vm_uuid: str) -> bool:
        return self.hypervisor.state(vm_uuid) is PowerState.OFF

    def _merge_early(self, vm_uuid: str, _: str) -> None:
        """Their room is scarce: the overlays of the running VM go, and the view that reads below them first."""
        self.close_of(vm_uuid)
        self.overlays.end(vm_uuid)

    def has_died(self, vm_uuid: str, view: str) -> bool:
        """Whether that view was served by a running VM that is off by now, or about to be."""
        opened = self._open.get(vm_uuid)
        if opened is None or opened.view != view or not opened.live:
            return False
        try:
            return self.hypervisor.wait_off(vm_uuid, NOTICES_DEATH_WITHIN_S)
        except HypervisorError:
            return False

    def open(
        self,
        pair: str,
        vm_uuid: str,
        targets: Sequence[str],
        view: str,
        *,
        track: bool = False,
        overlay: bool = False,
        since: Mapping[str, str] = MappingProxyType({}),
        freeze_guest: bool = False,
    ) -> OpenedView:
        """Freeze a view: a backup job of a running VM, the fenced images of one that is off. An older view of the pair
        is closed first.

        Args:
            pair, vm_uuid, targets, view: of which disks of which VM, for which pair, under which name.
            track: record what the guest writes from this view on, where that can be done.
            overlay: and do it by live overlays where the format has no dirty bitmaps. Their instant comes some ten
                milliseconds earlier: disks agree with one another in the last view, which is of the shut-off VM.
            since: by target, the earlier view since which it shall be known what was written.
            freeze_guest: freeze the guest's file systems for the instant of a live view.

        Raises:
            AgentError: nothing is left of the attempt.
        """
        older = self._open.get(vm_uuid)
        if older is not None:
            if older.pair != pair:
                raise HypervisorError(
                    f"a view of the VM {vm_uuid} is open for the pair {older.pair}: end that run first"
                )
            self.close(vm_uuid, older.view)
        for orphan in tuple(self._orphans):
            if orphan.vm_uuid == vm_uuid:
                self.close(vm_uuid, orphan.view)
        live = self.hypervisor.state(vm_uuid) is not PowerState.OFF
        opened = OpenedView(pair, view, live)
        try:
            if live:
                self._open_live(vm_uuid, targets, opened, track, overlay, since, freeze_guest)
            else:
                self._open_closed(vm_uuid, targets, opened, since)
        except BaseException:
            opened.close()
            if live:
                # What went wrong first is what is told; closing the view again removes what stays now.
                with contextlib.suppress(AgentError):
                    self.close(vm_uuid, view)
            raise
        self._open[vm_uuid] = opened
        return opened

    def _open_live(
        self,
        vm_uuid: str,
        targets: Sequence[str],
        opened: OpenedView,
        track: bool,
        overlay: bool,
        since: Mapping[str, str],
        freeze_guest: bool,
    ) -> None:
        self._ledger.put_view(ViewRecord(vm_uuid=vm_uuid, view=opened.view))
        raw = raw_disks(self.overlays, self.room, vm_uuid, targets, opened.tell) if overlay else ()
        rest = [target for target in targets if target not in raw]
        with self._frozen(vm_uuid, opened, targets) if freeze_guest else contextlib.nullcontext():
            # First the overlays: libvirt takes no snapshot while a backup job runs.
            frozen = self.overlays.open(opened.pair, vm_uuid, raw, opened.view, tag_of(opened.view), since)
            served = self._serve(vm_uuid, rest, opened, track, since) if rest else None
        if frozen:
            self.room.watch(vm_uuid, self.overlays.files(vm_uuid))
        for disk in frozen.values():
            self._open_frozen(disk, opened, disk.target in since)
        if served is not None:
            for target in rest:
                opened.disks[target] = open_view(target, served.socket, served.exports[target])
            if not frozen:
                self._served.put(record_of(vm_uuid, opened, served))
            scratch_bytes = sum(opened.sizes[target] for target in rest)
            self.scratch.begin(vm_uuid, opened.view, served.scratch.values(), scratch_bytes)

    def _open_frozen(self, disk: FrozenDisk, opened: OpenedView, asked: bool) -> None:
        # A raw image is read without a lock: one is held lest an overlay is merged into it meanwhile.
        opened.locks.append(hold_frozen(disk.image))
        opened.disks[disk.target] = open_source(disk.target, disk.image, disk.format, self.runtime_dir)
        opened.tracked.add(disk.target)
        opened.know_overlays(disk, asked=asked)

    def _serve(
        self, vm_uuid: str, targets: Sequence[str], opened: OpenedView, track: bool, since: Mapping[str, str]
    ) -> View:
        asked = {target: view for target, view in since.items() if target in targets}
        earlier, unknown = earlier_views(self._ledger, vm_uuid, asked)
        served = self.hypervisor.open_view(vm_uuid, targets, tag_of(opened.view), checkpoint=track, since=earlier)
        if track:
            self._remember(vm_uuid, opened, served)
        for target, reason in (*unknown.items(), *served.why_not.items()):
            opened.tell(target, reason)
        for target, context in served.dirty_contexts.items():
            opened.know(
                target, since[target], partial(open_dirty_view, target, served.socket, served.exports[target], context)
            )
        return served

    def _remember(self, vm_uuid: str, opened: OpenedView, served: View) -> None:
        """Which images the view records the writes of, durably, before anybody builds on it."""
        if self._ledger.tracking(vm_uuid, opened.view) is None:
            opened.tracked |= served.tracked
        elif served.checkpoint_is_new:
            # A target may equal the view that had this name before, and what was written between the two is lost.
            for target in served.tracked:
                opened.tell(target, f"a view {opened.view} was recorded before, and that record is lost")
        else:
            opened.tracked |= {t for t in served.tracked if self._ledger.tracked_image(vm_uuid, opened.view, t)}
            return
        images = (
            TrackedImage(target=t, path=served.images[t].path, identity=served.images[t].identity)
            for t in sorted(opened.tracked)
        )
        self._ledger.put_tracking(TrackingRecord(vm_uuid=vm_uuid, view=opened.view, images=tuple(images)))

    @contextlib.contextmanager
    def _frozen(self, vm_uuid: str, opened: OpenedView, targets: Sequence[str]) -> Iterator[None]:
        """With the guest's file systems frozen, if its agent does that; thawed whatever happens inside, and that is
        owed durably before they are frozen."""
        self._freezing.add(vm_uuid)
        try:
            self._ledger.put_thaw(vm_uuid)
            try:
                self.hypervisor.freeze_guest(vm_uuid)
            except HypervisorUnreachable:
                raise
            except HypervisorError as error:
                log.warning("the guest's file systems are not frozen for the view", vm=vm_uuid, reason=error.sentence)
                for target in targets:
                    opened.tell(target, f"the guest's file systems were not frozen: {error.sentence}")
                if isinstance(error, GuestAgentMissing):
                    self._ledger.drop_thaw(vm_uuid)
            yield
        finally:
            self._freezing.discard(vm_uuid)
            if any(owed.vm_uuid == vm_uuid for owed in self._ledger.contents.thaws):
                try:
                    self._thaw(vm_uuid)
                except AgentError as error:  # tried again, by `thaw_owed`
                    log.error("the guest's file systems could not be thawed yet", vm=vm_uuid, reason=error.sentence)

    def _open_closed(self, vm_uuid: str, targets: Sequence[str], opened: OpenedView, since: Mapping[str, str]) -> None:
        fence = self.fences.required(vm_uuid, "replica", opened.pair)
        for target in targets:
            # What the VM's disk is now stands first; an overlay of a protective snapshot is not frozen, its base is.
            frozen = (i for i in fence.images if i.target == target and i.kind is LockKind.FROZEN)
            image = next(frozen, None)
            if image is None:
                raise HypervisorError(f"the disk {target} of the VM {vm_uuid} is not frozen by the fence: fence it")
            if target in since:
                self._know_closed(vm_uuid, target, image.path, image.format, opened, since[target])
            opened.disks[target] = open_source(
                target, image.path, image.format, self.runtime_dir, scattered=target in opened.since
            )

    def _know_closed(
        self, vm_uuid: str, target: str, path: Path, image_format: str, opened: OpenedView, view: str
    ) -> None:
        if self.overlays.has(vm_uuid, target):
            opened.know_overlays(self.overlays.closed(vm_uuid, target, path, view), asked=True)
            return
        tracked = self._ledger.tracked_image(vm_uuid, view, target)
        if tracked is None:
            opened.tell(target, f"nothing was recorded of the disk {target} from the view {view} on")
            return
        record = closed_record(path, image_format, tracked, view)
        if isinstance(record, str):
            opened.tell(target, record)
            return
        opened.know(
            target,
            view,
            partial(open_dirty_closed, target, record.path, record.format, (record.bitmap,), self.runtime_dir),
        )

    def end_overlays(self, vm_uuid: str) -> None:
        """Merge the overlays of that VM, which no view of it reads any more; see `OverlayTracking.end`."""
        # The watch goes first, for it holds its own turn while it merges; and comes back where something is left.
        self.room.end(vm_uuid)
        try:
            self.overlays.end(vm_uuid)
        finally:
            if self.overlays.files(vm_uuid):
                self.room.watch(vm_uuid, self.overlays.files(vm_uuid))

    def close_of(self, vm_uuid: str) -> None:
        """End whatever view of that VM is open."""
        opened = self._open.get(vm_uuid)
        if opened is not None:
            self.close(vm_uuid, opened.view)

    def close_all_of(self, vm_uuid: str) -> None:
        """End every view of that VM, those of earlier agent processes too."""
        self.close_of(vm_uuid)
        for record in self._ledger.contents.views:
            if record.vm_uuid == vm_uuid:
                self.close(vm_uuid, record.view)

    def close(self, vm_uuid: str, view: str) -> None:
        """End that view; also one that an earlier agent process left behind."""
        opened = self._open.get(vm_uuid)
        if opened is not None and opened.view == view:
            del self._open[vm_uuid]
            opened.close()
        self._unclaimed.pop(vm_uuid, None)
        self.scratch.end(vm_uuid)
        self._served.drop(vm_uuid)
        with contextlib.suppress(NoSuchDomain):  # deleted, and the job with it
            self.hypervisor.close_view(vm_uuid, tag_of(view))
        record = ViewRecord(vm_uuid=vm_uuid, view=view)
        self._ledger.drop_view(record)
        with contextlib.suppress(ValueError):
            self._orphans.remove(record)

    def close_all(self) -> tuple[AgentError, ...]:
        """The agent is stopping: end every view, so that no guest goes on paying for it; returns what went wrong.
        Overlays stay, unwatched until the next agent's start."""
        for vm_uuid in {record.vm_uuid for record in self._ledger.contents.overlays}:
            self.room.end(vm_uuid)
        failed: list[AgentError] = []
        for vm_uuid, opened in tuple(self._open.items()):
            try:
                self.close(vm_uuid, opened.view)
            except AgentError as error:
                failed.append(error)
        return tuple(failed)
