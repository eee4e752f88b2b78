"""Making the tables, and bringing those of an earlier version up to this one: the other part of what is SQLite's own.

A version's changes are one transaction of `coordinator.database`: after a crash the file is of the old version or the
new. What was written before is never changed: new columns have defaults, new tables are empty.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, text, update

from coordinator import schema

FORGOTTEN = "Forgotten"
"""What the state of a pair says in the one transaction that takes it out of the registry, with its journal."""
TRIGGERS = tuple(
    f"CREATE TRIGGER IF NOT EXISTS journal_without_{change} BEFORE {change} ON journal {unless} "
    "BEGIN SELECT RAISE(ABORT, 'the journal is only ever added to'); END"
    for change, unless in (
        ("UPDATE", ""),
        ("DELETE", f"WHEN (SELECT state FROM pairs WHERE name = OLD.pair) IS NOT '{FORGOTTEN}'"),
    )
)
"""Entries cannot be changed or removed, by whatever program has the file open, but with their pair
(https://www.sqlite.org/lang_createtrigger.html). With ``recursive_triggers`` that holds for REPLACE as well."""

UPGRADES = {
    1: (
        "ALTER TABLE runs ADD COLUMN software TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE runs ADD COLUMN format INTEGER NOT NULL DEFAULT 1",
    ),
    2: ("ALTER TABLE pairs ADD COLUMN former TEXT",),
}
"""What leads from that version to the next, before tables that are new are made."""
MADE_IN = {"duties": 2, "exclusions": 3}
"""Tables that were not there from the beginning, and the version that brought them."""


def make_tables(connection: Connection) -> None:
    """Everything, in an empty database."""
    schema.metadata.create_all(connection)
    for trigger in TRIGGERS:
        connection.execute(text(trigger))


def delete_pair(connection: Connection, name: str) -> None:
    """Take the pair out, with its journal and everything else that speaks of it."""
    pairs = schema.pairs
    connection.execute(update(pairs).where(pairs.c.name == name).values(state=FORGOTTEN))
    for table in (schema.progress, schema.requests, schema.duties, schema.journal, schema.runs):
        connection.execute(delete(table).where(table.c.pair == name))
    connection.execute(delete(pairs).where(pairs.c.name == name))


def upgrade(connection: Connection, version: int) -> None:
    """Bring the tables of that version up to the present one."""
    for step in range(version, schema.VERSION):
        for statement in UPGRADES[step]:
            connection.execute(text(statement))
    make_tables(connection)


def missing_tables(connection: Connection, version: int) -> list[str]:
    """Tables that a database of that version must have and this one has not."""
    found = {str(name) for (name,) in connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'table'"))}
    new = {table for table, since in MADE_IN.items() if version < since}
    return sorted(set(schema.metadata.tables) - new - found)
