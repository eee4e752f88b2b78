"""Room that is kept beside the registry for the journal of a switchover: a file that is given up when its disk is full.

Once the replica is off, a journal that cannot be written would leave nobody served until a person makes room. So the
room is taken before, while the replica still serves, and where there is none the switchover is not begun.
"""

from __future__ import annotations

import os
from pathlib import Path

from coordinator.errors import DatabaseError

RESERVE_BYTES = 4 << 20
"""A switchover with its audit, and taking it back, journal some hundred entries; each costs a few pages of the log."""


def reserve_of(database: Path) -> Path:
    """The file that keeps the room for that database."""
    return database.with_name(f"{database.name}-reserve")


def take(database: Path) -> None:
    """Make sure that the room is kept; harmless where it is already.

    Raises:
        DatabaseError: there is not so much.
    """
    path = reserve_of(database)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        path.unlink(missing_ok=True)  # a part of it would keep room that the journal needs
        raise DatabaseError(
            f"the switchover is not begun, for its journal needs {RESERVE_BYTES >> 20} MiB beside the registry "
            f"{database} and cannot have them ({error.strerror}): free some there"
        ) from error


def give_up(database: Path) -> bool:
    """Let the journal have the room; False where none is kept."""
    try:
        reserve_of(database).unlink()
    except OSError:
        return False
    return True
