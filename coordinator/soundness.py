"""Whether a registry's file may be opened for writing: what is looked at first, and what is said where it may not.

Everything here only reads: a file that is refused stays as it was found, down to its last byte. SQLite's own, as
`coordinator.database`.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

from coordinator import schema
from coordinator.errors import DatabaseError
from coordinator.upgrades import missing_tables

APPLICATION_ID = 0x46426B31
"""Marks the file as ours (``PRAGMA application_id``): "FBk1"."""

BUSY_TIMEOUT_S = 30.0
"""How long a transaction waits for another process's; ours last milliseconds."""

CHECK_WITHIN_S = 5.0
"""So long the whole file is looked at for damage; of a larger one, what damage is left shows when it is read."""
CHECK_EVERY = 10_000
"""So many steps of SQLite's machine between two looks at the clock: some 100 µs."""

RESTORE = "put back a copy that `failback backup` made (docs/JOURNAL.md says how); nothing was changed"
REBUILD = "without a copy, `failback adopt HOST...` rebuilds it from what the agents know"
SMALLEST_BYTES = 512
"""Of a database with anything in it: one page (https://www.sqlite.org/fileformat.html)."""
LITTLE_ROOM_BYTES = 1 << 20
"""With less than that free, an I/O error of SQLite's is the lack of room: it cannot grow its index of the log."""

# fmt: off
NETWORK_FILE_SYSTEMS = frozenset(
    {
        "9p", "afs", "ceph", "cifs", "coda", "fuse.ceph",
        "fuse.curlftpfs", "fuse.davfs", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs",
        "gfs2", "glusterfs", "lustre", "ncpfs", "nfs", "nfs4",
        "ocfs2", "smb2", "smb3", "smbfs", "vboxsf",
    }
)
# fmt: on
MOUNTS = Path("/proc/self/mountinfo")


def file_system_type(path: Path, mountinfo: str) -> str:
    """Type of the file system that holds the absolute, resolved `path`, from the text of ``/proc/self/mountinfo``
    (proc(5)); empty when none is listed. Of mounts on one another the last listed covers the others."""
    found, depth = "", -1
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split()
        if not separator or len(fields) < 5:
            continue
        # Blanks and backslashes in mount points are written as octal escapes.
        mount = Path(fields[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\"))
        if path.is_relative_to(mount) and len(mount.parts) >= depth:
            found, depth = after.split()[0], len(mount.parts)
    return found


def check_place(path: Path) -> None:
    """Make the folder if it is missing, and insist that a database in it can be kept safely.

    Raises:
        DatabaseError: the folder cannot be made; a network file system; one that is mounted read-only.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        kind = file_system_type(path.resolve().parent, MOUNTS.read_text(encoding="utf-8"))
        read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
    except OSError as error:
        raise DatabaseError(
            f"the folder {folder} cannot be used: {error.strerror}; make it writable for this user or set state_dir"
        ) from error
    if kind in NETWORK_FILE_SYSTEMS:
        raise DatabaseError(
            f"the registry {path} would lie on {kind}, a network file system whose locks cannot be trusted: "
            "set state_dir to a folder on a local disk",
            file_system=kind,
        )
    if read_only:
        raise DatabaseError(
            f"the registry {path} lies on a file system that is mounted read-only: find out why (`dmesg` tells of disk "
            "errors), mount it writable, then repeat"
        )


def is_there(path: Path, *, anew: bool = False) -> bool:
    """Whether there is a registry; False: there never was one, or it is to begin `anew`, so that it may be made.

    Raises:
        DatabaseError: there was one and it is gone, or cut to nothing, or may not be read and written.
    """
    if not path.exists():
        if path.is_symlink():
            raise DatabaseError(
                f"the registry {path} is a link to {path.readlink()}, which is not there: mount its disk"
            )
        left = [name for name in (f"{path.name}-wal", f"{path.name}-shm") if (path.parent / name).exists()]
        if not anew:
            left += [f"run/{lock.name}" for lock in sorted((path.parent / "run").glob("*.lock"))]
        if left:
            raise DatabaseError(
                f"the registry {path} is gone, but {left[0]} beside it shows that there was one: {RESTORE}; {REBUILD}"
            )
        return False
    size_bytes = path.stat().st_size
    if size_bytes < SMALLEST_BYTES:
        raise DatabaseError(
            f"the registry {path} has {size_bytes} bytes, cut short by something else than failback: {RESTORE}"
        )
    if not os.access(path, os.R_OK | os.W_OK) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise DatabaseError(
            f"the registry {path} cannot be read and written by this user: run as its owner or mend its permissions "
            "and those of its folder"
        )
    return True


def look(path: Path) -> int:
    """The version of the tables in the file, after seeing that it is ours, known and whole.

    Raises:
        DatabaseError: it is not; the sentence says what to do.
    """
    uri = f"file:{path.resolve().as_posix().replace('%', '%25').replace('?', '%3f').replace('#', '%23')}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S)) as raw:
            return _look(path, raw)
    except sqlite3.Error as error:
        raise DatabaseError(sentence_of(path, error)) from error


def _look(path: Path, raw: sqlite3.Connection) -> int:
    application, version, tables = (
        int(raw.execute(question).fetchone()[0])
        for question in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if application != APPLICATION_ID:
        whose = "of some other program" if tables else "without a table, made by something else than failback"
        raise DatabaseError(f"{path} is a database {whose}: set state_dir to another folder")
    if version > schema.VERSION:
        raise DatabaseError(
            f"the registry {path} was made by a newer failback (schema {version}, this one knows "
            f"{schema.VERSION}): install that version; nothing was changed",
            schema=version,
        )
    page_bytes = int(raw.execute("PRAGMA page_size").fetchone()[0])
    over_bytes = path.stat().st_size % page_bytes  # what a short read of the last page lacks SQLite takes for zeroes
    answer = f"its last page has {over_bytes} of {page_bytes} bytes" if over_bytes else _quick_check(raw)
    if answer != "ok":
        raise DatabaseError(f"the registry {path} is damaged ({answer}): {RESTORE}")
    engine = create_engine("sqlite://", creator=lambda: raw, poolclass=StaticPool)
    with engine.connect() as connection:
        missing = missing_tables(connection, version)
    if missing:
        raise DatabaseError(f"the registry {path} is damaged (it has no table {', '.join(missing)}): {RESTORE}")
    return version


def _quick_check(raw: sqlite3.Connection, now: Callable[[], float] = time.monotonic) -> str:
    deadline_s = now() + CHECK_WITHIN_S
    raw.set_progress_handler(lambda: now() > deadline_s, CHECK_EVERY)
    try:
        return " ".join(str(raw.execute("PRAGMA quick_check(1)").fetchone()[0]).split())
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        return "ok"
    finally:
        raw.set_progress_handler(None, 0)


def says_full(path: Path, error: BaseException) -> bool:
    """Whether an error of SQLite's is about room."""
    return _primary(path, error) == sqlite3.SQLITE_FULL


def _primary(path: Path, error: BaseException) -> int | None:
    code = getattr(error, "sqlite_errorcode", None)
    primary = code & 0xFF if isinstance(code, int) else None
    return sqlite3.SQLITE_FULL if primary == sqlite3.SQLITE_IOERR and _is_full(path) else primary


def sentence_of(path: Path, error: BaseException) -> str:
    """What an error of SQLite's means and what to do."""
    match _primary(path, error):
        case sqlite3.SQLITE_NOTADB:
            return f"{path} is not a database: {RESTORE}"
        case sqlite3.SQLITE_CORRUPT:
            return f"the registry {path} is damaged: {RESTORE}"
        case sqlite3.SQLITE_READONLY:
            return f"the registry {path} cannot be written: its file system or folder is read-only; make it writable"
        case sqlite3.SQLITE_FULL:
            return f"the registry {path} cannot be written: no room on its file system; free some and repeat"
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return f"the registry {path} is held by another process for {BUSY_TIMEOUT_S:.0f} s: end that one and repeat"
        case sqlite3.SQLITE_CANTOPEN:
            return f"the registry {path} cannot be opened: check the permissions of the file and its folder"
        case _:
            return f"the registry {path} failed: {error}; check its file system"


def _is_full(path: Path) -> bool:
    try:
        room = os.statvfs(path.parent)
    except OSError:
        return False
    return room.f_bavail * room.f_frsize < LITTLE_ROOM_BYTES
