"""What every disk has in common: each request is validated whole, in one place, before it touches storage.

The gate also counts who is inside. Closing a file descriptor under a thread that still uses its number could send
that thread's write to whatever file the number is given to next; so `Gate.close` shuts the door first, then waits.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from agent.errors import DiskError, DiskFull

_CURES = {
    errno.ENOSPC: "free some room there, then resume",
    errno.EDQUOT: "raise the quota or free some room there, then resume",
    errno.EIO: "look at the storage under it (dmesg names the device), then resume",
    errno.EACCES: "give the agent's user the right to open it",
    errno.EPERM: "give the agent's user the right to open it",
    errno.ENOENT: "check that it is still where the domain says it is",
    errno.EROFS: "mount its file system writable",
    errno.EBUSY: "unmount or release it on this host first",
    errno.ETIMEDOUT: "look at what serves it and at the storage under it, then resume",
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
    cure = _CURES.get(number, "look at the storage under it, then resume")
    kind = DiskFull if number in (errno.ENOSPC, errno.EDQUOT) else DiskError
    return kind(
        f"Disk {name} ({where}): {doing} failed: {cause}; {cure}.",
        disk=name,
        errno=errno.errorcode.get(number, ""),
        **facts,
    )


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
        facts = {"offset_bytes": offset_bytes, "length_bytes": length_bytes}
        problem = None
        if self._closed:
            problem = "the disk is closed; open it again"
        elif offset_bytes < 0 or length_bytes < 0 or offset_bytes + length_bytes > self.size_bytes:
            problem = (
                f"that is outside the disk's {self.size_bytes} bytes; check that both disks have the size expected"
            )
        elif writes and not self.writable:
            problem = "the disk is open for reading only; open it writable"
        elif writes and self._poison is not None:
            problem = f"{self._poison}; what was written before may be lost, so open the disk anew and compare it again"
        if problem is not None:
            what = f"{doing} {length_bytes} bytes at {offset_bytes}"
            raise DiskError(f"Disk {self.name} ({self.where}): {what} refused: {problem}.", disk=self.name, **facts)

    @contextmanager
    def request(self, doing: str, offset_bytes: int, length_bytes: int, *, writes: bool = False) -> Iterator[None]:
        """Validate a request and be counted while it runs; an `OSError` inside becomes a `DiskError`."""
        with self._changed:
            self.check(doing, offset_bytes, length_bytes, writes=writes)
            self._inside += 1
        try:
            yield
        except OSError as error:
            facts = {"offset_bytes": offset_bytes, "length_bytes": length_bytes}
            what = f"{doing} {length_bytes} bytes at {offset_bytes}"
            raise self.error(what, error.errno or 0, error.strerror or str(error), **facts) from error
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
