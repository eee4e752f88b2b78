"""Fences and the flags of disks, as the ledger keeps them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path


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

    @property
    def is_exclusive(self) -> bool:
        """Whether nobody else may even read it."""
        return self.kind is LockKind.EXCLUSIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceRecord:
    """A VM that must not start. `side` is ``original`` or ``replica``; `since_s`: seconds since 1970, 0: not known."""

    vm_uuid: str
    pair: str
    run: str
    side: str
    autostart_before: bool
    images: tuple[FencedImage, ...]
    vm_name: str = ""
    since_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionRecord:
    """The flag of a VM's disks, with the view they equal."""

    vm_uuid: str
    condition: DiskCondition
    view: str | None = None
