"""What overlays have allocated: a superset of what was written since the image below them was frozen.

A cluster that was only zeroed or discarded is allocated too, for it hides what lies below. Read from the overlay's own
tables through `qemu-img map`, window by window: memory is bounded whatever the disk, and a disk of which little was
written costs little. Only for images that nobody has open for writing: closed, or below a live overlay.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.disk.cluster_map import ClusterMap
from agent.disk.direct import direct_works
from agent.disk.qemu_img import NotMapped, chain_of
from agent.errors import DiskError

Range = tuple[int, int]
"""First byte and length, in bytes."""


def allocated_ranges(
    name: str, image: Path, layers: int, *, given_up: Callable[[], bool] = lambda: False
) -> Iterator[Range]:
    """The ranges of the disk that the topmost `layers` images of a chain hold, in order, never adjoining.

    Args:
        name: what messages call the disk.
        image: the topmost of them, a qcow2 overlay.
        layers: how many images count, at least 1; the chain must have more.
        given_up: asked while waiting for qemu-img; True ends it with an error.

    Raises:
        DiskError: the map cannot be read, or must not be trusted (dirty, corrupt, encrypted, external data).
    """
    try:
        past_cache = direct_works(image)
        chain = chain_of(image, "qcow2", locked_by_us=False, past_cache=past_cache)
        if len(chain) <= layers:
            raise NotMapped(f"it has only {len(chain)} images, and not {layers} overlays over another one")
        opened = image.stat()
        cluster_map = ClusterMap(
            image,
            "qcow2",
            chain[0].size_bytes,
            files=layers,
            locked_by_us=False,
            past_cache=past_cache,
            in_place=lambda: _same(image, opened),
            given_up=given_up,
        )
        yield from _joined(
            (piece.offset_bytes, piece.length_bytes)
            for piece in cluster_map.pieces(0, chain[0].size_bytes)
            if piece.depth < layers
        )
    except (NotMapped, OSError) as error:
        raise DiskError(
            f"Disk {name}: what the overlay {image} holds cannot be told: {error}; the disk is compared whole instead.",
            disk=name,
            path=str(image),
        ) from error


def _same(image: Path, opened: os.stat_result) -> bool:
    try:
        now = image.stat()
    except OSError:
        return False
    if stat.S_ISBLK(opened.st_mode):
        return now.st_rdev == opened.st_rdev
    return os.path.samestat(now, opened)


def _joined(ranges: Iterator[Range]) -> Iterator[Range]:
    """The same ranges, those that adjoin as one."""
    start = end = 0
    for offset_bytes, length_bytes in ranges:
        if offset_bytes != end:
            if end > start:
                yield start, end - start
            start = offset_bytes
        end = offset_bytes + length_bytes
    if end > start:
        yield start, end - start
