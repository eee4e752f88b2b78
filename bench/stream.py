"""A plain TCP stream: what a link carries when nothing is in the way.

As a command: ``python -m bench.stream sink ADDRESS PORT`` swallows connections, one after the other, and answers each
with a byte when the sender has ended; ``python -m bench.stream send ADDRESS PORT BYTES`` prints the seconds until that
byte.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

CHUNK_BYTES = 1 << 20
PORT = 9890


@contextlib.contextmanager
def running(words: Sequence[str], prefix: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A module of ours as a process that says ``ready``, behind the words of `prefix`; it ends with the block.

    Raises:
        RuntimeError: it did not say so.
    """
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", *words],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C is for the benchmark, which ends its processes itself
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"`{' '.join(words)}` did not start")
        yield process
    finally:
        process.kill()
        process.communicate()


def send_s(size_bytes: int, address: str, port: int, prefix: Sequence[str]) -> float:
    """Seconds that `size_bytes` take to a sink at `address` and `port`, sent from where `prefix` leads."""
    words = [*prefix, sys.executable, "-m", "bench.stream", "send", address, str(port), str(size_bytes)]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _sink(address: str, port: int) -> None:
    buffer = bytearray(CHUNK_BYTES)
    with socket.create_server((address, port)) as listener:
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                while connection.recv_into(buffer):
                    pass
                connection.sendall(b"!")


def _send(address: str, port: int, size_bytes: int) -> None:
    chunk = memoryview(os.urandom(CHUNK_BYTES))
    with socket.create_connection((address, port)) as connection:
        started = time.monotonic()
        left = size_bytes
        while left > 0:
            connection.sendall(chunk[: min(left, CHUNK_BYTES)])
            left -= CHUNK_BYTES
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(1) != b"!":
            raise ConnectionError("the sink closed before it had everything")
        print(time.monotonic() - started, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        _sink(sys.argv[2], int(sys.argv[3]))
    else:
        _send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
