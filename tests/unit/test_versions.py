"""Registries and runs of other versions: taken on, or refused with what to do, and never damaged."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from coordinator import journal, schema
from coordinator.entries import JOURNAL_FORMAT
from coordinator.errors import AgentRefused, NewerRun, UsageError
from coordinator.events import Event, StepDone
from coordinator.model import OnFailure, RunOptions, State
from coordinator.runs import Coordinator
from coordinator.version import SOFTWARE
from tests.unit.cli_house import Command
from tests.unit.coordinator_house import PAIR, Crash, CrashPlan, House

STORED = Path(__file__).parent / "stored" / "registry-1.sql"
"""A registry as version 1 of the tables left it when its process was killed in the switchover, the replica off and
fenced: ``sqlite3 .dump`` of the file that the software of that time wrote."""


def put_back(stored: Path, path: Path) -> None:
    for end in ("", "-wal", "-shm"):
        path.with_name(f"{path.name}{end}").unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript(stored.read_text())


async def killed_in_the_switchover(folder: Path) -> House:
    house = House(folder)
    await house.register()
    async with house.process() as coordinator:
        await coordinator.start_run(PAIR, RunOptions())

    def observe(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == "fence_replica":
            raise Crash(event.step)

    async def work(coordinator: Coordinator) -> object:
        return await coordinator.execute_run(PAIR, observer=observe)

    assert await house.dies(CrashPlan(), work)
    return house


@pytest.mark.parametrize("verb", ["resume", "undo"])
async def test_a_run_begun_by_the_version_before_is_resumed_to_its_end(memory_folder: Path, verb: str) -> None:
    house = await killed_in_the_switchover(memory_folder / "state")
    put_back(STORED, house.config.database)
    (old,) = house.read(lambda connection: journal.list_runs(connection, PAIR))
    assert (old.software, old.format, old.options.on_failure) == ("", 1, OnFailure.ROLLBACK)
    async with house.process() as coordinator:
        assert (await coordinator.resume(PAIR)).state is State.FAILBACK
        if verb == "undo":
            assert (await coordinator.undo(PAIR)).state is State.FAILOVER
        entries = await coordinator.history(PAIR)
    assert next(e.sentence for e in entries if e.step == "taken_over").startswith(f"{SOFTWARE} works on the run")
    with closing(sqlite3.connect(house.config.database)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)
        with pytest.raises(sqlite3.IntegrityError, match="only ever added to"):
            raw.execute("DELETE FROM journal")


async def test_a_new_run_names_the_version_that_began_it(memory_folder: Path) -> None:
    house = await killed_in_the_switchover(memory_folder / "state")
    (run,) = house.read(lambda connection: journal.list_runs(connection, PAIR))
    assert (run.software, run.format) == (SOFTWARE, JOURNAL_FORMAT)


@pytest.mark.parametrize("verb", ["resume", "execute_run"])
async def test_a_run_of_a_newer_journal_is_refused_and_left_alone(
    memory_folder: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    with monkeypatch.context() as newer:
        newer.setattr("coordinator.journal.JOURNAL_FORMAT", 9)
        newer.setattr("coordinator.takeover.JOURNAL_FORMAT", 9)
        newer.setattr("coordinator.takeover.SOFTWARE", "failback 9.9")
        house = await killed_in_the_switchover(memory_folder / "state")
        with closing(sqlite3.connect(house.config.database, isolation_level=None)) as raw:
            raw.execute("UPDATE runs SET format = 9, options = json_set(options, '$.power_on', 'perhaps')")
    before = house.read(lambda connection: journal.entries(connection, PAIR))
    async with house.process() as coordinator:
        with pytest.raises(NewerRun, match=r"begun by failback 9\.9 \(journal format 9, .* go on with that version"):
            await getattr(coordinator, verb)(PAIR)
        assert (await coordinator.pair_status(PAIR)).state is State.SWITCHING
    assert house.read(lambda connection: journal.entries(connection, PAIR)) == before


def test_the_command_refuses_a_newer_run_with_exit_code_3(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command.register()
    command.begin()
    with closing(sqlite3.connect(command.config.database, isolation_level=None)) as raw:
        raw.execute("UPDATE runs SET format = 9, software = 'failback 9.9'")
    verbs = (("resume", "--foreground"), ("cancel",), ("switch",), ("limit", "--network", "1MB"))
    for words in ((*verb, PAIR) for verb in verbs):
        told = command.json(*words, exit_code=3)["error"]
        assert told["code"] == "newer-run", words
        assert "go on with that version or a newer one; nothing was changed" in told["sentence"]


def test_entries_cannot_be_changed_or_removed(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command.register()
    statements = (
        "UPDATE journal SET sentence = 'nothing happened'",
        "DELETE FROM journal WHERE seq = 1",
        "PRAGMA recursive_triggers=ON; REPLACE INTO journal SELECT * FROM journal WHERE seq = 1",
    )
    with closing(sqlite3.connect(command.config.database, isolation_level=None)) as raw:
        before = raw.execute("SELECT * FROM journal").fetchall()
        for statement in statements:
            with pytest.raises(sqlite3.IntegrityError, match="the journal is only ever added to"):
                raw.executescript(statement)
        assert raw.execute("SELECT * FROM journal").fetchall() == before


class TestBackup:
    def test_a_copy_made_while_a_run_goes_on_is_whole_and_can_be_put_back(self, tmp_path: Path) -> None:
        command = Command(tmp_path)
        command.register()
        command.begin()
        copy = tmp_path / "copy.sqlite"
        told = command.json("backup", str(copy))
        assert (told["pairs"], told["size_bytes"]) == (1, copy.stat().st_size)
        assert copy.stat().st_mode & 0o777 == 0o600
        history = command.json("history", PAIR)["entries"]
        assert command("cancel", PAIR).exit_code == 0
        for end in ("", "-wal", "-shm"):
            command.config.database.with_name(f"{command.config.database.name}{end}").unlink(missing_ok=True)
        copy.rename(command.config.database)
        assert command.json("history", PAIR)["entries"] == history
        assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]

    def test_an_older_copy_is_not_overwritten(self, tmp_path: Path) -> None:
        command = Command(tmp_path)
        command.register()
        copy = tmp_path / "copy.sqlite"
        copy.write_text("precious")
        told = command.json("backup", str(copy), exit_code=2)["error"]
        assert "is there already" in told["sentence"]
        assert copy.read_text() == "precious"

    def test_a_folder_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        command = Command(tmp_path)
        command.register()
        told = command.json("backup", str(tmp_path / "none" / "copy.sqlite"), exit_code=2)["error"]
        assert "No such file or directory" in told["sentence"]

    async def test_a_copy_put_back_has_an_epoch_that_agents_have_left_behind(self, memory_folder: Path) -> None:
        house = await killed_in_the_switchover(memory_folder / "state")
        copy = memory_folder / "copy.sqlite"
        async with house.process() as coordinator:
            await coordinator.backup(copy)
            assert (await coordinator.resume(PAIR)).state is State.FAILBACK
            assert (await coordinator.undo(PAIR)).state is State.FAILOVER
            with pytest.raises(UsageError):
                await coordinator.backup(copy)
        house.config.database.unlink()
        copy.rename(house.config.database)
        async with house.process() as coordinator:
            with pytest.raises(AgentRefused, match="this registry is behind"):
                await coordinator.resume(PAIR)
        assert not house.world.replica.is_off
