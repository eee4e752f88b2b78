"""Opening a disk: which backend serves which image."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from pathlib import Path

from agent.disk.gate import storage_error
from agent.disk.lock import HeldImage
from agent.disk.mapped import MappedDisk
from agent.disk.nbd import NbdDisk
from agent.disk.qemu_img import NotMapped
from agent.disk.qemu_nbd import CONNECTIONS, EXPORT, QemuNbd
from agent.disk.raw import RawDisk
from agent.disk.seam import Disk
from agent.disk.target import TargetImage
from agent.errors import DiskError


def open_source(name: str, image: Path, image_format: str, socket_dir: Path, *, scattered: bool = False) -> Disk:
    """Open an image that nobody writes to (its VM is off and the caller holds it frozen) for reading.

    Args:
        name: what messages call the disk.
        image: file or block device.
        image_format: QEMU's name of the format, ``raw``, ``qcow2`` …
        socket_dir: a folder for the sockets of qemu-nbd.
        scattered: little of it will be read, here and there: a cluster map costs a program's start for each window of
            the disk, and a server none.

    Raises:
        DiskError: it cannot be opened.
    """
    if image_format == "raw":
        return RawDisk.open(name, image, writable=False, idle=True)

    def serve(why: str = "") -> Disk:
        return _served(name, QemuNbd.start(name, image, image_format, socket_dir, idle=True), writable=False, why=why)

    if scattered:
        return serve("little of it is read, here and there")
    try:
        return MappedDisk.open(name, image, image_format, serve, idle=True)
    except NotMapped as why:
        return serve(str(why))


def open_view(name: str, socket: Path, export: str) -> Disk:
    """Open one disk of a view that a running VM serves over NBD.

    Args:
        name: what messages call the disk.
        socket: unix socket of QEMU's NBD server.
        export: the export's name.

    Raises:
        DiskError: no connection.
    """
    return NbdDisk.open(name, socket, export, writable=False, past_cache=False, connections=CONNECTIONS)


def open_shared(name: str, image: Path, image_format: str, socket_dir: Path) -> Disk:
    """Open an image that a running VM, or anybody else, may be writing to, for a look at it: no lock is taken, and what
    is read may be torn or old. No evidence is made of it.

    Args:
        name: what messages call the disk.
        image: file or block device.
        image_format: QEMU's name of the format.
        socket_dir: a folder for the sockets of qemu-nbd.

    Raises:
        DiskError: it cannot be opened.
    """
    if image_format == "raw":
        return RawDisk.open(name, image, writable=False, idle=True)
    server = QemuNbd.start(name, image, image_format, socket_dir, idle=True, shared=True)
    return _served(name, server, writable=False)


def open_target(
    name: str,
    held: HeldImage,
    image_format: str,
    socket_dir: Path,
    *,
    scattered: bool = False,
    doubtful: bool = False,
    writable: bool = True,
) -> Disk:
    """Open the image that is held exclusively; the lock lives until the last writer is gone.

    Args:
        name: what messages call the disk.
        held: its exclusive lock. The caller goes on owning it.
        image_format: QEMU's name of the format.
        socket_dir: a folder for the sockets of qemu-nbd.
        scattered: as for `open_source`.
        doubtful: a pass that wrote to it was not completed. Its last flush may have failed, or what it read back may
            have been wrong; the page cache then still holds what was to be written, which the storage may not. So the
            cache is dropped, and what is compared is what the storage holds.
        writable: it will be written. Where not, nothing of its file changes: a server that may write would mark the
            bitmaps of others as in use and write them anew.

    Raises:
        DiskError: it cannot be opened, is not held exclusively, or its path has been given to another file.
    """
    if not held.exclusive:
        raise DiskError(
            f"Disk {name}: {held.path} is frozen, not held for writing; fence it as an original first.", disk=name
        )
    _require_named(name, held)
    if doubtful:
        _drop_cache(name, held)
    if image_format == "raw":
        return RawDisk.open(name, held.path, writable=writable, fd=held.fd)
    QemuNbd.socket_path(name, socket_dir)  # what would keep the first write from starting it is said now
    with ExitStack() as undone:
        # The disk may start its server, which inherits the lock, when the caller has long let go of it.
        own = HeldImage(held.path, fcntl.fcntl(held.fd, fcntl.F_DUPFD_CLOEXEC, 0), exclusive=True)
        undone.callback(own.close)

        def serve(why: str = "") -> Disk:
            _require_named(name, own)
            server = QemuNbd.start(name, own.path, image_format, socket_dir, held=own, writable=writable)
            return _served(name, server, writable=writable, why=why)

        if scattered:
            return serve(f"little of it is {'written' if writable else 'read'}, here and there")
        try:
            target: Disk = TargetImage.open(name, own.path, image_format, own, serve, writable=writable)
        except NotMapped as why:
            return serve(str(why))
        undone.pop_all()
        return target


def _drop_cache(name: str, held: HeldImage) -> None:
    """Clean pages alone leave the cache (posix_fadvise(2)): those that are dirty still are written first."""
    try:
        os.fdatasync(held.fd)
        os.posix_fadvise(held.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise storage_error(name, str(held.path), "dropping its page cache", error.errno or 0) from error


def _require_named(name: str, held: HeldImage) -> None:
    """qemu-nbd opens by path, and so will the VM: what is written to must be what was locked."""
    if not held.is_named():
        raise DiskError(
            f"Disk {name}: {held.path} is not the file any more that was locked; "
            "find out who moved or replaced it, then fence the VM again.",
            disk=name,
        )


def _served(name: str, server: QemuNbd, *, writable: bool, why: str = "") -> Disk:
    try:
        return NbdDisk.open(
            name,
            server.socket,
            EXPORT,
            writable=writable,
            past_cache=server.past_cache,
            connections=CONNECTIONS,
            access=f"NBD ({why})" if why else "NBD",
            on_close=server.stop,
        )
    except BaseException:
        server.stop()
        raise
