"""Every kind of image a plain KVM host keeps a disk in, made from one raw content with the distribution's tools."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.lab.disks import Format

QCOW2_KINDS = ("qcow2-v2", "qcow2-v3", "compressed", "clusters-512", "clusters-2m", "extended-l2")
TARGET_KINDS = ("raw", *QCOW2_KINDS, "loop-512", "loop-4096")
"""What can be written: one image without a backing file."""
SOURCE_KINDS = (*TARGET_KINDS, "chain")
OPTIONS = {
    "qcow2-v2": "compat=0.10",
    "qcow2-v3": "compat=1.1",
    "compressed": "compat=1.1",
    "clusters-512": "cluster_size=512",
    "clusters-2m": "cluster_size=2M",
    "extended-l2": "extended_l2=on,cluster_size=128k",
}


def format_of(kind: str) -> Format:
    """The driver of a disk of that kind."""
    return "raw" if kind == "raw" or kind.startswith("loop-") else "qcow2"


def make(kind: str, content: Path, folder: Path, stem: str) -> Path:
    """An image of that kind (no loop device) which holds what the raw file `content` holds."""
    path = folder / f"{stem}.{kind}"
    words = ["-f", "raw", "-O", format_of(kind)]
    if kind == "compressed":
        words.append("-c")
    if kind == "chain":
        base = folder / f"{stem}.chain-base"
        with base.open("wb") as file:
            file.write(content.read_bytes()[: content.stat().st_size // 2])
            file.truncate(content.stat().st_size)
        words += ["-B", str(base), "-F", "raw"]
    elif kind in OPTIONS:
        words += ["-o", OPTIONS[kind]]
    _run("qemu-img", "convert", *words, str(content), str(path))
    return path


@contextlib.contextmanager
def loop_device(backing: Path, sector_bytes: int) -> Iterator[Path]:
    """A block device with logical sectors of that size over a file whose size is a multiple of them; needs root."""
    device = _run("losetup", "--find", "--show", "--sector-size", str(sector_bytes), str(backing)).strip()
    try:
        yield Path(device)
    finally:
        _run("losetup", "--detach", device)


@contextlib.contextmanager
def disk_of(kind: str, content: Path, folder: Path, stem: str) -> Iterator[Path]:
    """An image or device of that kind which holds what `content` holds, until the end of the block."""
    if not kind.startswith("loop-"):
        yield make(kind, content, folder, stem)
        return
    backing = make("raw", content, folder, stem)
    with loop_device(backing, int(kind.removeprefix("loop-"))) as device:
        yield device


def _run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"`{' '.join(argv)}` failed: {done.stderr.strip()}"
    return done.stdout
