"""The database file: opening it safely, and transactions. Whatever is SQLite's own stays in this module.

WAL keeps readers (`status`, `watch`) out of the writer's way; ``synchronous=FULL`` makes a commit durable before it is
acknowledged (I5; https://www.sqlite.org/pragma.html#pragma_synchronous); ``BEGIN IMMEDIATE`` takes the write lock at
once, so that a read-then-write never fails half-way. WAL needs shared memory between processes, which network file
systems do not give (https://www.sqlite.org/wal.html), and their locks cannot be trusted: they are refused.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from coordinator import schema
from coordinator.errors import DatabaseError

APPLICATION_ID = 0x46426B31
"""Marks the file as ours (``PRAGMA application_id``): "FBk1"."""

BUSY_TIMEOUT_S = 30.0
"""How long a transaction waits for another process's; ours last milliseconds."""

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


class Database:
    """An open database. Synchronous; used by one thread at a time (`coordinator.store`)."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self._engine = engine

    @classmethod
    def open(cls, path: Path) -> Database:
        """Open the database, making it and its folder if they are missing.

        Raises:
            DatabaseError: a network file system; no permission; not a database, not ours, damaged; made by a newer
                version (left as it is).
        """
        folder = path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            kind = file_system_type(folder.resolve(), MOUNTS.read_text(encoding="utf-8"))
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
        if path.exists() and not os.access(path, os.R_OK | os.W_OK):
            raise DatabaseError(
                f"the registry {path} cannot be read and written by this user: run as its owner or mend its permissions"
            )
        database = cls(path, _engine(path))
        try:
            database._prepare()
        except BaseException:
            database.close()
            raise
        return database

    def _prepare(self) -> None:
        with self._mapped():
            # The application id and the version are read before anything is written.
            with self.reading() as connection:
                application = int(connection.exec_driver_sql("PRAGMA application_id").scalar_one())
                version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
                tables = int(connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one())
            if tables and application != APPLICATION_ID:
                raise DatabaseError(f"{self.path} is a database of some other program: set state_dir to another folder")
            if version > schema.VERSION:
                raise DatabaseError(
                    f"the registry {self.path} was made by a newer failback (schema {version}, this one knows "
                    f"{schema.VERSION}): install that version; nothing was changed",
                    schema=version,
                )
            if tables:
                self._check_whole()
            # On the driver's own connection: the journal mode cannot be changed inside a transaction, and SQLAlchemy's
            # connections always are in one. The mode stays with the file.
            with self._mapped_driver(), closing(self._engine.raw_connection()) as raw:
                raw.cursor().execute("PRAGMA journal_mode=WAL")
            with self.transaction() as connection:
                if not tables:
                    schema.metadata.create_all(connection)
                    connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
                    connection.exec_driver_sql(f"PRAGMA user_version={schema.VERSION}")

    def _check_whole(self) -> None:
        with self.reading() as connection:
            answer = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one())
        if answer != "ok":
            raise DatabaseError(f"the registry {self.path} is damaged ({answer}): {_RESTORE}")

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A write transaction: all of it durable at the end, or none of it."""
        with self._mapped(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A read of one consistent state; does not wait for a writer."""
        connecting = self._engine.execution_options(failback_reads=True).connect
        with self._mapped(), connecting() as connection, connection.begin():
            yield connection

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise DatabaseError(_sentence(self.path, error.orig or error)) from error

    @contextmanager
    def _mapped_driver(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DatabaseError(_sentence(self.path, error)) from error

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._engine.dispose()


_RESTORE = "put back a copy of it, or move it away and register the pairs again"


def _sentence(path: Path, error: BaseException) -> str:
    code = getattr(error, "sqlite_errorcode", None)
    primary = code & 0xFF if isinstance(code, int) else None
    match primary:
        case sqlite3.SQLITE_NOTADB:
            return f"{path} is not a database: {_RESTORE}"
        case sqlite3.SQLITE_CORRUPT:
            return f"the registry {path} is damaged: {_RESTORE}"
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


def _engine(path: Path) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=QueuePool,
        pool_size=1,
        max_overflow=0,
        connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_S},
    )

    @event.listens_for(engine, "connect")
    def _set_up(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, see below
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get("failback_reads", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine
