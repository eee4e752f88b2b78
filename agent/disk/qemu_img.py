"""`qemu-img info` and `qemu-img map` of images that are closed: run, bounded in time and output, and understood."""

from __future__ import annotations

import json
import os
import select
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.disk.image_options import image_options
from agent.disk.processes import start_bound

_TIMEOUT_S = 300.0
_LOOK_UP_MS = 500  # how often a waiting thread looks whether it is still wanted
_INFO_BYTES = 16 * 1024 * 1024  # bitmaps and snapshots are listed by it; more than this is not believed


class NotMapped(Exception):
    """An image must not be read by its cluster map; the sentence part says why."""


@dataclass(frozen=True, slots=True)
class ChainImage:
    """One image of a backing chain.

    Attributes:
        path: file or block device.
        format: ``raw`` or ``qcow2``.
        size_bytes: as a guest sees it.
    """

    path: Path
    format: str
    size_bytes: int


def chain_of(image: Path, image_format: str, *, locked_by_us: bool, past_cache: bool) -> list[ChainImage]:
    """The image and its backing chain, if all of it may be read by cluster map.

    Args:
        image: a closed image.
        image_format: QEMU's name of its format.
        locked_by_us: see `image_options`.
        past_cache: ask past the page cache.

    Raises:
        NotMapped: it may not, or qemu-img cannot tell.
    """
    if image_format != "qcow2":
        raise NotMapped(f"format {image_format}")
    if shutil.which("qemu-img") is None:
        raise NotMapped("qemu-img is not installed")
    try:
        options = image_options(
            image,
            image_format,
            is_device=stat.S_ISBLK(image.stat().st_mode),
            locked_by_us=locked_by_us,
            past_cache=past_cache,
        )
        command = ["qemu-img", "info", "--backing-chain", "--output=json", "--image-opts", options]
        text, complete = run_bounded(command, _INFO_BYTES, lambda: False)
        if not complete:
            raise NotMapped("qemu-img info tells too much")
        told: list[dict[str, Any]] = json.loads(text)
    except (OSError, ValueError) as error:
        raise NotMapped(f"qemu-img info: {error}") from error
    paths = [image.absolute(), *(Path(str(link.get("full-backing-filename"))) for link in told[:-1])]
    return [_link(path, link, last=link is told[-1]) for path, link in zip(paths, told, strict=True)]


def _link(path: Path, told: dict[str, Any], *, last: bool) -> ChainImage:
    """One entry of qemu-img info, or `NotMapped` because of it (DESIGN.md, section 6, "Frozen views")."""
    specific = told.get("format-specific", {}).get("data", {})
    problem = None
    if told.get("format") not in ("qcow2", "raw"):
        problem = f"a backing file has format {told.get('format')}"
    elif told.get("encrypted") or "encrypt" in specific:
        problem = "the image is encrypted"
    elif told.get("dirty-flag"):
        problem = "the image is dirty"
    elif specific.get("corrupt"):
        problem = "the image is corrupt"
    elif specific.get("data-file") or specific.get("data-file-raw"):
        problem = "the image has an external data file"
    elif not last and not told.get("backing-filename-format"):
        problem = "the format of a backing file is not recorded"
    elif not path.is_absolute():
        problem = "a backing file is not named by its path"
    elif not (path.is_file() or path.is_block_device()):
        problem = "a backing file is not a file here"
    if problem is not None:
        raise NotMapped(problem)
    return ChainImage(path, str(told["format"]), int(told["virtual-size"]))


def run_bounded(command: list[str], most_bytes: int, given_up: Callable[[], bool]) -> tuple[bytes, bool]:
    """Run a program that only reads, and take its output up to `most_bytes`; it is killed when it has more to say.

    Args:
        command: program and arguments.
        most_bytes: at most so much output.
        given_up: asked while waiting; True ends it.

    Returns:
        The output, and whether that was all.

    Raises:
        OSError: it cannot be started, failed (with its last words), took too long or was given up.
    """
    messages = os.memfd_create("qemu-img-messages", os.MFD_CLOEXEC)
    try:
        process = start_bound(command, stdout=subprocess.PIPE, stderr=messages, idle=True)
        with process:
            try:
                text, complete = _take(process, most_bytes, given_up)
            finally:
                if process.poll() is None:
                    process.kill()
        if complete and process.returncode != 0:
            raise OSError(0, _last_words(messages) or f"{command[0]} ended with status {process.returncode}")
        return text, complete
    finally:
        os.close(messages)


def _take(process: subprocess.Popen[bytes], most_bytes: int, given_up: Callable[[], bool]) -> tuple[bytes, bool]:
    assert process.stdout is not None
    deadline = time.monotonic() + _TIMEOUT_S
    fd, text = process.stdout.fileno(), bytearray()
    readable = select.poll()
    readable.register(fd, select.POLLIN)
    while len(text) < most_bytes:
        if given_up():
            raise OSError(0, "the disk was closed meanwhile")
        if time.monotonic() > deadline:
            raise OSError(0, f"qemu-img did not end within {_TIMEOUT_S:g} s")
        if not readable.poll(_LOOK_UP_MS):
            continue
        part = os.read(fd, min(64 * 1024, most_bytes - len(text)))
        if not part:
            process.wait(_TIMEOUT_S)  # it closed its output: it is ending
            return bytes(text), True
        text += part
    return bytes(text), False


def _last_words(messages: int) -> str:
    size = os.fstat(messages).st_size
    text = os.pread(messages, 4096, max(0, size - 4096)).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("qemu-img: ") if lines else ""
