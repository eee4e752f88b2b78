"""Opening the registry: what it refuses, with which sentence, and that it never touches what it refuses."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from coordinator import schema
from coordinator import soundness as module
from coordinator.database import Database
from coordinator.errors import DatabaseError
from coordinator.soundness import file_system_type

MOUNTINFO = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:40 / /srv/my\\040share rw shared:2 - nfs4 server:/export rw,vers=4.2
41 22 0:41 / /var rw - xfs /dev/vdb rw
42 41 0:42 / /var/lib rw - cifs //server/share rw
43 41 0:43 / /var/lib rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/etc", "ext4"),
        ("/srv/my share/failback", "nfs4"),
        ("/srv/my shared", "ext4"),
        ("/var/log", "xfs"),
        ("/var/lib/failback", "tmpfs"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_and_topmost_mount(path: str, kind: str) -> None:
    assert file_system_type(Path(path), MOUNTINFO) == kind


def test_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"40 22 0:40 / {tmp_path} rw - nfs4 server:/export rw\n")
    monkeypatch.setattr(module, "MOUNTS", mounts)
    with pytest.raises(DatabaseError, match=r"nfs4, a network file system .* set state_dir"):
        Database.open(tmp_path / "state" / "registry.sqlite")
    assert not (tmp_path / "state" / "registry.sqlite").exists()


def test_a_database_is_made_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "registry.sqlite"
    first = Database.open(path)
    with first.transaction() as connection:
        connection.execute(
            insert(schema.hosts).values(name="prod", fingerprint="f", software="s", bulk_port=1, seen_s=0)
        )
    first.close()
    second = Database.open(path)
    with second.reading() as connection:
        assert connection.execute(select(schema.hosts.c.name)).scalars().all() == ["prod"]
        settings = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
    second.close()
    assert settings == ["wal", 2]


def test_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    database = Database.open(tmp_path / "registry.sqlite")
    values = {"name": "prod", "fingerprint": "f", "software": "s", "bulk_port": 1, "seen_s": 0.0}

    def interrupted() -> None:
        with database.transaction() as connection:
            connection.execute(insert(schema.hosts).values(**values))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    with database.reading() as connection:
        assert connection.execute(select(schema.hosts)).all() == []
    database.close()


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    Database.open(path).close()
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA user_version=999")
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match="made by a newer failback"):
        Database.open(path)
    assert path.read_bytes() == before


def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE recipes (name)")
        raw.commit()
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match="of some other program"):
        Database.open(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    path.write_bytes(b"not a database at all, but long enough to have a header " * 40)
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match="is not a database"):
        Database.open(path)
    assert path.read_bytes() == before


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    Database.open(path).close()
    content = bytearray(path.read_bytes())
    for page in range(4096, len(content), 4096):
        content[page : page + 200] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(DatabaseError, match="is damaged"):
        Database.open(path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatabaseError, match="cannot be used"):
        Database.open(tmp_path / "file" / "registry.sqlite")


def test_a_registry_held_by_another_writer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "registry.sqlite"
    Database.open(path).close()
    monkeypatch.setattr(module, "BUSY_TIMEOUT_S", 0.05)
    database = Database.open(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match="held by another process"), database.transaction():
            pass
        with database.reading() as connection:
            assert connection.execute(select(schema.pairs)).all() == [], "a reader must not wait for a writer"
        raw.execute("ROLLBACK")
    database.close()
