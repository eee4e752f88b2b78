"""A control server and a channel to it, over real TLS on loopback, for tests."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from protocol.channel import ControlChannel, open_control, serve_control
from protocol.messages import (
    Failure,
    HostDescription,
    Order,
    PassProgress,
    Power,
    PowerAnswer,
    Reply,
    Request,
    RunPass,
)
from protocol.tls import PeerIdentity
from tests.unit.protocol_house import AGENT_NAME, Certificates

HOST = HostDescription(
    host=AGENT_NAME,
    software="test",
    hypervisor_uri="test:///default",
    libvirt_version="9.0.0",
    qemu_version="7.2.0",
    bulk_port=1,
    fingerprint="00" * 32,
    missing_tools=(),
)
POWER = PowerAnswer(power=Power.OFF, images_free=True, holders=())
RUN = RunPass(order=Order(pair="p", run="r", epoch=1), grant="00" * 16, peer_name="", peer_host="", peer_port=0)


@dataclass
class Service:
    """An agent that answers as the test tells it; counts what was asked and what was cancelled."""

    answer: Callable[[Request, Callable[[PassProgress], Awaitable[None]]], Awaitable[Reply]]
    peers: list[PeerIdentity] = field(default_factory=list)
    started: int = 0
    cancelled: int = 0
    seen: trio.Event = field(default_factory=trio.Event)

    async def handle(
        self, request: Request, peer: PeerIdentity, progress: Callable[[PassProgress], Awaitable[None]]
    ) -> Reply:
        self.started += 1
        self.peers.append(peer)
        self.seen.set()
        try:
            return await self.answer(request, progress)
        except trio.Cancelled:
            self.cancelled += 1
            raise


async def describe(request: Request, progress: object) -> Reply:
    return HOST


async def never(request: Request, progress: object) -> Reply:
    await trio.sleep_forever()
    raise AssertionError


def map_error(error: Exception) -> Failure | None:
    return Failure(code="value", sentence=str(error), facts={"n": 1}) if isinstance(error, ValueError) else None


@asynccontextmanager
async def serving(
    service: Service,
    certificates: Certificates,
    *,
    context: ssl.SSLContext | None = None,
    silent_after_s: float = 30,
    map_error: Callable[[Exception], Failure | None] = map_error,
) -> AsyncIterator[int]:
    """An agent on a port of its own."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]

    async def serve(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await serve_control(
            listeners,
            context or certificates.agent.server(),
            service.handle,
            host=AGENT_NAME,
            map_error=map_error,
            max_connections=2,
            handshake_timeout_s=1,
            silent_after_s=silent_after_s,
            task_status=task_status,
        )

    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        with trio.fail_after(20):
            yield port
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def asking(
    port: int,
    certificates: Certificates,
    *,
    context: ssl.SSLContext | None = None,
    server_name: str = AGENT_NAME,
    ping_after_s: float = 10,
    silent_after_s: float = 30,
    cancel_grace_s: float = 5,
) -> AsyncIterator[ControlChannel]:
    async with open_control(
        "127.0.0.1",
        port,
        server_name=server_name,
        context=context or certificates.coordinator.client(),
        connect_timeout_s=5,
        ping_after_s=ping_after_s,
        silent_after_s=silent_after_s,
        cancel_grace_s=cancel_grace_s,
    ) as channel:
        yield channel


async def cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def serve_until_cancelled(
    service: Service,
    certificates: Certificates,
    map_error: Callable[[Exception], Failure | None] = map_error,
    task_status: trio.TaskStatus[tuple[int, trio.CancelScope]] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.CancelScope() as scope:
        async with serving(service, certificates, map_error=map_error) as port:
            task_status.started((port, scope))
            await trio.sleep_forever()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - what the agent noticed has no event a test could wait for
            await trio.sleep(0.002)
