"""Windows of a cluster map: where the bytes of a closed image lie in its files. Pure functions on values.

`qemu-img map` walks the image's own tables; we only read what it prints. A window is as much of the map as fits into a
bounded text, so that neither an 8 TiB image nor the most scattered one needs more than a few MiB of memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIB = 1024 * 1024
TEXT_BYTES = 1 * MIB
"""How much of qemu-img's text makes a window: some 8000 extents; 6 MiB of Python objects while it is parsed."""

FIRST_WINDOW_BYTES = 1024 * MIB
_SMALLEST_WINDOW_BYTES = 64 * MIB
# Mapping reads the tables of what is allocated (8 bytes a cluster), before the first byte of data can be read: a window
# does not grow past this much of data, however few its extents are. What is unallocated costs nothing.
_MUCH_DATA_BYTES = 64 * 1024 * MIB
_GROWTH = 8

ZERO = -1
"""Instead of a place: reads as zero."""
SERVED = -2
"""Instead of a place: the bytes do not lie in a file as they are (compressed); QEMU must be asked for them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of the image with its place.

    Attributes:
        offset_bytes: first byte of the image.
        length_bytes: length, at least 1.
        place: byte in the file, or `ZERO`, or `SERVED`.
        depth: which file: 0 is the image itself, 1 its backing file, and so on.
    """

    offset_bytes: int
    length_bytes: int
    place: int
    depth: int


@dataclass(frozen=True, slots=True)
class Window:
    """The map from `start` to `end`: extents that adjoin.

    Attributes:
        start, end: first byte, and the byte behind the last.
        starts: first byte of each extent, rising; the first is `start`.
        places: see `Piece.place`.
        depths: see `Piece.depth`.
    """

    start: int
    end: int
    starts: NDArray[np.int64]
    places: NDArray[np.int64]
    depths: NDArray[np.int16]

    @property
    def data_bytes(self) -> int:
        """How much of the window does not read as zero."""
        lengths = np.diff(self.starts, append=self.end)
        return int(lengths[self.places != ZERO].sum())

    def pieces(self, offset_bytes: int, end: int) -> Iterator[Piece]:
        """What lies between `offset_bytes` (in the window) and `end` or the window's own end."""
        end = min(end, self.end)
        first = int(np.searchsorted(self.starts, offset_bytes, side="right")) - 1
        behind = int(np.searchsorted(self.starts, end, side="left"))
        starts = [*self.starts[first:behind].tolist(), end]
        places, depths = self.places[first:behind].tolist(), self.depths[first:behind].tolist()
        for number, (place, depth) in enumerate(zip(places, depths, strict=True)):
            start = max(starts[number], offset_bytes)
            moved = place + start - starts[number] if place >= 0 else place
            yield Piece(start, min(starts[number + 1], end) - start, moved, depth)


def window_of(text: bytes, start: int, end: int, *, complete: bool, files: int) -> Window:
    """Make a window of what ``qemu-img map --output=json`` printed.

    Args:
        text: from the beginning of the output on.
        start, end: what was asked for.
        complete: whether the text is whole; otherwise the window ends where the last whole line ends.
        files: how many files there are to find bytes in; what lies deeper is left to QEMU.

    Raises:
        ValueError: it does not adjoin, does not cover what was asked for, or cannot be understood.
    """
    if not complete:
        text = text[: text.rfind(b"}") + 1] + b"]"
    extents: list[dict[str, Any]] = json.loads(text)
    count = len(extents)
    starts = np.fromiter((extent["start"] for extent in extents), np.int64, count)
    lengths = np.fromiter((extent["length"] for extent in extents), np.int64, count)
    depths = np.fromiter((extent["depth"] for extent in extents), np.int16, count)
    places = np.fromiter((_place(extent) for extent in extents), np.int64, count)
    places[(depths >= files) & (places >= 0)] = SERVED
    ends = starts + lengths
    if not count or starts[0] != start or (lengths < 1).any() or (starts[1:] != ends[:-1]).any():
        raise ValueError(f"qemu-img map left a gap behind byte {start}")
    if ends[-1] > end or (complete and ends[-1] != end):
        raise ValueError(f"qemu-img map told about {start} to {ends[-1]} instead of {end}")
    return Window(start, int(ends[-1]), starts, places, depths)


def _place(extent: dict[str, Any]) -> int:
    if extent["zero"]:
        return ZERO
    # qemu-img tells an offset only where the bytes lie as they are; since 8.2 it also names what is compressed.
    if not extent["data"] or extent.get("compressed"):
        return SERVED
    return int(extent.get("offset", SERVED))


def next_window_bytes(asked_bytes: int, window: Window, *, complete: bool) -> int:
    """How much to ask for next, after `asked_bytes` came to `window`."""
    if not complete:
        return max(_SMALLEST_WINDOW_BYTES, window.end - window.start)
    if window.data_bytes > _MUCH_DATA_BYTES:
        return max(_SMALLEST_WINDOW_BYTES, asked_bytes // 2)
    if window.data_bytes * _GROWTH <= _MUCH_DATA_BYTES:
        return asked_bytes * _GROWTH
    return asked_bytes
