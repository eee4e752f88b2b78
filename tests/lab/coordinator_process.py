"""The `failback` command as processes: its configuration, its verbs run to their end, in the background, or killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.agent_process import AgentProcess, Identity
from tests.lab.private_host import PrivateNetwork

PROGRAM = Path(sys.executable).with_name("failback")
VERB_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Done:
    """How a verb ended."""

    code: int
    output: str
    errors: str

    def json(self) -> Any:
        """The output of a verb that ran with ``--json``."""
        return json.loads(self.output)


class CoordinatorProcess:
    """A coordinator with a database of its own, on this machine or in a private network.

    Args:
        folder: made for its configuration, database and hooks.
        identity: its certificate.
        agents: the hosts it knows, each by its listening address and ports.
        network: runs in this namespace; in the machine's when None.
        program: what to run instead of the installed command.
        bulk_endpoints: address and port by which other agents reach a host's bulk port, by its name, where those
            are not the agent's own (behind a proxy, say).
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        agents: Sequence[AgentProcess],
        *,
        network: PrivateNetwork | None = None,
        program: Sequence[str] = (str(PROGRAM),),
        environment: Mapping[str, str] | None = None,
        bulk_endpoints: Mapping[str, tuple[str, int]] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "coordinator.toml"
        self.hooks = folder / "hooks.d"
        self._network = network
        self._program = list(program)
        self._environment = {**os.environ, **(environment or {}), "FAILBACK_CONFIG": str(self.config)}
        lines = [
            f"state_dir = {json.dumps(str(folder / 'state'))}",
            f"hooks_dir = {json.dumps(str(self.hooks))}",
            "[pki]",
            *(f"{key} = {json.dumps(str(getattr(identity, key)))}" for key in ("ca", "certificate", "key")),
        ]
        for agent in agents:
            bulk_address, bulk_port = (bulk_endpoints or {}).get(agent.name, (agent.listen, agent.bulk_port))
            lines += [
                f"[hosts.{agent.name}]",
                f"address = {json.dumps(agent.listen)}",
                f"port = {agent.control_port}",
                f"bulk_address = {json.dumps(bulk_address)}",
                f"bulk_port = {bulk_port}",
            ]
        self.config.write_text("".join(f"{line}\n" for line in lines))

    def argv(self, *arguments: str) -> list[str]:
        """What to start for ``failback ARGUMENTS``, with `environment`."""
        return self.wrapped([*self._program, *arguments])

    def wrapped(self, argv: Sequence[str]) -> list[str]:
        """`argv` as it must be started to run where the coordinator runs."""
        return list(argv) if self._network is None else self._network.argv(argv)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that `argv` must be started with."""
        return dict(self._environment)

    def run(self, *arguments: str, timeout_s: float = VERB_TIMEOUT_S, stdin: str = "") -> Done:
        """Run a verb to its end; its exit code is the caller's to judge."""
        done = subprocess.run(
            self.argv(*arguments),
            env=self._environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def must(self, *arguments: str, timeout_s: float = VERB_TIMEOUT_S) -> Done:
        """Run a verb that has to end with exit code 0."""
        done = self.run(*arguments, timeout_s=timeout_s)
        if done.code:
            words = " ".join(arguments)
            raise AssertionError(f"`failback {words}` ended with {done.code}:\n{done.output}\n{done.errors}")
        return done

    def spawn(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a verb in the background, output to `log`. Signals reach the command itself, also in a network."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.argv(*arguments), env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
