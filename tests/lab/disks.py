"""Disk images for lab guests: made with the distribution's tools, changed and compared with them as well.

Nothing here uses failback's own code, so that what it says about two disks is a second opinion.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from tests.lab.domain import LabDisk

Format = Literal["raw", "qcow2"]

MIB = 1024 * 1024
SECTOR_BYTES = 512
ODD_BYTES = 4096 + 512  # added to a round size: no multiple of 64 KiB, nor of 4 KiB
COMMAND_TIMEOUT_S = 300.0


def make_ext4(path: Path, format: Format, size_bytes: int, *, seed: int, content_bytes: int) -> None:
    """A disk whose whole is an ext4 file system with about `content_bytes` of incompressible files, chosen by `seed`.

    QEMU rounds the size of raw images to `SECTOR_BYTES`, so `size_bytes` must be a multiple of it.
    """
    _check_size(size_bytes)
    with tempfile.TemporaryDirectory(prefix="content-", dir=path.parent) as scratch:
        content = Path(scratch) / "content"
        content.mkdir()
        dice = random.Random(seed)
        for number in range(8):
            (content / f"file{number}").write_bytes(dice.randbytes(content_bytes // 8))
        image = Path(scratch) / "image"
        image.touch()
        _truncate(image, size_bytes)
        # The journal as small as it gets: it is what mkfs and every mount write.
        _run(["mke2fs", "-q", "-F", "-t", "ext4", "-J", "size=4", "-d", str(content), str(image)])
        _keep(image, path, format)


def make_blank(path: Path, format: Format, size_bytes: int, *, seed: int | None = None, content_bytes: int = 0) -> None:
    """A disk without a file system: zero, but for `content_bytes` of incompressible data from byte 1 MiB on."""
    _check_size(size_bytes)
    with tempfile.TemporaryDirectory(prefix="content-", dir=path.parent) as scratch:
        image = Path(scratch) / "image"
        image.touch()
        _truncate(image, size_bytes)
        if content_bytes:
            with image.open("r+b") as file:
                file.seek(MIB)
                file.write(random.Random(seed).randbytes(content_bytes))
        _keep(image, path, format)


def copy(source: Path, source_format: Format, target: Path, target_format: Format) -> None:
    """An equal disk in an image of its own, sparse, of another format if asked for."""
    _run(["qemu-img", "convert", "-f", source_format, "-O", target_format, str(source), str(target)])


def wait_unlocked(path: Path, format: Format, within_s: float = 60.0) -> None:
    """Until no process writes to the image any more. Raises `TimeoutError`."""
    deadline = time.monotonic() + within_s
    while subprocess.run(["qemu-img", "info", "-f", format, str(path)], capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} is still locked by a writer")


def diverge(path: Path, format: Format, *, seed: int, writes: int = 24, largest_bytes: int = 256 * 1024) -> None:
    """Change a disk in `writes` places chosen by `seed`: data, zeroes and discards, the very last sector included.

    For disks without a file system; a file system would be ruined.
    """
    size = virtual_size(path, format)
    dice = random.Random(seed)
    commands = [f"write -P {dice.randrange(1, 256)} {size - SECTOR_BYTES} {SECTOR_BYTES}"]
    for _ in range(writes):
        length = dice.randrange(1, largest_bytes // SECTOR_BYTES + 1) * SECTOR_BYTES
        offset = dice.randrange(0, max(1, (size - length) // SECTOR_BYTES)) * SECTOR_BYTES
        change = dice.choices([f"write -P {dice.randrange(1, 256)}", "write -z", "discard"], [6, 1, 1])[0]
        commands.append(f"{change} {offset} {length}")
    scatter_writes(path, format, commands)


def scatter_writes(path: Path, format: Format, commands: Sequence[str]) -> None:
    """Run ``qemu-io`` commands on a closed disk, all in one process, flushed at the end."""
    options = [word for command in [*commands, "flush"] for word in ("-c", command)]
    output = _run(["qemu-io", "-f", format, "-d", "unmap", *options, str(path)])
    if "failed" in output or "rror" in output:
        raise AssertionError(f"qemu-io on {path}: {output}")


def virtual_size(path: Path, format: Format) -> int:
    """Size in bytes as a guest sees it."""
    description = _run(["qemu-img", "info", "-U", "--output=json", "-f", format, str(path)])
    return int(json.loads(description)["virtual-size"])


def assert_same(a: Path, a_format: Format, b: Path, b_format: Format, *, locked: bool = False) -> None:
    """Both disks hold the same bytes and have the same size, says ``qemu-img compare``.

    Args:
        a: an image that nobody writes to.
        a_format: its format.
        b: another.
        b_format: its format.
        locked: read them though a process holds QEMU's image locks: neither takes nor asks for any (``-U`` would
            still fail on an image that is locked exclusively).
    """
    # Not -s: that also compares what is allocated, and equal bytes may be a hole here and zeroes there.
    sizes = virtual_size(a, a_format), virtual_size(b, b_format)
    assert sizes[0] == sizes[1], f"{a} and {b} have {sizes[0]} and {sizes[1]} bytes"
    argv = [
        "qemu-img",
        "compare",
        "--image-opts",
        _image_opts(a, a_format, locked),
        _image_opts(b, b_format, locked),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode:
        raise AssertionError(f"{a} and {b} differ: {done.stdout.strip()} {done.stderr.strip()}")


def _image_opts(path: Path, format: Format, locked: bool) -> str:
    name = str(path).replace(",", ",,")
    driver = "host_device" if path.is_block_device() else "file"
    return f"driver={format},file.driver={driver},file.filename={name},file.locking={'off' if locked else 'auto'}"


def make_set(folder: Path, formats: Sequence[Format], size_bytes: int, *, seed: int = 1) -> list[LabDisk]:
    """Disks of one VM: ext4 on ``vda``, bare disks after it, each a MiB and some sectors larger than the one before."""
    made: list[LabDisk] = []
    for number, format in enumerate(formats):
        target = f"vd{chr(ord('a') + number)}"
        path = folder / f"{target}.{format}"
        size = size_bytes + number * (MIB + ODD_BYTES)
        content_bytes = min(size // 4, 8 * MIB)
        if number == 0:
            make_ext4(path, format, size, seed=seed, content_bytes=content_bytes)
        else:
            make_blank(path, format, size, seed=seed + number, content_bytes=content_bytes)
        made.append(LabDisk(target, path, format, "raw" if number else "ext4"))
    return made


def copy_set(disks: Sequence[LabDisk], folder: Path) -> list[LabDisk]:
    """Equal disks in `folder`, same names and formats: a replica, until its guest writes or `diverge` changes it."""
    copies = [replace(disk, path=folder / disk.path.name) for disk in disks]
    for disk, twin in zip(disks, copies, strict=True):
        copy(disk.path, disk.format, twin.path, twin.format)
    return copies


def lab_pair(
    folder: Path, replica_folder: Path, *, formats: Sequence[Format], size_bytes: int, seed: int = 1
) -> tuple[list[LabDisk], list[LabDisk]]:
    """Disks of an original and of its replica, equal at first: `make_set`, then `copy_set`."""
    original = make_set(folder, formats, size_bytes, seed=seed)
    return original, copy_set(original, replica_folder)


def _keep(image: Path, path: Path, format: Format) -> None:
    if format == "raw":
        image.rename(path)
    else:
        copy(image, "raw", path, format)


def _check_size(size_bytes: int) -> None:
    if size_bytes % SECTOR_BYTES:
        raise ValueError(f"{size_bytes} is not a multiple of {SECTOR_BYTES}: QEMU would round it up")


def _truncate(path: Path, size_bytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size_bytes)


def _run(argv: list[str]) -> str:
    program = shutil.which(argv[0], path="/usr/sbin:/usr/bin:/sbin:/bin")
    if program is None:
        raise AssertionError(f"{argv[0]} is missing: `make setup` installs what the lab needs.")
    done = subprocess.run([program, *argv[1:]], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode:
        raise AssertionError(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")
    return done.stdout
