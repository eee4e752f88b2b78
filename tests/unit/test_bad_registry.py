"""Registries that must not be used, through the whole command: refused with what to do, left to the last byte."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import pytest
from sqlalchemy import Connection

from coordinator import journal, registry, soundness
from coordinator.database import Database
from coordinator.entries import JournalEntry
from coordinator.errors import DatabaseError
from coordinator.model import OnFailure, RestorePoint, RunOptions, State
from coordinator.runs import Coordinator
from coordinator.states import TABLE
from coordinator.store import Store, Work
from tests.fakes.agent import World
from tests.unit.cli_house import Command
from tests.unit.coordinator_house import PAIR, CrashingStore, CrashPlan, House

T = TypeVar("T")
PROGRAM = Path(sys.executable).with_name("failback")


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """A registry with a pair that has been failed back."""
    made = Command(tmp_path)
    made.register()
    made.fail_back()
    return made


def picture(folder: Path) -> dict[str, bytes]:
    """Every file but what SQLite's readers leave of their own: an index, and a log with nothing in it."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
    return {str(path): path.read_bytes() for path in files if path.stat().st_size or not path.name.endswith("-wal")}


def refused(command: Command, *why: str, words: tuple[str, ...] = ("status", PAIR)) -> str:
    """The command refuses in one sentence, as a process of its own as well, and nothing has changed afterwards."""
    folder = command.config.state_dir
    before = picture(folder)
    error = command.json(*words, exit_code=1)["error"]
    assert error["code"] == "database"
    sentence = str(error["sentence"])
    for part in why:
        assert part in sentence, sentence
    done = subprocess.run(
        [PROGRAM, "--state-dir", folder, *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"failback: {sentence}\n"
    assert picture(folder) == before
    return sentence


class TestTheFile:
    def test_one_that_is_gone_is_not_made_anew_beside_what_it_left(self, command: Command) -> None:
        command.config.database.unlink()
        sentence = refused(command, "is gone, but run/web.lock beside it shows that there was one")
        assert "`failback backup`" in sentence
        assert not command.config.database.exists()

    def test_a_log_without_its_database_is_not_made_anew_either(self, tmp_path: Path) -> None:
        command = Command(tmp_path)
        command.config.state_dir.mkdir()
        Path(f"{command.config.database}-wal").write_bytes(b"the latest transactions")
        refused(command, "is gone, but registry.sqlite-wal beside it")

    def test_one_that_was_emptied_is_not_made_anew(self, command: Command) -> None:
        command.config.database.write_bytes(b"")
        refused(command, "has 0 bytes, cut short")

    def test_a_link_to_nothing_is_not_filled(self, tmp_path: Path) -> None:
        command = Command(tmp_path)
        command.config.state_dir.mkdir()
        command.config.database.symlink_to(tmp_path / "not mounted" / "registry.sqlite")
        refused(command, "is a link to", "mount its disk")

    def test_one_that_was_cut_short_anywhere_is_refused(self, command: Command) -> None:
        whole = command.config.database.read_bytes()
        assert len(whole) > 8 * 4096
        for size in (1, 15, 100, 4096, 4097, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
            command.config.database.write_bytes(whole[:size])
            result = command("status", PAIR)
            assert result.exit_code == 1, size
            assert "put back a copy" in result.output, (size, result.output)
            assert command.config.database.read_bytes() == whole[:size], size
        command.config.database.write_bytes(whole)
        assert command("status", PAIR).exit_code == 0

    def test_pages_that_hold_something_else_are_refused(self, command: Command) -> None:
        whole = command.config.database.read_bytes()
        for page in range(1, len(whole) // 4096, 3):
            damaged = bytearray(whole)
            damaged[page * 4096 : page * 4096 + 512] = os.urandom(512)
            command.config.database.write_bytes(damaged)
            result = command("history", PAIR)
            assert result.exit_code == 1, page
            assert "damaged" in result.output, (page, result.output)
            assert command.config.database.read_bytes() == damaged, page

    def test_one_without_a_table_is_refused(self, command: Command) -> None:
        with closing(sqlite3.connect(command.config.database)) as raw:
            raw.execute("DROP TABLE requests")
        refused(command, "has no table requests", "put back a copy")

    def test_a_word_that_nobody_knows_is_refused(self, command: Command) -> None:
        with closing(sqlite3.connect(command.config.database, isolation_level=None)) as raw:
            raw.execute("UPDATE pairs SET state = 'Flying'")
        refused(command, "holds the State 'Flying', which is none", "install that version")

    def test_one_of_a_newer_version_is_refused(self, command: Command) -> None:
        with closing(sqlite3.connect(command.config.database)) as raw:
            raw.execute("PRAGMA user_version=999")
        refused(command, "made by a newer failback (schema 999", "install that version; nothing was changed")

    @pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
    def test_one_on_a_network_file_system_is_refused(
        self, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        mounts = tmp_path / "mountinfo"
        mounts.write_text(f"40 22 0:40 / {tmp_path} rw - {kind} server:/export rw\n")
        monkeypatch.setattr(soundness, "MOUNTS", mounts)
        before = picture(command.config.state_dir)
        told = command.json("status", PAIR, exit_code=1)["error"]
        assert f"would lie on {kind}, a network file system" in told["sentence"]
        assert "set state_dir to a folder on a local disk" in told["sentence"]
        assert picture(command.config.state_dir) == before

    def test_looking_at_a_large_one_ends_in_time(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(soundness, "CHECK_WITHIN_S", -1.0)
        monkeypatch.setattr(soundness, "CHECK_EVERY", 1)
        assert command("status", PAIR).exit_code == 0

    def test_a_registry_that_was_never_there_is_made_whole(self, tmp_path: Path) -> None:
        command = Command(tmp_path)
        assert command("pairs").exit_code == 0
        assert sorted(path.name for path in command.config.state_dir.iterdir()) == ["registry.mark", "registry.sqlite"]

    def test_of_two_processes_that_make_it_one_is_as_good_as_the_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "registry.sqlite"
        is_there = soundness.is_there

        def late(wanted: Path, *, anew: bool = False) -> bool:
            found = is_there(wanted, anew=anew)
            if not found:
                monkeypatch.setattr(soundness, "is_there", is_there)
                Database.open(wanted).close()
            return found

        monkeypatch.setattr(soundness, "is_there", late)
        Database.open(path).close()
        assert [found.name for found in tmp_path.iterdir()] == ["registry.sqlite"]


# --- a journal that cannot be written, in the middle of a run ------------------------------------------------------


class FullStore(CrashingStore):
    """From a certain write on there is no room, until the process ends."""

    def __init__(self, database: Database, full_from: int) -> None:
        super().__init__(database, CrashPlan())
        self._left = full_from

    async def write(self, work: Work[T]) -> T:
        """See `Store.write`."""
        self._left -= 1
        if self._left <= 0:

            def full(connection: Connection) -> T:
                pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
                connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
                connection.exec_driver_sql("CREATE TABLE filler (x)")
                connection.exec_driver_sql("INSERT INTO filler VALUES (zeroblob(1000000))")
                return work(connection)

            return await super().write(full)
        return await super().write(work)


def coordinator_of(house: House, make_store: Callable[[Database], Store]) -> Coordinator:
    return Coordinator(
        house.config,
        actor="root@test",
        agents=house.world,
        clock=house.clock,
        tokens=house.tokens,
        make_store=make_store,
    )


@pytest.mark.parametrize("act", ["run", "commit", "undo"])
@pytest.mark.parametrize("policy", list(OnFailure))
async def test_a_run_whose_journal_is_full_at_any_write_stops_in_a_sentence_and_goes_on_when_there_is_room(
    memory_folder: Path, act: str, policy: OnFailure
) -> None:
    start = House(memory_folder / "start")
    await start.register()
    async with start.process() as coordinator:
        await coordinator.start_run(PAIR, RunOptions(on_failure=policy))
        if act != "run":
            await coordinator.execute_run(PAIR)
    stopped = 0
    while (
        sentence := await stops_at(house := start.twin(memory_folder / f"{stopped}"), act, 1 + 2 * stopped)
    ) is not None:
        stopped += 1
        assert "no room on its file system; free some and repeat" in sentence
        assert "`failback resume web` goes on" in sentence or stopped == 1, sentence
        orders = len(house.world.orders)
        house.world.crash_ends_passes()
        assert pair_state(house) is not State.ROLLING_BACK, "taken back without a journal"
        async with house.process() as coordinator:
            if TABLE[pair_state(house)].unfinished:
                await coordinator.resume(PAIR)
            elif act != "run":
                await (coordinator.undo(PAIR) if act == "undo" else coordinator.commit(PAIR, RestorePoint.DROP))
            else:
                await coordinator.execute_run(PAIR)
        assert len(house.world.orders) >= orders
        ends = {"run": State.FAILBACK, "commit": State.READY, "undo": State.FAILOVER}
        assert pair_state(house) is ends[act], stopped
        house.world.check()
    assert stopped >= {"run": 40, "commit": 4, "undo": 8}[act], stopped


async def stops_at(house: House, act: str, write: int) -> str | None:
    """What is said where there is no room from that write on; None: the act did not write so often."""
    try:
        async with coordinator_of(house, lambda database: FullStore(database, write)) as coordinator:
            match act:
                case "run":
                    await coordinator.execute_run(PAIR)
                case "commit":
                    await coordinator.commit(PAIR, RestorePoint.DROP)
                case _:
                    await coordinator.undo(PAIR)
    except DatabaseError as error:
        return error.sentence
    return None


def pair_state(house: House) -> State:
    return house.read(lambda connection: registry.get_pair(connection, PAIR)).state


def test_the_sentence_of_a_run_that_stopped_says_who_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = Command(tmp_path, World())
    command.register()
    append = journal.append

    def full(connection: Connection, entry: JournalEntry) -> JournalEntry:
        if entry.step == "protect_replica":
            raise DatabaseError("the registry cannot be written: no room on its file system; free some and repeat")
        return append(connection, entry)

    monkeypatch.setattr(journal, "append", full)
    told = command("start", PAIR, "--yes", "--foreground")
    assert told.exit_code == 1
    assert "the run of web stopped in Switching, for its journal comes before everything it does" in told.output
    assert "`failback resume web` goes on, and nobody may be served until then" in told.output
    monkeypatch.setattr(journal, "append", append)
    assert command("resume", PAIR, "--foreground").exit_code == 0
    assert command.json("status", PAIR)["state"] == "Failback"
