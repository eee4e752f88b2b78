"""What the agent must still know after a restart: epochs, fences, conditions of disks, protective snapshots.

One small JSON file, replaced whole: written beside, synced, renamed, folder synced. Every change is durable before the
method returns (I5). The lock on the folder keeps a second agent away.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import cattrs

from agent.authority_record import EpochRecord, epoch_of, with_epoch
from agent.disk.stamp import Stamp
from agent.durable import replace_whole, settle
from agent.errors import AgentError
from agent.fence_list import entry, list_text, write_list
from agent.fence_record import ConditionRecord, DiskCondition, FencedImage, FenceRecord, LockKind
from agent.lift_record import LiftRecord
from agent.overlay_record import OverlayRecord

__all__ = [
    "ConditionRecord",
    "Contents",
    "DiskCondition",
    "FenceRecord",
    "FencedImage",
    "Ledger",
    "LedgerBusy",
    "LedgerError",
    "LockKind",
    "ProtectedImage",
    "ProtectionRecord",
    "ThawRecord",
    "TrackedImage",
    "TrackingRecord",
    "ViewRecord",
]

VERSION = 1


class LedgerError(AgentError):
    """The ledger cannot be read or written; the agent does not go on without it."""

    code = "ledger"


class LedgerBusy(LedgerError):
    """Another agent uses the state folder."""


R = TypeVar("R", FenceRecord, ConditionRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectedImage:
    """One disk of a snapshot of ours. `mode`: what the base's permission bits were before it was made read-only as a
    restore point; None: it was not. `base_stamp`: of an original's base, before the overlay was put over it."""

    target: str
    base: Path
    base_format: str
    overlay: Path
    mode: int | None = None
    base_stamp: Stamp | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionRecord:
    """A snapshot of ours that has not been dropped: the protective one of a replica, the working one of an original.

    `merging`: its overlays are being merged into their bases, which are not what they were any more.
    """

    vm_uuid: str
    pair: str
    snapshot: str
    images: tuple[ProtectedImage, ...]
    side: str = "replica"
    merging: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRecord:
    """A view of a running VM that is open, or about to be: it must not outlive the agent that reads it, for the guest
    pays for it with every write."""

    vm_uuid: str
    view: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ThawRecord:
    """A VM whose guest's file systems we have had frozen, or are about to: it is owed a thaw."""

    vm_uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedImage:
    """The image that a disk had when a view of it was frozen; its identity ends with the host's uptime."""

    target: str
    path: Path
    identity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingRecord:
    """A view from which on the writes to these disks of a VM are recorded."""

    vm_uuid: str
    view: str
    images: tuple[TrackedImage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The whole ledger, a value."""

    version: int = VERSION
    epochs: tuple[EpochRecord, ...] = ()
    fences: tuple[FenceRecord, ...] = ()
    conditions: tuple[ConditionRecord, ...] = ()
    protections: tuple[ProtectionRecord, ...] = ()
    views: tuple[ViewRecord, ...] = ()
    overlays: tuple[OverlayRecord, ...] = ()
    thaws: tuple[ThawRecord, ...] = ()
    trackings: tuple[TrackingRecord, ...] = ()
    lifts: tuple[LiftRecord, ...] = ()


@dataclass
class Ledger:
    """The ledger of one agent. Its methods block for an fsync and may be called from several threads: pairs are worked
    on side by side, and what one writes must not undo what another wrote."""

    folder: Path
    _contents: Contents = field(default_factory=Contents)
    _lock_fd: int = -1
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, folder: Path) -> Ledger:
        """Lock the folder (made if missing) and read the ledger.

        Raises:
            LedgerError: another agent uses the folder; the file is damaged, or of a newer version.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(folder / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LedgerError(
                f"the state folder {folder} cannot be used: {error.strerror}; make it writable or set state_dir"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise LedgerBusy(
                f"another failback-agent already uses the state folder {folder}: stop it, or set another state_dir"
            ) from error
        ledger = cls(folder, _lock_fd=fd)
        try:
            ledger._settle()
            ledger._contents = ledger._read()
            ledger._list(ledger._contents)
        except LedgerError:
            ledger.close()
            raise
        return ledger

    def _settle(self) -> None:
        try:
            settle(self.folder)
        except OSError as error:
            raise LedgerError(
                f"the state folder {self.folder} cannot be made durable: {error.strerror}; see to its storage, then "
                "start the agent again"
            ) from error

    @property
    def path(self) -> Path:
        """The file itself."""
        return self.folder / "ledger.json"

    @property
    def contents(self) -> Contents:
        """What is durable now."""
        return self._contents

    def _read(self) -> Contents:
        cure = "put back a copy of it, or move it away after making sure that no pair is fenced here"
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Contents()
        except (OSError, ValueError) as error:
            raise LedgerError(f"the agent's ledger {self.path} cannot be read: {error}; {cure}") from error
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise LedgerError(
                f"the agent's ledger {self.path} is of version {version}, this agent reads {VERSION}: "
                "install the version of failback that wrote it"
            )
        try:
            return _CONVERTER.structure(values, Contents)
        except Exception as error:  # whatever cattrs raises, it means: damaged
            raise LedgerError(f"the agent's ledger {self.path} is damaged; {cure}") from error

    def _write(self, contents: Contents) -> None:
        text = json.dumps(_CONVERTER.unstructure(contents), indent=1, sort_keys=True)
        # The hook's list is ahead of the ledger with new fences and behind it with lifted ones: never one too few.
        gone = tuple(fence for fence in self._contents.fences if fence not in contents.fences)
        self._list(replace(contents, fences=(*contents.fences, *gone)))
        try:
            replace_whole(self.path, text)
        except OSError as error:
            raise self._unwritable(error) from error
        self._contents = contents
        self._list(contents)

    def _list(self, contents: Contents) -> None:
        """Write the list of fenced VMs for libvirt's hook."""
        torn = {r.vm_uuid: r.condition.value for r in contents.conditions}
        entries = (entry(f, torn.get(f.vm_uuid, "")) for f in contents.fences)
        try:
            write_list(self.folder, list_text(entries))
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> LedgerError:
        cure = "free or mend its file system"
        return LedgerError(f"the agent's ledger {self.path} cannot be written: {error.strerror}; {cure}")

    def _change(self, change: Callable[[Contents], Contents]) -> None:
        """Make `change`'s result durable; no write where it changes nothing."""
        with self._turn:
            contents = change(self._contents)
            if contents != self._contents:
                self._write(contents)

    # --- epochs ---------------------------------------------------------------------------------------------------

    def epoch(self, pair: str) -> int:
        """The highest epoch seen for the pair, 0 when none was."""
        return self.authority(pair).epoch

    def authority(self, pair: str) -> EpochRecord:
        """The highest epoch seen for the pair, and who holds it."""
        return epoch_of(self._contents.epochs, pair)

    def raise_epoch(self, pair: str, epoch: int) -> None:
        """Remember a higher epoch; a lower or equal one changes nothing."""
        self.put_authority(EpochRecord(pair=pair, epoch=epoch))

    def put_authority(self, record: EpochRecord) -> None:
        """Remember a higher epoch and its holder; a lower one changes nothing."""
        self._change(lambda old: replace(old, epochs=with_epoch(old.epochs, record)))

    # --- fences lifted by hand --------------------------------------------------------------------------------------

    def lift_of(self, vm_uuid: str) -> LiftRecord | None:
        """That a person lifted the fence of that VM, until a run has fenced and released it again."""
        return next((record for record in self._contents.lifts if record.vm_uuid == vm_uuid), None)

    def lift_by_hand(self, record: LiftRecord, condition: ConditionRecord | None) -> None:
        """Forget the fence, remember who lifted it, and set the flag of the disks: one write."""
        self._change(
            lambda old: replace(
                old,
                fences=_without(old.fences, record.vm_uuid),
                lifts=(*(r for r in old.lifts if r.vm_uuid != record.vm_uuid), record),
                conditions=old.conditions
                if condition is None
                else (*_without(old.conditions, record.vm_uuid), condition),
            )
        )

    # --- records by VM --------------------------------------------------------------------------------------------

    def fence(self, vm_uuid: str) -> FenceRecord | None:
        """The fence on that VM, if there is one."""
        return next((record for record in self._contents.fences if record.vm_uuid == vm_uuid), None)

    def put_fence(self, fence: FenceRecord) -> None:
        """Add the fence, or replace the one on the same VM."""
        self._change(lambda old: replace(old, fences=(*_without(old.fences, fence.vm_uuid), fence)))

    def drop_fence(self, vm_uuid: str) -> None:
        """Forget the fence on that VM, which a run lifts; also that a person lifted an earlier one."""
        self._change(
            lambda old: replace(
                old,
                fences=_without(old.fences, vm_uuid),
                lifts=tuple(r for r in old.lifts if r.vm_uuid != vm_uuid),
            )
        )

    def condition(self, vm_uuid: str) -> ConditionRecord | None:
        """The flag of that VM's disks; None when nothing was ever written to them by us."""
        return next((record for record in self._contents.conditions if record.vm_uuid == vm_uuid), None)

    def put_condition(self, record: ConditionRecord) -> None:
        """Set the flag of a VM's disks; no write when it says so already."""
        if self.condition(record.vm_uuid) == record:
            return
        self._change(lambda old: replace(old, conditions=(*_without(old.conditions, record.vm_uuid), record)))

    def drop_condition(self, vm_uuid: str) -> None:
        """Forget the flag of that VM's disks: they belong to no pair any more."""
        self._change(lambda old: replace(old, conditions=_without(old.conditions, vm_uuid)))

    def protection(self, vm_uuid: str, snapshot: str) -> ProtectionRecord | None:
        """The record of that protective snapshot."""
        return next((r for r in self._contents.protections if (r.vm_uuid, r.snapshot) == (vm_uuid, snapshot)), None)

    def put_protection(self, record: ProtectionRecord) -> None:
        """Add or replace the record of a protective snapshot."""
        self._change(
            lambda old: replace(old, protections=(*_others(old.protections, record.vm_uuid, record.snapshot), record))
        )

    def drop_protection(self, vm_uuid: str, snapshot: str) -> None:
        """Forget a protective snapshot."""
        self._change(lambda old: replace(old, protections=_others(old.protections, vm_uuid, snapshot)))

    def put_view(self, record: ViewRecord) -> None:
        """Remember a view that is about to be opened."""
        self._change(lambda old: replace(old, views=(*(v for v in old.views if v != record), record)))

    def drop_view(self, record: ViewRecord) -> None:
        """Forget a view that is closed."""
        self._change(lambda old: replace(old, views=tuple(v for v in old.views if v != record)))

    # --- what views record --------------------------------------------------------------------------------------------

    def put_thaw(self, vm_uuid: str) -> None:
        """Remember that the guest of that VM is owed a thaw."""
        record = ThawRecord(vm_uuid=vm_uuid)
        self._change(lambda old: replace(old, thaws=(*(t for t in old.thaws if t != record), record)))

    def drop_thaw(self, vm_uuid: str) -> None:
        """It has been thawed."""
        self._change(lambda old: replace(old, thaws=tuple(t for t in old.thaws if t.vm_uuid != vm_uuid)))

    def tracked_image(self, vm_uuid: str, view: str, target: str) -> TrackedImage | None:
        """The image of that disk from that view on; None where nothing was recorded of it."""
        record = self.tracking(vm_uuid, view)
        return None if record is None else next((i for i in record.images if i.target == target), None)

    def tracking(self, vm_uuid: str, view: str) -> TrackingRecord | None:
        """What that view records."""
        return next((r for r in self._contents.trackings if (r.vm_uuid, r.view) == (vm_uuid, view)), None)

    def put_tracking(self, record: TrackingRecord) -> None:
        """Remember what a view records."""
        key = (record.vm_uuid, record.view)
        self._change(
            lambda old: replace(old, trackings=(*(r for r in old.trackings if (r.vm_uuid, r.view) != key), record))
        )

    def drop_trackings(self, vm_uuid: str, keep: Sequence[str]) -> None:
        """Forget what the views of that VM record, but for those in `keep`."""
        self._change(
            lambda old: replace(
                old, trackings=tuple(r for r in old.trackings if r.vm_uuid != vm_uuid or r.view in keep)
            )
        )

    def put_overlays(self, *records: OverlayRecord) -> None:
        """Add these records of live overlays, or replace those of the same files; one write."""
        files = {record.overlay for record in records}
        self._change(lambda old: replace(old, overlays=(*_not_of(old.overlays, files), *records)))

    def drop_overlays(self, *records: OverlayRecord) -> None:
        """Forget these overlays; one write."""
        files = {record.overlay for record in records}
        self._change(lambda old: replace(old, overlays=_not_of(old.overlays, files)))

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock_fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._lock_fd)
            self._lock_fd = -1


def _without(records: tuple[R, ...], vm_uuid: str) -> tuple[R, ...]:
    return tuple(record for record in records if record.vm_uuid != vm_uuid)


def _others(records: tuple[ProtectionRecord, ...], vm_uuid: str, snapshot: str) -> tuple[ProtectionRecord, ...]:
    return tuple(r for r in records if (r.vm_uuid, r.snapshot) != (vm_uuid, snapshot))


def _not_of(records: tuple[OverlayRecord, ...], files: set[Path]) -> tuple[OverlayRecord, ...]:
    return tuple(record for record in records if record.overlay not in files)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(Path, lambda value, _: Path(str(value)))
    to_text: Callable[[Path], str] = str
    converter.register_unstructure_hook(Path, to_text)
    return converter


_CONVERTER = _converter()
