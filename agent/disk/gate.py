"""What every disk has in common: each request is validated whole, in one place, before it touches storage.

The gate also counts who is inside. Closing a file descriptor under a thread that still uses its number could send
that thread's write to whatever file the number is given to next; so `Gate.close` shuts the door first, then waits.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from agent.disk.runs import Run, problem_of
from agent.errors import DiskError, DiskFull, FlushFailed

_CURES = {
    errno.ENOSPC: "free some room there, then try again",
    errno.EDQUOT: "raise the quota or free some room there, then try again",
    errno.EIO: "look at the storage under it (dmesg names the device), then try again",
    errno.EACCES: "give the agent's user the right to open it",
    errno.EPERM: "give the agent's user the right to open it",
    errno.ENOENT: "check that it is still where the domain says it is",
    errno.EROFS: "mount its file system writable",
    errno.EBUSY: "unmount or release it on this host first",
    errno.ETIMEDOUT: "look at what serves it and at the storage under it, then try again",
}


def storage_error(name: str, where: str, doing: str, number: int, detail: str = "", **facts: int) -> DiskError:
    """The error for a failed system call or NBD request.

    Args:
        name: the disk's name.
        where: its path or address, for people.
        doing: what was attempted, as ``writing 512 bytes at 0``.
        number: an ``errno`` value, 0 when unknown.
        detail: the cause in words, where the error number does not say it.
        facts: ``offset_bytes`` and ``length_bytes`` where they apply.
    """
    cause = detail or os.strerror(number)
    cure = _CURES.get(number, "look at the storage under it, then try again")
    kind = DiskFull if number in (errno.ENOSPC, errno.EDQUOT) else DiskError
    return kind(
        f"Disk {name} ({where}): {doing} failed: {cause}; {cure}.",
        disk=name,
        errno=errno.errorcode.get(number, ""),
        **facts,
    )


class RunFailed(OSError):
    """One run of a batch failed: the error is about that run alone.

    Args:
        cause: what happened.
        offset_bytes, length_bytes: the run.
    """

    def __init__(self, cause: OSError, offset_bytes: int, length_bytes: int) -> None:
        super().__init__(cause.errno or 0, cause.strerror or str(cause))
        self.offset_bytes = offset_bytes
        self.length_bytes = length_bytes


class Gate:
    """Who may touch a disk, and with what.

    Args:
        name: the disk's name.
        where: path or address of its storage, for sentences.
        size_bytes: requests end here at the latest.
        writable: whether writes are let in.
    """

    def __init__(self, name: str, where: str, size_bytes: int, *, writable: bool) -> None:
        self.name = name
        self.where = where
        self.size_bytes = size_bytes
        self.writable = writable
        self._inside = 0
        self._closed = False
        self._poison: str | None = None
        self._changed = threading.Condition()

    @property
    def closed(self) -> bool:
        """Whether `close` was called: long requests look at this and give up."""
        return self._closed

    def check(self, doing: str, offset_bytes: int, length_bytes: int, *, writes: bool = False) -> None:
        """Raise `DiskError` unless the request may be carried out now."""
        problem = self._shut(writes=writes)
        if problem is None and (offset_bytes < 0 or length_bytes < 0 or offset_bytes + length_bytes > self.size_bytes):
            problem = (
                f"that is outside the disk's {self.size_bytes} bytes; check that both disks have the size expected"
            )
        if problem is not None:
            raise self._refusal(doing, (offset_bytes, length_bytes), problem)

    def _shut(self, *, writes: bool) -> str | None:
        """Why nobody is let in now, whatever the place, as a clause; None when the door is open."""
        if self._closed:
            return "the disk is closed; open it again"
        if writes and not self.writable:
            return "the disk is open for reading only; open it writable"
        if writes and self._poison is not None:
            return f"{self._poison}; what was written before may be lost, so open the disk anew and compare it again"
        return None

    def _refusal(self, doing: str, run: Run, problem: str) -> DiskError:
        offset_bytes, length_bytes = run
        kind = FlushFailed if self._poison is not None else DiskError
        return kind(
            f"Disk {self.name} ({self.where}): {doing} {length_bytes} bytes at {offset_bytes} refused: {problem}.",
            disk=self.name,
            offset_bytes=offset_bytes,
            length_bytes=length_bytes,
        )

    @contextmanager
    def request(self, doing: str, offset_bytes: int, length_bytes: int, *, writes: bool = False) -> Iterator[None]:
        """Validate a request and be counted while it runs; an `OSError` inside becomes a `DiskError`."""
        with self._changed:
            self.check(doing, offset_bytes, length_bytes, writes=writes)
            self._inside += 1
        with self._counted(doing, offset_bytes, length_bytes):
            yield

    @contextmanager
    def batch(self, doing: str, runs: Sequence[Run], buffer_bytes: int, *, writes: bool = False) -> Iterator[None]:
        """`request` for many runs that share a buffer of `buffer_bytes`: all are validated before the first begins."""
        wrong = problem_of(runs, self.size_bytes, buffer_bytes)
        with self._changed:
            shut = self._shut(writes=writes)
            if shut is not None:
                raise self._refusal(doing, (runs[0][0] if runs else 0, buffer_bytes), shut)
            if wrong is not None:
                raise self._refusal(doing, wrong[1], wrong[0])
            self._inside += 1
        with self._counted(doing, runs[0][0] if runs else 0, buffer_bytes):
            yield

    @contextmanager
    def _counted(self, doing: str, offset_bytes: int, length_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, RunFailed):
                offset_bytes, length_bytes = error.offset_bytes, error.length_bytes
            facts = {"offset_bytes": offset_bytes, "length_bytes": length_bytes}
            what = f"{doing} {length_bytes} bytes at {offset_bytes}"
            failure = self.error(what, error.errno or 0, error.strerror or str(error), **facts)
            if self._poison is not None:
                raise FlushFailed(failure.sentence, **failure.facts) from error
            raise failure from error
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def error(self, doing: str, number: int, detail: str = "", **facts: int) -> DiskError:
        """The error of this disk for a failed call (see `storage_error`)."""
        return storage_error(self.name, self.where, doing, number, detail, **facts)

    def poison(self, why: str) -> None:
        """Refuse every later write and flush; `why` is a clause for their sentences."""
        with self._changed:
            if self._poison is None:
                self._poison = why

    def close(self) -> bool:
        """Let nobody in any more and wait until nobody is inside. True for the first caller alone.

        There is no deadline on purpose: a thread that writes is never left behind with its storage taken away.
        """
        with self._changed:
            first = not self._closed
            self._closed = True
            self._changed.wait_for(lambda: self._inside == 0)
        return first
