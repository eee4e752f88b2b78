"""Merging overlays of a closed image into what they stand on, by qemu-img.

The disk reads the same before, meanwhile and after: only what the overlays hold anyway is written below them. So a
merge that was cut short is simply done again. The caller keeps every writer away by image locks of its own, which is
why qemu-img is told not to look at them.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

from agent.disk.gate import storage_error
from agent.disk.processes import start_bound
from agent.errors import DiskError

_LAST_WORDS_BYTES = 4096


def commit_overlays(name: str, overlays: Sequence[Path], into: Path, into_format: str, *, timeout_s: float) -> None:
    """Put what adjoining qcow2 `overlays` (top first) hold into `into`, durably. The overlays stay as they are.

    Args:
        name: what messages call the disk.
        overlays: closed, and held by the caller so that nobody writes to them.
        into: the image right below the last of them, held likewise.
        into_format: QEMU's name of its format.
        timeout_s: how long qemu-img may take for each overlay.

    Raises:
        DiskError: it failed or took too long; the disk reads as before.
    """
    # Opened before anything is written, so that it hears of every error of writing back.
    below = [(path, "qcow2") for path in overlays[1:]] + [(into, into_format)]
    for number, overlay in enumerate(overlays):
        fd = _open(name, below[number][0])
        try:
            options = _chain_options([(overlay, "qcow2"), *below[number:]])
            _run(name, ["qemu-img", "commit", "-q", "-d", "--image-opts", options], timeout_s)
            _fsync(name, below[number][0], fd)
        finally:
            os.close(fd)


def stand_on(name: str, image: Path, base: Path, base_format: str, *, timeout_s: float) -> None:
    """Let a closed qcow2 image stand on `base`, which reads the same as what it stands on now, durably.

    Raises:
        DiskError: it failed or took too long.
    """
    fd = _open(name, image)
    try:
        options = _chain_options([(image, "qcow2")])
        command = ["qemu-img", "rebase", "-q", "-u", "-b", str(base), "-F", base_format, "--image-opts", options]
        _run(name, command, timeout_s)
        _fsync(name, image, fd)
    finally:
        os.close(fd)


def _chain_options(chain: Sequence[tuple[Path, str]]) -> str:
    """A chain as ``--image-opts``, every part named: nothing is looked up in a header or taken from a file name."""
    options: dict[str, str] = {}
    for depth, (path, image_format) in enumerate(chain):
        prefix = "backing." * depth
        options[f"{prefix}driver"] = image_format
        options[f"{prefix}file.driver"] = "host_device" if stat.S_ISBLK(path.stat().st_mode) else "file"
        options[f"{prefix}file.filename"] = str(path.absolute())
        options[f"{prefix}file.locking"] = "off"
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())


def _run(name: str, command: list[str], timeout_s: float) -> None:
    messages = os.memfd_create("qemu-img-messages", os.MFD_CLOEXEC)
    try:
        with start_bound(command, stderr=messages) as process:
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise DiskError(
                    f"Disk {name}: `{' '.join(command[:2])}` did not end within {timeout_s:.0f} s and was stopped, "
                    "nothing is lost: look at its storage, then try again.",
                    disk=name,
                ) from error
        if status != 0:
            size = os.fstat(messages).st_size
            text = os.pread(messages, _LAST_WORDS_BYTES, max(0, size - _LAST_WORDS_BYTES)).decode(errors="replace")
            words = text.strip().splitlines()[-1:] or [f"it ended with status {status}"]
            raise DiskError(
                f"Disk {name}: `{' '.join(command[:2])}` failed, nothing is lost: {words[0]}; mend that and try again.",
                disk=name,
            )
    finally:
        os.close(messages)


def _open(name: str, path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise storage_error(name, str(path), "opening the image", error.errno or 0) from error


def _fsync(name: str, path: Path, fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        raise storage_error(name, str(path), "making the image durable", error.errno or 0) from error
