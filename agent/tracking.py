"""What this host knows of the records of writes: which image each belongs to, and whether it still holds.

A dirty bitmap proves something only for the very image it was made for, and only while it is saved and recording. All
functions block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.disk.bitmaps import bitmaps_of
from agent.errors import AgentError
from agent.ledger import Ledger, TrackedImage
from agent.tags import tag_of
from agent.virt.images import identity
from agent.virt.seam import EarlierView


@dataclass(frozen=True, slots=True)
class LiveRecord:
    """Where what was written since an earlier view is told: a metadata context of a running VM's NBD export."""

    socket: Path
    export: str
    context: str


@dataclass(frozen=True, slots=True)
class ClosedRecord:
    """Where what was written since an earlier view is told: a persistent dirty bitmap of a closed image."""

    path: Path
    format: str
    bitmap: str


@dataclass(frozen=True, slots=True)
class OverlayedRecord:
    """Where what was written since an earlier view is told: by what the topmost `layers` images of a chain that nobody
    writes to have allocated (`agent.disk.allocated`)."""

    path: Path
    layers: int


def earlier_views(
    ledger: Ledger, vm_uuid: str, since: Mapping[str, str]
) -> tuple[dict[str, EarlierView], dict[str, str]]:
    """The earlier views in `since` (by target) as the hypervisor wants them, and why not, for those nothing is known
    of."""
    known: dict[str, EarlierView] = {}
    why_not: dict[str, str] = {}
    for target, view in since.items():
        image = ledger.tracked_image(vm_uuid, view, target)
        if image is None:
            why_not[target] = f"nothing was recorded of the disk {target} from the view {view} on"
        else:
            known[target] = EarlierView(tag=tag_of(view), path=image.path, identity=image.identity)
    return known, why_not


def closed_record(image: Path, image_format: str, tracked: TrackedImage, view: str) -> ClosedRecord | str:
    """The record of what was written to a closed image since `view`; a sentence where it does not hold any more."""
    of_disk = f"the disk {tracked.target}"
    try:
        if image != tracked.path or identity(image) != tracked.identity:
            return f"the image of {of_disk} is not the one of the view {view} any more"
        bitmaps = {bitmap.name: bitmap for bitmap in bitmaps_of(image, image_format)}
    except AgentError as error:
        return f"the record of {of_disk} cannot be read: {error.sentence}"
    bitmap = bitmaps.get(tag_of(view))
    if bitmap is None:
        return f"the image of {of_disk} holds no dirty bitmap of the view {view} any more"
    if bitmap.in_use:
        return f"the dirty bitmap of {of_disk} was not saved when its VM ended"
    if not bitmap.enabled:
        return f"the dirty bitmap of {of_disk} was disabled by somebody"
    return ClosedRecord(image, image_format, bitmap.name)
