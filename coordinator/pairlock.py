"""One process per pair: a lock file that the kernel frees when its holder dies, however it dies.

Open-file-description locks (fcntl(2), F_OFD_SETLK), because those can be looked at without being taken: a `status` that
took the lock for a moment, only to look, could keep a run from starting.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator.errors import DatabaseError, PairBusy


def lock_file(state_dir: Path, pair: str) -> Path:
    """Where the lock of that pair lies."""
    return state_dir / "run" / f"{pair}.lock"


@contextmanager
def pair_lock(state_dir: Path, pair: str) -> Iterator[None]:
    """Hold the pair's lock.

    Raises:
        PairBusy: another process holds it.
        DatabaseError: the lock file cannot be made.
    """
    path = lock_file(state_dir, pair)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DatabaseError(
            f"the lock {path} cannot be made: {error.strerror}; make its folder writable for this user"
        ) from error
    try:
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _write_lock())
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise DatabaseError(f"the lock {path} cannot be taken: {error.strerror}") from error
            raise PairBusy(
                f"another process is working on the run of {pair}: `failback watch {pair}` shows it", pair=pair
            ) from error
        yield
    finally:
        os.close(descriptor)


def is_locked(state_dir: Path, pair: str) -> bool:
    """Whether some process holds the pair's lock now; looks, does not take it."""
    try:
        descriptor = os.open(lock_file(state_dir, pair), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _write_lock())
    finally:
        os.close(descriptor)
    return bool(struct.unpack_from("h", found)[0] != fcntl.F_UNLCK)


def _write_lock() -> bytes:
    """``struct flock`` of a write lock on the whole file (type, whence, start, length, process: 0 for these locks)."""
    return struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
