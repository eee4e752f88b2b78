"""What a run has made on this host for a VM that is entirely new: the agent's memory of it.

One small JSON file for each VM, beside the ledger, replaced whole. Each volume and the definition are in it before they
are made, so that what is removed after a crash is what may have been made, and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cattrs

from agent.durable import make_folder, remove_durably, replace_whole
from agent.errors import AgentError

VERSION = 1


class HomeBookError(AgentError):
    """The record cannot be read or written; nothing is made or removed then either."""

    code = "ledger"


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeVolume:
    """A volume that was made, or, with `path` None, is about to be."""

    target: str
    pool: str
    name: str
    format: str
    size_bytes: int
    path: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HomeRecord:
    """One VM.

    Attributes:
        vm_uuid, name: of the VM; `pair`, `run`: for which it is made.
        volumes: of its disks.
        defining: its definition is about to be made, or was.
        defined: it was.
        keep_nvram: where the variables of its firmware were to be there was such a file before it.
    """

    vm_uuid: str
    name: str
    pair: str
    run: str
    volumes: tuple[MadeVolume, ...]
    defining: bool = False
    defined: bool = False
    keep_nvram: bool = True
    version: int = VERSION

    def with_volume(self, volume: MadeVolume) -> HomeRecord:
        """The record with that one instead of the one for the same disk."""
        return replace(self, volumes=tuple(volume if v.target == volume.target else v for v in self.volumes))


@dataclass(frozen=True, slots=True)
class HomeBook:
    """The records of one agent, in a folder of its state, which it has locked. Methods block for an fsync."""

    folder: Path

    def find(self, vm_uuid: str) -> HomeRecord | None:
        """The record of that VM.

        Raises:
            HomeBookError: there is one that cannot be read.
        """
        path = self._path(vm_uuid)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["version"] != VERSION:
                raise self._damaged(path, ValueError(f"version {values['version']}"))
            return _CONVERTER.structure(values, HomeRecord)
        except FileNotFoundError:
            return None
        except HomeBookError:
            raise
        except Exception as error:  # whatever reading raises, it means: damaged
            raise self._damaged(path, error) from error

    def put(self, record: HomeRecord) -> None:
        """Make the record durable."""
        path = self._path(record.vm_uuid)
        try:
            make_folder(self.folder)
            replace_whole(path, json.dumps(_CONVERTER.unstructure(record), indent=1))
        except OSError as error:
            raise self._unwritable(path, error) from error

    def drop(self, vm_uuid: str) -> None:
        """Forget that VM; harmless where it is not known."""
        path = self._path(vm_uuid)
        try:
            remove_durably(path)
        except OSError as error:
            raise self._unwritable(path, error) from error

    def _path(self, vm_uuid: str) -> Path:
        return self.folder / f"{os.path.basename(vm_uuid)}.json"  # noqa: PTH119 - of a UUID, not of a path

    def _damaged(self, path: Path, error: Exception) -> HomeBookError:
        return HomeBookError(
            f"the agent's record {path} of a VM that a run made cannot be read: {error}; put back a copy of it, or "
            "move it away after you have removed that VM and its volumes by hand"
        )

    def _unwritable(self, path: Path, error: OSError) -> HomeBookError:
        return HomeBookError(f"the agent's record {path} cannot be written: {error.strerror}; mend its file system")


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter()
    converter.register_structure_hook(Path, lambda value, _: Path(str(value)))
    to_text: Callable[[Path], str] = str
    converter.register_unstructure_hook(Path, to_text)
    return converter


_CONVERTER = _converter()
