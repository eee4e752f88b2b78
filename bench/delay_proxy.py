"""A long way in user space: every byte arrives so much later, and none is lost.

As a command: ``python -m bench.delay_proxy PORT ADDRESS TARGET_PORT ONE_WAY_MS`` listens on 127.0.0.1 and passes every
connection on, either direction delayed by ONE_WAY_MS. It stands in for `tc netem`, which many kernels come without.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections import deque

CHUNK_BYTES = 256 << 10
ON_THE_WAY_BYTES = 64 << 20
"""What one direction of one connection may hold: five times what a gigabit needs over 100 ms, so that neither the
delay nor this bound is what a gigabit link waits for."""


class Way:
    """One direction: bytes that were read, each chunk with the time at which it is due at the other end."""

    def __init__(self, source: socket.socket, sink: socket.socket, delay_s: float) -> None:
        self._source = source
        self._sink = sink
        self._delay_s = delay_s
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._held = 0
        self._changed = threading.Condition()

    def start(self) -> list[threading.Thread]:
        """Read and write in threads of their own, which end with the direction."""
        threads = [threading.Thread(target=part, daemon=True) for part in (self._read, self._write)]
        for thread in threads:
            thread.start()
        return threads

    def _read(self) -> None:
        while True:
            try:
                chunk = self._source.recv(CHUNK_BYTES)
            except OSError:
                chunk = b""
            with self._changed:
                self._chunks.append((time.monotonic() + self._delay_s, chunk))
                self._held += len(chunk)
                self._changed.notify_all()
                if not chunk:
                    return
                self._changed.wait_for(lambda: self._held < ON_THE_WAY_BYTES)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._chunks)
                due, chunk = self._chunks.popleft()
            # The delay itself: nothing else is waited for here.
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                if not chunk:
                    self._sink.shutdown(socket.SHUT_WR)
                    return
                self._sink.sendall(chunk)
            except OSError:
                # Whoever is gone will not read: the other side must learn of it, and the reader must not wait for room.
                with contextlib.suppress(OSError):
                    self._source.shutdown(socket.SHUT_RDWR)
                with self._changed:
                    self._held = -ON_THE_WAY_BYTES
                    self._changed.notify_all()
                return
            with self._changed:
                self._held -= len(chunk)
                self._changed.notify_all()


def _carry(near: socket.socket, far: tuple[str, int], delay_s: float) -> None:
    time.sleep(2 * delay_s)  # the handshake of TCP goes there and back
    try:
        there = socket.create_connection(far)
    except OSError:
        near.close()
        return
    with near, there:
        for end in (near, there):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threads = [*Way(near, there, delay_s).start(), *Way(there, near, delay_s).start()]
        for thread in threads:
            thread.join()


def serve(port: int, far: tuple[str, int], delay_s: float) -> None:
    """Listen until killed."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        print("ready", flush=True)
        while True:
            near, _ = listener.accept()
            threading.Thread(target=_carry, args=(near, far, delay_s), daemon=True).start()


if __name__ == "__main__":
    serve(int(sys.argv[1]), (sys.argv[2], int(sys.argv[3])), float(sys.argv[4]) / 1000)
