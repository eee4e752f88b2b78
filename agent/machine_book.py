"""What a run has changed of a VM beside its disks, and where the old is kept: the agent's memory of it.

One small JSON file for each VM, beside the ledger, replaced whole. It is written before anything is changed, so that
what is found there after a crash is what may have been done.
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
from agent.virt.seam import StateRole

VERSION = 1


class MachineBookError(AgentError):
    """The record cannot be read or written; nothing is changed then either."""

    code = "ledger"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptState:
    """State that was replaced.

    Attributes:
        role: what it is.
        path: where the VM has it, a file or a folder.
        kept: what was there is kept under this name beside it.
        existed: there was anything.
        placed: name and BLAKE3 (hex) of each file that was put there.
    """

    role: StateRole
    path: Path
    kept: Path
    existed: bool
    placed: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeDisk:
    """A disk that was created, or is about to be."""

    target: str
    path: Path
    format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRecord:
    """What one run has changed of one VM. `definition_before`: with its secrets, None where it was not changed;
    `definition_after`: as it was left."""

    vm_uuid: str
    pair: str
    run: str
    states: tuple[KeptState, ...] = ()
    definition_before: str | None = None
    definition_after: str = ""
    disks: tuple[MadeDisk, ...] = ()
    version: int = VERSION

    def state(self, role: StateRole) -> KeptState | None:
        """What was replaced of that role."""
        return next((state for state in self.states if state.role is role), None)

    def with_state(self, state: KeptState) -> MachineRecord:
        """The record with that one instead of the one of its role."""
        return replace(self, states=(*(s for s in self.states if s.role is not state.role), state))

    @property
    def is_empty(self) -> bool:
        """Nothing is changed any more."""
        return not self.states and self.definition_before is None and not self.disks


@dataclass(frozen=True, slots=True)
class MachineBook:
    """The records of one agent, in a folder of its state, which it has locked. Methods block for an fsync."""

    folder: Path

    def find(self, vm_uuid: str) -> MachineRecord | None:
        """The record of that VM.

        Raises:
            MachineBookError: there is one that cannot be read.
        """
        path = self._path(vm_uuid)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._damaged(path, error) from error
        try:
            if values["version"] != VERSION:
                raise self._damaged(path, ValueError(f"version {values['version']}"))
            return _CONVERTER.structure(values, MachineRecord)
        except MachineBookError:
            raise
        except Exception as error:  # whatever cattrs raises, it means: damaged
            raise self._damaged(path, error) from error

    def put(self, record: MachineRecord) -> None:
        """Make the record durable; an empty one is forgotten."""
        path = self._path(record.vm_uuid)
        try:
            if record.is_empty:
                remove_durably(path)
                return
            make_folder(self.folder)
            replace_whole(path, json.dumps(_CONVERTER.unstructure(record), indent=1))
        except OSError as error:
            raise MachineBookError(
                f"the agent's record {path} cannot be written: {error.strerror}; free or mend its file system"
            ) from error

    def _path(self, vm_uuid: str) -> Path:
        return self.folder / f"{os.path.basename(vm_uuid)}.json"  # noqa: PTH119 - of a UUID, not of a path

    def _damaged(self, path: Path, error: Exception) -> MachineBookError:
        return MachineBookError(
            f"the agent's record {path} of what a run changed cannot be read: {error}; put back a copy of it, or move "
            "it away after you have given the VM its old definition, firmware variables and TPM state by hand"
        )


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter()
    converter.register_structure_hook(Path, lambda value, _: Path(str(value)))
    to_text: Callable[[Path], str] = str
    converter.register_unstructure_hook(Path, to_text)
    return converter


_CONVERTER = _converter()
