"""The registry on file systems that fill up or turn read-only: real ones, through the whole command."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.messages import Protect, Request, RunPass
from tests.unit.cli_house import PAIR, Command

pytestmark = [pytest.mark.root]
SIZE = "size=2m"


class SmallDisk:
    """A file system of 2 MiB for the registry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def mount(self, *options: str) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join((SIZE, *options)), "failback-test", self.folder], check=True
        )

    def remount(self, mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", self.folder], check=True)

    def fill(self) -> None:
        with self._filler.open("ab", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                return

    def free(self) -> None:
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "state")
    made.folder.mkdir()
    made.mount()
    yield made
    subprocess.run(["umount", made.folder], check=True)


@pytest.mark.parametrize("kind", [RunPass, Protect])
def test_a_disk_that_fills_in_the_middle_of_a_run_stops_it_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, disk: SmallDisk, kind: type[Request]
) -> None:
    command = Command(tmp_path)
    command.register()

    def fills(_host: str, request: Request, moment: str) -> None:
        if isinstance(request, kind) and moment == "before":
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
