"""One NBD connection: libnbd's asynchronous calls, driven by the thread that uses it, with deadlines.

The synchronous calls of libnbd wait for ever and copy once more; the asynchronous ones fill the caller's buffer, let
one request be cut into several that are under way at once, and can be given up. libnbd (nbd_poll(3)) moves bytes only
while it is polled, so a connection that is dropped never touches a buffer again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import nbd

ALLOCATION = "base:allocation"
_STATE_ZERO = 2  # NBD_STATE_ZERO of the base:allocation context (NBD protocol, "Metadata contexts")
_GOODBYE_S = 2.0
_LOOK_UP_MS = 500  # how often a waiting thread looks whether its disk was closed meanwhile


class ConnectionBroken(OSError):
    """The connection cannot be used any more: refused, cut, timed out or given up."""


class Connection:
    """A connection to one export; used by one thread at a time.

    Args:
        socket: unix socket of the server.
        export: export name.
        timeout_s: how long a request (or connecting) may take.
        given_up: asked while waiting; True ends the wait with `ConnectionBroken`.

    Raises:
        ConnectionBroken: no connection came about.
    """

    def __init__(self, socket: Path, export: str, timeout_s: float, given_up: Callable[[], bool]) -> None:
        self._timeout_s = timeout_s
        self._given_up = given_up
        self.handle = nbd.NBD()
        try:
            self.handle.set_export_name(export)
            self.handle.add_meta_context(ALLOCATION)
            self.handle.set_pread_initialize(False)  # a buffer counts only when its read succeeded
            self.handle.aio_connect_unix(str(socket))
            self._poll_while(lambda: self.handle.aio_is_connecting() or self.handle.aio_is_negotiating())
            if not self.handle.aio_is_ready():
                raise ConnectionBroken(0, "the NBD server closed the connection")
        except nbd.Error as error:
            raise ConnectionBroken(error.errnum, error.string) from error

    def _poll_while(self, busy: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._timeout_s
        while busy():
            left_ms = int((deadline - time.monotonic()) * 1000)
            if left_ms <= 0:
                raise ConnectionBroken(0, f"the NBD server did not answer for {self._timeout_s:g} s")
            if self._given_up():
                raise ConnectionBroken(0, "the disk was closed meanwhile")
            self.handle.poll(min(left_ms, _LOOK_UP_MS))

    @property
    def broken(self) -> bool:
        """Whether the connection is beyond use."""
        return not (self.handle.aio_is_ready() or self.handle.aio_is_processing())

    def _await_answer(self, cookie: int) -> None:
        self._poll_while(lambda: not self.handle.aio_command_completed(cookie))

    def finish(self, cookies: list[int]) -> None:
        """Wait until every request of `cookies` is answered; then raise the first `OSError` among the answers.

        Raises:
            OSError: the server answered with that error; the connection lives.
            ConnectionBroken: it does not.
        """
        failed: OSError | None = None
        for cookie in cookies:
            try:
                self._await_answer(cookie)
            except nbd.Error as error:
                if self.broken:
                    raise ConnectionBroken(error.errnum, error.string) from error
                failed = failed or OSError(error.errnum, error.string)
        if failed is not None:
            raise failed

    def block_status(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, bool]]:
        """What the server tells about a run: (length in bytes, reads as zero) in order; it may tell less, or more."""
        told: list[tuple[int, bool]] = []

        def on_extents(context: str, _offset: int, entries: list[int], _error: int) -> int:
            if context == ALLOCATION:
                told.extend(
                    (length, bool(flags & _STATE_ZERO))
                    for length, flags in zip(entries[::2], entries[1::2], strict=True)
                )
            return 0

        self.finish([self.handle.aio_block_status(length_bytes, offset_bytes, on_extents)])
        return told

    def pread_once(self, offset_bytes: int, length_bytes: int) -> None:
        """Read in one request whatever its size, and drop what was read. Raises as `finish`."""
        memory = memoryview(bytearray(length_bytes))
        try:
            cookie = self.handle.aio_pread(nbd.Buffer.from_buffer(memory), offset_bytes)
        except nbd.Error as error:
            raise ConnectionBroken(error.errnum, error.string) from error
        self.finish([cookie])

    def close(self) -> None:
        """Say goodbye if the server listens, and drop the connection."""
        self._given_up = lambda: False
        self._timeout_s = _GOODBYE_S
        try:
            if self.handle.aio_is_ready():
                self.handle.aio_disconnect()
                self._poll_while(lambda: not (self.handle.aio_is_closed() or self.handle.aio_is_dead()))
        except (nbd.Error, ConnectionBroken):
            pass  # it is dropped either way
        del self.handle
