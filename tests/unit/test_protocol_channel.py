"""Control connections over real TLS on loopback: asking, cancelling, silence, and who is not let in."""

from __future__ import annotations

import math
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

from protocol import limits
from protocol.channel import ControlChannel, open_control, serve_control
from protocol.connection import ControlConnection, Speaker
from protocol.errors import (
    ConnectionLost,
    LocalMisuse,
    PeerEnded,
    PeerViolation,
    ProtocolError,
    RequestFailed,
    RequestTimedOut,
)
from protocol.messages import (
    AskPower,
    DescribeHost,
    DiskProgress,
    Done,
    Failure,
    Hello,
    HostDescription,
    InspectVm,
    Order,
    PassProgress,
    PassReport,
    Power,
    PowerAnswer,
    Reply,
    Request,
    Role,
    RunPass,
)
from protocol.tls import PeerIdentity
from protocol.tls_stream import TlsStream
from tests.unit.protocol_house import AGENT_NAME, Certificates, make_certificates, refused

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


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("pki"))


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


async def _describe(request: Request, progress: object) -> Reply:
    return HOST


async def _never(request: Request, progress: object) -> Reply:
    await trio.sleep_forever()
    raise AssertionError


def _map_error(error: Exception) -> Failure | None:
    return Failure(code="value", sentence=str(error), facts={"n": 1}) if isinstance(error, ValueError) else None


@asynccontextmanager
async def serving(
    service: Service,
    certificates: Certificates,
    *,
    context: ssl.SSLContext | None = None,
    silent_after_s: float = 30,
    map_error: Callable[[Exception], Failure | None] = _map_error,
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


async def test_a_question_is_answered_and_both_sides_know_each_other(certificates: Certificates) -> None:
    service = Service(_describe)
    async with serving(service, certificates) as port, asking(port, certificates) as channel:
        assert await channel.ask(DescribeHost()) == HOST
        assert channel.agent_host == AGENT_NAME
        assert channel.peer == PeerIdentity(
            role=Role.AGENT, names=(AGENT_NAME,), fingerprint=certificates.agent.fingerprint
        )
        assert service.peers == [
            PeerIdentity(role=Role.COORDINATOR, names=(), fingerprint=certificates.coordinator.fingerprint)
        ]


async def test_many_tasks_ask_at_once_and_each_gets_its_own_answer(certificates: Certificates) -> None:
    arrived = 0
    everyone = trio.Event()

    async def answer(request: Request, progress: object) -> Reply:
        nonlocal arrived
        assert isinstance(request, AskPower)
        arrived += 1
        if arrived == 60:
            everyone.set()
        await everyone.wait()
        return PowerAnswer(power=Power.OFF, images_free=True, holders=(request.vm_uuid,))

    got: dict[str, Reply] = {}
    async with (
        serving(Service(answer), certificates) as port,
        asking(port, certificates) as channel,
        trio.open_nursery() as nursery,
    ):

        async def ask(name: str) -> None:
            got[name] = await channel.ask(AskPower(vm_uuid=name))

        for number in range(60):
            nursery.start_soon(ask, str(number))
    assert got == {str(n): PowerAnswer(power=Power.OFF, images_free=True, holders=(str(n),)) for n in range(60)}


async def test_more_questions_than_allowed_at_once_wait_for_their_turn(certificates: Certificates) -> None:
    async with (
        serving(Service(_describe), certificates) as port,
        asking(port, certificates) as channel,
        trio.open_nursery() as nursery,
    ):
        for _ in range(200):
            nursery.start_soon(channel.ask, DescribeHost())


async def test_a_failure_keeps_its_code_sentence_and_facts(certificates: Certificates) -> None:
    async def answer(request: Request, progress: object) -> Reply:
        raise ValueError("no such VM: look again")

    async with serving(Service(answer), certificates) as port, asking(port, certificates) as channel:
        with pytest.raises(RequestFailed) as caught:
            await channel.ask(InspectVm(vm="x"))
    assert (caught.value.code, caught.value.sentence, caught.value.facts) == (
        "value",
        "no such VM: look again",
        {"n": 1},
    )


async def test_an_error_nobody_mapped_is_internal_and_the_connection_lives_on(certificates: Certificates) -> None:
    async def answer(request: Request, progress: object) -> Reply:
        if isinstance(request, InspectVm):
            raise KeyError("x")
        return Done() if isinstance(request, AskPower) else HOST  # Done is no answer to AskPower

    async with serving(Service(answer), certificates) as port, asking(port, certificates) as channel:
        for request in (InspectVm(vm="x"), AskPower(vm_uuid="x")):
            with pytest.raises(RequestFailed) as caught:
                await channel.ask(request)
            assert caught.value.code == "internal"
        assert await channel.ask(DescribeHost()) == HOST


async def test_an_error_inside_the_handlers_nursery_is_mapped_as_what_it_is(certificates: Certificates) -> None:
    async def fail() -> None:
        raise ValueError("inside")

    async def answer(request: Request, progress: object) -> Reply:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
        return HOST

    async with serving(Service(answer), certificates) as port, asking(port, certificates) as channel:
        with pytest.raises(RequestFailed) as caught:
            await channel.ask(DescribeHost())
        assert caught.value.code == "value"


async def test_a_handler_that_fails_while_its_agent_stops_harms_nothing(certificates: Certificates) -> None:
    mapped: list[Exception] = []

    async def fail_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("in the middle of stopping")

    async def answer(request: Request, progress: object) -> Reply:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(fail_when_cancelled)
        return HOST

    def map_error(error: Exception) -> Failure | None:
        mapped.append(error)
        return _map_error(error)

    service = Service(answer)
    async with trio.open_nursery() as nursery:
        port, agent = await nursery.start(_serve_until_cancelled, service, certificates, map_error)
        async with asking(port, certificates) as channel:
            nursery.start_soon(_cancel_when, service.seen, agent)
            with refused("stopping"):
                await channel.ask(DescribeHost())
    assert [str(error) for error in mapped] == ["in the middle of stopping"]


async def test_progress_reaches_the_one_who_asked(certificates: Certificates) -> None:
    disk = DiskProgress(target="vda", total_bytes=9, done_bytes=3, zero_bytes=0, changed_bytes=1, wire_bytes=1)
    seen: list[PassProgress] = []
    told = trio.Event()

    async def answer(request: Request, progress: Callable[[PassProgress], Awaitable[None]]) -> Reply:
        await progress(PassProgress(disks=(disk,)))
        await told.wait()
        return PassReport(view="v1", elapsed_s=1.5, disks=())

    async def on_progress(progress: PassProgress) -> None:
        seen.append(progress)
        told.set()

    async with serving(Service(answer), certificates) as port, asking(port, certificates) as channel:
        report = await channel.ask(RUN, on_progress=on_progress)
    assert seen == [PassProgress(disks=(disk,))]
    assert isinstance(report, PassReport)


async def test_cancelling_the_asker_stops_the_handler_before_the_ask_ends(certificates: Certificates) -> None:
    service = Service(_never)
    async with serving(service, certificates) as port, asking(port, certificates) as channel:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.ask, RUN)
            await service.seen.wait()
            nursery.cancel_scope.cancel()
        assert service.cancelled == 1
        service.answer = _describe
        assert await channel.ask(DescribeHost()) == HOST


async def test_an_ask_that_takes_too_long_is_cancelled_at_the_agent(certificates: Certificates) -> None:
    service = Service(_never)
    async with serving(service, certificates) as port, asking(port, certificates) as channel:
        with pytest.raises(RequestTimedOut):
            await channel.ask(RUN, timeout_s=0.05)
        assert service.cancelled == 1


async def test_a_reply_that_crosses_the_cancel_is_the_reply(certificates: Certificates) -> None:
    async def answer(request: Request, progress: object) -> Reply:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            return POWER  # it was done when it was told to stop
        raise AssertionError

    async with serving(Service(answer), certificates) as port, asking(port, certificates) as channel:
        assert await channel.ask(AskPower(vm_uuid="x"), timeout_s=0.05) == POWER


async def test_an_agent_that_does_not_stop_loses_the_connection(certificates: Certificates) -> None:
    released = trio.Event()

    async def answer(request: Request, progress: object) -> Reply:
        with trio.CancelScope(shield=True):
            await released.wait()
        return POWER

    async with (
        serving(Service(answer), certificates) as port,
        asking(port, certificates, cancel_grace_s=0.1) as channel,
    ):
        with pytest.raises(ConnectionLost, match="did not stop"):
            await channel.ask(AskPower(vm_uuid="x"), timeout_s=0.05)
        with pytest.raises(ConnectionLost, match="did not stop"):
            await channel.ask(DescribeHost())
        released.set()


async def test_an_error_in_the_progress_callback_stops_the_request(certificates: Certificates) -> None:
    service = Service(_never)

    async def answer(request: Request, progress: Callable[[PassProgress], Awaitable[None]]) -> Reply:
        await progress(PassProgress(disks=()))
        return await _never(request, progress)

    def on_progress(progress: PassProgress) -> None:
        raise ZeroDivisionError

    service.answer = answer
    async with serving(service, certificates) as port, asking(port, certificates) as channel:
        with pytest.raises(ZeroDivisionError):
            await channel.ask(RUN, on_progress=on_progress)
        assert service.cancelled == 1


async def test_an_exception_in_the_block_comes_out_as_it_is(certificates: Certificates) -> None:
    async with serving(Service(_describe), certificates) as port:
        with pytest.raises(ZeroDivisionError) as caught:
            async with asking(port, certificates):
                raise ZeroDivisionError
        assert caught.value.__context__ is None


async def test_leaving_the_block_ends_what_was_asked_on_both_sides(certificates: Certificates) -> None:
    service = Service(_never)

    async def ask(channel: ControlChannel) -> None:
        with pytest.raises(ConnectionLost, match="closed on this side"):
            await channel.ask(RUN)

    async with serving(service, certificates) as port, trio.open_nursery() as nursery:
        async with asking(port, certificates) as channel:
            nursery.start_soon(ask, channel)
            await service.seen.wait()
        await _until(lambda: service.cancelled == 1)


async def test_cancelling_everything_around_a_channel_still_stops_the_request_at_the_agent(
    certificates: Certificates,
) -> None:
    service = Service(_never)
    async with serving(service, certificates) as port:
        with trio.CancelScope() as everything:
            async with asking(port, certificates) as channel, trio.open_nursery() as nursery:
                nursery.start_soon(channel.ask, RUN)
                await service.seen.wait()
                before = trio.current_time()
                everything.cancel()
        assert everything.cancelled_caught
        assert service.cancelled == 1
        assert trio.current_time() - before < 4  # the answer was heard, not waited for in vain


async def test_an_agent_that_stops_says_so_to_whoever_waits(certificates: Certificates) -> None:
    service = Service(_never)
    async with trio.open_nursery() as nursery:
        port, agent = await nursery.start(_serve_until_cancelled, service, certificates)
        async with asking(port, certificates) as channel:
            nursery.start_soon(_cancel_when, service.seen, agent)
            with refused("stopping"):
                await channel.ask(RUN)
    assert service.cancelled == 1


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _serve_until_cancelled(
    service: Service,
    certificates: Certificates,
    map_error: Callable[[Exception], Failure | None] = _map_error,
    task_status: trio.TaskStatus[tuple[int, trio.CancelScope]] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.CancelScope() as scope:
        async with serving(service, certificates, map_error=map_error) as port:
            task_status.started((port, scope))
            await trio.sleep_forever()


async def _until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - what the agent noticed has no event a test could wait for
            await trio.sleep(0.002)


# --- silence --------------------------------------------------------------------------------------------------------


async def test_pings_keep_an_idle_connection_alive(certificates: Certificates) -> None:
    service = Service(_describe)
    async with (
        serving(service, certificates, silent_after_s=0.4) as port,
        asking(port, certificates, ping_after_s=0.05, silent_after_s=0.4) as channel,
    ):
        await trio.sleep(1)  # much longer than either side tolerates silence
        assert await channel.ask(DescribeHost()) == HOST
        assert service.started == 1  # pings never reach the handler


@asynccontextmanager
async def _relay(port: int) -> AsyncIterator[tuple[int, trio.CancelScope]]:
    """A TCP relay in front of `port` that can be stopped from passing anything on, without closing anything."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    passing = trio.CancelScope()

    async def copy(a: trio.SocketStream, b: trio.SocketStream) -> None:
        async for data in a:
            await b.send_all(data)

    async def relay() -> None:
        near = await listener.accept()
        far = await trio.open_tcp_stream("127.0.0.1", port)
        async with near, far, trio.open_nursery() as nursery:
            with passing:
                async with trio.open_nursery() as copying:
                    copying.start_soon(copy, near, far)
                    copying.start_soon(copy, far, near)
            nursery.start_soon(trio.sleep_forever)

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(relay)
        yield listener.socket.getsockname()[1], passing
        nursery.cancel_scope.cancel()


async def test_a_half_open_connection_is_noticed_by_both_sides(certificates: Certificates) -> None:
    service = Service(_never)
    async with (
        serving(service, certificates, silent_after_s=0.5) as port,
        _relay(port) as (near_port, passing),
        asking(near_port, certificates, ping_after_s=0.1, silent_after_s=0.5) as channel,
        trio.open_nursery() as nursery,
    ):

        async def ask() -> None:
            with pytest.raises(ConnectionLost, match="silent"):
                await channel.ask(RUN)

        nursery.start_soon(ask)
        await service.seen.wait()
        passing.cancel()
        await _until(lambda: service.cancelled == 1)


# --- who is not let in ----------------------------------------------------------------------------------------------


async def test_nobody_listens(certificates: Certificates) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionLost, match="refuses connections"):
            async with asking(sock.getsockname()[1], certificates):
                pass


@pytest.mark.parametrize(
    ("who", "why"),
    [
        ("foreign_coordinator", "another CA"),
        ("expired_coordinator", "expired"),
    ],
)
async def test_a_wrong_certificate_of_the_coordinator_is_refused_and_it_is_told_why(
    certificates: Certificates, who: str, why: str
) -> None:
    holder = getattr(certificates, who)
    context = holder.client()
    context.load_verify_locations(certificates.agent.issued.ca)  # so that only the agent objects
    service = Service(_describe)
    async with serving(service, certificates) as port:
        with pytest.raises(ConnectionLost) as caught:
            async with asking(port, certificates, context=context):
                pass
        assert "our certificate" in caught.value.sentence
        assert {"another CA": "CA it does not know", "expired": "has expired"}[why] in caught.value.sentence
    assert service.started == 0


async def test_a_coordinator_without_certificate_is_refused_and_told_why(certificates: Certificates) -> None:
    context = certificates.coordinator.client_without_certificate()
    async with serving(Service(_describe), certificates) as port:
        with pytest.raises(ConnectionLost, match="requires a certificate and we showed none"):
            async with asking(port, certificates, context=context):
                pass


async def test_an_agent_may_not_give_orders(certificates: Certificates) -> None:
    async with serving(Service(_describe), certificates) as port:
        with refused("forbidden"):
            async with asking(port, certificates, context=certificates.other_agent.client()):
                pass


@pytest.mark.parametrize(
    ("who", "why"),
    [("foreign_agent", "another CA"), ("expired_agent", "expired"), ("other_agent", "another host name")],
)
async def test_the_coordinator_refuses_a_wrong_certificate_of_the_agent(
    certificates: Certificates, who: str, why: str
) -> None:
    context = getattr(certificates, who).server()
    context.load_verify_locations(certificates.agent.issued.ca)
    async with serving(Service(_describe), certificates, context=context) as port:
        with pytest.raises(PeerViolation, match=why):
            async with asking(port, certificates):
                pass


async def test_a_coordinators_certificate_does_not_make_an_agent(certificates: Certificates) -> None:
    context = certificates.coordinator.server()
    async with serving(Service(_describe), certificates, context=context) as port:
        with pytest.raises(PeerViolation, match="not meant for this use"):
            async with asking(port, certificates):
                pass


async def test_the_name_is_checked_whatever_the_address(certificates: Certificates) -> None:
    async with serving(Service(_describe), certificates) as port:
        with pytest.raises(PeerViolation, match="another host name"):
            async with asking(port, certificates, server_name="kvm9.test"):
                pass


async def test_a_peer_without_a_common_version_hears_both_sides_versions(certificates: Certificates) -> None:
    async with serving(Service(_describe), certificates) as port:
        stream = await _shake_hands(port, certificates)
        hello = Hello(versions=(7, 8), software="future", role=Role.COORDINATOR)
        error = await _talk(stream, hello)
        assert isinstance(error, PeerEnded)
        assert error.goodbye_code == "version"
        assert "7, 8" in error.sentence
        assert "version 1" in error.sentence


async def test_a_peer_that_says_it_is_an_agent_is_refused(certificates: Certificates) -> None:
    async with serving(Service(_describe), certificates) as port:
        stream = await _shake_hands(port, certificates)
        error = await _talk(stream, Hello(versions=(1,), software="x", role=Role.AGENT))
        assert isinstance(error, PeerEnded)
        assert error.goodbye_code == "forbidden"


async def test_connections_beyond_the_limit_are_told_that_it_is_busy(certificates: Certificates) -> None:
    async with (
        serving(Service(_describe), certificates) as port,
        asking(port, certificates),
        asking(port, certificates),
    ):
        with refused("busy"):
            async with asking(port, certificates):
                pass


async def test_who_does_not_speak_in_time_is_dropped_and_others_are_served(certificates: Certificates) -> None:
    async with serving(Service(_describe), certificates) as port:
        mute = await trio.open_tcp_stream("127.0.0.1", port)
        silent = await _shake_hands(port, certificates)
        async with asking(port, certificates) as channel:
            assert await channel.ask(DescribeHost()) == HOST
        assert await mute.receive_some() == b""
        assert await silent.receive_some() == b""
        await mute.aclose()
        await silent.aclose(politely=False)


async def test_a_flood_of_half_open_connections_is_cut_short(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_HANDSHAKES", 2)
    async with serving(Service(_describe), certificates) as port:
        mute = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
        assert await mute[2].receive_some() == b""
        for stream in mute:
            await stream.aclose()


async def test_a_peer_that_breaks_the_rules_loses_its_connection_only(certificates: Certificates) -> None:
    async with serving(Service(_describe), certificates) as port:
        stream = await _shake_hands(port, certificates)
        await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
        assert await stream.receive_some() == b""
        await stream.aclose(politely=False)
        async with asking(port, certificates) as channel:
            assert await channel.ask(DescribeHost()) == HOST


async def test_plain_text_is_no_way_in(certificates: Certificates) -> None:
    async with serving(Service(_describe), certificates) as port:
        tcp = await trio.open_tcp_stream("127.0.0.1", port)
        await tcp.send_all(b"GET / HTTP/1.1\r\n\r\n")
        while await tcp.receive_some():
            pass
        await tcp.aclose()


async def test_an_agent_that_is_no_tls_server_is_called_that(certificates: Certificates) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def answer() -> None:
        stream = await listener.accept()
        await stream.send_all(b"HTTP/1.0 400 Bad Request\r\n\r\n")
        await stream.aclose()

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        with pytest.raises(PeerViolation, match="right port"):
            async with asking(listener.socket.getsockname()[1], certificates):
                pass


async def test_an_agent_that_never_answers_is_given_up(certificates: Certificates) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        with pytest.raises(ConnectionLost, match=r"within 0\.2 seconds"):
            async with open_control(
                "127.0.0.1",
                listener.socket.getsockname()[1],
                server_name=AGENT_NAME,
                context=certificates.coordinator.client(),
                connect_timeout_s=0.2,
            ):
                pass


async def test_what_cannot_be_written_down_is_our_mistake_and_costs_nothing(certificates: Certificates) -> None:
    order = Order(pair="p", run="r", epoch=2**70)
    async with serving(Service(_describe), certificates) as port, asking(port, certificates) as channel:
        with pytest.raises(LocalMisuse):
            await channel.ask(
                RunPass(order=order, grant="", peer_name="", peer_host="", peer_port=0), timeout_s=math.inf
            )
        assert await channel.ask(DescribeHost()) == HOST


async def _shake_hands(port: int, certificates: Certificates) -> TlsStream:
    stream = TlsStream(
        await trio.open_tcp_stream("127.0.0.1", port), certificates.coordinator.client(), "the agent", AGENT_NAME
    )
    await stream.handshake()
    return stream


async def _talk(stream: TlsStream, hello: Hello) -> ProtocolError:
    """Say hello by hand; how the agent ends it."""
    connection = ControlConnection(Speaker.CALLER)
    for buffer in connection.say(hello):
        await stream.send_all(bytes(buffer))
    while data := await stream.receive_some():
        connection.feed(data)
        while connection.next_event():
            pass
    await stream.aclose(politely=False)
    return connection.lost()
