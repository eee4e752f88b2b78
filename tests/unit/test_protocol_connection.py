"""The control conversation without a wire: who may say what when, and what happens to who does not keep to it."""

from __future__ import annotations

import pytest

from protocol import limits
from protocol.codec import Message, encode
from protocol.connection import ControlConnection, Received, Speaker, State, agree, no_common_version
from protocol.errors import ConnectionLost, LocalMisuse, PeerEnded, PeerViolation
from protocol.framing import frame_prefix
from protocol.messages import (
    AskPower,
    BulkHello,
    Cancel,
    Done,
    Failure,
    FenceVm,
    Goodbye,
    Hello,
    Order,
    PassProgress,
    PassReport,
    Ping,
    Pong,
    Power,
    PowerAnswer,
    Role,
    RunPass,
    Side,
    Welcome,
)
from tests.unit.protocol_house import deliver

HELLO = Hello(versions=(1,), software="test", role=Role.COORDINATOR)
WELCOME = Welcome(version=1, software="test", host="kvm1")
ORDER = Order(pair="p", run="r", epoch=1)
RUN = RunPass(order=ORDER, grant="00", peer_name="", peer_host="", peer_port=0)
REPORT = PassReport(view="v", elapsed_s=1.0, disks=())
POWER = PowerAnswer(power=Power.OFF, images_free=True, holders=())
FAILURE = Failure(code="x", sentence="x", facts={})
GOODBYE = Goodbye(code="done", sentence="enough")


def _frame(message: Message, number: int = 0, payload: bytes = b"") -> bytes:
    return frame_prefix(encode(message, number), len(payload)) + payload


def _open() -> tuple[ControlConnection, ControlConnection]:
    """Coordinator and agent, past the handshake."""
    caller, listener = ControlConnection(Speaker.CALLER), ControlConnection(Speaker.LISTENER)
    deliver(caller.say(HELLO), listener)
    deliver(listener.say(WELCOME), caller)
    return caller, listener


def _violates(connection: ControlConnection, data: bytes, why: str) -> None:
    """`data` kills the connection, for ever."""
    connection.feed(data)
    with pytest.raises(PeerViolation, match=why):
        connection.next_event()
    assert not connection.alive
    connection.feed(_frame(GOODBYE))
    for _ in range(2):
        with pytest.raises(PeerViolation, match=why):
            connection.next_event()
    with pytest.raises(LocalMisuse, match="dead"):
        connection.goodbye("x", "x")
    assert isinstance(connection.lost(), PeerViolation)


def test_hello_and_welcome_open_the_conversation() -> None:
    caller, listener = ControlConnection(Speaker.CALLER), ControlConnection(Speaker.LISTENER)
    assert [e.message for e in deliver(caller.say(HELLO), listener)] == [HELLO]
    assert [e.message for e in deliver(listener.say(WELCOME), caller)] == [WELCOME]
    assert caller.state is listener.state is State.OPEN


def test_answers_may_come_in_any_order_each_for_its_request() -> None:
    caller, listener = _open()
    first, buffers = caller.ask(AskPower(vm_uuid="a"))
    assert deliver(buffers, listener)[0].number == first == 1
    second, buffers = caller.ask(RUN)
    deliver(buffers, listener)
    assert deliver(listener.say(PassProgress(disks=()), second), caller)[0].number == second
    assert deliver(listener.say(REPORT, second), caller)[0].message == REPORT
    assert deliver(listener.say(POWER, first), caller) == [Received(first, POWER, memoryview(b""))]
    assert not caller.outstanding
    assert not listener.outstanding


def test_a_failure_answers_any_request() -> None:
    caller, listener = _open()
    number, buffers = caller.ask(Ping())
    deliver(buffers, listener)
    assert deliver(listener.say(FAILURE, number), caller)[0].message == FAILURE


def test_a_cancel_may_cross_the_answer() -> None:
    caller, listener = _open()
    number, buffers = caller.ask(Ping())
    deliver(buffers, listener)
    answer = listener.say(Pong(), number)
    deliver(caller.cancel(number), listener)
    assert deliver(answer, caller)[0].message == Pong()


@pytest.mark.parametrize(
    ("message", "number", "why"),
    [
        (HELLO, 0, "must not be said"),
        (WELCOME, 0, "must not be said"),
        (POWER, 1, "must not be said"),
        (PassProgress(disks=()), 1, "must not be said"),
        (BulkHello(versions=(1,), software="", grant="", target="", digest_seed=0), 0, "must not be said"),
        (Ping(), 0, "does not rise"),
        (Ping(), 5, "does not rise"),
        (Ping(), 4, "does not rise"),
        (Cancel(request=6), 0, "never asked"),
        (Cancel(request=0), 0, "never asked"),
        (Cancel(request=5), 1, "has no request number"),
        (GOODBYE, 1, "has no request number"),
    ],
)
def test_a_coordinator_that_breaks_a_rule_is_cut_off(message: Message, number: int, why: str) -> None:
    _, listener = _open()
    listener.feed(_frame(Ping(), 5))
    assert listener.next_event() is not None
    _violates(listener, _frame(message, number), why)


@pytest.mark.parametrize(
    ("message", "number", "why"),
    [
        (HELLO, 0, "must not be said"),
        (WELCOME, 0, "must not be said"),
        (Ping(), 2, "must not be said"),
        (Cancel(request=1), 0, "must not be said"),
        (Pong(), 1, "answered by PowerAnswer"),
        (Done(), 1, "answered by PowerAnswer"),
        (POWER, 2, "not open"),
        (POWER, 0, "not open"),
        (FAILURE, 2, "not open"),
        (PassProgress(disks=()), 1, "no RunPass"),
        (PassProgress(disks=()), 2, "not open"),
    ],
)
def test_an_agent_that_breaks_a_rule_is_cut_off(message: Message, number: int, why: str) -> None:
    caller, _ = _open()
    caller.ask(AskPower(vm_uuid="a"))
    _violates(caller, _frame(message, number), why)


def test_a_request_is_answered_once() -> None:
    caller, _ = _open()
    caller.ask(Ping())
    caller.feed(_frame(Pong(), 1))
    assert caller.next_event() is not None
    _violates(caller, _frame(Pong(), 1), "not open")


@pytest.mark.parametrize("message", [Ping(), WELCOME, Cancel(request=1), POWER])
def test_nothing_comes_before_hello(message: Message) -> None:
    _violates(ControlConnection(Speaker.LISTENER), _frame(message, 0), "must not be said")


def test_nothing_comes_between_hello_and_welcome() -> None:
    listener = ControlConnection(Speaker.LISTENER)
    listener.feed(_frame(HELLO) + _frame(Ping(), 1))
    assert listener.next_event() is not None
    _violates(listener, b"\x00", "must not be said")


def test_a_version_that_was_not_offered_is_refused() -> None:
    caller = ControlConnection(Speaker.CALLER)
    caller.say(HELLO)
    _violates(caller, _frame(Welcome(version=2, software="", host="")), "not offered")


def test_control_frames_have_no_payload() -> None:
    _, listener = _open()
    _violates(listener, _frame(Ping(), 1, b"x"), "payload of 1 bytes")


def test_headers_are_short_until_the_handshake_is_through() -> None:
    long = Hello(versions=(1,), software="x" * limits.HANDSHAKE.header_bytes, role=Role.COORDINATOR)
    _violates(ControlConnection(Speaker.LISTENER), _frame(long), "header of")
    with pytest.raises(LocalMisuse, match="allowed are 4096"):
        ControlConnection(Speaker.CALLER).say(long)
    _, listener = _open()
    listener.feed(_frame(AskPower(vm_uuid="x" * limits.HANDSHAKE.header_bytes), 1))
    assert listener.next_event() is not None


def test_a_request_too_long_is_our_own_mistake() -> None:
    caller, listener = _open()
    names = tuple("x" * 60_000 for _ in range(20))
    with pytest.raises(LocalMisuse, match="allowed are 1048576"):
        caller.ask(FenceVm(order=ORDER, vm_uuid="u", side=Side.ORIGINAL, targets=names))
    number, buffers = caller.ask(FenceVm(order=ORDER, vm_uuid="u", side=Side.ORIGINAL, targets=names[:17]))
    assert number == 1
    assert len(deliver(buffers, listener)) == 1


def test_only_so_many_requests_may_be_unanswered() -> None:
    caller, listener = _open()
    for _ in range(limits.MAX_OUTSTANDING_REQUESTS):
        deliver(caller.ask(Ping())[1], listener)
    with pytest.raises(LocalMisuse, match="unanswered"):
        caller.ask(Ping())
    deliver(listener.say(Pong(), 1), caller)
    deliver(caller.ask(Ping())[1], listener)
    _violates(listener, _frame(Ping(), 1000), "unanswered")


def test_misuse_sends_nothing_and_changes_nothing() -> None:
    caller, listener = _open()
    for message in (HELLO, WELCOME, POWER, Pong()):
        with pytest.raises(LocalMisuse):
            caller.say(message)
    with pytest.raises(LocalMisuse):
        caller.cancel(1)
    with pytest.raises(LocalMisuse):
        listener.say(Pong(), 1)
    with pytest.raises(LocalMisuse):
        listener.ask(Ping())
    number, buffers = caller.ask(Ping())
    assert number == 1
    deliver(buffers, listener)
    with pytest.raises(LocalMisuse):
        listener.say(Done(), 1)
    assert deliver(listener.say(Pong(), 1), caller)[0].message == Pong()


def test_nothing_follows_goodbye() -> None:
    caller, listener = _open()
    assert deliver(caller.goodbye("done", "x"), listener)[0].message == Goodbye(code="done", sentence="x")
    assert not caller.alive
    assert not listener.alive
    for connection in (caller, listener):
        with pytest.raises(LocalMisuse):
            connection.goodbye("again", "x")
    assert isinstance(listener.lost(), PeerEnded)
    with pytest.raises(PeerViolation, match="after its last word"):
        deliver(list(_chunks(_frame(Ping(), 1))), listener)


def test_what_was_under_way_when_we_said_goodbye_is_dropped() -> None:
    caller, _ = _open()
    caller.ask(Ping())
    frame = _frame(Pong(), 1)
    caller.feed(frame[:5])
    assert caller.next_event() is None
    caller.goodbye("done", "x")
    caller.feed(frame[5:] + b"anything at all")
    assert caller.next_event() is None


def test_a_goodbye_is_shortened_to_what_fits_any_state() -> None:
    listener = ControlConnection(Speaker.LISTENER)
    caller = ControlConnection(Speaker.CALLER)
    caller.say(HELLO)
    (event,) = deliver(listener.goodbye("busy", "\N{SNOWMAN}" * 5000), caller)
    assert isinstance(event.message, Goodbye)
    assert event.message.sentence == "\N{SNOWMAN}" * limits.MAX_GOODBYE_CHARACTERS


def test_the_end_of_the_stream_is_explained() -> None:
    caller, listener = _open()
    assert "without a word" in str(caller.lost())
    listener.feed(_frame(Ping(), 1)[:3])
    assert listener.next_event() is None
    assert "middle of a message" in str(listener.lost())
    caller.feed(_frame(GOODBYE))
    caller.next_event()
    lost = caller.lost()
    assert isinstance(lost, PeerEnded)
    assert (lost.goodbye_code, lost.sentence) == ("done", "enough")
    listener.goodbye("x", "x")
    assert type(listener.lost()) is ConnectionLost


def _chunks(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def test_the_highest_common_version_is_agreed_on() -> None:
    assert agree((3, 1, 2)) == 2
    assert agree((1, 3)) is None
    assert agree(()) is None


def test_without_a_common_version_both_sides_versions_are_named() -> None:
    sentence = no_common_version((9, 8), "the agent on kvm1")
    assert "the agent on kvm1 speaks protocol version 2" in sentence
    assert "speaks 8, 9" in sentence
    assert "install the same release" in sentence
    assert len(no_common_version(tuple(range(60_000)), "x")) < 300
