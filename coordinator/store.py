"""The database from trio: one writer at a time in one worker thread, calls never abandoned, no transaction across an
await."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio
from sqlalchemy import Connection

from coordinator import reserve
from coordinator.database import Database
from coordinator.errors import DatabaseFull

T = TypeVar("T")
Work = Callable[[Connection], T]


class Store:
    """Runs plain functions of a connection, each in a transaction of its own.

    Args:
        database: open; closed by whoever opened it.
        inline: run in the calling thread (simulation).
    """

    def __init__(self, database: Database, *, inline: bool = False) -> None:
        self._database = database
        self._inline = inline
        self._one = trio.CapacityLimiter(1)

    async def write(self, work: Work[T]) -> T:
        """Run `work` in a write transaction; durable when this returns.

        A cancelled caller waits for the end: a write whose outcome nobody learns would be worse than a late one. Where
        the disk is full, the room that a switchover keeps (`keep_room`) is given up, and `work` run once more.
        """

        def once() -> T:
            with self._database.transaction() as connection:
                return work(connection)

        def call() -> T:
            try:
                return once()
            except DatabaseFull:
                if not reserve.give_up(self._database.path):
                    raise
                return once()

        return await self._call(call)

    async def keep_room(self) -> None:
        """Keep room for the journal of a switchover.

        Raises:
            DatabaseError: there is none.
        """
        await self._call(lambda: reserve.take(self._database.path))

    async def read(self, work: Work[T]) -> T:
        """Run `work` on one consistent state."""

        def call() -> T:
            with self._database.reading() as connection:
                return work(connection)

        return await self._call(call)

    async def backup(self, file: Path) -> None:
        """Copy the database to that file; see `Database.backup`."""
        await self._call(lambda: self._database.backup(file))

    async def _call(self, call: Callable[[], T]) -> T:
        if self._inline:
            await trio.lowlevel.checkpoint()
            return call()
        return await trio.to_thread.run_sync(call, abandon_on_cancel=False, limiter=self._one)
