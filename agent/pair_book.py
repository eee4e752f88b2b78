"""What each pair is, as coordinators told it: their registry can be rebuilt from this where it was lost.

A file of its own beside the ledger. Unlike the ledger it may be lost: nothing that is done to a VM rests on it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cattrs
import structlog

from agent.durable import replace_whole
from agent.errors import AgentError
from protocol.messages import PairMap, Side

log = structlog.get_logger("failback.agent")

VERSION = 1


class PairBookError(AgentError):
    """The book cannot be written."""

    code = "ledger"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """A pair of which one VM is on this host. `run`: the run under which it was told last, or empty."""

    pair: str
    run: str
    side: Side
    mapping: PairMap

    @property
    def vm_uuid(self) -> str:
        """The VM on this host."""
        return (self.mapping.original if self.side is Side.ORIGINAL else self.mapping.replica).uuid


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    version: int = VERSION
    pairs: tuple[PairRecord, ...] = ()


@dataclass
class PairBook:
    """The pairs of one agent. Its methods block for an fsync and may be called from several threads."""

    path: Path
    _pairs: tuple[PairRecord, ...] = ()
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, folder: Path) -> PairBook:
        """Read the book of that state folder, which the caller has locked. One that cannot be read is empty."""
        book = cls(folder / "pairs.json")
        try:
            contents = cattrs.structure(json.loads(book.path.read_text(encoding="utf-8")), _Contents)
        except FileNotFoundError:
            return book
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, it is told anew by the next run
            log.warning("what the pairs of this host are cannot be read; the next run tells it", reason=str(error))
            return book
        if contents.version == VERSION:
            book._pairs = contents.pairs
        return book

    @property
    def pairs(self) -> tuple[PairRecord, ...]:
        """Everything that is durable now."""
        return self._pairs

    def put(self, record: PairRecord) -> None:
        """Remember the pair's side, in place of what was remembered of it; no write where it is known already."""
        self._change(lambda old: (*(r for r in old if (r.pair, r.side) != (record.pair, record.side)), record))

    def drop(self, pair: str, vm_uuid: str) -> None:
        """Forget that VM's part in the pair."""
        self._change(lambda old: tuple(r for r in old if (r.pair, r.vm_uuid) != (pair, vm_uuid)))

    def pair_of(self, vm_uuid: str) -> str:
        """The pair that has that VM on this host; empty where none is known."""
        return next((record.pair for record in self._pairs if record.vm_uuid == vm_uuid), "")

    def _change(self, change: Callable[[tuple[PairRecord, ...]], tuple[PairRecord, ...]]) -> None:
        with self._turn:
            pairs = change(self._pairs)
            if set(pairs) == set(self._pairs):
                return
            text = json.dumps(cattrs.unstructure(_Contents(pairs=pairs)), indent=1, sort_keys=True)
            try:
                replace_whole(self.path, text)
            except OSError as error:
                raise PairBookError(
                    f"the record {self.path} cannot be written: {error.strerror}; see to it that the state folder has "
                    "room and is writable"
                ) from error
            self._pairs = pairs
