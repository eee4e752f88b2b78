"""Deterministic disk images that resemble a server's: system files, a database, free space; and how they change.

The same seed makes the same bytes on any machine, as long as numpy keeps its generators' streams; a test watches that.
An image is laid out as a file system lays files out (runs of pages, metadata in front of each group, free space in
runs), but no kernel will mount it: making it needs neither root nor tools, and every change is known page by page.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.content import fill

PAGE_BYTES = 4 << 10
BLOCK_PAGES = 16
BLOCK_BYTES = PAGE_BYTES * BLOCK_PAGES
GROUP_PAGES = (64 << 20) // PAGE_BYTES
"""Pages of an allocation group, each with its metadata in front."""
STEP_PAGES = (1 << 20) // PAGE_BYTES
"""Pages whose content has one seed, so that any MiB can be made without the ones before it."""
UNIT_BYTES = 16 << 20
"""Sizes of images are multiples of this."""

FREE_SHARE = 0.32
"""Share of the disk that holds nothing: 5.9 GB of data on 8 GiB."""
DATABASE_SHARE = 0.15
"""Share of the data that is one database file: what a server writes to all day."""

Patch = tuple[int, npt.NDArray[np.uint8] | None, int]
"""Where (bytes), the new content (uint8) or None for a discard, and the length in bytes."""


class Kind(IntEnum):
    """What a page holds."""

    HOLE = 0
    METADATA = 1
    TEXT = 2
    CODE = 3
    PACKED = 4
    DATABASE = 5


@dataclass(frozen=True, slots=True)
class Layout:
    """Where what lies.

    Attributes:
        kinds: `Kind` of each page, shape (pages,).
        files: first page and pages of each run of one file, shape (n, 2), rising.
        seed: of the content.
    """

    kinds: npt.NDArray[np.uint8]
    files: npt.NDArray[np.int64]
    seed: int

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""
        return len(self.kinds) * PAGE_BYTES

    @property
    def data_blocks(self) -> npt.NDArray[np.int64]:
        """Numbers of the 64 KiB blocks that hold any data, rising."""
        return np.flatnonzero(self.kinds.reshape(-1, BLOCK_PAGES).any(axis=1))

    @property
    def data_bytes(self) -> int:
        """Bytes of pages that hold data."""
        return int(np.count_nonzero(self.kinds)) * PAGE_BYTES


def layout(size_bytes: int, *, seed: int, free_share: float = FREE_SHARE) -> Layout:
    """Lay a disk of `size_bytes` (a multiple of 16 MiB) out."""
    if size_bytes <= 0 or size_bytes % UNIT_BYTES:
        raise ValueError(f"an image of {size_bytes} bytes is no multiple of 16 MiB")
    dice = np.random.default_rng([seed, 1])
    pages = size_bytes // PAGE_BYTES
    kinds = np.zeros(pages, dtype=np.uint8)
    files: list[tuple[int, int]] = []
    at = 0
    while at < pages:
        if at % GROUP_PAGES == 0:
            length = min(64, pages - at)
            kinds[at : at + length] = Kind.METADATA
            at += length
            continue
        # Half of all files are smaller than 32 KiB, most of the bytes are in the few that are large.
        length = int(min(np.ceil(dice.lognormal(2.1, 1.9)), 4096, pages - at, GROUP_PAGES - at % GROUP_PAGES))
        kind = Kind(int(dice.choice([2, 3, 4, 5], p=[0.25, 0.35, 0.4 - DATABASE_SHARE, DATABASE_SHARE])))
        if dice.random() < free_share:
            length = min(length, 2048)
        else:
            kinds[at : at + length] = kind
            files.append((at, length))
        at += length
    return Layout(kinds, np.array(files, dtype=np.int64).reshape(-1, 2), seed)


def make(path: Path, size_bytes: int, *, seed: int = 1, free_share: float = FREE_SHARE) -> Layout:
    """Write a sparse raw image of `size_bytes` (a multiple of 16 MiB); returns where what lies."""
    plan = layout(size_bytes, seed=seed, free_share=free_share)
    with path.open("wb", buffering=0) as file:
        file.truncate(size_bytes)
        for offset, content, _ in everything(plan):
            file.seek(offset)
            file.write(content.data)
    return plan


def everything(plan: Layout) -> Iterator[tuple[int, npt.NDArray[np.uint8], int]]:
    """The disk's content when it is made, as patches of whole runs of data within a MiB."""
    for start in range(0, len(plan.kinds), STEP_PAGES):
        kinds = plan.kinds[start : start + STEP_PAGES]
        content = fill(kinds, [plan.seed, 2, start])
        for first, stop in runs(kinds != Kind.HOLE):
            yield (start + first) * PAGE_BYTES, content[first:stop].reshape(-1), (stop - first) * PAGE_BYTES


def runs(chosen: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Index pairs (start, stop) of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False])).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def changes(plan: Layout, *, share: float, seed: int) -> Iterator[Patch]:
    """How the disk changes when `share` of its data blocks are written to, in rising order.

    Of the changed blocks half get one to three scattered 4 or 8 KiB pages (a database), a quarter are written whole and
    in runs (files replaced), 15 percent take over content from elsewhere on the disk (files moved), 5 percent get a few
    bytes in one page (metadata), 5 percent are discarded (files deleted).

    Raises:
        ValueError: `share` is not within 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"{share} is no share")
    dice = np.random.default_rng([seed, 3])
    data = plan.data_blocks
    count = round(len(data) * share)
    left = np.ones(len(data), dtype=bool)
    how = np.zeros(len(data), dtype=np.uint8)
    for code, part in ((1, 0.25), (2, 0.15), (3, 0.05)):
        chosen = _in_runs(dice, left, round(count * part))
        how[chosen] = code
        left[chosen] = False
    scattered = dice.choice(np.flatnonzero(left), size=count - int((~left).sum()), replace=False)
    how[scattered] = np.where(dice.random(len(scattered)) < 0.9, 4, 5)
    # Moved files come from one distance, so that what lies together came from together.
    origin = np.roll(data, int(dice.integers(1, max(2, len(data)))))
    for index in np.flatnonzero(how).tolist():
        yield from _patches(plan, dice, int(data[index]), int(how[index]), [seed, 4, index], int(origin[index]))


def _in_runs(dice: np.random.Generator, left: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.int64]:
    """`count` indexes where `left` is True, in runs of up to 64."""
    free = np.flatnonzero(left)
    taken = np.zeros(len(free), dtype=bool)
    while (missing := count - int(taken.sum())) > 0:
        run = min(int(dice.integers(1, 65)), missing)
        start = int(dice.integers(0, len(free)))
        gap = np.flatnonzero(~taken[start:])[:run] + start
        taken[gap] = True
    return free[taken]


def _patches(
    plan: Layout, dice: np.random.Generator, block: int, how: int, seed: list[int], origin: int
) -> Iterator[Patch]:
    start = block * BLOCK_PAGES
    kinds = plan.kinds[start : start + BLOCK_PAGES]
    if how == 1:
        content = fill(np.where(kinds == Kind.HOLE, Kind.CODE, kinds), seed)
        yield start * PAGE_BYTES, content.reshape(-1), BLOCK_BYTES
    elif how == 2:
        # What the image held elsewhere when it was made: no need to read it, and the same on every copy.
        content = original(plan, origin * BLOCK_PAGES, BLOCK_PAGES)
        yield start * PAGE_BYTES, content.reshape(-1), BLOCK_BYTES
    elif how == 3:
        yield start * PAGE_BYTES, None, BLOCK_BYTES
    elif how == 4:
        width = int(dice.integers(1, 3))
        places = dice.choice(BLOCK_PAGES // width, size=int(dice.integers(1, 4)), replace=False)
        content = fill(np.full(width * len(places), Kind.DATABASE, dtype=np.uint8), seed)
        for number, place in enumerate(sorted(places.tolist())):
            pages = content[number * width : (number + 1) * width].reshape(-1)
            yield (start + place * width) * PAGE_BYTES, pages, width * PAGE_BYTES
    else:
        page = start + int(dice.integers(0, BLOCK_PAGES))
        yield page * PAGE_BYTES + 256, dice.integers(0, 256, size=96, dtype=np.uint8), 96


def original(plan: Layout, page: int, pages: int) -> npt.NDArray[np.uint8]:
    """What `make` wrote to a run of pages within one MiB, shape (pages, PAGE_BYTES)."""
    start = page - page % STEP_PAGES
    content = _steps.get((plan.seed, start))
    if content is None:
        content = fill(plan.kinds[start : start + STEP_PAGES], [plan.seed, 2, start])
        if len(_steps) >= 4:
            _steps.clear()
        _steps[plan.seed, start] = content
    return content[page - start : page - start + pages]


_steps: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}


def all_packed(size_bytes: int, *, seed: int) -> Layout:
    """A layout without free space and without anything that compresses."""
    pages = size_bytes // PAGE_BYTES
    return Layout(np.full(pages, Kind.PACKED, dtype=np.uint8), np.array([[0, pages]], dtype=np.int64), seed)


def packed_patches(plan: Layout, *, seed: int) -> Iterator[Patch]:
    """New bytes that no compressor shrinks for every page of the disk."""
    for start in range(0, len(plan.kinds), STEP_PAGES):
        content = fill(np.full(min(STEP_PAGES, len(plan.kinds) - start), Kind.PACKED, dtype=np.uint8), [seed, 5, start])
        yield start * PAGE_BYTES, content.reshape(-1), content.size
