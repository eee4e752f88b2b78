"""What overlays have allocated: a superset of what was written since the image below them was frozen.

A cluster that was only zeroed or discarded is allocated too, for it hides what lies below. Read from the overlay's own
tables through `qemu-img map`, window by window: memory is bounded whatever the disk, and a disk of which little was
written costs little. Only for images that nobody has open for writing: closed, or below a live overlay.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from agent.disk.cluster_map import ClusterMap
from agent.disk.direct import direct_works
from agent.disk.gate import Gate
from agent.disk.qemu_img import NotMapped, chain_of
from agent.errors import DiskError

Range = tuple[int, int]
"""First byte and length, in bytes."""


class AllocatedRanges:
    """What the topmost images of a chain hold, as a record of what was written (`agent.disk.dirty.DirtyRanges`).

    Args:
        name: what messages call the disk.
        image: the topmost image, a qcow2 overlay.
        layers: how many images count.
        size_bytes: of the disk.
        cluster_map: of those images.
    """

    rung = "overlay"

    def __init__(self, name: str, image: Path, layers: int, size_bytes: int, cluster_map: ClusterMap) -> None:
        self._image = image
        self._layers = layers
        self._map = cluster_map
        self._gate = Gate(name, str(image), size_bytes, writable=False)

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""
        return self._gate.size_bytes

    def ranges(self, offset_bytes: int, length_bytes: int) -> Iterator[Range]:
        """As `DirtyRanges.ranges`: in order, never adjoining."""
        self._gate.check("asking what was written", offset_bytes, length_bytes)
        return _joined(self._held(offset_bytes, length_bytes))

    def _held(self, offset_bytes: int, length_bytes: int) -> Iterator[Range]:
        pieces = self._map.pieces(offset_bytes, length_bytes)
        while True:
            try:
                with self._gate.request("asking what was written", offset_bytes, length_bytes):
                    piece = next(pieces, None)
            except NotMapped as error:
                raise _untold(self._gate.name, self._image, error) from error
            if piece is None:
                return
            if piece.depth < self._layers:
                yield piece.offset_bytes, piece.length_bytes

    def close(self) -> None:
        """As `DirtyRanges.close`."""
        self._gate.close()


def open_allocated(name: str, image: Path, layers: int) -> AllocatedRanges:
    """The record of what overlays hold: of the topmost `layers` images of a chain, which must have more.

    Args:
        name: what messages call the disk.
        image: the topmost of them, a qcow2 overlay.
        layers: how many images count, at least 1.

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
            given_up=lambda: False,
        )
    except (NotMapped, OSError) as error:
        raise _untold(name, image, error) from error
    return AllocatedRanges(name, image, layers, chain[0].size_bytes, cluster_map)


def allocated_ranges(name: str, image: Path, layers: int) -> Iterator[Range]:
    """All ranges of `open_allocated`."""
    record = open_allocated(name, image, layers)
    try:
        yield from record.ranges(0, record.size_bytes)
    finally:
        record.close()


def _untold(name: str, image: Path, error: Exception) -> DiskError:
    return DiskError(
        f"Disk {name}: what the overlay {image} holds cannot be told: {error}; the disk is compared whole instead.",
        disk=name,
        path=str(image),
    )


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
