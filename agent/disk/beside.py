"""`ReaderBeside`: a second, cached qemu-nbd that reads a qcow2 image while ours writes it past the page cache.

The server that writes opens the image with O_DIRECT, so that what is read back comes from storage. Comparing needs no
such proof and is several times faster from the page cache, for which this reader is. Two processes of QEMU on one image
are unsafe in general; here it is sound, because of what is asked of the reader and when it was opened:

- It is opened before the first write, so the tables that it knows are whole.
- It is asked only for what was not written since. The cluster of such a byte is where it was: QEMU moves, frees or
  fills a cluster only when something within it is written, zeroed or discarded; the tables of the clusters stay in
  place too, but for those that an internal snapshot shares, which then stay as they are for the snapshot. Storage that
  is freed belonged to written clusters, and only there could a stale table lead into what it is used for now.
- So what is written is booked in units that no cluster is larger than, *before* the write leaves.

It reads through QEMU, not by a cluster map of ours, and never what a verification rests on.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from agent.disk.residency import Residency
from agent.disk.runs import Run
from agent.disk.seam import Disk
from agent.errors import DiskError

UNIT_BYTES = 2 * 1024 * 1024
"""The largest cluster that qcow2 knows (docs/interop/qcow2.txt, cluster_bits); a multiple of every smaller one."""
_MOST_UNITS = 1 << 20
_CACHED_SHARE = 0.9
_SAMPLES = 64
_SAMPLE_BYTES = 256 * 1024


def is_cached(image: Path) -> bool:
    """Whether the page cache holds nearly all of an image, by sample. Where not, a cached reader would fill the cache
    with what nobody else wants. False where the kernel does not tell."""
    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        residency = Residency(fd)
        step = max(_SAMPLE_BYTES, size_bytes // _SAMPLES // _SAMPLE_BYTES * _SAMPLE_BYTES)
        asked = missing = 0
        for start in range(0, size_bytes, step):
            end = min(start + _SAMPLE_BYTES, size_bytes)
            if not _is_stored(fd, start, end):
                continue  # a hole is never read, so nothing of it is cached
            asked += end - start
            missing += sum(behind - first for first, behind in residency.missing(start, end))
        return asked > 0 and missing <= (1 - _CACHED_SHARE) * asked
    except OSError:
        return False
    finally:
        os.close(fd)


def _is_stored(fd: int, start: int, end: int) -> bool:
    """Whether the whole range of the file is data (lseek(2), SEEK_DATA)."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA) == start and os.lseek(fd, start, os.SEEK_HOLE) >= end
    except OSError:
        return False  # ENXIO: nothing is stored from there on


class ReaderBeside:
    """The reader and the books of what it must not be asked for. Thread-safe.

    Args:
        disk: the reader's export; owned from now on.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        units = -(-disk.size_bytes // UNIT_BYTES)
        self._unit_bytes = UNIT_BYTES * max(1, -(-units // _MOST_UNITS))  # a MiB of books at most
        self._written = bytearray(-(-disk.size_bytes // self._unit_bytes))
        self._turn = threading.Lock()
        self._usable = True

    def wrote(self, runs: Sequence[Run]) -> None:
        """These runs are about to be written, zeroed or discarded."""
        with self._turn:
            for offset_bytes, length_bytes in runs:
                if length_bytes:
                    first, last = self._units(offset_bytes, length_bytes)
                    self._written[first : last + 1] = b"\x01" * (last + 1 - first)

    def read_runs(self, runs: Sequence[Run], buffer: memoryview) -> bool:
        """Fill `buffer` with the runs. False, and nothing to rely on in `buffer`, where they must be read elsewhere:
        something near them was written, before or meanwhile, or the reader failed and is not asked again."""
        if not self._may_read(runs):
            return False
        try:
            self._disk.read_runs(runs, buffer)
        except DiskError:
            self._usable = False  # whoever reads elsewhere then learns whether it is the storage
            return False
        return self._may_read(runs)

    def _may_read(self, runs: Sequence[Run]) -> bool:
        if not self._usable:
            return False
        with self._turn:
            for offset_bytes, length_bytes in runs:
                if length_bytes:
                    first, last = self._units(offset_bytes, length_bytes)
                    if self._written.find(1, first, last + 1) >= 0:
                        return False
        return True

    def _units(self, offset_bytes: int, length_bytes: int) -> tuple[int, int]:
        """The first and the last unit that a run touches."""
        return offset_bytes // self._unit_bytes, (offset_bytes + length_bytes - 1) // self._unit_bytes

    def close(self) -> None:
        """End the reader. It only read: nothing that goes wrong here loses anything."""
        self._usable = False
        with contextlib.suppress(DiskError):
            self._disk.close()
