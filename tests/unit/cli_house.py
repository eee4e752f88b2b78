"""The command over in-memory agents: each call is one process of the real command line, database and all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
from click.testing import CliRunner, Result

from coordinator.agents import AgentDirectory
from coordinator.cli.main import cli
from coordinator.cli.service import Systemd
from coordinator.cli.session import Session
from coordinator.config import Config
from coordinator.model import RunOptions
from coordinator.runs import Coordinator
from tests.fakes.agent import World

PAIR = "web"


class Command:
    """``failback`` in a folder of its own."""

    def __init__(self, folder: Path, world: World | None = None, systemd: Systemd | None = None) -> None:
        self.world = world or World()
        self.directory: AgentDirectory = self.world
        self.systemd = systemd or Systemd(runtime_dir=folder / "no-systemd")
        self.config = Config(state_dir=folder / "state", hooks_dir=folder / "hooks.d")
        self.poll_s = 0.01
        self.grace_s = 5.0

    def coordinator(self, _config: Config | None = None, actor: str = "root@test") -> Coordinator:
        """A coordinator over the world's agents."""
        return Coordinator(self.config, actor=actor, agents=self.directory)

    def session(self) -> Session:
        """What the group would make itself."""
        return Session(
            opener=self.coordinator, systemd=self.systemd, poll_s=self.poll_s, grace_s=self.grace_s, load=self.load
        )

    def load(self, _file: Path | None) -> Config:
        """The configuration of this folder, whatever was named."""
        return self.config

    def __call__(self, *words: str, stdin: str | None = None) -> Result:
        """Run it to its end."""
        result = CliRunner().invoke(cli, list(words), obj=self.session(), input=stdin, prog_name="failback")
        assert "Traceback" not in result.output, result.output
        return result

    def begin(self) -> None:
        """What `start` does before it hands over: the run is in the journal, nobody works on it."""

        async def begin(coordinator: Coordinator) -> None:
            await coordinator.start_run(PAIR, RunOptions())

        self.session().run(begin)

    def json(self, *words: str, exit_code: int = 0) -> dict[str, Any]:
        """Run it with ``--json``: exactly one object on standard output, nothing on the other stream."""
        result = self("--json", *words)
        assert result.exit_code == exit_code, result.output
        assert result.stderr == ""
        lines = result.stdout.splitlines()
        assert len(lines) == 1, result.stdout
        value = json.loads(lines[0])
        assert isinstance(value, dict)
        return value

    def register(self, *, in_failover: bool = True) -> None:
        """Take the world's pair in."""
        words = ["register", PAIR, "--original", "prod/web", "--replica", "dr/web"]
        assert self(*words, *(["--in-failover"] if in_failover else [])).exit_code == 0

    def fail_back(self) -> None:
        """A whole run, to Failback."""
        done = self("start", PAIR, "--yes", "--foreground")
        assert done.exit_code == 0, done.output


class UnitInThread(Systemd):
    """A service manager whose unit is a thread of this process."""

    def __init__(self, work: Callable[[str], object]) -> None:
        super().__init__()
        self._work = work
        self.started: list[threading.Thread] = []

    def why_unusable(self) -> str | None:
        """It can be used."""
        return None

    def start(self, pair: str) -> None:
        """Begin the work beside the caller."""
        thread = threading.Thread(target=self._work, args=(pair,))
        self.started.append(thread)
        thread.start()

    def join(self) -> None:
        """Wait for every unit."""
        for thread in self.started:
            thread.join(30)
            assert not thread.is_alive()


def resume_here(command: Command, pair: str) -> None:
    """What the unit does."""

    async def work() -> None:
        async with command.coordinator() as coordinator:
            await coordinator.resume(pair)

    trio.run(work)
