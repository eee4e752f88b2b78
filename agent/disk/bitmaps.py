"""Persistent dirty bitmaps of closed qcow2 images: listed, counted through qemu-nbd, removed.

See qemu-img(1), "bitmap", and qemu-nbd(8), "--bitmap".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from agent.disk.dirty import open_dirty_closed
from agent.disk.gate import storage_error
from agent.disk.image_options import image_options
from agent.disk.qemu_img import run_bounded

_OUTPUT_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A persistent dirty bitmap in an image.

    Attributes:
        name: its name.
        in_use: it was not saved by the process that had it open last, or one has it open: its content means nothing.
        enabled: what is written to the image is recorded in it.
    """

    name: str
    in_use: bool
    enabled: bool


def bitmaps_of(image: Path, image_format: str) -> tuple[Bitmap, ...]:
    """The bitmaps of one image, whoever holds its lock; none in a format that has none.

    Raises:
        DiskError: the image cannot be read.
    """
    if image_format != "qcow2":
        return ()
    # -U opens without asking for locks: they may be ours.
    options = image_options(image, image_format, is_device=image.is_block_device())
    command = ["qemu-img", "info", "--output=json", "-U", "--image-opts", options]
    told = json.loads(_run(image, "listing its dirty bitmaps", command))
    found = told.get("format-specific", {}).get("data", {}).get("bitmaps", ())
    return tuple(Bitmap(b["name"], "in-use" in b["flags"], "auto" in b["flags"]) for b in found)


def remove_bitmap(image: Path, image_format: str, bitmap: str, *, locked_by_us: bool) -> None:
    """Remove a bitmap from an image that no VM uses; also one that is in-use. No byte that a guest sees changes.

    Args:
        image: file or block device.
        image_format: QEMU's name of the format.
        bitmap: its name.
        locked_by_us: this process holds the image's lock, and goes on holding it: qemu-img must not ask for it, and
            nobody else gets in meanwhile.

    Raises:
        DiskError: there is no such bitmap, or the image cannot be written.
    """
    options = image_options(image, image_format, is_device=image.is_block_device(), locked_by_us=locked_by_us)
    command = ["qemu-img", "bitmap", "--remove", "--image-opts", options, bitmap]
    _run(image, f"removing the dirty bitmap {bitmap}", command)


def _run(image: Path, doing: str, command: list[str]) -> bytes:
    try:
        text, complete = run_bounded(command, _OUTPUT_BYTES, lambda: False)
    except OSError as error:
        raise storage_error(image.name, str(image), doing, error.errno or 0, error.strerror or str(error)) from error
    if not complete:
        raise storage_error(image.name, str(image), doing, 0, "qemu-img tells more than is believed")
    return text


def dirty_bytes(name: str, image: Path, image_format: str, bitmap: str, socket_dir: Path) -> int:
    """How much of a closed image's content the bitmap says was written, in bytes of its granularity.

    Args:
        name: the disk's name, for messages.
        image: file or block device that nobody writes to; its lock may be held frozen.
        image_format: QEMU's name of the format.
        bitmap: a bitmap of that very image.
        socket_dir: a folder for the socket of qemu-nbd.

    Raises:
        DiskError: the bitmap is not there or cannot be read.
    """
    dirty = open_dirty_closed(name, image, image_format, (bitmap,), socket_dir)
    try:
        return sum(length for _, length in dirty.ranges(0, dirty.size_bytes))
    finally:
        dirty.close()
