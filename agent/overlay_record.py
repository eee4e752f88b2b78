"""What the agent's ledger says of a live overlay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayRecord:
    """A live overlay of ours that is over a disk, or about to be put there or merged.

    Attributes:
        view: the view from which on it holds what the guest wrote.
        overlay: the file; names the record together with the VM.
        base, base_format: the disk's own image, under every overlay of ours.
        definition: the disk in the VM's definition of before, as XML.
        answered: the view was opened with it, so that a target may have been made equal to that view.
        base_stamp: the base as it was last left by us; empty where that is not known.
        merging_into: the image it is being merged into, or None.
    """

    vm_uuid: str
    pair: str
    target: str
    view: str
    overlay: Path
    base: Path
    base_format: str
    definition: str
    answered: bool = False
    base_stamp: str = ""
    merging_into: Path | None = None
