"""Small requests to storage, several at a time: one after the other, each would wait out the storage's latency."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 4
"""The thread that asks among them. Solid-state storage gains up to about this; a disk that turns is
not hurt by it."""
_WORTH_IT = 4  # fewer jobs than this are done by the thread that asks, alone

Job = TypeVar("Job")


class SideBySide:
    """A few threads, started when they are first of use. Thread-safe."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def each(self, jobs: Sequence[Job], do: Callable[[Job], object]) -> None:
        """Do all jobs, in no particular order.

        Raises:
            OSError: of the first of the jobs that failed, when none is being done any more.
        """
        if len(jobs) < _WORTH_IT:
            for job in jobs:
                do(job)
            return
        failures: dict[int, OSError] = {}

        def work(first: int) -> None:
            for number in range(first, len(jobs), THREADS):
                try:
                    do(jobs[number])
                except OSError as error:
                    failures[number] = error
                    return

        others = [self._pool().submit(work, first) for first in range(1, THREADS)]
        try:
            work(0)
        finally:
            # Whatever happens: nobody may go on filling the caller's memory behind its back.
            outcomes = [other.exception() for other in others]
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        if failures:
            raise failures[min(failures)]

    def _pool(self) -> ThreadPoolExecutor:
        with self._starting:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(THREADS - 1, thread_name_prefix="storage")
            return self._threads

    def close(self) -> None:
        """End the threads. Nobody may be asking."""
        if self._threads is not None:
            self._threads.shutdown()
