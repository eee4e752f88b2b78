"""What the chain of a disk with live overlays tells: what may be merged, and since which view its writes are known.

Values and pure functions; only `stamp_of` looks at a file.
"""

from __future__ import annotations

import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agent.errors import HypervisorError
from agent.overlay_record import OverlayRecord
from agent.virt.seam import Domain, Image


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenDisk:
    """One disk of a view that overlays made: a chain of images that nobody writes to.

    Attributes:
        target: the disk.
        image, format: the topmost image of the view.
        since: the earlier view since which the `layers` topmost images hold whatever was written; None: not known.
        layers: how many images these are; 0 where `since` is None.
        why_not: a sentence where an earlier view was asked for and `since` is None.
    """

    target: str
    image: Path
    format: str
    since: str | None = None
    layers: int = 0
    why_not: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """How much was written to a closed disk since a view; `since` is None where that is not known any more."""

    target: str
    since: str | None
    dirty_bytes: int
    why_not: str = ""


def known_since(target: str, chain: Sequence[Image], known: Sequence[OverlayRecord], since: str | None) -> FrozenDisk:
    """What overlays know of a disk.

    Args:
        target: the disk.
        chain: its images, from the frozen one down.
        known: the records of its overlays.
        since: the earlier view that is asked for.
    """
    frozen = FrozenDisk(target=target, image=chain[0].path, format=chain[0].format)
    if since is None:
        return frozen
    records = {record.overlay: record for record in known}
    held = [number for number, image in enumerate(chain) if _is_of(records.get(image.path), since)]
    if not held:
        return replace(frozen, why_not=f"no overlay of this disk holds what was written since the view {since}")
    layers = held[0] + 1
    record = records[chain[held[0]].path]
    damaged = [image.path.name for image in chain[:layers] if image.dirty or image.corrupt or image.external_data]
    why_not = ""
    if not record.answered:
        why_not = f"the view {since} was begun, but never opened"
    elif damaged:
        why_not = f"the overlay {damaged[0]} is damaged, what it holds is not certain"
    elif chain[-1].path != record.base:
        why_not = f"the disk's own image is {chain[-1].path} by now, not {record.base}"
    elif record.base_stamp != stamp_of(record.base) or not record.base_stamp:
        why_not = f"the image {record.base} was replaced or written under its overlays since the view {since}"
    if why_not:
        return replace(frozen, why_not=why_not)
    return replace(frozen, since=since, layers=layers)


def groups(
    chain: Sequence[Image], records: Mapping[Path, OverlayRecord], keep: Collection[str]
) -> list[tuple[list[Image], Image]]:
    """What is to be merged: groups of adjoining overlays of ours that no view in `keep` needs, top first, each with the
    image below it, which is the disk's own or a kept overlay of ours. The lowest group comes first.

    Overlays that stand on somebody else's are left alone: what is ours is never merged into what is not.
    """
    found: list[tuple[list[Image], Image]] = []
    below: Image | None = None
    for image in reversed(chain):
        record = records.get(image.path)
        if record is None:
            below = image if image is chain[-1] else None
        elif record.view in keep:
            below = image if below is not None else None
        elif below is not None:
            if found and found[-1][1] is below:
                found[-1][0].insert(0, image)
            else:
                found.append(([image], below))
    return found


def stamp_of(path: Path) -> str:
    """What changes when a file is replaced or written; of a block device only which it is. Empty when it is missing."""
    try:
        status = path.stat()
    except OSError:
        return ""
    if stat.S_ISBLK(status.st_mode):
        return f"device {status.st_rdev}"
    return f"file {status.st_dev}:{status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _is_of(record: OverlayRecord | None, view: str) -> bool:
    return record is not None and record.view == view


def chain_of(domain: Domain, target: str) -> tuple[Image, ...]:
    disk = next((disk for disk in domain.disks if disk.target == target), None)
    if disk is None or not disk.chain:
        problem = None if disk is None else disk.problem
        raise HypervisorError(
            f"VM {domain.name}: the images of its disk {target} cannot be read: {problem or 'it has no such disk'}",
            vm=domain.name,
            disk=target,
        )
    return disk.chain
