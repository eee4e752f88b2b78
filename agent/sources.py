"""Views this agent has open: frozen states of a VM's disks, ready to be read by a pass."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.disk.open import open_source, open_view
from agent.disk.seam import Disk
from agent.errors import HypervisorError, SyncError
from agent.fences import FenceKeeper
from agent.ledger import LockKind
from agent.virt.seam import Hypervisor, PowerState


def tag_of(view: str) -> str:
    """The tag that files and sockets of a view carry: short, safe in a path whatever the view is called, and the same
    after a restart of the agent."""
    return f"failback-{hashlib.sha256(view.encode()).hexdigest()[:12]}"


@dataclass
class OpenedView:
    """One open view: its disks by target name stay open until it is closed."""

    view: str
    live: bool
    disks: dict[str, Disk] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Size in bytes by target name."""
        return {target: disk.size_bytes for target, disk in self.disks.items()}

    def close(self) -> None:
        """Close every disk."""
        for disk in self.disks.values():
            disk.close()
        self.disks.clear()


@dataclass
class ViewDesk:
    """The open views of this host, one for each VM. All methods block."""

    hypervisor: Hypervisor
    fences: FenceKeeper
    runtime_dir: Path
    _open: dict[str, OpenedView] = field(default_factory=dict)

    def is_open(self, vm_uuid: str) -> bool:
        """Whether a live view of that VM is open here, so that its backup job is ours."""
        opened = self._open.get(vm_uuid)
        return opened is not None and opened.live

    def disks(self, vm_uuid: str, view: str) -> dict[str, Disk]:
        """The disks of that open view.

        Raises:
            SyncError: it is not open (any more).
        """
        opened = self._open.get(vm_uuid)
        if opened is None or opened.view != view:
            raise SyncError(f"the view {view} is not open on this host: open it again")
        return opened.disks

    def open(self, vm_uuid: str, targets: Sequence[str], view: str) -> OpenedView:
        """Freeze a view: a backup job of a running VM, the fenced images of one that is off.

        Raises:
            AgentError: nothing is left of the attempt.
        """
        if vm_uuid in self._open:
            raise HypervisorError(f"a view of the VM {vm_uuid} is open already: close {self._open[vm_uuid].view} first")
        state = self.hypervisor.state(vm_uuid)
        live = state is not PowerState.OFF
        opened = OpenedView(view, live)
        try:
            if live:
                self._open_live(vm_uuid, targets, opened)
            else:
                self._open_closed(vm_uuid, targets, opened)
        except BaseException:
            opened.close()
            if live:
                self.hypervisor.close_view(vm_uuid, tag_of(view))
            raise
        self._open[vm_uuid] = opened
        return opened

    def _open_live(self, vm_uuid: str, targets: Sequence[str], opened: OpenedView) -> None:
        served = self.hypervisor.open_view(vm_uuid, targets, tag_of(opened.view))
        for target in targets:
            opened.disks[target] = open_view(target, served.socket, served.exports[target])

    def _open_closed(self, vm_uuid: str, targets: Sequence[str], opened: OpenedView) -> None:
        fence = self.fences.required(vm_uuid, "replica")
        frozen = {image.target: image for image in fence.images if image.kind is LockKind.FROZEN}
        for target in targets:
            if target not in frozen:
                raise HypervisorError(f"the disk {target} of the VM {vm_uuid} is not frozen by the fence: fence it")
            image = frozen[target]
            opened.disks[target] = open_source(target, image.path, image.format, self.runtime_dir)

    def close(self, vm_uuid: str, view: str) -> None:
        """End that view; also one that an earlier agent process left behind."""
        opened = self._open.get(vm_uuid)
        if opened is not None and opened.view == view:
            del self._open[vm_uuid]
            opened.close()
        self.hypervisor.close_view(vm_uuid, tag_of(view))

    def close_all(self) -> None:
        """The agent is stopping: end every view, so that no guest goes on paying for it."""
        for vm_uuid, opened in tuple(self._open.items()):
            self.close(vm_uuid, opened.view)
