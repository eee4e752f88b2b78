"""The page cache as a benchmark wants it: a file all in it, or not at all; and a look whether it is so."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

READ_BYTES = 8 << 20


def data_extents(file: int) -> Iterator[tuple[int, int]]:
    """Offset and length of what an open file stores (lseek(2), SEEK_DATA), in bytes."""
    end = os.fstat(file).st_size
    at = 0
    while at < end:
        try:
            start = os.lseek(file, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing behind here
            return
        at = os.lseek(file, start, os.SEEK_HOLE)
        yield start, at - start


def warm(paths: Iterable[Path]) -> None:
    """Read all that the files store, so that it is in the page cache if there is room for it."""
    buffer = memoryview(mmap.mmap(-1, READ_BYTES))
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            for start, length in data_extents(file):
                at = start
                while at < start + length:
                    at += os.preadv(file, [buffer[: min(READ_BYTES, start + length - at)]], at)
        finally:
            os.close(file)


def cool(paths: Iterable[Path]) -> None:
    """Write the files back and take them out of the page cache (posix_fadvise(2)); nobody else's pages are touched."""
    for path in paths:
        file = os.open(path, os.O_RDWR)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def resident_share(path: Path) -> float:
    """Share of what the file stores that is in the page cache, as fincore(1) counts it; 0 to 1.

    Raises:
        subprocess.CalledProcessError: fincore failed.
    """
    words = ["fincore", "--bytes", "--noheadings", "--raw", "--output", "RES", str(path)]
    resident = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    stored = path.stat().st_blocks * 512
    return min(1.0, resident / stored) if stored else 0.0


def state(paths: Iterable[Path]) -> dict[str, float]:
    """`resident_share` by file name, for the record."""
    return {path.name: round(resident_share(path), 3) for path in paths}
