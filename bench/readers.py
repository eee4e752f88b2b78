"""The limit: processes that do nothing but read what images store, side by side, as fast as this machine lets them.

As a command it is one such process: ``python -m bench.readers PATH REQUEST_BYTES THREADS buffered|direct`` reads once
for each line on its standard input and answers ``done BYTES``.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from bench.pagecache import cool, data_extents

ALIGNMENT = 4096  # what O_DIRECT may ask for (open(2)); our images' extents keep to it


@dataclass(frozen=True, slots=True)
class Way:
    """How to read: request size in bytes, threads, and whether past the page cache (O_DIRECT)."""

    request_bytes: int
    threads: int = 1
    direct: bool = False

    def __str__(self) -> str:
        kind = "O_DIRECT" if self.direct else "buffered"
        return f"{kind}, {self.request_bytes >> 10} KiB, {self.threads} thread{'s' if self.threads > 1 else ''}"


WARM_WAYS = (Way(256 << 10), Way(1 << 20), Way(2 << 20), Way(8 << 20))
COLD_WAYS = (Way(1 << 20), Way(8 << 20), Way(1 << 20, 4, direct=True), Way(4 << 20, 2, direct=True))


class Readers:
    """Reader processes that stand ready, one for each image."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def read_s(self) -> float:
        """Seconds until all of them have read everything once, at the same time.

        Raises:
            RuntimeError: one ended.
        """
        started = time.monotonic()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in self._processes:
            _expect(process, "done")
        return time.monotonic() - started


def _expect(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    answer = process.stdout.readline()
    if not answer.startswith(word):
        raise RuntimeError(f"a reader process ended instead of saying {word}")


@contextlib.contextmanager
def open_readers(paths: Sequence[Path], way: Way) -> Iterator[Readers]:
    """Start a process for each of `paths`; they end with the block."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for path in paths:
            kind = "direct" if way.direct else "buffered"
            words = [sys.executable, "-m", "bench.readers", str(path), str(way.request_bytes), str(way.threads), kind]
            processes.append(
                subprocess.Popen(
                    words,
                    cwd=Path(__file__).parents[1],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # a terminal's Ctrl-C is for the benchmark, which ends them itself
                )
            )
        for process in processes:
            _expect(process, "ready")
        yield Readers(processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def best_way(paths: Sequence[Path], ways: Sequence[Way], *, cold: bool) -> Way:
    """The fastest of `ways` to read `paths` side by side, tried one after the other (warm: the better of two tries)."""
    seconds: dict[Way, float] = {}
    for way in ways:
        with open_readers(paths, way) as readers:
            if cold:
                cool(paths)
                seconds[way] = readers.read_s()
            else:
                readers.read_s()
                seconds[way] = min(readers.read_s() for _ in range(2))
    return min(seconds, key=lambda way: seconds[way])


def _serve(path: Path, way: Way) -> None:
    flags = os.O_RDONLY | (os.O_DIRECT if way.direct else 0)
    file = os.open(path, flags)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    print("ready", flush=True)
    buffers = [memoryview(mmap.mmap(-1, way.request_bytes)) for _ in range(way.threads)]
    for _ in sys.stdin:
        print(f"done {_read_once(file, way, buffers)}", flush=True)


def _read_once(file: int, way: Way, buffers: Sequence[memoryview]) -> int:
    requests: SimpleQueue[tuple[int, int]] = SimpleQueue()
    total = 0
    for start, length in data_extents(file):
        total += length
        for at in range(start, start + length, way.request_bytes):
            requests.put((at, min(way.request_bytes, start + length - at)))
    if way.threads == 1:
        _drain(file, requests, buffers[0])
        return total
    threads = [threading.Thread(target=_drain, args=(file, requests, buffer)) for buffer in buffers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return total


def _drain(file: int, requests: SimpleQueue[tuple[int, int]], buffer: memoryview) -> None:
    while True:
        try:
            offset, length = requests.get_nowait()
        except Empty:
            return
        os.preadv(file, [buffer[: -(-length // ALIGNMENT) * ALIGNMENT]], offset)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Way(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "direct"))
