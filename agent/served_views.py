"""What it takes to read a live view again after the agent was killed: QEMU goes on serving it, nobody closed it.

A small file for each view that a backup job serves whole, written when the view is open and removed before the job is
ended. Without it, or where it is damaged, the view is closed as nobody's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import cattrs
import structlog

from agent.durable import remove_durably, replace_whole

log = structlog.get_logger("failback.agent")

FOLDER = "views"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedView:
    """A view that a running VM's backup job serves.

    Attributes:
        targets: every disk of it.
        socket, exports, contexts: where QEMU serves it, the export of each disk, and the metadata context that lists
            what was written to it since `since`.
        scratch: the scratch file of each disk.
        tracked, since, why_not: as of `agent.sources.OpenedView`.
    """

    version: int = VERSION
    vm_uuid: str
    pair: str
    view: str
    targets: tuple[str, ...]
    socket: Path
    exports: dict[str, str]
    contexts: dict[str, str]
    scratch: dict[str, Path]
    tracked: tuple[str, ...]
    since: dict[str, str]
    why_not: dict[str, tuple[str, ...]]


_converter = cattrs.Converter()
_converter.register_structure_hook(Path, lambda value, _: Path(value))
_converter.register_unstructure_hook(Path, str)


@dataclass
class ServedViews:
    """The records of this host, one for each VM. Its methods block."""

    state_dir: Path

    def _path(self, vm_uuid: str) -> Path:
        return self.state_dir / FOLDER / f"{quote(vm_uuid, safe='')}.json"

    def put(self, view: ServedView) -> None:
        """Record it. One that cannot be recorded is not there after a restart, and that is all."""
        path = self._path(view.vm_uuid)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_whole(path, json.dumps(_converter.unstructure(view)))
        except OSError as error:
            log.warning("an open view cannot be recorded", vm=view.vm_uuid, view=view.view, reason=str(error))

    def of(self, vm_uuid: str, view: str) -> ServedView | None:
        """The record of that view of that VM."""
        path = self._path(vm_uuid)
        try:
            found = _converter.structure(json.loads(path.read_text(encoding="utf-8")), ServedView)
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the view is opened anew
            log.warning("the record of an open view cannot be read", path=str(path), reason=str(error))
            return None
        fits = (found.version, found.vm_uuid, found.view) == (VERSION, vm_uuid, view)
        return found if fits else None

    def drop(self, vm_uuid: str) -> None:
        """The view is about to end. One that cannot be removed names a job that is gone, and counts for nothing."""
        try:
            remove_durably(self._path(vm_uuid))
        except OSError as error:
            log.warning("the record of an open view cannot be removed", vm=vm_uuid, reason=str(error))
