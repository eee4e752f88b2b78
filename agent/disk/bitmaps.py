"""Persistent dirty bitmaps of closed qcow2 images: listed, counted through qemu-nbd, removed.

See qemu-img(1), "bitmap", and qemu-nbd(8), "--bitmap".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import nbd

from agent.disk.connection import Connection
from agent.disk.gate import storage_error
from agent.disk.image_options import image_options
from agent.disk.qemu_img import run_bounded
from agent.disk.qemu_nbd import EXPORT, QemuNbd
from agent.errors import DiskError

_OUTPUT_BYTES = 16 * 1024 * 1024
_TIMEOUT_S = 60.0
_STATUS_STEP_BYTES = 1024 * 1024 * 1024
_DIRTY = 1  # NBD protocol, "qemu:dirty-bitmap" metadata contexts


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


def context_of(bitmap: str) -> str:
    """The NBD metadata context that a bitmap is exported in by qemu-nbd."""
    return f"qemu:dirty-bitmap:{bitmap}"


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
    server = QemuNbd.start(name, image, image_format, socket_dir, bitmap=bitmap)
    try:
        connection = Connection(server.socket, EXPORT, _TIMEOUT_S, lambda: False, (context_of(bitmap),))
        try:
            return _count(name, image, connection, context_of(bitmap))
        finally:
            connection.close()
    except nbd.Error as error:
        raise storage_error(name, str(image), "reading its dirty bitmap", error.errnum, error.string) from error
    except OSError as error:
        cause = error.strerror or str(error)
        raise storage_error(name, str(image), "reading its dirty bitmap", error.errno or 0, cause) from error
    finally:
        server.stop()


def _count(name: str, image: Path, connection: Connection, context: str) -> int:
    if not connection.handle.can_meta_context(context):
        raise DiskError(
            f"Disk {name}: qemu-nbd does not tell the dirty bitmap of {image}; look at the image.", disk=name
        )
    size_bytes, at, dirty = int(connection.handle.get_size()), 0, 0
    while at < size_bytes:
        told = connection.statuses(at, min(_STATUS_STEP_BYTES, size_bytes - at), context)
        if not told or any(length <= 0 for length, _ in told):
            raise OSError(0, "the NBD server told nothing about the run")
        for length, flags in told:
            length = min(length, size_bytes - at)
            dirty += length if flags & _DIRTY else 0
            at += length
    return dirty
