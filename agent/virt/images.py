"""What ``qemu-img info`` knows about the images of a disk."""

from __future__ import annotations

import functools
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

from agent.errors import HypervisorError
from agent.virt.seam import Image

_TIMEOUT_S = 60.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class UnreadableChain(HypervisorError):
    """A backing chain could not be read; the sentence says which image and why."""

    code = "unreadable-chain"


def backing_chain(path: Path, image_format: str, *, qemu_img: str = "qemu-img") -> tuple[Image, ...]:
    """The images of a disk, top first.

    Args:
        path: the top image, a file or a block device; may be in use by a running QEMU and locked by anyone.
        image_format: as the domain's XML says: a raw image is never probed, for its guest writes its header.
        qemu_img: the program to call.

    Raises:
        UnreadableChain: a member is missing, unreadable, or not a local file or block device.
    """
    # -U (force share) opens without asking for locks: seen to work on an image that is locked exclusively.
    command = [qemu_img, "info", "--output=json", "-U", "--backing-chain", "-f", image_format, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise UnreadableChain(f"{qemu_img} is not installed on this host: install the package qemu-utils.") from error
    except subprocess.TimeoutExpired as error:
        raise UnreadableChain(
            f"{qemu_img} did not answer for {path} within {_TIMEOUT_S:.0f} s: its storage hangs.", path=str(path)
        ) from error
    if done.returncode != 0:
        raise UnreadableChain(f"The images of {path} cannot be read: {_last_line(done.stderr)}", path=str(path))
    return tuple(_image(member) for member in json.loads(done.stdout))


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].removeprefix("qemu-img: ") if lines else "qemu-img failed without a word"


def _image(info: dict[str, Any]) -> Image:
    path = Path(info["filename"])
    if not path.is_absolute():
        raise UnreadableChain(f"The backing image {info['filename']} is not a file or block device of this host.")
    specific: dict[str, Any] = info.get("format-specific", {}).get("data", {})
    return Image(
        path=path,
        format=info["format"],
        identity=identity(path),
        virtual_size_bytes=info["virtual-size"],
        internal_snapshots=len(info.get("snapshots", ())),
        bitmaps=tuple(bitmap["name"] for bitmap in specific.get("bitmaps", ())),
        dirty=info.get("dirty-flag", False),
        corrupt=specific.get("corrupt", False),
        encrypted=info.get("encrypted", False),
        external_data="data-file" in specific,
        keeps_bitmaps=info["format"] == "qcow2" and specific.get("compat", "0.10") != "0.10",
        modified_s=modified_s(path),
        allocated_bytes=info.get("actual-size", 0),
    )


def modified_s(path: Path) -> float:
    """When the file was last written, seconds since 1970 by this host's clock; 0 for a device, whose node does not
    tell, and for a file that cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return 0.0
    return status.st_mtime if stat.S_ISREG(status.st_mode) else 0.0


def identity(path: Path) -> str:
    """Names the inode or device, for comparison now, not for keeping: it ends with the host's uptime.

    The kernel's boot id and not ``/etc/machine-id`` tells machines apart, for cloned installations share the latter.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UnreadableChain(f"{path} cannot be looked at: {error.strerror}.", path=str(path)) from error
    if stat.S_ISBLK(status.st_mode):
        return f"{_boot_id()}:dev:{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return f"{_boot_id()}:{os.major(status.st_dev)}:{os.minor(status.st_dev)}:{status.st_ino}"


@functools.cache
def _boot_id() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip()


def free_bytes(folder: Path) -> int:
    """Room for an unprivileged user in the file system of `folder`, or of its nearest existing ancestor."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize
