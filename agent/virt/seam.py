"""The one seam between the agent and the hypervisor.

`Hypervisor` is what the rest of the agent may ask for; `agent.virt.libvirt_host.LibvirtHost` is the real one and the
only importer of libvirt; the in-memory one of the tests passes the same contract tests
(``tests/contract/test_hypervisor.py``). Every method is synchronous, may block, is called from a worker
thread, and raises `agent.errors.HypervisorError` (or a subclass) and nothing else.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class PowerState(enum.Enum):
    """What a domain is doing, reduced to what failback must tell apart."""

    RUNNING = "running"  # executing, idle or blocked
    PAUSED = "paused"  # holds its disks and memory, executes nothing
    SHUTTING_DOWN = "shutting-down"  # asked to stop, still holds its disks
    OFF = "off"  # no process, and only then
    CRASHED = "crashed"  # its process was preserved after a guest crash: holds its disks
    SUSPENDED = "suspended"  # pmsuspended: holds its disks


class SourceKind(enum.Enum):
    """Where a disk's bytes live."""

    FILE = "file"
    BLOCK = "block"
    NETWORK = "network"
    OTHER = "other"  # volume, vhostuser, nvme, dir: refused for now


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One member of a disk's backing chain, the top one first.

    Attributes:
        path: absolute path on this host.
        format: ``raw``, ``qcow2`` …
        identity: names the inode or device on this machine, so that two chains that share one are noticed.
        virtual_size_bytes: as the guest sees it.
        internal_snapshots: number of snapshots inside a qcow2 image.
        bitmaps: names of persistent dirty bitmaps.
        dirty, corrupt, encrypted, external_data: what makes reading by cluster map unsafe.
        modified_s: when its file was last written, seconds since 1970 by this host's clock; 0: not known (devices).
        allocated_bytes: what it takes of its storage.
    """

    path: Path
    format: str
    identity: str
    virtual_size_bytes: int
    internal_snapshots: int = 0
    bitmaps: tuple[str, ...] = ()
    dirty: bool = False
    corrupt: bool = False
    encrypted: bool = False
    external_data: bool = False
    modified_s: float = 0.0
    allocated_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainDisk:
    """One disk of a domain (``device='disk'``; CD-ROM and floppy drives are not disks here).

    Attributes:
        target: the name the pair maps by, for example ``vda``.
        kind: where its bytes live.
        chain: its images, top first; empty when `kind` is not FILE or BLOCK, or `problem` is set.
        sector_bytes: logical sector size as the guest sees it.
        problem: why the chain could not be read, a sentence, or None.
        free_bytes: room for new files beside the top image (the file system of its folder; for a block
            device, of the agent's scratch folder).
    """

    target: str
    kind: SourceKind
    chain: tuple[Image, ...]
    sector_bytes: int = 512
    shareable: bool = False
    readonly: bool = False
    problem: str | None = None
    free_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A libvirt snapshot of a domain; `ours` when failback made it (by its name and description)."""

    name: str
    ours: bool
    external: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """What inspection found; a value, never a handle."""

    uuid: str
    name: str
    state: PowerState
    persistent: bool
    autostart: bool
    managed_save: bool
    on_poweroff: str  # destroy, restart, preserve, rename-restart
    machine: str
    firmware: str  # bios or uefi
    has_tpm: bool
    passthrough: tuple[str, ...]  # host devices, as ``pci 0000:01:00.0``
    disks: tuple[DomainDisk, ...]
    snapshots: tuple[Snapshot, ...]
    checkpoints: tuple[str, ...]
    job: str | None  # a job or block job that is running: backup, migration, "block copy of vda" …


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What the host is."""

    hostname: str
    uri: str
    libvirt_version: str
    qemu_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A frozen state of a running domain's disks, served by QEMU over NBD on a unix socket.

    Attributes:
        socket: the NBD server's unix socket.
        exports: NBD export name by disk target (``exports[target]``).
    """

    domain_uuid: str
    socket: Path
    exports: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """What a protective snapshot did to one disk: `base` is frozen, the domain now points at `overlay`."""

    target: str
    base: Path
    base_format: str
    overlay: Path


class Hypervisor(Protocol):
    """A host that runs domains. Domains are named by UUID (canonical, lower case) except in `find`."""

    def facts(self) -> HostFacts:
        """Facts of the host itself."""

    def find(self, name_or_uuid: str) -> str:
        """The UUID of the domain of that name or UUID; raises `agent.errors.NoSuchDomain`."""

    def inspect(self, uuid: str) -> Domain:
        """Everything a plan needs, read now."""

    def state(self, uuid: str) -> PowerState:
        """Only the power state; cheap."""

    def power_on(self, uuid: str) -> None:
        """Start the domain; returns when libvirt says it runs. No-op when it runs already."""

    def request_shutdown(self, uuid: str) -> None:
        """Ask the guest once to power off (ACPI). No-op when off. It is a request: poll or wait for the state."""

    def wait_off(self, uuid: str, timeout_s: float) -> bool:
        """Wait (on libvirt's lifecycle events, not by polling alone) until the domain is off; False at the deadline."""

    def force_off(self, uuid: str, *, graceful: bool) -> None:
        """Destroy the domain. Graceful never sends SIGKILL, so that bitmaps survive, and raises if QEMU won't end."""

    def set_autostart(self, uuid: str, enabled: bool) -> bool:
        """Set the autostart flag; returns what it was before."""

    def open_view(self, uuid: str, targets: Sequence[str], tag: str) -> View:
        """Begin a pull-mode backup of the running domain's `targets` (all other disks excluded) at one instant.

        Scratch files and socket carry `tag`. A domain that has a job already is an error, also when the job is an
        older view of ours: `close_view` comes first.
        """

    def close_view(self, uuid: str, tag: str) -> None:
        """End the view of that tag if it is the domain's running job; remove its scratch files and socket.

        Never touches a job that is not ours. Harmless when there is none, when the domain is off, and when repeated.
        """

    def protect(self, uuid: str, targets: Sequence[str], snapshot: str, description: str) -> tuple[Overlay, ...]:
        """Take the external disk-only snapshot `snapshot` of the shut-off domain; its disks now point at overlays.

        Overlays stand beside their bases (for block devices in the agent's scratch folder). When a snapshot of
        that name exists already, its overlays are returned and nothing is done.
        """

    def unprotect(self, uuid: str, snapshot: str, overlays: Sequence[Overlay]) -> None:
        """Undo `protect`: the shut-off domain's disks point at their bases again, snapshot metadata and overlay
        files are gone. Whatever the overlays hold is lost. Harmless when repeated or half done before."""

    def close(self) -> None:
        """Disconnect; running domains and jobs are left alone."""
