"""Small files that are replaced whole and durably: a crash leaves the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path


def replace_whole(path: Path, text: str) -> None:
    """Write beside, sync, rename, sync the folder. Raises `OSError`; the old file stands then, or the new one."""
    beside = path.with_suffix(".new")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    _sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder for small files if it is missing, so that no crash takes it away with what was put there. Raises
    `OSError`."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _sync(folder.parent)


def remove_durably(path: Path) -> None:
    """Remove a file so that no crash brings it back; harmless where there is none. Raises `OSError`."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    _sync(path.parent)


def settle(folder: Path) -> None:
    """Make durable what an earlier process has renamed or removed in this folder and those in it. Raises `OSError`.

    A process that was killed between a rename and the sync of its folder leaves what the next one reads and a power cut
    takes back: nothing that was read may be relied on before this.
    """
    for place in (folder, *(below for below in folder.iterdir() if below.is_dir() and not below.is_symlink())):
        _sync(place)


def _sync(folder: Path) -> None:
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)
