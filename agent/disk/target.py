"""`TargetImage`: a qcow2 image that we hold alone; read from its file until the first write, by qemu-nbd from then on.

Much of a pass is reading and comparing, and a target that turns out to be equal is never written at all. Until
something is written the image is closed, and its cluster map holds. The first write waits for every read that still
goes by the map, and starts the qemu-nbd. What is not written is read by the map all the same, several times faster than
from a server (`agent.disk.beside`); whatever was written comes from the server that wrote it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

from agent.disk.beside import ReaderBeside
from agent.disk.gate import Gate
from agent.disk.lock import HeldImage
from agent.disk.mapped import MappedDisk
from agent.disk.raw import READERS
from agent.disk.runs import Run
from agent.disk.seam import Disk, Extent

_EXTENTS_AT_ONCE = 1024


class TargetImage:
    """A `Disk` for writing; open it with `TargetImage.open`."""

    def __init__(self, gate: Gate, held: HeldImage, serve: Callable[[], Disk]) -> None:
        self._gate = gate
        self._held = held
        self._serve = serve
        self._changed = threading.Condition()
        self._readers = 0
        self._switching = False
        self._mapped: MappedDisk | None = None
        self._starting = threading.Lock()
        self._served: Disk | None = None
        self._beside: ReaderBeside | None = None
        self._past_cache = False

    @classmethod
    def open(
        cls,
        name: str,
        path: Path,
        image_format: str,
        held: HeldImage,
        serve: Callable[[], Disk],
        *,
        writable: bool = True,
    ) -> TargetImage:
        """Open a closed image.

        Args:
            name: what messages call the disk.
            path: file or block device.
            image_format: QEMU's name of the format.
            held: its exclusive lock; owned by the disk if it comes about, and held until its last writer is gone.
            serve: starts the qemu-nbd that writes the image under that lock, and connects to it.
            writable: False: it is only to be compared, and `serve` gives it for reading.

        Raises:
            NotMapped: it may not be read by its map.
        """
        gate = Gate(name, str(path), 0, writable=writable)
        target = cls(gate, held, serve)
        mapped = MappedDisk.open(name, path, image_format, target._server, held=held, idle=False)
        gate.size_bytes = mapped.size_bytes
        target._mapped = mapped
        target._past_cache = mapped.reads_back_past_cache
        return target

    @property
    def name(self) -> str:
        return self._gate.name

    @property
    def size_bytes(self) -> int:
        return self._gate.size_bytes

    @property
    def access(self) -> str:
        mapped = self._mapped
        if mapped is not None:
            return mapped.access
        return "cluster map, and NBD for what was written"

    @property
    def readers(self) -> int:
        return READERS

    @property
    def reads_back_past_cache(self) -> bool:
        return self._past_cache

    def _server(self) -> Disk:
        with self._starting:
            if self._served is None:
                self._served = self._serve()
            return self._served

    @contextmanager
    def _reading(self) -> Iterator[Disk]:
        """The disk to read from: the map, which then stays until we are done, or the server."""
        with self._changed:
            self._changed.wait_for(lambda: not self._switching)
            mapped = self._mapped
            if mapped is not None:
                self._readers += 1
        if mapped is None:
            yield self._server()
            return
        try:
            yield mapped
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    def _writing(self) -> Disk:
        """The disk to write to. From the first call on only what is not written is read by the map."""
        with self._changed:
            self._changed.wait_for(lambda: not self._switching)
            mapped = self._mapped
            if mapped is None:
                return self._server()
            self._switching = True
            self._changed.wait_for(lambda: self._readers == 0)
        try:
            served = self._server()  # a failure changes nothing: the map still holds
            self._beside, self._mapped = ReaderBeside(mapped), None
        finally:
            with self._changed:
                self._switching = False
                self._changed.notify_all()
        return served

    def _read_beside(self, runs: Sequence[Run], buffer: memoryview) -> bool:
        beside = self._beside
        return beside is not None and beside.read_runs(runs, buffer)

    def _writing_to(self, runs: Sequence[Run]) -> Disk:
        """The disk to write these runs to; the map is not asked for them from now on."""
        served = self._writing()
        if self._beside is not None:
            self._beside.wrote(runs)
        return served

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading", offset_bytes, buffer.nbytes):
            if not self._read_beside([(offset_bytes, buffer.nbytes)], buffer):
                with self._reading() as disk:
                    disk.read_into(offset_bytes, buffer)

    def read_runs(self, runs: Sequence[Run], buffer: memoryview) -> None:
        with self._gate.batch("reading", runs, buffer.nbytes):
            if not self._read_beside(runs, buffer):
                with self._reading() as disk:
                    disk.read_runs(runs, buffer)

    def read_back(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading back", offset_bytes, buffer.nbytes), self._reading() as disk:
            disk.read_back(offset_bytes, buffer)

    def read_back_runs(self, runs: Sequence[Run], buffer: memoryview) -> None:
        with self._gate.batch("reading back", runs, buffer.nbytes), self._reading() as disk:
            disk.read_back_runs(runs, buffer)

    def write(self, offset_bytes: int, data: memoryview) -> None:
        with self._gate.request("writing", offset_bytes, data.nbytes, writes=True):
            self._writing_to([(offset_bytes, data.nbytes)]).write(offset_bytes, data)

    def write_runs(self, runs: Sequence[Run], data: memoryview) -> None:
        with self._gate.batch("writing", runs, data.nbytes, writes=True):
            self._writing_to(runs).write_runs(runs, data)

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        with self._gate.request("zeroing", offset_bytes, length_bytes, writes=True):
            self._writing_to([(offset_bytes, length_bytes)]).write_zeroes(offset_bytes, length_bytes)

    def flush(self) -> None:
        if not self._gate.writable:
            self._gate.check("flushing", 0, 0)
            return
        with self._gate.request("flushing", 0, 0, writes=True):
            served = self._served
            if served is not None:
                served.flush()

    def extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
        self._gate.check("mapping", offset_bytes, length_bytes)
        return self._extents(offset_bytes, offset_bytes + length_bytes)

    def _extents(self, offset_bytes: int, end: int) -> Iterator[Extent]:
        """By the map as far as it holds, some at a time so that a slow caller does not keep writers waiting."""
        pending: Extent | None = None
        while offset_bytes < end:
            with self._gate.request("mapping", offset_bytes, end - offset_bytes):
                told = self._told(offset_bytes, end)
            for extent in told:
                offset_bytes = extent.offset_bytes + extent.length_bytes
                if pending is not None and pending.zero == extent.zero:
                    pending = Extent(pending.offset_bytes, offset_bytes - pending.offset_bytes, extent.zero)
                    continue
                if pending is not None:
                    yield pending
                pending = extent
        if pending is not None:
            yield pending

    def _told(self, offset_bytes: int, end: int) -> list[Extent]:
        """Some extents from `offset_bytes` on, one at least."""
        beside = self._beside
        if beside is not None:
            told = beside.extents(offset_bytes, end, most=_EXTENTS_AT_ONCE)
            if told:
                return told
            end = beside.written_until(offset_bytes, end)
        with self._reading() as disk:
            return list(islice(disk.extents(offset_bytes, end - offset_bytes), _EXTENTS_AT_ONCE))

    def close(self) -> None:
        if self._gate.close():
            with ExitStack() as closing:  # each in any case; the lock is let go of last
                closing.callback(self._held.close)
                for disk in (self._served, self._mapped, self._beside):
                    if disk is not None:
                        closing.callback(disk.close)
