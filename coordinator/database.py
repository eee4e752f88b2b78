"""The database file: opening it safely, and transactions. What is SQLite's own stays here, in `coordinator.soundness`
(what is looked at first) and in `coordinator.upgrades` (tables of earlier versions).

WAL keeps readers (`status`, `watch`) out of the writer's way; ``synchronous=FULL`` makes a commit durable before it is
acknowledged (I5; https://www.sqlite.org/pragma.html#pragma_synchronous); ``BEGIN IMMEDIATE`` takes the write lock at
once, so that a read-then-write never fails half-way. WAL needs shared memory between processes, which network file
systems do not give (https://www.sqlite.org/wal.html), and their locks cannot be trusted: they are refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from coordinator import schema, soundness
from coordinator.errors import DatabaseError, DatabaseFull, UsageError
from coordinator.soundness import APPLICATION_ID, says_full, sentence_of
from coordinator.upgrades import make_tables, upgrade


class Database:
    """An open database. Synchronous; used by one thread at a time (`coordinator.store`)."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self._engine = engine

    @classmethod
    def open(cls, path: Path, *, anew: bool = False) -> Database:
        """Open the database. It is made, with its folder, where there never was one; one that is gone, cut short or
        damaged is refused and left as it is.

        Args:
            anew: one that is gone is made, though something beside it shows that there was one: whoever says so fills
                it with what others know.

        Raises:
            DatabaseError: a network file system, one that is full or read-only; no permission; not a database, not
                ours, damaged, gone; made by a newer version.
        """
        soundness.check_place(path)
        if not soundness.is_there(path, anew=anew):
            _make(path)
        version = soundness.look(path)
        database = cls(path, _engine(path))
        try:
            # A copy made by `backup` has another mode. On the driver's own connection: the mode cannot be changed
            # inside a transaction, and SQLAlchemy's connections always are in one. It stays with the file.
            with database._mapped_driver(), closing(database._engine.raw_connection()) as raw:
                raw.cursor().execute("PRAGMA journal_mode=WAL")
            if version < schema.VERSION:
                database._upgrade()
        except BaseException:
            database.close()
            raise
        return database

    def _upgrade(self) -> None:
        with self.transaction() as connection:
            # Another process may have done it since we looked.
            version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
            upgrade(connection, version)
            connection.exec_driver_sql(f"PRAGMA user_version={schema.VERSION}")

    def backup(self, file: Path) -> None:
        """Write a copy of the database as it is at one instant to `file`, durably, while others go on writing
        (https://www.sqlite.org/backup.html). The file appears whole or not at all.

        Raises:
            UsageError: `file` is there already, or cannot be made.
            DatabaseError: the database cannot be read.
        """
        if file.exists() or file.is_symlink():
            raise UsageError(f"{file} is there already: name another file, an older copy is never overwritten")
        try:
            with _part_of(file) as part:
                with self._mapped_driver(), closing(self._engine.raw_connection()) as raw:
                    source = raw.driver_connection
                    assert isinstance(source, sqlite3.Connection)
                    _copy(source, part)
                _appear(part, file)
        except OSError as error:
            raise UsageError(f"{file} cannot be written: {error.strerror}; name a file where there is room") from error

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
            cause = error.orig or error
            kind = DatabaseFull if says_full(self.path, cause) else DatabaseError
            raise kind(sentence_of(self.path, cause)) from error

    @contextmanager
    def _mapped_driver(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DatabaseError(sentence_of(self.path, error)) from error

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._engine.dispose()


def _make(path: Path) -> None:
    """An empty registry, complete from the first moment that it is there: one that is cut short can be told from it."""
    try:
        with _part_of(path) as part:
            database = Database(path, _engine(part))
            try:
                with database.transaction() as connection:
                    make_tables(connection)
                    connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
                    connection.exec_driver_sql(f"PRAGMA user_version={schema.VERSION}")
            finally:
                database.close()
            with contextlib.suppress(FileExistsError):  # another process was faster, and made the same
                _appear(part, path)
    except OSError as error:
        raise DatabaseError(
            f"the registry {path} cannot be made: {error.strerror}; make room for it, and its folder writable"
        ) from error


@contextmanager
def _part_of(file: Path) -> Iterator[Path]:
    """A file beside `file` that is not its final self yet; gone at the end."""
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        for end in ("", "-wal", "-shm", "-journal"):
            Path(f"{name}{end}").unlink(missing_ok=True)


def _appear(part: Path, file: Path) -> None:
    """Give the file its name, durably, and never in another one's place."""
    for place in (part, part.parent):
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
            if place == part:
                _name(part, file)
        finally:
            os.close(descriptor)


def _name(part: Path, file: Path) -> None:
    try:
        os.link(part, file)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        part.rename(file)  # a file system without hard links


def _copy(source: sqlite3.Connection, file: Path) -> None:
    with closing(sqlite3.connect(file)) as target:
        try:
            source.backup(target)
            target.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise


def _engine(path: Path) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=QueuePool,
        pool_size=1,
        max_overflow=0,
        connect_args={"check_same_thread": False, "timeout": soundness.BUSY_TIMEOUT_S},
    )

    @event.listens_for(engine, "connect")
    def _set_up(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, see below
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA recursive_triggers=ON")  # so that REPLACE cannot remove an entry either

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get("failback_reads", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine
