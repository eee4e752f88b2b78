"""Several pairs over in-memory agents: a world for each pair, all of them the directory of one coordinator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coordinator.agents import Agent
from tests.fakes.agent import World
from tests.unit.cli_house import Command


class Worlds:
    """The agents of every pair: each world has hosts of its own, named after its pair."""

    def __init__(self, names: Sequence[str]) -> None:
        self.by_pair = {name: World() for name in names}
        for name, world in self.by_pair.items():
            for vm, host in ((world.original, f"prod-{name}"), (world.replica, f"dr-{name}")):
                vm.host, vm.uuid = host, f"{vm.uuid}-{name}"

    def __getitem__(self, pair: str) -> World:
        return self.by_pair[pair]

    def _of(self, host: str) -> World:
        return self.by_pair[host.partition("-")[2]]

    def agent(self, host: str) -> Agent:
        """See `coordinator.agents.AgentDirectory`."""
        return self._of(host).agent(host)

    def bulk_endpoint(self, host: str) -> tuple[str, int | None]:
        """See `coordinator.agents.AgentDirectory`."""
        return self._of(host).bulk_endpoint(host)


class Fleet(Command):
    """``failback`` over several pairs, registered and in Failover, with a plan file to write."""

    def __init__(self, folder: Path, *names: str) -> None:
        super().__init__(folder)
        self.worlds = Worlds(names)
        self.file = folder / "site.toml"
        self.directory = self.worlds
        for name in names:
            words = ("register", name, "--original", f"prod-{name}/web", "--replica", f"dr-{name}/web")
            done = self(*words, "--in-failover")
            assert done.exit_code == 0, done.output

    def plan(self, text: str) -> str:
        """Write the plan; its name."""
        self.file.write_text(text)
        return str(self.file)

    def states(self) -> dict[str, str]:
        """Of every pair."""
        return {pair["name"]: pair["state"] for pair in self.json("pairs")["pairs"]}
