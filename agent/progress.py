"""How far passes have come that are not complete: for each disk of an original, durably, what of it is proven to equal
the view of its pass.

A stretch gets here only after what was written to it was flushed and read back; so a crash leaves a record that claims
too little. A record is about one view, and is removed before anything is written for another. What it says holds only
if nobody else can have written meanwhile: the lock was held without a gap, or the file is as it was when everything
written was proven. All methods block and may be called from several worker threads.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

import cattrs
import structlog

from agent.disk.lock import HeldImage
from agent.disk.stamp import Stamp, stamp_of
from agent.durable import make_folder, remove_durably, replace_whole
from agent.errors import AgentError
from agent.fences import FenceKeeper
from agent.sync.proven import Proven
from protocol.messages import GrantedDisk

log = structlog.get_logger("failback.agent")

FOLDER = "progress"
VERSION = 1
SETTLE_S = 0.02
"""Between the last write and the stamp, as `agent.evidence.SETTLE_S` says."""


class ProgressError(AgentError):
    """The record of an earlier pass cannot be removed, and would be believed after this one."""

    code = "ledger"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressRecord:
    """How far the pass of one disk has come.

    Attributes:
        view: of the pass; `path`: the image; `size_bytes`: of the view.
        runs: what is proven, offset and length in bytes.
        stamp: of the image when nothing was written that was not proven; None otherwise, and for a block device.
        suspect: a flush failed since the disk was last proven whole: what is not in `runs` is not to be read from the
            page cache.
    """

    version: int = VERSION
    view: str
    path: str
    size_bytes: int
    runs: tuple[tuple[int, int], ...] = ()
    stamp: Stamp | None = None
    suspect: bool = False


@dataclass(frozen=True, slots=True)
class Begun:
    """What a pass begins with: what is proven already, and whether the page cache is not to be believed."""

    proven: Proven
    suspect: bool


@dataclass
class ProgressDesk:
    """The records of this host's originals, a small file for each disk."""

    state_dir: Path
    fences: FenceKeeper
    _under: dict[Path, HeldImage] = field(default_factory=dict)
    """By record: the lock that has been held since it was begun or was proven by its stamp."""
    _kept: dict[Path, ProgressRecord] = field(default_factory=dict)

    def begin(self, vm_uuid: str, granted: GrantedDisk, view: str) -> Begun:
        """A pass that makes that disk equal `view` is about to begin.

        Raises:
            ProgressError: a record that does not hold cannot be removed.
        """
        path, held = self._path(vm_uuid, granted.target), self._held(vm_uuid, granted.target)
        record = _read(path)
        suspect = record is not None and record.suspect
        if record is not None:
            why_not = self._why_not(path, record, held, granted, view)
            if not why_not:
                assert held is not None
                self._under[path], self._kept[path] = held, record
                proven = Proven(record.runs)
                log.info("a pass goes on", disk=granted.target, view=view, proven_bytes=proven.size_bytes)
                return Begun(proven, suspect)
            log.info("what an earlier pass has proven does not count", disk=granted.target, reason=why_not)
        if not suspect:
            self._remove(path)
        if held is not None:
            empty = ProgressRecord(
                view=view, path=str(held.path), size_bytes=granted.source_size_bytes, suspect=suspect
            )
            self._under[path], self._kept[path] = held, empty
            if suspect:  # never without that record, not for a moment
                self._put(path, empty, must=True)
        return Begun(Proven(), suspect)

    def keep(self, vm_uuid: str, target: str, proven: Proven) -> None:
        """Record what is proven by now, if that is more, or if the disk is quiet and the record does not say so yet."""
        path = self._path(vm_uuid, target)
        kept, held = self._kept.get(path), self._held(vm_uuid, target)
        if kept is None or held is None or held is not self._under.get(path):
            return
        runs, stamp = proven.runs(), None
        if proven.is_quiet():
            stamp = _stamp(held)
            if stamp != kept.stamp:
                time.sleep(SETTLE_S)
                stamp = _stamp(held)
            if not proven.is_quiet():
                stamp = None
        if runs != kept.runs or (stamp is not None and stamp != kept.stamp):
            self._put(path, replace(kept, runs=runs, stamp=stamp))

    def broken_off(self, vm_uuid: str, target: str, proven: Proven, *, suspect: bool) -> None:
        """The pass has failed and the disk is closed. `suspect`: it failed by a flush of this disk.

        Raises:
            ProgressError: that a flush failed cannot be recorded.
        """
        path = self._path(vm_uuid, target)
        kept, held = self._kept.get(path), self._held(vm_uuid, target)
        if kept is None:
            return
        still = held is not None and held is self._under.get(path)
        time.sleep(SETTLE_S)
        stamp = _stamp(held) if held is not None and still else None
        runs = proven.runs() if still else ()
        self._put(path, replace(kept, runs=runs, stamp=stamp, suspect=suspect or kept.suspect), must=suspect)

    def finished(self, vm_uuid: str, target: str) -> None:
        """The pass is complete: what the disk equals is on record elsewhere."""
        self._remove(self._path(vm_uuid, target))

    def forget(self, vm_uuid: str) -> None:
        """The VM is about to be let loose on its disks, which are verified, or are none of ours any more."""
        for path in (self.state_dir / FOLDER).glob(f"{quote(vm_uuid, safe='')}-*.json"):
            self._remove(path)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _path(self, vm_uuid: str, target: str) -> Path:
        return self.state_dir / FOLDER / f"{quote(vm_uuid, safe='')}-{quote(target, safe='')}.json"

    def _held(self, vm_uuid: str, target: str) -> HeldImage | None:
        fence = self.fences.fence_of(vm_uuid)
        image = next((i for i in (fence.images if fence else ()) if i.target == target), None)
        held = None if image is None else self.fences.held(image.path)
        return held if held is not None and held.exclusive and held.is_named() else None

    def _why_not(
        self, path: Path, record: ProgressRecord, held: HeldImage | None, granted: GrantedDisk, view: str
    ) -> str:
        """Why a record does not hold, a clause; empty where it does."""
        if record.version != VERSION or record.view != view:
            return f"it is about the view {record.view or 'of a damaged record'}, and this pass is about {view}"
        if held is None or str(held.path) != record.path or record.size_bytes != granted.source_size_bytes:
            return "the disk is another than it was, or is not locked"
        under_lock = self._under.get(path) is held
        if record.stamp is None:
            return "" if under_lock else "the lock was lost while something was being written"
        now = _stamp(held)
        changed = ("kind",) if now is None else record.stamp.changed_to(now)
        return f"the file was changed since ({', '.join(changed)})" if changed else ""

    def _put(self, path: Path, record: ProgressRecord, *, must: bool = False) -> None:
        """Durably; one that cannot be written leaves the one before, which claims less, unless it `must` be."""
        try:
            make_folder(path.parent)
            replace_whole(path, json.dumps(cattrs.unstructure(record)))
            self._kept[path] = record
        except OSError as error:
            if must:
                raise ProgressError(
                    f"the record {path} cannot be written: {error.strerror}; see to it that the state folder has room"
                ) from error
            log.warning("the progress of a pass cannot be recorded", path=str(path), reason=str(error))

    def _remove(self, path: Path) -> None:
        self._under.pop(path, None)
        self._kept.pop(path, None)
        try:
            remove_durably(path)
        except OSError as error:
            raise ProgressError(
                f"the record {path} of an earlier pass cannot be removed: {error.strerror}; see to it that the state "
                "folder is writable"
            ) from error


def _read(path: Path) -> ProgressRecord | None:
    try:
        return cattrs.structure(json.loads(path.read_text(encoding="utf-8")), ProgressRecord)
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, it proves nothing
        log.warning("the record of a pass cannot be read; it counts for nothing", path=str(path), reason=str(error))
        # It may have said that a flush failed.
        return ProgressRecord(version=0, view="", path="", size_bytes=0, suspect=True)


def _stamp(held: HeldImage) -> Stamp | None:
    try:
        return stamp_of(held.fd)
    except OSError:
        return None
