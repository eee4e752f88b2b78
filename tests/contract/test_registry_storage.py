"""The registry on file systems that fill up or turn read-only: real ones, through the whole command."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.reserve import RESERVE_BYTES, reserve_of
from protocol.messages import Power, PowerOff, Protect, Request, RunPass
from tests.unit.cli_house import PAIR, Command

pytestmark = [pytest.mark.root]
SIZE = "size=8m"


class SmallDisk:
    """A file system of 8 MiB for the registry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def mount(self, *options: str) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join((SIZE, *options)), "failback-test", self.folder], check=True
        )

    def remount(self, mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", self.folder], check=True)

    def fill(self, *, but_bytes: int = 0) -> None:
        with self._filler.open("ab", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                filler.truncate(filler.tell() - but_bytes)

    def free(self) -> None:
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "state")
    made.folder.mkdir()
    made.mount()
    yield made
    subprocess.run(["umount", made.folder], check=True)


def test_a_disk_that_fills_in_the_middle_of_a_run_stops_it_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, disk: SmallDisk
) -> None:
    command = Command(tmp_path)
    command.register()

    def fills(_host: str, request: Request, moment: str) -> None:
        if isinstance(request, RunPass) and moment == "before":
            disk.fill()

    command.world.fault = fills
    told = command.json("start", PAIR, "--yes", "--foreground", exit_code=1)["error"]
    assert told["code"] == "database"
    assert "no room on its file system; free some and repeat" in told["sentence"]
    assert "`failback resume web` goes on" in told["sentence"]
    command.world.fault = lambda *_: None
    again = command.json("resume", PAIR, "--foreground", exit_code=1)["error"]
    assert "no room" in again["sentence"], again
    disk.free()
    assert command.json("resume", PAIR, "--foreground")["state"] == "Failback"
    assert command("commit", PAIR, "--restore-point", "drop", "--yes").exit_code == 0


@pytest.mark.parametrize("kind", [PowerOff, Protect])
def test_a_disk_that_fills_in_the_switchover_leaves_nobody_unserved(
    tmp_path: Path, disk: SmallDisk, kind: type[Request]
) -> None:
    command = Command(tmp_path)
    command.register()
    kept: list[bool] = []

    def fills(_host: str, request: Request, moment: str) -> None:
        if isinstance(request, kind) and moment == "after" and reserve_of(command.config.database).exists():
            kept.append(True)
            disk.fill()

    command.world.fault = fills
    assert command.json("start", PAIR, "--yes", "--foreground")["state"] == "Failback"
    assert kept
    assert not reserve_of(command.config.database).exists()


def test_a_switchover_whose_journal_has_no_room_is_not_begun(tmp_path: Path, disk: SmallDisk) -> None:
    command = Command(tmp_path)
    command.register()
    disk.fill(but_bytes=RESERVE_BYTES // 2)
    told = command.json("start", PAIR, "--yes", "--foreground", exit_code=1)["error"]
    assert told["code"] == "database"
    assert "the switchover is not begun" in told["sentence"]
    assert command.world.replica.power is Power.RUNNING
    assert not reserve_of(command.config.database).exists()
    disk.free()
    assert command.json("resume", PAIR, "--foreground")["state"] == "Failback"


def test_a_disk_without_any_room_takes_no_registry_and_keeps_no_half_of_one(tmp_path: Path, disk: SmallDisk) -> None:
    command = Command(tmp_path)
    disk.fill()
    told = command.json("pairs", exit_code=1)["error"]
    assert told["code"] == "database"
    assert "room" in told["sentence"], told
    assert [path.name for path in disk.folder.iterdir()] == ["filler"]
    disk.free()
    command.register()


def test_a_file_system_that_turned_read_only_is_named(tmp_path: Path, disk: SmallDisk) -> None:
    command = Command(tmp_path)
    command.register()
    before = command.config.database.read_bytes()
    disk.remount("ro")
    try:
        for words in (("status", PAIR), ("history", PAIR), ("start", PAIR, "--yes", "--foreground")):
            told = command.json(*words, exit_code=1)["error"]
            assert "mounted read-only" in told["sentence"], words
            assert "mount it writable, then repeat" in told["sentence"]
        assert command.config.database.read_bytes() == before
    finally:
        disk.remount("rw")
    assert command("status", PAIR).exit_code == 0


def test_a_backup_that_does_not_fit_leaves_nothing(tmp_path: Path, disk: SmallDisk) -> None:
    command = Command(tmp_path / "elsewhere")
    command.register()
    disk.fill()
    told = command.json("backup", str(disk.folder / "copy.sqlite"), exit_code=2)["error"]
    assert "No space left on device" in told["sentence"]
    assert [path.name for path in disk.folder.iterdir()] == ["filler"]
