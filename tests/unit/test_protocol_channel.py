"""Control connections over real TLS on loopback: asking, cancelling, silence."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from protocol.channel import ControlChannel
from protocol.errors import (
    ConnectionLost,
    RequestFailed,
    RequestTimedOut,
)
from protocol.messages import (
    AskPower,
    DescribeHost,
    DiskProgress,
    Done,
    Failure,
    InspectVm,
    PassProgress,
    PassReport,
    Power,
    PowerAnswer,
    Reply,
    Request,
    Role,
)
from protocol.tls import PeerIdentity
from tests.unit.channel_house import (
    HOST,
    POWER,
    RUN,
    Service,
    asking,
    cancel_when,
    describe,
    map_error,
    never,
    serve_until_cancelled,
    serving,
    until,
)
from tests.unit.protocol_house import AGENT_NAME, Certificates, make_certificates, refused


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("pki"))


async def test_a_question_is_answered_and_both_sides_know_each_other(certificates: Certificates) -> None:
    service = Service(describe)
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
        serving(Service(describe), certificates) as port,
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

    def note(error: Exception) -> Failure | None:
        mapped.append(error)
        return map_error(error)

    service = Service(answer)
    async with trio.open_nursery() as nursery:
        port, agent = await nursery.start(serve_until_cancelled, service, certificates, note)
        async with asking(port, certificates) as channel:
            nursery.start_soon(cancel_when, service.seen, agent)
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
    service = Service(never)
    async with serving(service, certificates) as port, asking(port, certificates) as channel:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.ask, RUN)
            await service.seen.wait()
            nursery.cancel_scope.cancel()
        assert service.cancelled == 1
        service.answer = describe
        assert await channel.ask(DescribeHost()) == HOST


async def test_an_ask_that_takes_too_long_is_cancelled_at_the_agent(certificates: Certificates) -> None:
    service = Service(never)
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
    service = Service(never)

    async def answer(request: Request, progress: Callable[[PassProgress], Awaitable[None]]) -> Reply:
        await progress(PassProgress(disks=()))
        return await never(request, progress)

    def on_progress(progress: PassProgress) -> None:
        raise ZeroDivisionError

    service.answer = answer
    async with serving(service, certificates) as port, asking(port, certificates) as channel:
        with pytest.raises(ZeroDivisionError):
            await channel.ask(RUN, on_progress=on_progress)
        assert service.cancelled == 1


async def test_an_exception_in_the_block_comes_out_as_it_is(certificates: Certificates) -> None:
    async with serving(Service(describe), certificates) as port:
        with pytest.raises(ZeroDivisionError) as caught:
            async with asking(port, certificates):
                raise ZeroDivisionError
        assert caught.value.__context__ is None


async def test_leaving_the_block_ends_what_was_asked_on_both_sides(certificates: Certificates) -> None:
    service = Service(never)

    async def ask(channel: ControlChannel) -> None:
        with pytest.raises(ConnectionLost, match="closed on this side"):
            await channel.ask(RUN)

    async with serving(service, certificates) as port, trio.open_nursery() as nursery:
        async with asking(port, certificates) as channel:
            nursery.start_soon(ask, channel)
            await service.seen.wait()
        await until(lambda: service.cancelled == 1)


async def test_cancelling_everything_around_a_channel_still_stops_the_request_at_the_agent(
    certificates: Certificates,
) -> None:
    service = Service(never)
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
    service = Service(never)
    async with trio.open_nursery() as nursery:
        port, agent = await nursery.start(serve_until_cancelled, service, certificates)
        async with asking(port, certificates) as channel:
            nursery.start_soon(cancel_when, service.seen, agent)
            with refused("stopping"):
                await channel.ask(RUN)
    assert service.cancelled == 1


# --- silence --------------------------------------------------------------------------------------------------------


async def test_pings_keep_an_idle_connection_alive(certificates: Certificates) -> None:
    service = Service(describe)
    async with (
        serving(service, certificates, silent_after_s=0.4) as port,
        asking(port, certificates, ping_after_s=0.05, silent_after_s=0.4) as channel,
    ):
        await trio.sleep(1)  # much longer than either side tolerates silence
        assert await channel.ask(DescribeHost()) == HOST
        assert service.started == 1  # pings never reach the handler


async def test_a_request_whose_progress_is_told_all_the_time_keeps_its_connection(certificates: Certificates) -> None:
    async def answer(request: Request, progress: Callable[[PassProgress], Awaitable[None]]) -> Reply:
        for _ in range(100):  # much longer together than the agent tolerates silence
            await trio.sleep(0.01)
            await progress(PassProgress(disks=()))
        return PassReport(view="v1", elapsed_s=1.5, disks=())

    async def on_progress(_: PassProgress) -> None:
        return

    async with (
        serving(Service(answer), certificates, silent_after_s=0.4) as port,
        asking(port, certificates, ping_after_s=0.05, silent_after_s=0.4) as channel,
    ):
        assert isinstance(await channel.ask(RUN, on_progress=on_progress), PassReport)


@asynccontextmanager
async def relay(port: int) -> AsyncIterator[tuple[int, trio.CancelScope]]:
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
    service = Service(never)
    async with (
        serving(service, certificates, silent_after_s=0.5) as port,
        relay(port) as (near_port, passing),
        asking(near_port, certificates, ping_after_s=0.1, silent_after_s=0.5) as channel,
        trio.open_nursery() as nursery,
    ):

        async def ask() -> None:
            with pytest.raises(ConnectionLost, match="silent"):
                await channel.ask(RUN)

        nursery.start_soon(ask)
        await service.seen.wait()
        passing.cancel()
        await until(lambda: service.cancelled == 1)
