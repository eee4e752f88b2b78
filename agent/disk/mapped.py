"""`MappedDisk`: a closed qcow2 image read straight from its files, by its cluster map, at the speed of files.

Only for images that nobody has open for writing, as the locks held by the disk make sure, and that are neither dirty,
corrupt, encrypted nor kept in an external data file. What does not lie in a file as it is (compressed clusters) comes
from a qemu-nbd that is started when the first such run is met.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from agent.disk.cluster_map import ClusterMap
from agent.disk.direct import direct_works
from agent.disk.gate import Gate, RunFailed
from agent.disk.lock import HeldImage, hold_frozen
from agent.disk.qemu_img import NotMapped, chain_of
from agent.disk.raw import READERS, measure
from agent.disk.runs import Run, joined
from agent.disk.seam import Disk, Extent
from agent.disk.storage import Part, StorageFile
from agent.disk.windows import SERVED, ZERO
from agent.errors import DiskError


class MappedDisk:
    """A `Disk` for reading; open it with `MappedDisk.open`."""

    def __init__(
        self,
        gate: Gate,
        cluster_map: ClusterMap,
        files: list[StorageFile],
        serve: Callable[[], Disk],
        owned: ExitStack,
        *,
        owns_server: bool,
    ) -> None:
        self._gate = gate
        self._map = cluster_map
        self._files = files
        self._serve = serve
        self._owned = owned
        self._owns_server = owns_server
        self._starting = threading.Lock()
        self._served: Disk | None = None

    @classmethod
    def open(
        cls,
        name: str,
        image: Path,
        image_format: str,
        serve: Callable[[], Disk],
        *,
        held: HeldImage | None = None,
        idle: bool,
    ) -> MappedDisk:
        """Open a closed image.

        Args:
            name: what messages call the disk.
            image: file or block device.
            image_format: QEMU's name of the format.
            serve: gives the same image through qemu-nbd, asked at most once. The disk closes it with itself when
                `held` is None.
            held: its exclusive lock; the caller goes on owning it and holds it longer than the disk is open. None: the
                image and its backing files are locked here so that nobody can write.
            idle: read under idle I/O priority (see `agent.disk.priority`).

        Raises:
            NotMapped: it may not be read this way, or not by us; qemu-nbd may do, or say better what is wrong.
        """
        with ExitStack() as owned:
            try:
                size_bytes, locks = _lock_chain(image, image_format, held, owned)
                files = [_storage(name, lock, owned, idle=idle) for lock in locks]
                gate = Gate(name, str(image), size_bytes, writable=False)
                cluster_map = ClusterMap(
                    image,
                    image_format,
                    gate.size_bytes,
                    files=len(files),
                    locked_by_us=held is not None,
                    past_cache=all(file.reads_past_cache for file in files),
                    in_place=lambda: all(lock.is_named() for lock in locks),
                    given_up=lambda: gate.closed,
                )
            except (DiskError, OSError) as error:
                raise NotMapped(str(error)) from error
            return cls(gate, cluster_map, files, serve, owned.pop_all(), owns_server=held is None)

    @property
    def name(self) -> str:
        return self._gate.name

    @property
    def size_bytes(self) -> int:
        return self._gate.size_bytes

    @property
    def readers(self) -> int:
        return READERS

    @property
    def access(self) -> str:
        return "cluster map" if self._served is None else "cluster map, and NBD for compressed clusters"

    @property
    def questions(self) -> int:
        """How often qemu-img was asked for a window of the map."""
        return self._map.questions

    @property
    def reads_back_past_cache(self) -> bool:
        return all(file.reads_past_cache for file in self._files)

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading", offset_bytes, buffer.nbytes):
            self._read([(offset_bytes, buffer.nbytes)], buffer, StorageFile.read_parts)

    def read_runs(self, runs: Sequence[Run], buffer: memoryview) -> None:
        with self._gate.batch("reading", runs, buffer.nbytes):
            self._read(joined(runs), buffer, StorageFile.read_parts)

    def read_back(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading back", offset_bytes, buffer.nbytes):
            self._read([(offset_bytes, buffer.nbytes)], buffer, StorageFile.read_parts_past_cache)

    def read_back_runs(self, runs: Sequence[Run], buffer: memoryview) -> None:
        with self._gate.batch("reading back", runs, buffer.nbytes):
            self._read(joined(runs), buffer, StorageFile.read_parts_past_cache)

    def _read(
        self, runs: Iterable[Run], buffer: memoryview, read: Callable[[StorageFile, Sequence[Part]], None]
    ) -> None:
        """Fill `buffer` with the runs, from whichever file each piece lies in."""
        in_files: list[list[Part]] = [[] for _ in self._files]
        done = 0
        for offset_bytes, length_bytes in runs:
            try:
                for piece in self._map.pieces(offset_bytes, length_bytes):
                    part = buffer[done : done + piece.length_bytes]
                    done += piece.length_bytes
                    if piece.place == ZERO:
                        np.frombuffer(part, np.uint8).fill(0)
                    elif piece.place == SERVED:
                        self._server().read_into(piece.offset_bytes, part)
                    else:
                        in_files[piece.depth].append(Part(piece.place, part, piece.offset_bytes))
            except OSError as error:
                raise RunFailed(error, offset_bytes, length_bytes) from error
        for file, parts in zip(self._files, in_files, strict=True):
            read(file, parts)

    def _server(self) -> Disk:
        with self._starting:
            if self._served is None:
                self._served = self._serve()
                if self._owns_server:
                    self._owned.callback(self._served.close)
            return self._served

    def extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
        self._gate.check("mapping", offset_bytes, length_bytes)
        return self._extents(offset_bytes, offset_bytes + length_bytes)

    def _extents(self, offset_bytes: int, end: int) -> Iterator[Extent]:
        """Neighbours of one kind are joined."""
        start = at = offset_bytes
        kind: bool | None = None
        pieces = self._map.pieces(offset_bytes, end - offset_bytes)
        while at < end:
            with self._gate.request("mapping", at, end - at):
                piece = next(pieces)
            zero = piece.place == ZERO
            if kind is not None and zero != kind:
                yield Extent(start, at - start, kind)
                start = at
            kind, at = zero, at + piece.length_bytes
        if kind is not None:
            yield Extent(start, end - start, kind)

    def write(self, offset_bytes: int, data: memoryview) -> None:
        self._gate.check("writing", offset_bytes, data.nbytes, writes=True)

    def write_runs(self, runs: Sequence[Run], data: memoryview) -> None:
        with self._gate.batch("writing", runs, data.nbytes, writes=True):
            pass

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        self._gate.check("zeroing", offset_bytes, length_bytes, writes=True)

    def flush(self) -> None:
        self._gate.check("flushing", 0, 0)

    def close(self) -> None:
        if self._gate.close():
            self._owned.close()


def _lock_chain(
    image: Path, image_format: str, held: HeldImage | None, owned: ExitStack
) -> tuple[int, list[HeldImage]]:
    """Size of the disk in bytes, and a lock of each file of the chain; `owned` lets go of those that are taken here.

    Raises:
        NotMapped: the chain may not be read by its map.
        OSError, DiskError: it cannot be locked.
    """
    past_cache = direct_works(image)
    if held is not None:
        chain = chain_of(image, image_format, locked_by_us=True, past_cache=past_cache)
        locks = [held]
        for link in chain[1:]:
            locks.append(hold_frozen(link.path))
            owned.callback(locks[-1].close)
        if len(chain) > 1 and chain != chain_of(image, image_format, locked_by_us=True, past_cache=past_cache):
            raise NotMapped("the backing chain changed while it was opened")
        return chain[0].size_bytes, locks
    locks = [hold_frozen(image)]
    owned.callback(locks[0].close)
    chain = chain_of(image, image_format, locked_by_us=False, past_cache=past_cache)
    for link in chain[1:]:
        locks.append(hold_frozen(link.path))
        owned.callback(locks[-1].close)
    # Only now nobody can change the chain any more.
    if len(chain) > 1 and chain != chain_of(image, image_format, locked_by_us=False, past_cache=past_cache):
        raise NotMapped("the backing chain changed while it was opened")
    return chain[0].size_bytes, locks


def _storage(name: str, held: HeldImage, owned: ExitStack, *, idle: bool) -> StorageFile:
    # An open file description of its own: reading must not change how the lock's descriptor reads ahead.
    fd = os.open(f"/proc/self/fd/{held.fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        size_bytes, sector_bytes = measure(name, held.path, fd)
        file = StorageFile(fd, size_bytes, sector_bytes or 1, idle=idle)
    except BaseException:
        os.close(fd)
        raise
    owned.callback(file.close)
    return file
