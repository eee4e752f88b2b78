"""What every verb is given: the global options, where words go, and the way to the coordinator."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import click
import trio

from coordinator.cli.output import Output
from coordinator.cli.service import Systemd
from coordinator.config import ENVIRONMENT, Config, load_config
from coordinator.errors import CoordinatorError, UsageError
from coordinator.runs import Coordinator

T = TypeVar("T")
Loader = Callable[[Path | None], Config]
Opener = Callable[[Config, str], Coordinator]


def open_coordinator(config: Config, actor: str) -> Coordinator:
    """The real one."""
    return Coordinator(config, actor=actor)


@dataclass
class Session:
    """One call of the command. The group's options fill it before a verb runs.

    Attributes:
        config_file, state_dir: what ``--config`` and ``--state-dir`` said; None: the defaults.
        opener: makes the coordinator; another one in tests.
        load: reads the configuration.
        systemd: the service manager of this machine.
        poll_s: how often a watched run is looked at.
        grace_s: how long a watched run may be without a process before that is said (its unit may just be starting).
    """

    config_file: Path | None = None
    state_dir: Path | None = None
    as_json: bool = False
    no_color: bool = False
    opener: Opener = open_coordinator
    load: Loader = load_config
    systemd: Systemd = field(default_factory=Systemd)
    poll_s: float = 0.5
    grace_s: float = 10.0
    _output: Output | None = None

    @property
    def output(self) -> Output:
        """Where words go; made when first used, after the options are known."""
        if self._output is None or self._output.as_json != self.as_json:
            self._output = Output(as_json=self.as_json, no_color=self.no_color, stdout=sys.stdout, stderr=sys.stderr)
        return self._output

    def config(self) -> Config:
        """The configuration, with ``--state-dir`` above it; `UsageError` when it cannot be read."""
        config = self.load(self.config_file)
        return replace(config, state_dir=self.state_dir.absolute()) if self.state_dir is not None else config

    def why_not_systemd(self) -> str | None:
        """Why a run must work in this process rather than in its unit, as a clause; None: the unit can have it."""
        if self.config_file is not None or self.state_dir is not None or os.environ.get(ENVIRONMENT):
            return "the unit reads the default configuration, and another one was named here"
        if os.geteuid() != 0:
            return "only root may start the unit"
        return self.systemd.why_unusable()

    def run(self, work: Callable[[Coordinator], Awaitable[T]], *, rebuilds: bool = False) -> T:
        """Open the coordinator, do the work, close it; an error comes out as itself, never in a group.

        `rebuilds`: the work rebuilds a registry, so that one that is gone is no reason against it.
        """

        async def opened() -> T:
            coordinator = self.opener(config, actor())
            coordinator.rebuilds = rebuilds
            async with coordinator:
                return await work(coordinator)

        config = self.config()
        try:
            return trio.run(opened)
        except BaseExceptionGroup as group:
            raise first_cause(group) from group

    def confirm(self, question: str, *, yes: bool, action: str) -> bool:
        """Ask, unless ``--yes`` was said; `UsageError` where nobody can answer."""
        if yes:
            return True
        if self.as_json or not sys.stdin.isatty():
            raise UsageError(
                f"{action} asks before it acts and there is no terminal to ask on: say --yes if you mean it"
            )
        return click.confirm(question, default=False)

    def known_pairs(self) -> tuple[str, ...]:
        """Names of the pairs for shell completion; none where the registry cannot be read."""

        async def names(coordinator: Coordinator) -> tuple[str, ...]:
            return tuple(pair.name for pair in await coordinator.list_pairs())

        try:
            return self.run(names) if self.config().database.exists() else ()
        except (CoordinatorError, OSError):
            return ()


def actor() -> str:
    """Who asks, for the journal: the person behind sudo where there is one."""
    try:
        user = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def first_cause(group: BaseExceptionGroup) -> BaseException:
    """The error a group is about: one raised on purpose before any other."""
    leaves = list(_leaves(group))
    return next((leaf for leaf in leaves if isinstance(leaf, CoordinatorError)), leaves[0])


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
