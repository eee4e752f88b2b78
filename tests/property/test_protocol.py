"""Any message comes back as it was; any bytes in any pieces end in events or a protocol error."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import struct
import types
import typing
from collections.abc import Callable
from typing import Any

import msgpack
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from protocol.bulk_connection import BulkConnection
from protocol.bulk_ranges import superblock_count
from protocol.codec import MESSAGES, Message, decode, encode
from protocol.connection import Connection, ControlConnection, Speaker
from protocol.errors import PeerViolation
from protocol.framing import frame_prefix
from protocol.messages import (
    BulkWelcome,
    CompareSpan,
    Hello,
    Ping,
    Role,
    RunPass,
    SpanAnswer,
    Welcome,
    ZeroRanges,
)
from tests.unit.protocol_house import HELLO, MIB, ranges, span

PLAIN: dict[object, st.SearchStrategy[Any]] = {
    str: st.text(max_size=20),
    bool: st.booleans(),
    bytes: st.binary(max_size=20),
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    types.NoneType: st.none(),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of the type of a message's field."""
    if kind in PLAIN:
        return PLAIN[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if origin is typing.Union or isinstance(kind, types.UnionType):
        return st.one_of(*map(values, arguments))
    if issubclass(kind, enum.Enum):
        return st.sampled_from(kind)
    return st.deferred(lambda: messages_of(kind))


def messages_of(kind: type) -> st.SearchStrategy[Any]:
    """Any message of that class."""
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values(hints[field.name]) for field in dataclasses.fields(kind)})


ANY_MESSAGE: st.SearchStrategy[Message] = st.one_of(*(messages_of(kind) for _, kind in sorted(MESSAGES.items())))
ANY_NUMBER = st.integers(0, 2**32 - 1)


@given(ANY_MESSAGE, ANY_NUMBER)
@settings(max_examples=200)
def test_every_message_comes_back_as_it_was(message: Message, number: int) -> None:
    assert decode(encode(message, number)) == (number, message)


def test_every_message_has_been_thought_of() -> None:
    for kind in MESSAGES.values():
        messages_of(kind).validate()


@given(st.binary(max_size=200))
def test_any_header_is_a_message_or_a_violation(header: bytes) -> None:
    _decodes_or_violates(header)


@given(ANY_MESSAGE, st.data())
@settings(max_examples=100)
def test_a_spoilt_header_is_a_message_or_a_violation(message: Message, data: st.DataObject) -> None:
    header = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    _decodes_or_violates(bytes(header))


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(sorted(MESSAGES)), st.data())
@settings(max_examples=150)
def test_a_body_with_anything_in_its_fields_is_a_message_or_a_violation(tag: str, data: st.DataObject) -> None:
    fields = [field.name for field in dataclasses.fields(MESSAGES[tag])]
    assume(fields)
    body = {name: data.draw(JUNK) for name in fields}
    _decodes_or_violates(msgpack.packb([tag, 0, body]))


def _decodes_or_violates(header: bytes) -> None:
    try:
        number, message = decode(header)
    except PeerViolation:
        return
    # What was taken for a message is one: it can be written down again.
    assert decode(encode(message, number)) == (number, message)


# --- machines -------------------------------------------------------------------------------------------------------


BULK_WELCOME = BulkWelcome(version=2, software="", window_bytes=MIB, ahead_bytes=MIB, lanes=4)


def _new_listener() -> Connection:
    return ControlConnection(Speaker.LISTENER)


def _open_listener() -> Connection:
    connection = ControlConnection(Speaker.LISTENER)
    connection.feed(_frame(Hello(versions=(1,), software="", role=Role.COORDINATOR)))
    connection.next_event()
    connection.say(Welcome(version=1, software="", host=""))
    return connection


def _asking_caller() -> Connection:
    connection = ControlConnection(Speaker.CALLER)
    connection.say(Hello(versions=(1,), software="", role=Role.COORDINATOR))
    connection.feed(_frame(Welcome(version=1, software="", host="")))
    connection.next_event()
    connection.ask(Ping())
    return connection


def _open_target() -> Connection:
    connection = BulkConnection(Speaker.LISTENER)
    connection.feed(_frame(HELLO))
    connection.next_event()
    connection.send(BULK_WELCOME)
    return connection


def _open_source() -> Connection:
    connection = BulkConnection(Speaker.CALLER)
    connection.send(HELLO)
    connection.feed(_frame(BULK_WELCOME))
    connection.next_event()
    return connection


def _asking_source() -> Connection:
    connection = _open_source()
    assert isinstance(connection, BulkConnection)
    connection.send(*span(1, 0, MIB))
    return connection


MACHINES: list[Callable[[], Connection]] = [
    _new_listener,
    _open_listener,
    _asking_caller,
    _open_target,
    _open_source,
    _asking_source,
]


def _frame(message: Message, number: int = 0, payload: bytes = b"") -> bytes:
    return frame_prefix(encode(message, number), len(payload)) + payload


def _outcome(connection: Connection, pieces: list[bytes]) -> tuple[list[tuple[int, Message, bytes]], str]:
    """All events of the bytes, and the sentence of the violation that ended them, if one did."""
    events: list[tuple[int, Message, bytes]] = []
    try:
        for piece in pieces:
            connection.feed(piece)
            while (event := connection.next_event()) is not None:
                events.append((event.number, event.message, bytes(event.payload)))
    except PeerViolation as error:
        return events, error.sentence
    return events, ""


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def _ranges_payload(draw: st.DrawFn, count: int) -> bytes:
    return b"".join(struct.pack("<QQ", draw(st.integers(0, 2**20)), draw(st.integers(0, 2**18))) for _ in range(count))


@st.composite
def questions(draw: st.DrawFn) -> tuple[CompareSpan, int, bytes]:
    """A question about a span with its payload, in most cases one that may be asked."""
    blocks = draw(st.lists(st.integers(0, 15), min_size=1, max_size=4, unique=True).map(sorted))
    at, spoilt = draw(st.integers(0, 3)) * MIB, draw(st.integers(0, 4))
    message = CompareSpan(
        batch=draw(st.integers(0, 5)),
        offset_bytes=at,
        length_bytes=MIB,
        superblock_bytes=draw(st.sampled_from([65536, MIB])),
        detail_bytes=draw(st.sampled_from([4096, 65536])),
        count=len(blocks),
    )
    payload = ranges(*((at + block * 65536, 65536 + (spoilt == 1)) for block in blocks)) + bytes(16 * len(blocks))
    return message, 0, payload + bytes(16 * (spoilt == 2))


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Bytes a peer might send: frames of messages likely and unlikely, good and spoilt, and plain junk."""
    parts: list[bytes] = []
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.integers(0, 5))
        if kind == 0:
            parts.append(draw(st.binary(max_size=30)))
        elif kind == 1:
            parts.append(_frame(draw(ANY_MESSAGE), draw(st.integers(0, 3)), draw(st.binary(max_size=20))))
        elif kind == 2:
            count = draw(st.integers(1, 3))
            parts.append(_frame(ZeroRanges(count=count), 0, _ranges_payload(draw, count)))
        elif kind == 3:
            parts.append(_frame(*draw(questions())))
        elif kind == 4:
            answer = SpanAnswer(batch=1, read_bytes=draw(st.integers(0, MIB)), details=0)
            parts.append(_frame(answer, 0, draw(st.binary(min_size=4, max_size=4))))
        else:
            request = draw(st.one_of(messages_of(Ping), messages_of(RunPass)))
            parts.append(_frame(request, draw(st.integers(0, 4))))
    return b"".join(parts)


@given(st.sampled_from(MACHINES), streams(), st.lists(st.integers(0, 400), max_size=12))
@example(_open_target, _frame(typing.cast("Message", HELLO)), [1, 2, 3])
@example(_open_target, struct.pack(">II", 1, 2**32 - 1) + ranges((0, 1)), [7, 8])
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_any_bytes_in_any_pieces_give_the_same_events_and_the_same_end(
    machine: Callable[[], Connection], data: bytes, cuts: list[int]
) -> None:
    whole = _outcome(machine(), [data])
    assert _outcome(machine(), _cut(data, cuts)) == whole
    assert _outcome(machine(), [data[i : i + 1] for i in range(len(data))]) == whole


@given(st.sampled_from(MACHINES), streams())
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_receiving_in_place_gives_what_feeding_gives(machine: Callable[[], Connection], data: bytes) -> None:
    expected = _outcome(machine(), [data])
    connection = machine()
    events: list[tuple[int, Message, bytes]] = []
    rest, sentence = data, ""
    try:
        while rest:
            space = connection.want()
            count = min(len(space), len(rest))
            space[:count] = rest[:count]
            rest = rest[count:]
            event = connection.filled(count)
            if event is not None:
                events.append((event.number, event.message, bytes(event.payload)))
    except PeerViolation as error:
        sentence = error.sentence
    assert (events, sentence) == expected


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=6),
    st.integers(0, 65535),
    st.sampled_from([4096, 65536, 131072, MIB]),
)
def test_superblocks_are_counted_as_they_would_be_cut(
    runs: list[tuple[int, int]], cut_off_bytes: int, superblock_bytes: int
) -> None:
    """`runs`: of blocks, each with the gap before it; the end of the last is cut off."""
    offsets, lengths, end = [], [], 0
    for gap, blocks in runs:
        offsets.append(end + gap * 65536)
        lengths.append(blocks * 65536)
        end = offsets[-1] + lengths[-1]
    lengths[-1] -= cut_off_bytes
    pieces = 0
    for offset, length in zip(offsets, lengths, strict=True):
        at = offset
        while at < offset + length:
            at = (at // superblock_bytes + 1) * superblock_bytes
            pieces += 1
    assert superblock_count(offsets, lengths, superblock_bytes) == pieces


@given(st.lists(messages_of(RunPass), min_size=1, max_size=10), st.lists(st.integers(0, 4000), max_size=10))
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_what_one_machine_says_the_other_hears(requests: list[RunPass], cuts: list[int]) -> None:
    caller, listener = _asking_caller(), _open_listener()
    assert isinstance(caller, ControlConnection)
    said, expected = bytearray(_frame(Ping(), 1)), [(1, Ping(), b"")]
    for request in requests:
        number, buffers = caller.ask(request)
        said += b"".join(buffers)
        expected.append((number, request, b""))  # type: ignore[arg-type]
    assert _outcome(listener, _cut(bytes(said), cuts)) == (expected, "")
