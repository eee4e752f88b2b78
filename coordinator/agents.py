"""The way to the agents: the seam the steps ask through, and its TLS implementation."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import trio

from coordinator.config import Config
from coordinator.errors import TIMED_OUT, AgentRefused, CoordinatorError, HostUnreachable, UsageError
from coordinator.model import VmRef
from protocol.channel import ControlChannel, open_control
from protocol.errors import ConnectionLost, ProtocolError, RequestFailed, RequestTimedOut
from protocol.messages import PassProgress, Reply, Request
from protocol.tls import client_context

ProgressCallback = Callable[[PassProgress], object]
R = TypeVar("R")

QUESTION_TIMEOUT_S = 60.0
ORDER_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 10.0


class Agent(Protocol):
    """One agent as the steps see it. `host` is the name in its certificate."""

    @property
    def host(self) -> str:
        """The host's name."""

    async def ask(
        self, request: Request, *, timeout_s: float | None, on_progress: ProgressCallback | None = None
    ) -> Reply:
        """Ask and wait; None waits as long as the agent is alive.

        Raises:
            HostUnreachable: no connection, or it was lost: what the order did is unknown.
            AgentRefused: the agent answered with a failure; its code and facts are kept.
        """


class AgentDirectory(Protocol):
    """Finds agents by host name."""

    def agent(self, host: str) -> Agent:
        """The agent of that host; connects when first asked."""

    def bulk_endpoint(self, host: str) -> tuple[str, int | None]:
        """Address for bulk connections to that host, and port; None: the one its agent tells."""


async def ask(
    agent: Agent,
    request: Request,
    kind: type[R],
    *,
    timeout_s: float | None = ORDER_TIMEOUT_S,
    on_progress: ProgressCallback | None = None,
) -> R:
    """Ask and insist on an answer of that kind."""
    reply = await agent.ask(request, timeout_s=timeout_s, on_progress=on_progress)
    if not isinstance(reply, kind):
        raise AgentRefused(
            f"the agent on {agent.host} answered {type(request).__name__} with {type(reply).__name__}: "
            "install the same version of failback on every host",
            code="unexpected-reply",
            host=agent.host,
        )
    return reply


class NamingAgent:
    """An agent whose sentences name the pair's VM as people know it: agents know VMs by UUID. Facts keep the UUID."""

    def __init__(self, agent: Agent, vm: VmRef) -> None:
        self._agent = agent
        self._vm = vm

    @property
    def host(self) -> str:
        """The host's name."""
        return self._agent.host

    async def ask(
        self, request: Request, *, timeout_s: float | None, on_progress: ProgressCallback | None = None
    ) -> Reply:
        """See `Agent.ask`."""
        try:
            return await self._agent.ask(request, timeout_s=timeout_s, on_progress=on_progress)
        except CoordinatorError as error:
            error.sentence = error.sentence.replace(self._vm.uuid, self._vm.name)
            error.args = (error.sentence,)
            raise


class AgentLink:
    """An agent over TLS. One control connection, opened when first needed and again after it was lost."""

    def __init__(
        self, host: str, *, address: str, port: int, context: Callable[[], ssl.SSLContext], nursery: trio.Nursery
    ) -> None:
        self._host = host
        self._address = address
        self._port = port
        self._context = context
        self._nursery = nursery
        self._channel: ControlChannel | None = None
        self._dropped = trio.Event()
        self._connecting = trio.Lock()

    @property
    def host(self) -> str:
        """The host's name."""
        return self._host

    async def ask(
        self, request: Request, *, timeout_s: float | None, on_progress: ProgressCallback | None = None
    ) -> Reply:
        """See `Agent.ask`."""
        channel = await self._connected()
        try:
            return await channel.ask(request, timeout_s=timeout_s, on_progress=on_progress)
        except RequestFailed as error:
            refused = AgentRefused(error.sentence.rstrip("."), code=error.code)
            refused.facts.update({**error.facts, "host": self._host})
            raise refused from error
        except RequestTimedOut as error:
            raise AgentRefused(
                f"the agent on {self._host} did not finish {type(request).__name__} within {timeout_s:.0f} s and was "
                "told to stop it: look at its log, then repeat",
                code=TIMED_OUT,
                host=self._host,
            ) from error
        except ProtocolError as error:
            self._drop(channel)
            raise self._unreachable(error) from error

    async def _connected(self) -> ControlChannel:
        async with self._connecting:
            if self._channel is None:
                self._dropped = trio.Event()
                try:
                    self._channel = await self._nursery.start(self._keep, self._dropped)
                except ProtocolError as error:
                    raise self._unreachable(error) from error
            return self._channel

    async def _keep(
        self, dropped: trio.Event, task_status: trio.TaskStatus[ControlChannel] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Hold the connection open until it is dropped; a connection that ends by itself shows at the next `ask`."""
        started = False
        try:
            async with open_control(
                self._address,
                self._port,
                server_name=self._host,
                context=self._context(),
                connect_timeout_s=CONNECT_TIMEOUT_S,
            ) as channel:
                task_status.started(channel)
                started = True
                await dropped.wait()
        except ProtocolError:
            if not started:
                raise

    def _drop(self, channel: ControlChannel) -> None:
        if self._channel is channel:
            self._channel = None
            self._dropped.set()

    def _unreachable(self, error: ProtocolError) -> CoordinatorError:
        cure = f"check the host, its network and `systemctl status failback-agent` on {self._host}, then repeat"
        if not isinstance(error, ConnectionLost):
            cure = (
                "install the same version of failback on every host, with certificates of one authority "
                f"(`failback pki issue {self._host}` makes that agent's)"
            )
        return HostUnreachable(
            f"the agent on {self._host} ({self._address} port {self._port}) cannot be asked: {error.sentence}; {cure}",
            code=HostUnreachable.code if isinstance(error, ConnectionLost) else error.code,
            host=self._host,
        )


class TlsAgents:
    """The agents of the configured hosts, over TLS."""

    def __init__(self, config: Config, nursery: trio.Nursery) -> None:
        self._config = config
        self._nursery = nursery
        self._links: dict[str, AgentLink] = {}
        self._tls: ssl.SSLContext | None = None

    def agent(self, host: str) -> Agent:
        """See `AgentDirectory.agent`."""
        if host not in self._links:
            place = self._config.host(host)
            self._links[host] = AgentLink(
                host, address=place.address or host, port=place.port, context=self._context, nursery=self._nursery
            )
        return self._links[host]

    def bulk_endpoint(self, host: str) -> tuple[str, int | None]:
        """See `AgentDirectory.bulk_endpoint`."""
        place = self._config.host(host)
        return place.bulk_address or place.address or host, place.bulk_port

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            files = self._config.pki
            missing = [path for path in (files.ca, files.certificate, files.key) if not path.exists()]
            if missing:
                listed = ", ".join(str(path) for path in missing)
                are = "is" if len(missing) == 1 else "are"
                raise UsageError(
                    f"this coordinator has no certificate yet: {listed} {are} missing; "
                    "`failback pki init` makes the authority and the coordinator's certificate, `failback pki issue "
                    "HOST` that of each agent (or name the files in the configuration under [pki])",
                    code="no-certificate",
                )
            try:
                self._tls = client_context(certificate=files.certificate, key=files.key, ca=files.ca)
            except ProtocolError as error:
                raise UsageError(error.sentence, code=error.code) from error
        return self._tls


@asynccontextmanager
async def open_agents(config: Config) -> AsyncIterator[TlsAgents]:
    """The agents of the configured hosts; connections are closed at the end."""
    async with trio.open_nursery() as nursery:
        yield TlsAgents(config, nursery)
        nursery.cancel_scope.cancel()
