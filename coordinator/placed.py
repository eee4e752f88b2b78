"""Agents as one registry reaches them: every order says which registry it comes from (I6)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from coordinator.agents import Agent, AgentDirectory, ProgressCallback
from protocol.messages import OrderRequest, Reply, Request


@dataclass(frozen=True, slots=True)
class PlacedAgents:
    """An `AgentDirectory` whose agents are told `place` with every order: see `coordinator.pair_holder.place_of`."""

    agents: AgentDirectory
    place: str

    def agent(self, host: str) -> Agent:
        """See `AgentDirectory.agent`."""
        return _PlacedAgent(self.agents.agent(host), self.place)

    def bulk_endpoint(self, host: str) -> tuple[str, int | None]:
        """See `AgentDirectory.bulk_endpoint`."""
        return self.agents.bulk_endpoint(host)


@dataclass(frozen=True, slots=True)
class _PlacedAgent:
    """One of them."""

    placeless: Agent
    place: str

    @property
    def host(self) -> str:
        """The host's name."""
        return self.placeless.host

    async def ask(
        self, request: Request, *, timeout_s: float | None, on_progress: ProgressCallback | None = None
    ) -> Reply:
        """See `Agent.ask`."""
        if isinstance(request, OrderRequest):
            request = replace(request, order=replace(request.order, place=self.place))
        return await self.placeless.ask(request, timeout_s=timeout_s, on_progress=on_progress)
