"""Views this agent has open: frozen states of a VM's disks, ready to be read by a pass."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.disk.dirty import DirtyRanges
from agent.disk.open import open_source, open_view
from agent.disk.seam import Disk
from agent.errors import AgentError, DiskError, HypervisorError, NoSuchDomain, SyncError
from agent.fences import FenceKeeper
from agent.ledger import LockKind, ViewRecord
from agent.virt.seam import Hypervisor, PowerState

NOTICES_DEATH_WITHIN_S = 2.0
"""How long libvirt may take to notice that a QEMU whose view broke off has died."""


def tag_of(view: str) -> str:
    """The tag that files and sockets of a view carry: short, safe in a path whatever the view is called, and the same
    after a restart of the agent."""
    return f"failback-{hashlib.sha256(view.encode()).hexdigest()[:12]}"


@dataclass
class OpenedView:
    """One open view: its disks by target name stay open until it is closed.

    Attributes:
        since: by target: the earlier view since which it is known what was written.
        dirty: by target, of the same disks: what that is.
    """

    pair: str
    view: str
    live: bool
    disks: dict[str, Disk] = field(default_factory=dict)
    since: dict[str, str] = field(default_factory=dict)
    dirty: dict[str, DirtyRanges] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Size in bytes by target name."""
        return {target: disk.size_bytes for target, disk in self.disks.items()}

    def close(self) -> None:
        """Close every disk. They were only read: nothing that goes wrong here loses anything."""
        both: list[Disk | DirtyRanges] = [*self.dirty.values(), *self.disks.values()]
        for opened in both:
            with contextlib.suppress(DiskError):
                opened.close()
        self.dirty.clear()
        self.disks.clear()


@dataclass
class ViewDesk:
    """The open views of this host, one for each VM. All methods block."""

    hypervisor: Hypervisor
    fences: FenceKeeper
    runtime_dir: Path
    _open: dict[str, OpenedView] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ledger = self.fences.ledger
        self._orphans = list(self._ledger.contents.views)

    def close_orphans(self) -> tuple[AgentError, ...]:
        """End the views that an agent process before this one was killed over: nobody can read them any more. Returns
        what went wrong; asked again, it tries again."""
        failed: list[AgentError] = []
        for orphan in tuple(self._orphans):
            try:
                self.close(orphan.vm_uuid, orphan.view)
            except AgentError as error:
                failed.append(error)
        return tuple(failed)

    def is_open(self, vm_uuid: str) -> bool:
        """Whether a live view of that VM is open here, so that its backup job is ours."""
        opened = self._open.get(vm_uuid)
        return opened is not None and opened.live

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
        return opened

    def has_died(self, vm_uuid: str, view: str) -> bool:
        """Whether that view was served by a running VM that is off by now, or about to be."""
        opened = self._open.get(vm_uuid)
        if opened is None or opened.view != view or not opened.live:
            return False
        try:
            return self.hypervisor.wait_off(vm_uuid, NOTICES_DEATH_WITHIN_S)
        except HypervisorError:
            return False

    def open(self, pair: str, vm_uuid: str, targets: Sequence[str], view: str) -> OpenedView:
        """Freeze a view: a backup job of a running VM, the fenced images of one that is off. An older view of the pair
        is closed first.

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
                self._open_live(vm_uuid, targets, opened)
            else:
                self._open_closed(vm_uuid, targets, opened)
        except BaseException:
            opened.close()
            if live:
                # What went wrong first is what is told; closing the view again removes what stays now.
                with contextlib.suppress(AgentError):
                    self.close(vm_uuid, view)
            raise
        self._open[vm_uuid] = opened
        return opened

    def _open_live(self, vm_uuid: str, targets: Sequence[str], opened: OpenedView) -> None:
        self._ledger.put_view(ViewRecord(vm_uuid=vm_uuid, view=opened.view))
        served = self.hypervisor.open_view(vm_uuid, targets, tag_of(opened.view))
        for target in targets:
            opened.disks[target] = open_view(target, served.socket, served.exports[target])

    def _open_closed(self, vm_uuid: str, targets: Sequence[str], opened: OpenedView) -> None:
        fence = self.fences.required(vm_uuid, "replica", opened.pair)
        for target in targets:
            # What the VM's disk is now stands first; an overlay of a protective snapshot is not frozen, its base is.
            frozen = (i for i in fence.images if i.target == target and i.kind is LockKind.FROZEN)
            image = next(frozen, None)
            if image is None:
                raise HypervisorError(f"the disk {target} of the VM {vm_uuid} is not frozen by the fence: fence it")
            opened.disks[target] = open_source(target, image.path, image.format, self.runtime_dir)

    def close(self, vm_uuid: str, view: str) -> None:
        """End that view; also one that an earlier agent process left behind."""
        opened = self._open.get(vm_uuid)
        if opened is not None and opened.view == view:
            del self._open[vm_uuid]
            opened.close()
        with contextlib.suppress(NoSuchDomain):  # deleted, and the job with it
            self.hypervisor.close_view(vm_uuid, tag_of(view))
        record = ViewRecord(vm_uuid=vm_uuid, view=view)
        self._ledger.drop_view(record)
        with contextlib.suppress(ValueError):
            self._orphans.remove(record)

    def close_all(self) -> tuple[AgentError, ...]:
        """The agent is stopping: end every view, so that no guest goes on paying for it; returns what went wrong."""
        failed: list[AgentError] = []
        for vm_uuid, opened in tuple(self._open.items()):
            try:
                self.close(vm_uuid, opened.view)
            except AgentError as error:
                failed.append(error)
        return tuple(failed)
