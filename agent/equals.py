"""The target's durable record of what each disk of an original equals, and the stamps of its files.

A file of its own beside the ledger. Unlike the ledger it may be lost: without it nothing is proven, and the next pass
compares.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cattrs
import structlog

from agent.disk.stamp import Stamp
from agent.durable import replace_whole
from agent.errors import AgentError

log = structlog.get_logger("failback.agent")

VERSION = 1


class EqualsError(AgentError):
    """The record cannot be written; nothing is written to a disk then either."""

    code = "ledger"


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualsRecord:
    """What one disk equals.

    Attributes:
        path: its image.
        view: the view that it equals.
        torn: a pass limited to what was written since that view has begun to write: whatever differs from the view
            lies in that.
        stamp: of the file when it was closed; None for a block device, and while something is being written.
    """

    vm_uuid: str
    target: str
    path: str
    view: str
    torn: bool
    stamp: Stamp | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    version: int = VERSION
    disks: tuple[EqualsRecord, ...] = ()


@dataclass
class EqualsBook:
    """The records of one agent. Its methods block for an fsync and may be called from several threads."""

    path: Path
    _disks: tuple[EqualsRecord, ...] = ()
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, folder: Path) -> EqualsBook:
        """Read the book of that state folder, which the caller has locked. One that cannot be read is empty."""
        book = cls(folder / "equals.json")
        try:
            contents = cattrs.structure(json.loads(book.path.read_text(encoding="utf-8")), _Contents)
        except FileNotFoundError:
            return book
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, nothing is proven by it
            log.warning("the record of what disks equal cannot be read; they will be compared", reason=str(error))
            return book
        if contents.version == VERSION:
            book._disks = contents.disks
        return book

    def of(self, vm_uuid: str, target: str) -> EqualsRecord | None:
        """The record of that disk."""
        return next((r for r in self._disks if (r.vm_uuid, r.target) == (vm_uuid, target)), None)

    @property
    def records(self) -> tuple[EqualsRecord, ...]:
        """All of them."""
        return self._disks

    def put(self, record: EqualsRecord) -> None:
        """Make the record durable, in place of the disk's former one."""
        self._change(lambda old: (*(r for r in old if not _is_of(r, record.vm_uuid, record.target)), record))

    def drop(self, vm_uuid: str, target: str | None = None) -> None:
        """Durably forget that disk, or all of the VM; no write where nothing is known."""
        self._change(lambda old: tuple(r for r in old if not _is_of(r, vm_uuid, target)))

    def _change(self, change: Callable[[tuple[EqualsRecord, ...]], tuple[EqualsRecord, ...]]) -> None:
        with self._turn:
            disks = change(self._disks)
            if disks == self._disks:
                return
            text = json.dumps(cattrs.unstructure(_Contents(disks=disks)), indent=1, sort_keys=True)
            try:
                replace_whole(self.path, text)
            except OSError as error:
                raise EqualsError(
                    f"the record {self.path} cannot be written: {error.strerror}; see to it that the state folder has "
                    "room and is writable"
                ) from error
            self._disks = disks


def _is_of(record: EqualsRecord, vm_uuid: str, target: str | None) -> bool:
    return record.vm_uuid == vm_uuid and target in (None, record.target)
