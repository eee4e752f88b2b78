"""`NbdDisk`: an export of an NBD server on a unix socket (a qemu-nbd of ours, or the view of a running VM)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbd

from agent.disk.connection import ALLOCATION, Connection, ConnectionBroken
from agent.disk.gate import Gate, RunFailed, storage_error
from agent.disk.runs import Run, joined
from agent.disk.seam import Extent

REQUEST_BYTES = 1024 * 1024
"""Larger reads and writes travel as several requests that are under way together."""

# Under way on one connection at most. QEMU's server works on 16 requests of a client (nbd/server.c,
# MAX_NBD_REQUESTS); as many again wait in the socket, so that it never runs dry while we fetch answers.
_REQUESTS_UNDER_WAY = 32
_BYTES_UNDER_WAY = 8 * 1024 * 1024
# QEMU's server takes memory for each request and frees it when it is answered (nbd/server.c). glibc gives memory that
# large back to the kernel each time, and the next request waits for fresh pages: that costs more than copying the data
# twice. But it adapts (mallopt(3), M_MMAP_THRESHOLD): once something larger was freed, it keeps twice as much. So the
# first request is one large read: 1.3 GB/s become 3, and the server keeps 32 MiB at most that it would have given back.
_FIRST_READ_BYTES = 16 * 1024 * 1024
_FIRST_READ_FROM_BYTES = 256 * 1024 * 1024  # smaller disks are read before it pays
_ZERO_STEP_BYTES = 256 * 1024 * 1024
_STATUS_STEP_BYTES = 1024 * 1024 * 1024
_ZEROES = memoryview(bytes(REQUEST_BYTES))


_Call = Callable[[nbd.Buffer, int], int]


@dataclass(slots=True)
class _Part:
    """One request: its place on the disk, in the caller's buffer, and libnbd's name for it once it is sent."""

    offset_bytes: int
    length_bytes: int
    at: int
    cookie: int = 0


def _parts(runs: Iterable[Run]) -> Iterator[_Part]:
    """The runs, whose bytes lie end to end in a buffer, cut into requests."""
    at = 0
    for offset_bytes, length_bytes in runs:
        for start in range(0, length_bytes, REQUEST_BYTES):
            length = min(REQUEST_BYTES, length_bytes - start)
            yield _Part(offset_bytes + start, length, at)
            at += length


def _read_once_in_large(connection: Connection, size_bytes: int) -> None:
    """The first read that makes the others fast; that it fails tells nothing that those would not tell better."""
    if size_bytes < _FIRST_READ_FROM_BYTES:
        return
    try:
        connection.pread_once(0, _FIRST_READ_BYTES)
    except ConnectionBroken:
        raise
    except OSError:
        pass


def _require_writable(name: str, where: str, connection: Connection) -> None:
    if connection.handle.is_read_only():
        raise storage_error(name, where, "opening for writing", 0, "the server offers it for reading only")
    if not connection.handle.can_flush():
        raise storage_error(name, where, "opening for writing", 0, "the server cannot flush")


class NbdDisk:
    """A `Disk` over NBD; open it with `NbdDisk.open`.

    Threads that read at the same time get a connection each, up to `connections`. A writer gets more than one only
    from a server that promises that a flush on one connection covers what was completed on all of them
    (NBD_FLAG_CAN_MULTI_CONN).
    """

    def __init__(
        self,
        gate: Gate,
        connect: Callable[[], Connection],
        first: Connection,
        *,
        connections: int,
        past_cache: bool,
        access: str,
        on_close: Callable[[], None] | None,
    ) -> None:
        self._gate = gate
        self._connect = connect
        self._idle = [first]
        self._count = 1
        self._limit = connections
        self._changed = threading.Condition()
        self._past_cache = past_cache
        self.access = access
        self._on_close = on_close
        self._can_zero = bool(first.handle.can_zero())
        self._can_map = bool(first.handle.can_meta_context(ALLOCATION))

    @classmethod
    def open(
        cls,
        name: str,
        socket: Path,
        export: str,
        *,
        writable: bool,
        past_cache: bool,
        connections: int = 4,
        timeout_s: float = 60.0,
        access: str = "NBD",
        on_close: Callable[[], None] | None = None,
    ) -> NbdDisk:
        """Connect to an export.

        Args:
            name: what messages call the disk.
            socket: the server's unix socket.
            export: the export's name.
            writable: whether it will be written.
            past_cache: what the server reads comes past its host's page cache.
            connections: at most so many, opened as threads ask for them.
            timeout_s: a request unanswered for so long is an error.
            access: what reports say of how the content is reached.
            on_close: called once, after the last connection is gone.

        Raises:
            DiskError: no connection, or the export is not what was asked for.
        """
        where = f"NBD export {export!r} at {socket}"
        gates: list[Gate] = []  # the first connection is made before there is a size to guard

        def connect() -> Connection:
            return Connection(socket, export, timeout_s, lambda: any(gate.closed for gate in gates))

        try:
            first = connect()
        except OSError as error:
            raise storage_error(name, where, "connecting", error.errno or 0, error.strerror or "") from error
        try:
            size_bytes = int(first.handle.get_size())
            if writable:
                _require_writable(name, where, first)
            if writable and not first.handle.can_multi_conn():
                connections = 1
            gate = Gate(name, where, size_bytes, writable=writable)
            gates.append(gate)
            _read_once_in_large(first, size_bytes)
            return cls(
                gate,
                connect,
                first,
                connections=connections,
                past_cache=past_cache,
                access=access,
                on_close=on_close,
            )
        except nbd.Error as error:
            first.close()
            raise storage_error(name, where, "connecting", error.errnum, error.string) from error
        except ConnectionBroken as error:
            first.close()
            raise storage_error(name, where, "reading", error.errno or 0, error.strerror or "") from error
        except BaseException:
            first.close()
            raise

    @property
    def name(self) -> str:
        return self._gate.name

    @property
    def size_bytes(self) -> int:
        return self._gate.size_bytes

    @property
    def reads_back_past_cache(self) -> bool:
        return self._past_cache

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """A connection for this thread alone; one that breaks is dropped, and ends writing for good."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._count < self._limit)
            connection = self._idle.pop() if self._idle else None
            if connection is None:
                self._count += 1
        keep = False
        try:
            if connection is None:
                connection = self._connect()
            yield connection
            keep = True
        except ConnectionBroken as error:
            # What the server had accepted and not flushed may be gone with it.
            self._gate.poison(f"the connection to its NBD server was lost ({error.strerror})")
            raise
        except nbd.Error as error:
            keep = connection is not None and not connection.broken
            raise OSError(error.errnum, error.string) from error
        except OSError:
            keep = connection is not None and not connection.broken
            raise
        finally:
            if connection is not None and not keep:
                connection.close()
            with self._changed:
                if connection is not None and keep:
                    self._idle.append(connection)
                else:
                    self._count -= 1
                self._changed.notify()

    @property
    def readers(self) -> int:
        return self._limit

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        with self._gate.request("reading", offset_bytes, buffer.nbytes), self._connection() as connection:
            self._move(connection, connection.handle.aio_pread, [(offset_bytes, buffer.nbytes)], buffer)

    def read_runs(self, runs: Sequence[Run], buffer: memoryview) -> None:
        with self._gate.batch("reading", runs, buffer.nbytes), self._connection() as connection:
            self._move(connection, connection.handle.aio_pread, joined(runs), buffer)

    def write(self, offset_bytes: int, data: memoryview) -> None:
        with self._gate.request("writing", offset_bytes, data.nbytes, writes=True), self._connection() as connection:
            self._move(connection, connection.handle.aio_pwrite, [(offset_bytes, data.nbytes)], data)

    def write_runs(self, runs: Sequence[Run], data: memoryview) -> None:
        with self._gate.batch("writing", runs, data.nbytes, writes=True), self._connection() as connection:
            self._move(connection, connection.handle.aio_pwrite, joined(runs), data)

    @staticmethod
    def _move(connection: Connection, call: _Call, runs: Iterable[Run], data: memoryview) -> None:
        """Read or write runs, cut into requests, of which a bounded number and amount is under way.

        The oldest is waited for alone, and an error is raised only when nothing is under way any more: the request
        that failed first.
        """
        under_way: deque[_Part] = deque()
        bytes_under_way = 0
        failed: RunFailed | None = None
        parts = _parts(runs)
        part = next(parts, None)
        while under_way or (part is not None and failed is None):
            if (
                part is not None
                and failed is None
                and len(under_way) < _REQUESTS_UNDER_WAY
                and bytes_under_way + part.length_bytes <= _BYTES_UNDER_WAY
            ):
                memory = data[part.at : part.at + part.length_bytes]
                try:
                    part.cookie = call(nbd.Buffer.from_buffer(memory), part.offset_bytes)
                except nbd.Error as error:  # others are under way in the caller's memory: it must be dropped
                    raise ConnectionBroken(error.errnum, error.string) from error
                under_way.append(part)
                bytes_under_way += part.length_bytes
                part = next(parts, None)
                continue
            oldest = under_way.popleft()
            bytes_under_way -= oldest.length_bytes
            try:
                connection.finish([oldest.cookie])
            except ConnectionBroken:
                raise
            except OSError as error:
                failed = failed or RunFailed(error, oldest.offset_bytes, oldest.length_bytes)
        if failed is not None:
            raise failed

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        with self._gate.request("zeroing", offset_bytes, length_bytes, writes=True), self._connection() as connection:
            end = offset_bytes + length_bytes
            step = _ZERO_STEP_BYTES if self._can_zero else REQUEST_BYTES
            for start in range(offset_bytes, end, step):
                length = min(step, end - start)
                if self._can_zero:
                    # Without NBD_CMD_FLAG_NO_HOLE: the server may release the storage.
                    connection.finish([connection.handle.aio_zero(length, start)])
                else:
                    self._move(connection, connection.handle.aio_pwrite, [(start, length)], _ZEROES[:length])

    def flush(self) -> None:
        with self._gate.request("flushing", 0, 0, writes=self._gate.writable):
            if not self._gate.writable:
                return
            try:
                with self._connection() as connection:
                    connection.finish([connection.handle.aio_flush()])
            except OSError as error:
                self._gate.poison(f"an earlier flush failed ({error.strerror})")
                raise

    def extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
        self._gate.check("mapping", offset_bytes, length_bytes)
        if length_bytes and not self._can_map:
            return iter([Extent(offset_bytes, length_bytes, zero=False)])
        return self._told_extents(offset_bytes, offset_bytes + length_bytes)

    def _told_extents(self, offset_bytes: int, end: int) -> Iterator[Extent]:
        """Ask by window; neighbours of one kind are joined."""
        start = offset_bytes
        kind: bool | None = None
        while offset_bytes < end:
            length = min(_STATUS_STEP_BYTES, end - offset_bytes)
            with self._gate.request("mapping", offset_bytes, length), self._connection() as connection:
                told = connection.block_status(offset_bytes, length)
                if not told or any(run_length == 0 for run_length, _ in told):
                    raise OSError(0, "the NBD server told nothing about the run")
            for run_length, zero in told:
                if kind is not None and zero != kind and offset_bytes > start:
                    yield Extent(start, offset_bytes - start, kind)
                    start = offset_bytes
                kind = zero
                offset_bytes = min(offset_bytes + run_length, end)
                if offset_bytes == end:
                    break
        if kind is not None:
            yield Extent(start, end - start, kind)

    def read_back(self, offset_bytes: int, buffer: memoryview) -> None:
        self.read_into(offset_bytes, buffer)

    def read_back_runs(self, runs: Sequence[Run], buffer: memoryview) -> None:
        self.read_runs(runs, buffer)

    def close(self) -> None:
        if self._gate.close():
            for connection in self._idle:
                connection.close()
            self._idle.clear()
            if self._on_close is not None:
                self._on_close()
