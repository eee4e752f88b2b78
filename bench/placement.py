"""Changing an image in place: where a guest's bytes lie in a raw or a closed qcow2 file, and writing them there.

In-place writes to clusters that exist already change neither a qcow2 image's tables nor anything a running QEMU holds
in memory, so that even the image of a VM that runs (and writes nothing itself) can be given other content.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from bench.images import PAGE_BYTES, Layout, Patch, changes, everything

Format = Literal["raw", "qcow2"]
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # fallocate(2)


@dataclass(frozen=True, slots=True)
class Changed:
    """What `Image.change` did, in bytes of disk: whole 64 KiB blocks, whole 4 KiB pages, and those pages themselves."""

    block_bytes: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class Image:
    """A disk image that the benchmark may change in place.

    Attributes:
        path: the file. `format`: of it.
        plan: what `bench.images.make` laid out in it.
        extents: offset in `plan`, offset in the file, length in bytes of what is allocated, shape (n, 3), rising;
            empty where both are the same.
    """

    path: Path
    format: Format
    plan: Layout
    extents: npt.NDArray[np.int64]

    @classmethod
    def of(cls, path: Path, image_format: Format, plan: Layout) -> Self:
        """Look where the guest's bytes are. A qcow2 image must be closed."""
        rows: list[tuple[int, int, int]] = []
        if image_format == "qcow2":
            words = ["qemu-img", "map", "-f", "qcow2", "--output=json", str(path)]
            found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            rows = [(e["start"], e["offset"], e["length"]) for e in found if e["data"] and "offset" in e]
        return cls(path, image_format, plan, np.array(rows, dtype=np.int64).reshape(-1, 3))

    def copy_to(self, path: Path) -> Image:
        """A copy, holes kept; for qcow2 with the clusters where they are here."""
        subprocess.run(["cp", "--sparse=auto", str(self.path), str(path)], check=True)
        return Image(path, self.format, self.plan, self.extents)

    def change(self, *, share: float, seed: int) -> Changed:
        """Change `share` of the data blocks, see `bench.images.changes`."""
        return self.apply(changes(self.plan, share=share, seed=seed))

    def apply(self, patches: Iterable[Patch]) -> Changed:
        """Write `patches`; what falls on something that has no place in the file is left out."""
        blocks: set[int] = set()
        pages: set[int] = set()
        file = os.open(self.path, os.O_WRONLY)
        try:
            for offset, content, length in patches:
                self._write(file, offset, content, length)
                blocks.add(offset >> 16)
                pages.update(range(offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES + 1))
        finally:
            os.close(file)
        return Changed(len(blocks) << 16, len(pages) * PAGE_BYTES)

    def _write(self, file: int, offset: int, content: npt.NDArray[np.uint8] | None, length: int) -> None:
        if not len(self.extents):
            if content is None:
                punch(file, offset, length)
            else:
                os.pwrite(file, content.data, offset)
            return
        data = np.zeros(length, dtype=np.uint8) if content is None else content
        at = max(0, int(np.searchsorted(self.extents[:, 0], offset, side="right")) - 1)
        for guest, host, size in self.extents[at:].tolist():
            first, stop = max(guest, offset), min(guest + size, offset + length)
            if guest >= offset + length:
                break
            if first < stop:
                os.pwrite(file, data[first - offset : stop - offset].data, host + first - guest)


def stretched(path: Path, size_bytes: int, plan: Layout) -> Image:
    """A sparse raw image of `size_bytes` with the content of `plan` in pieces of 1 MiB at even distances.

    Raises:
        ValueError: it does not fit.
    """
    pieces = plan.size_bytes >> 20
    stride = size_bytes // pieces >> 20 << 20
    if stride < 1 << 20:
        raise ValueError(f"{plan.size_bytes} bytes of data do not fit a disk of {size_bytes} bytes")
    rows = [(number << 20, number * stride, 1 << 20) for number in range(pieces)]
    image = Image(path, "raw", plan, np.array(rows, dtype=np.int64))
    with path.open("wb") as file:
        file.truncate(size_bytes)
    image.apply(everything(plan))
    return image


def punch(file: int, offset: int, length: int) -> None:
    """Make a run of the file a hole (fallocate(2)). Raises OSError where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    if libc.fallocate(file, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def empty(path: Path) -> None:
    """Make the whole file one hole, in place: it stays the same file, with its locks."""
    file = os.open(path, os.O_WRONLY)
    try:
        punch(file, 0, os.fstat(file).st_size)
        os.fsync(file)
    finally:
        os.close(file)


def as_qcow2(raw: Image, path: Path) -> Image:
    """The same disk as a qcow2 image without preallocation, 64 KiB clusters."""
    words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "lazy_refcounts=off", str(raw.path), str(path)]
    subprocess.run(words, check=True)
    return Image.of(path, "qcow2", raw.plan)


def assert_same(a: Image, b: Image) -> None:
    """End the benchmark unless both hold the same, says ``qemu-img compare``: its numbers would mean nothing."""
    options = [
        f"driver={image.format},file.driver=file,file.filename={image.path},file.locking=off" for image in (a, b)
    ]
    words = ["qemu-img", "compare", "-U", "--image-opts", *options]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the target does not equal the source, so the numbers mean nothing: {done.stdout.strip()}")
