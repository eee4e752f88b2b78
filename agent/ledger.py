"""What the agent must still know after a restart: epochs, fences, conditions of disks, protective snapshots.

One small JSON file, replaced whole: written beside, synced, renamed, folder synced. Every change is durable before the
method returns (I5). The lock on the folder keeps a second agent away.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import cattrs

from agent.errors import AgentError

VERSION = 1


class LedgerError(AgentError):
    """The ledger cannot be read or written; the agent does not go on without it."""

    code = "ledger"


class LockKind(enum.Enum):
    """How an image is held."""

    EXCLUSIVE = "exclusive"  # nobody else reads or writes
    FROZEN = "frozen"  # everybody may read, nobody writes


class DiskCondition(enum.Enum):
    """The durable flag of an original's disks."""

    INTACT = "intact"
    TORN = "torn"
    EQUALS_VIEW = "equals-view"


@dataclass(frozen=True, slots=True, kw_only=True)
class FencedImage:
    """One image that a fence locks."""

    target: str
    path: Path
    format: str
    kind: LockKind


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceRecord:
    """A VM that must not start. `side` is ``original`` or ``replica``."""

    vm_uuid: str
    pair: str
    run: str
    side: str
    autostart_before: bool
    images: tuple[FencedImage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionRecord:
    """The flag of a VM's disks, with the view they equal."""

    vm_uuid: str
    condition: DiskCondition
    view: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectedImage:
    """One disk of a protective snapshot of ours."""

    target: str
    base: Path
    base_format: str
    overlay: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionRecord:
    """A protective snapshot of ours that has not been dropped."""

    vm_uuid: str
    pair: str
    snapshot: str
    images: tuple[ProtectedImage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """The highest fencing epoch seen for a pair."""

    pair: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The whole ledger, a value."""

    version: int = VERSION
    epochs: tuple[EpochRecord, ...] = ()
    fences: tuple[FenceRecord, ...] = ()
    conditions: tuple[ConditionRecord, ...] = ()
    protections: tuple[ProtectionRecord, ...] = ()


@dataclass
class Ledger:
    """The ledger of one agent. Calls come one at a time (the agent's own lock sees to it) and block for an fsync."""

    folder: Path
    _contents: Contents = field(default_factory=Contents)
    _lock_fd: int = -1

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
            raise LedgerError(
                f"another failback-agent already uses the state folder {folder}: stop it, or set another state_dir"
            ) from error
        ledger = cls(folder, _lock_fd=fd)
        try:
            ledger._contents = ledger._read()
        except LedgerError:
            ledger.close()
            raise
        return ledger

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
        beside = self.path.with_suffix(".new")
        try:
            fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
            folder_fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder_fd)
            finally:
                os.close(folder_fd)
        except OSError as error:
            raise LedgerError(
                f"the agent's ledger {self.path} cannot be written: {error.strerror}; free or mend its file system"
            ) from error
        self._contents = contents

    # --- epochs ---------------------------------------------------------------------------------------------------

    def epoch(self, pair: str) -> int:
        """The highest epoch seen for the pair, 0 when none was."""
        return next((record.epoch for record in self._contents.epochs if record.pair == pair), 0)

    def raise_epoch(self, pair: str, epoch: int) -> None:
        """Remember a higher epoch; a lower or equal one changes nothing."""
        if epoch <= self.epoch(pair):
            return
        kept = tuple(record for record in self._contents.epochs if record.pair != pair)
        self._write(replace(self._contents, epochs=(*kept, EpochRecord(pair=pair, epoch=epoch))))

    # --- records by VM --------------------------------------------------------------------------------------------

    def fence(self, vm_uuid: str) -> FenceRecord | None:
        """The fence on that VM, if there is one."""
        return next((record for record in self._contents.fences if record.vm_uuid == vm_uuid), None)

    def put_fence(self, fence: FenceRecord) -> None:
        """Add the fence, or replace the one on the same VM."""
        kept = tuple(record for record in self._contents.fences if record.vm_uuid != fence.vm_uuid)
        self._write(replace(self._contents, fences=(*kept, fence)))

    def drop_fence(self, vm_uuid: str) -> None:
        """Forget the fence on that VM."""
        kept = tuple(record for record in self._contents.fences if record.vm_uuid != vm_uuid)
        if kept != self._contents.fences:
            self._write(replace(self._contents, fences=kept))

    def condition(self, vm_uuid: str) -> ConditionRecord | None:
        """The flag of that VM's disks; None when nothing was ever written to them by us."""
        return next((record for record in self._contents.conditions if record.vm_uuid == vm_uuid), None)

    def put_condition(self, record: ConditionRecord) -> None:
        """Set the flag of a VM's disks; no write when it says so already."""
        if self.condition(record.vm_uuid) == record:
            return
        kept = tuple(old for old in self._contents.conditions if old.vm_uuid != record.vm_uuid)
        self._write(replace(self._contents, conditions=(*kept, record)))

    def protection(self, vm_uuid: str, snapshot: str) -> ProtectionRecord | None:
        """The record of that protective snapshot."""
        return next((r for r in self._contents.protections if (r.vm_uuid, r.snapshot) == (vm_uuid, snapshot)), None)

    def put_protection(self, record: ProtectionRecord) -> None:
        """Add or replace the record of a protective snapshot."""
        self._write(replace(self._contents, protections=(*self._others(record.vm_uuid, record.snapshot), record)))

    def drop_protection(self, vm_uuid: str, snapshot: str) -> None:
        """Forget a protective snapshot."""
        self._write(replace(self._contents, protections=self._others(vm_uuid, snapshot)))

    def _others(self, vm_uuid: str, snapshot: str) -> tuple[ProtectionRecord, ...]:
        return tuple(r for r in self._contents.protections if (r.vm_uuid, r.snapshot) != (vm_uuid, snapshot))

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock_fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._lock_fd)
            self._lock_fd = -1


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(Path, lambda value, _: Path(str(value)))
    to_text: Callable[[Path], str] = str
    converter.register_unstructure_hook(Path, to_text)
    return converter


_CONVERTER = _converter()
