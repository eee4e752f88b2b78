"""What was written to a disk since an earlier view of it: the one seam, and the readers of QEMU's dirty bitmaps.

A bitmap is asked for over NBD, window by window (NBD protocol, "Metadata contexts"; QEMU docs/interop/nbd.rst: context
``qemu:dirty-bitmap:NAME``, flag 1 is dirty), so that nothing here grows with the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import nbd

from agent.disk.connection import Connection
from agent.disk.gate import Gate, storage_error
from agent.disk.qemu_nbd import EXPORT, QemuNbd

BITMAP_CONTEXT = "qemu:dirty-bitmap:"
_STATE_DIRTY = 1
_STEP_BYTES = (1 << 32) - (1 << 16)
"""Asked for at once: lengths of NBD requests have 32 bits. QEMU answers with 131072 stretches at most, some MiB of
Python objects, and is asked again behind them."""


class DirtyRanges(Protocol):
    """What of a disk may have been written since an earlier view of it. Whatever is in none of its ranges is the same
    in both views.

    Synchronous, called from worker threads by one at a time; it belongs to a frozen view, so that it tells the same
    each time. The conformance suite in ``tests/contract/test_dirty_ranges.py`` is passed by every kind.
    """

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""

    @property
    def rung(self) -> str:
        """What the record is, in the words of reports: ``bitmap`` or ``overlay``."""

    def ranges(self, offset_bytes: int, length_bytes: int) -> Iterator[tuple[int, int]]:
        """Offset and length of what of the run was written: rising, neither empty nor overlapping, inside the run.
        Lazy, in bounded memory.

        Raises:
            DiskError: the run is not on the disk, or the record cannot be read.
        """

    def close(self) -> None:
        """Release everything; harmless when repeated."""


class NbdDirtyRanges:
    """A dirty bitmap that an NBD server exports; made by `open_dirty_view` and `open_dirty_closed`."""

    rung = "bitmap"

    def __init__(self, gate: Gate, connection: Connection, on_close: Callable[[], None] | None) -> None:
        self._gate = gate
        self._connection = connection
        self._on_close = on_close

    @classmethod
    def open(
        cls,
        name: str,
        socket: Path,
        export: str,
        context: str,
        *,
        timeout_s: float = 60.0,
        on_close: Callable[[], None] | None = None,
    ) -> NbdDirtyRanges:
        """Connect to an export for that one context.

        Raises:
            DiskError: no connection, or the export has no such context.
        """
        where = f"NBD export {export!r} at {socket}"
        gates: list[Gate] = []

        def closed() -> bool:
            return any(gate.closed for gate in gates)

        try:
            connection = Connection(socket, export, timeout_s, closed, context=context)
        except OSError as error:
            raise storage_error(name, where, "connecting", error.errno or 0, error.strerror or "") from error
        try:
            if not connection.handle.can_meta_context(context):
                raise storage_error(name, where, "asking what was written", 0, f"it has no context {context}")
            gates.append(Gate(name, where, int(connection.handle.get_size()), writable=False))
        except nbd.Error as error:
            connection.close()
            raise storage_error(name, where, "connecting", error.errnum, error.string) from error
        except BaseException:
            connection.close()
            raise
        return cls(gates[0], connection, on_close)

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""
        return self._gate.size_bytes

    def ranges(self, offset_bytes: int, length_bytes: int) -> Iterator[tuple[int, int]]:
        """As `DirtyRanges.ranges`."""
        self._gate.check("asking what was written", offset_bytes, length_bytes)
        return self._told(offset_bytes, offset_bytes + length_bytes)

    def _told(self, at: int, end: int) -> Iterator[tuple[int, int]]:
        """Ask by window; neighbours are joined."""
        start = at  # of what is dirty and not told yet, up to `at`
        while at < end:
            length = min(_STEP_BYTES, end - at)
            with self._gate.request("asking what was written", at, length):
                told = self._ask(at, length)
                if not told or any(run_length == 0 for run_length, _ in told):
                    raise OSError(0, "the NBD server told nothing about the run")
            for run_length, flags in told:
                behind = min(at + run_length, end)
                if not flags & _STATE_DIRTY:
                    if start < at:
                        yield start, at - start
                    start = behind
                at = behind
                if at == end:
                    break
        if start < end:
            yield start, end - start

    def _ask(self, at: int, length: int) -> list[tuple[int, int]]:
        try:
            return self._connection.block_flags(at, length)
        except nbd.Error as error:
            raise OSError(error.errnum, error.string) from error

    def close(self) -> None:
        """As `DirtyRanges.close`."""
        if self._gate.close():
            self._connection.close()
            if self._on_close is not None:
                self._on_close()


class JoinedDirtyRanges:
    """What is in any of several records of one disk: bitmaps of QEMU follow one another, and what was written since the
    first is in all of them together."""

    def __init__(self, parts: Sequence[DirtyRanges]) -> None:
        self._parts = tuple(parts)

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""
        return min(part.size_bytes for part in self._parts)

    @property
    def rung(self) -> str:
        """As `DirtyRanges.rung`."""
        return self._parts[0].rung

    def ranges(self, offset_bytes: int, length_bytes: int) -> Iterator[tuple[int, int]]:
        """As `DirtyRanges.ranges`."""
        return union([part.ranges(offset_bytes, length_bytes) for part in self._parts])

    def close(self) -> None:
        """As `DirtyRanges.close`."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.callback(part.close)


def union(sources: Sequence[Iterator[tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    """What is in any of several rows of ranges (offset, length), each rising: one such row, lazy, neighbours joined."""
    heads = [(first, source) for source in sources if (first := next(source, None)) is not None]
    start = end = -1
    while heads:
        index = min(range(len(heads)), key=lambda i: heads[i][0])
        (offset, length), source = heads[index]
        if offset > end:
            if end > start:
                yield start, end - start
            start, end = offset, offset + length
        else:
            end = max(end, offset + length)
        following = next(source, None)
        if following is None:
            del heads[index]
        else:
            heads[index] = (following, source)
    if end > start:
        yield start, end - start


def open_dirty_view(name: str, socket: Path, export: str, context: str) -> DirtyRanges:
    """What was written to one disk of a live view since the checkpoint that its backup job names.

    Args:
        name: what messages call the disk.
        socket, export: of QEMU's NBD server, as for `agent.disk.open.open_view`.
        context: the export's metadata context, whole: ``qemu:dirty-bitmap:`` and the bitmap's name.

    Raises:
        DiskError: no connection, or no such bitmap.
    """
    return NbdDirtyRanges.open(name, socket, export, context)


def open_dirty_closed(
    name: str, image: Path, image_format: str, bitmaps: Sequence[str], socket_dir: Path
) -> DirtyRanges:
    """What persistent bitmaps of a closed image say. Read-only, so it works while the image is frozen; it is not
    changed, not even its bitmaps.

    Args:
        name: what messages call the disk.
        image, image_format: as for `agent.disk.open.open_source`.
        bitmaps: one at least; several are joined. libvirt's checkpoints are bitmaps of their names, and each records up
            to the next alone: since checkpoint N means that of N and of all behind it.
        socket_dir: a folder for the sockets of qemu-nbd.

    Raises:
        DiskError: a bitmap is missing, inconsistent (QEMU died while it was in use) or otherwise not to be had; the
            sentence carries what qemu-nbd says.
    """
    with ExitStack() as undone:
        parts: list[DirtyRanges] = []
        for bitmap in bitmaps:
            server = QemuNbd.start(name, image, image_format, socket_dir, bitmap=bitmap)
            undone.callback(server.stop)
            context = BITMAP_CONTEXT + bitmap
            part = NbdDirtyRanges.open(name, server.socket, EXPORT, context, on_close=server.stop)
            undone.callback(part.close)
            parts.append(part)
        undone.pop_all()
    return parts[0] if len(parts) == 1 else JoinedDirtyRanges(parts)
