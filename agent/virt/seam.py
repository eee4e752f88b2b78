"""The one seam between the agent and the hypervisor.

`Hypervisor` is what the rest of the agent may ask for; `agent.virt.libvirt_host.LibvirtHost` is the real one and the
only importer of libvirt; the in-memory one of the tests passes the same contract tests
(``tests/contract/test_hypervisor.py``). Every method is synchronous, may block, is called from a worker
thread, and raises `agent.errors.HypervisorError` (or a subclass) and nothing else.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from agent.virt.provision_seam import Provider


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
        keeps_bitmaps: its format can hold persistent dirty bitmaps (qcow2 from version 3 on).
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
    keeps_bitmaps: bool = False
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
    checkpoints: tuple[str, ...]  # those of others; ours are no obstacle to anybody
    job: str | None  # a job or block job that is running: backup, migration, "block copy of vda" …
    running_since_s: float = 0.0  # when its process started, seconds since 1970; 0: it does not run, or not known
    last_started_s: float = 0.0  # when it was started and stopped last, by its log; 0: the log does not tell
    last_stopped_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What the host is."""

    hostname: str
    uri: str
    libvirt_version: str
    qemu_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierView:
    """The earlier view of a disk since which a new one shall know what was written.

    Attributes:
        tag: of the earlier view; its checkpoint and its dirty bitmap carry it as their name.
        path, identity: the disk's image when that view was frozen (`Image.identity`).
    """

    tag: str
    path: Path
    identity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A frozen state of a running domain's disks, served by QEMU over NBD on a unix socket.

    Attributes:
        socket: the NBD server's unix socket.
        exports: NBD export name by disk target (``exports[target]``).
        images: the top image of each disk, by target.
        scratch: the scratch file of each disk, by target: it grows as the guest writes.
        tracked: targets whose writes are recorded from this view on.
        checkpoint_is_new: they are from this view on; not from an earlier instant at which a view had the same tag.
        since: by target, the tag of the earlier view since which this one knows what was written.
        dirty_contexts: for the targets in `since`, the NBD metadata context that lists what was written.
        why_not: by target, why it is not tracked, or does not know what was written since: a sentence.
    """

    domain_uuid: str
    socket: Path
    exports: dict[str, str]
    images: dict[str, Image] = field(default_factory=dict)
    scratch: dict[str, Path] = field(default_factory=dict)
    tracked: frozenset[str] = frozenset()
    checkpoint_is_new: bool = False
    since: dict[str, str] = field(default_factory=dict)
    dirty_contexts: dict[str, str] = field(default_factory=dict)
    why_not: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """What a protective snapshot did to one disk: `base` is frozen, the domain now points at `overlay`."""

    target: str
    base: Path
    base_format: str
    overlay: Path


class StateRole(enum.Enum):
    """State of a domain that is no disk."""

    NVRAM = "nvram"  # one file: the variables of UEFI firmware
    TPM = "tpm"  # one folder: what swtpm keeps


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePlace:
    """Where such state is kept: `path` may not be there yet. `format`: of the file, or the version of the TPM;
    `problem`: why it cannot be carried to another host, a sentence without its end, or empty."""

    role: StateRole
    path: Path
    format: str
    problem: str = ""


NO_EARLIER_VIEW: Mapping[str, EarlierView] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackOverlay:
    """A live overlay of ours on one disk of a running domain: from it on, what the guest writes is in `overlay`.

    Attributes:
        target: the disk.
        below: the image it stands on, frozen from then on: the disk's own, or an older overlay.
        base: the disk's own image, under every overlay of ours; its format is raw.
        overlay: the qcow2 file.
        definition: the ``<disk>`` of the persistent definition as it was when the disk had no overlay of ours.
    """

    target: str
    below: Path
    base: Path
    base_format: str
    overlay: Path
    definition: str


class Hypervisor(Provider, Protocol):
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
        """Ask the guest once to power off: through its agent where that answers, else by ACPI. No-op when off.

        It is a request: poll or wait for the state."""

    def wait_off(self, uuid: str, timeout_s: float) -> bool:
        """Wait (on libvirt's lifecycle events, not by polling alone) until the domain is off; False at the deadline."""

    def force_off(self, uuid: str, *, graceful: bool) -> None:
        """Destroy the domain. Graceful never sends SIGKILL, so that bitmaps survive, and raises if QEMU won't end."""

    def set_autostart(self, uuid: str, enabled: bool) -> bool:
        """Set the autostart flag; returns what it was before."""

    def open_view(
        self,
        uuid: str,
        targets: Sequence[str],
        tag: str,
        *,
        checkpoint: bool = False,
        since: Mapping[str, EarlierView] = NO_EARLIER_VIEW,
    ) -> View:
        """Begin a pull-mode backup of the running domain's `targets` (all other disks excluded) at one instant.

        Scratch files and socket carry `tag`. A domain that has a job already is an error, also when the job is an
        older view of ours: `close_view` comes first.

        Args:
            checkpoint: from the same instant, record what is written to each disk that can, under the name `tag`. A
                checkpoint of ours that has this name already stays instead of a new one: it began earlier, so it
                records whatever was written since this view as well.
            since: by target, the earlier view since which it shall be known what was written. Where that is not proven
                any more, the disk's view is opened without, and `View.why_not` tells the reason.
        """

    def serves_view(self, uuid: str, tag: str) -> bool:
        """Whether the running domain's job is the view of that tag, opened by whichever process."""

    def close_view(self, uuid: str, tag: str) -> None:
        """End the view of that tag if it is the domain's running job; remove its scratch files and socket.

        Never touches a job that is not ours. Harmless when there is none, when the domain is off, and when repeated.
        A guest that was paused by an I/O error while the view was open, as a full scratch file does it, goes on.
        """

    def has_stalled(self, uuid: str) -> bool:
        """Whether the guest is paused by an I/O error; cheap."""

    def drop_checkpoints(self, uuid: str, keep: Sequence[str] = ()) -> None:
        """Delete the checkpoints of our views but for the tags in `keep`: with their bitmaps while the domain runs
        (those whose bitmap is lost, and those of a domain that is off, by metadata only). Harmless when repeated."""

    def written_since(self, uuid: str, tag: str) -> dict[str, int]:
        """By target, about how many bytes the running domain has written since the view of that tag, as its bitmaps
        say now; disks that it does not know of are missing. Nothing is proven by it."""

    def drop_bitmaps(self, uuid: str) -> None:
        """Remove the dirty bitmaps of our views, and their checkpoints, from the images the running domain writes to;
        also those that no checkpoint knows any more. Those of others stay. Harmless when repeated, and when off."""

    def freeze_guest(self, uuid: str) -> None:
        """Let the guest's agent freeze its file systems: `thaw_guest` must follow soon, whatever this raises.

        Raises:
            GuestAgentMissing: the guest has no agent that listens: nothing was frozen.
        """

    def thaw_guest(self, uuid: str) -> None:
        """Let them go on. Harmless when nothing is frozen, and when the domain is off."""

    def protect(self, uuid: str, targets: Sequence[str], snapshot: str, description: str) -> tuple[Overlay, ...]:
        """Take the external disk-only snapshot `snapshot` of the shut-off domain; its disks now point at overlays.

        Overlays stand beside their bases (for block devices in the agent's scratch folder). When a snapshot of
        that name exists already, its overlays are returned and nothing is done.
        """

    def unprotect(self, uuid: str, snapshot: str, overlays: Sequence[Overlay]) -> None:
        """Undo `protect`: the shut-off domain's disks point at their bases again, snapshot metadata and overlay
        files are gone. Whatever the overlays hold is lost. Harmless when repeated or half done before."""

    def plan_protection(self, uuid: str, targets: Sequence[str], snapshot: str) -> tuple[Overlay, ...]:
        """What `protect` would do to these disks of the shut-off domain; changes nothing.

        So that the caller can write down what it is about to do. Where the snapshot stands, its overlays are named.
        """

    def merge_protection(self, uuid: str, snapshot: str, overlays: Sequence[Overlay], *, timeout_s: float) -> None:
        """Put what the overlays of `snapshot` hold into their bases, durably, while the domain runs; its disks are
        their bases again, as they were defined before, the snapshot's metadata and the overlays' files are gone.

        A block job for each disk, which is taken up again when it runs already. Harmless when repeated or half done
        before. `timeout_s`: how long each may take; it is ended then, and nothing is lost.
        """

    def plan_overlays(self, uuid: str, targets: Sequence[str], tag: str) -> tuple[TrackOverlay, ...]:
        """What `begin_overlays` would do to these disks of the running domain; changes nothing.

        So that the caller can write down what it is about to do. An overlay of that tag that stands already is named
        as it stands.
        """

    def begin_overlays(self, uuid: str, planned: Sequence[TrackOverlay]) -> None:
        """Put these overlays over the running domain's disks, all at one instant, without a snapshot's metadata.

        What lies below is flushed and frozen by it. Those that stand already stay. The domain's persistent definition
        names them as well, so that it starts through them.
        """

    def merge_overlays(
        self, uuid: str, paths: Sequence[Path], into: Path, disk: TrackOverlay, *, timeout_s: float
    ) -> None:
        """Put what adjoining overlays of ours (`paths`, top first) hold into the image below them, durably, and take
        them out of the running domain's disk; the guest sees the same bytes before, meanwhile and after.

        It is a block job, which is taken up again when it runs already. The files stay: they are the caller's to
        remove. Harmless when the disk does not read through them any more.

        Args:
            uuid: the domain.
            paths: their files.
            into: the image right below the last of them.
            disk: any overlay of that disk, for its target, base and definition.
            timeout_s: how long the job may take; it is ended then, and the chain is as it was.
        """

    def forget_overlays(self, uuid: str, paths: Sequence[Path], into: Path, disk: TrackOverlay) -> None:
        """Let the shut-off domain's disk stand on `into` instead of on `paths`, whose content the caller has put
        there; where a protective snapshot of ours stands on them, its metadata say so too. Harmless when repeated."""

    def definition(self, uuid: str, *, secrets: bool = False) -> str:
        """The persistent definition, libvirt's XML; with `secrets`, as `define` needs it."""

    def define(self, uuid: str, xml: str) -> str:
        """Give the shut-off domain another persistent definition; returns it as it then stands, secrets included."""

    def state_places(self, uuid: str) -> tuple[StatePlace, ...]:
        """Where the domain's state that is no disk is kept."""

    def networks(self) -> tuple[str, ...]:
        """What a NIC can be attached to on this host: ``network:NAME`` of libvirt's, ``bridge:NAME``."""

    def close(self) -> None:
        """Disconnect; running domains and jobs are left alone."""
