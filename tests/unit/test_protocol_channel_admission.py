"""Control connections over real TLS on loopback: who is not let in, and what they are told."""

from __future__ import annotations

import math
import socket

import pytest
import trio

from protocol import limits
from protocol.channel import open_control
from protocol.connection import ControlConnection, Speaker
from protocol.errors import (
    ConnectionLost,
    LocalMisuse,
    PeerEnded,
    PeerViolation,
    ProtocolError,
)
from protocol.messages import (
    DescribeHost,
    Hello,
    Order,
    Role,
    RunPass,
)
from protocol.tls_stream import TlsStream
from tests.unit.channel_house import (
    HOST,
    Service,
    asking,
    describe,
    serving,
)
from tests.unit.protocol_house import AGENT_NAME, Certificates, make_certificates, refused


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("pki"))


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
    service = Service(describe)
    async with serving(service, certificates) as port:
        with pytest.raises(ConnectionLost) as caught:
            async with asking(port, certificates, context=context):
                pass
        assert "our certificate" in caught.value.sentence
        assert {"another CA": "CA it does not know", "expired": "has expired"}[why] in caught.value.sentence
    assert service.started == 0


async def test_a_coordinator_without_certificate_is_refused_and_told_why(certificates: Certificates) -> None:
    context = certificates.coordinator.client_without_certificate()
    async with serving(Service(describe), certificates) as port:
        with pytest.raises(ConnectionLost, match="requires a certificate and we showed none"):
            async with asking(port, certificates, context=context):
                pass


async def test_an_agent_may_not_give_orders(certificates: Certificates) -> None:
    async with serving(Service(describe), certificates) as port:
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
    async with serving(Service(describe), certificates, context=context) as port:
        with pytest.raises(PeerViolation, match=why):
            async with asking(port, certificates):
                pass


async def test_a_coordinators_certificate_does_not_make_an_agent(certificates: Certificates) -> None:
    context = certificates.coordinator.server()
    async with serving(Service(describe), certificates, context=context) as port:
        with pytest.raises(PeerViolation, match="not meant for this use"):
            async with asking(port, certificates):
                pass


async def test_the_name_is_checked_whatever_the_address(certificates: Certificates) -> None:
    async with serving(Service(describe), certificates) as port:
        with pytest.raises(PeerViolation, match="another host name"):
            async with asking(port, certificates, server_name="kvm9.test"):
                pass


async def test_a_peer_without_a_common_version_hears_both_sides_versions(certificates: Certificates) -> None:
    async with serving(Service(describe), certificates) as port:
        stream = await _shake_hands(port, certificates)
        hello = Hello(versions=(7, 8), software="future", role=Role.COORDINATOR)
        error = await _talk(stream, hello)
        assert isinstance(error, PeerEnded)
        assert error.goodbye_code == "version"
        assert "7, 8" in error.sentence
        assert "version 2" in error.sentence


async def test_a_peer_that_says_it_is_an_agent_is_refused(certificates: Certificates) -> None:
    async with serving(Service(describe), certificates) as port:
        stream = await _shake_hands(port, certificates)
        error = await _talk(stream, Hello(versions=(2,), software="x", role=Role.AGENT))
        assert isinstance(error, PeerEnded)
        assert error.goodbye_code == "forbidden"


async def test_connections_beyond_the_limit_are_told_that_it_is_busy(certificates: Certificates) -> None:
    async with (
        serving(Service(describe), certificates) as port,
        asking(port, certificates),
        asking(port, certificates),
    ):
        with refused("busy"):
            async with asking(port, certificates):
                pass


async def test_who_does_not_speak_in_time_is_dropped_and_others_are_served(certificates: Certificates) -> None:
    async with serving(Service(describe), certificates) as port:
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
    async with serving(Service(describe), certificates) as port:
        mute = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
        assert await mute[2].receive_some() == b""
        for stream in mute:
            await stream.aclose()


async def test_a_peer_that_breaks_the_rules_loses_its_connection_only(certificates: Certificates) -> None:
    async with serving(Service(describe), certificates) as port:
        stream = await _shake_hands(port, certificates)
        await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
        assert await stream.receive_some() == b""
        await stream.aclose(politely=False)
        async with asking(port, certificates) as channel:
            assert await channel.ask(DescribeHost()) == HOST


async def test_plain_text_is_no_way_in(certificates: Certificates) -> None:
    async with serving(Service(describe), certificates) as port:
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
    async with serving(Service(describe), certificates) as port, asking(port, certificates) as channel:
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
