"""`ReaderBeside`: what was not written of a qcow2 image is read by its cluster map, while our qemu-nbd writes it.

The server that writes opens the image with O_DIRECT, so that what is read back comes from storage, and hands every byte
over twice. Comparing needs no such proof, and is several times faster straight from the file. A map of an image that is
being written is unsafe in general; here it is sound, because of what it is asked for:

- It is asked only for what was not written since the image was closed. The cluster of such a byte is where it was: QEMU
  moves, frees or fills a cluster only when something within it is written, zeroed or discarded. The tables of such
  clusters stay in place too, but for those that an internal snapshot shares, which then stay as they are for the
  snapshot; so a window of the map that is asked for later tells the same of them, be it that a table is just written.
  Storage that is freed belonged to written clusters, and only there could an old table lead into its next use.
- So what is written is booked in units that no cluster is larger than, *before* the write leaves, and looked up again
  after each read.

It is never what a verification rests on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from itertools import islice

from agent.disk.runs import Run
from agent.disk.seam import Disk, Extent
from agent.errors import DiskError

UNIT_BYTES = 2 * 1024 * 1024
"""The largest cluster that qcow2 knows (docs/interop/qcow2.txt, cluster_bits); a multiple of every smaller one."""
_MOST_UNITS = 1 << 20


class ReaderBeside:
    """The reader and the books of what it must not be asked for. Thread-safe.

    Args:
        disk: the image by its map; owned from now on.
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

    def extents(self, offset_bytes: int, end: int, *, most: int) -> list[Extent]:
        """Some extents from `offset_bytes` on, up to what was written; none where that was written itself, or where the
        reader failed."""
        if not self._usable:
            return []
        end = self._same_until(offset_bytes, end, written=False)
        if end <= offset_bytes:
            return []
        try:
            told = list(islice(self._disk.extents(offset_bytes, end - offset_bytes), most))
        except DiskError:
            self._usable = False
            return []
        length_bytes = sum(extent.length_bytes for extent in told)
        return told if self._may_read([(offset_bytes, length_bytes)]) else []

    def written_until(self, offset_bytes: int, end: int) -> int:
        """Where what must be asked elsewhere ends; behind `offset_bytes` in any case."""
        if not self._usable:
            return end
        until = self._same_until(offset_bytes, end, written=True)
        return until if until > offset_bytes else min(end, (offset_bytes // self._unit_bytes + 1) * self._unit_bytes)

    def _same_until(self, offset_bytes: int, end: int, *, written: bool) -> int:
        """The end of the units, from that of `offset_bytes` on, that were all written or all not."""
        first, last = self._units(offset_bytes, end - offset_bytes)
        with self._turn:
            other = self._written.find(0 if written else 1, first, last + 1)
        return end if other < 0 else max(offset_bytes, other * self._unit_bytes)

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
