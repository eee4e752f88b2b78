"""SPEC.md says what the code does: every message, every limit, who may say what when, and the bytes of its example."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from xxhash import xxh3_128_digest

import protocol
from protocol import limits, messages
from protocol.bulk_connection import BULK_TABLE
from protocol.codec import MESSAGES, decode, encode, members
from protocol.connection import CONTROL_TABLE, ControlConnection, Speaker, State, Table
from protocol.framing import PREFIX, frame_prefix
from protocol.messages import CompareSpan, Reply, Request, SpanAnswer
from tests.unit.protocol_house import deliver, open_bulk

SPEC = (Path(next(iter(protocol.__path__))) / "SPEC.md").read_text("utf-8")
OURS = [value for value in vars(messages).values() if getattr(value, "__module__", "").startswith(messages.__name__)]
DATACLASSES: list[Any] = [value for value in OURS if dataclasses.is_dataclass(value)]
ENUMS = [value for value in OURS if isinstance(value, type) and issubclass(value, enum.Enum)]


def _words(kind: Any) -> str:
    """A type in the words of the specification."""
    plain = {str: "str", int: "int", bool: "bool", float: "float", bytes: "bin", types.NoneType: "nil"}
    if kind in plain:
        return plain[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return f"array of {_words(arguments[0])}"
    if origin is dict:
        return f"map of {_words(arguments[0])} to {_words(arguments[1])}"
    if origin is typing.Union or isinstance(kind, types.UnionType):
        return " or ".join(map(_words, arguments))
    return f"`{kind.__name__}`"


@pytest.mark.parametrize("kind", DATACLASSES, ids=lambda kind: kind.__name__)
def test_every_message_is_documented_with_its_fields_and_its_reply(kind: Any) -> None:
    hints = typing.get_type_hints(kind)
    fields = [f"`{field.name}`: {_words(hints[field.name])}" for field in dataclasses.fields(kind)]
    reply = getattr(kind, "reply", None)
    heading = f"#### `{kind.__name__}`" + (f" → `{reply.__name__}`" if reply else "")
    assert f"\n{heading}\n\n{', '.join(fields) or 'no fields'}\n\n" in SPEC


def test_nothing_is_documented_that_is_no_message() -> None:
    headings = re.findall(r"^#### `(\w+)`", SPEC, re.MULTILINE)
    assert sorted(headings) == sorted(kind.__name__ for kind in DATACLASSES)
    assert set(MESSAGES) <= set(headings)


@pytest.mark.parametrize("kind", ENUMS, ids=lambda kind: kind.__name__)
def test_every_enum_is_documented_with_its_values(kind: type[enum.Enum]) -> None:
    values = ", ".join(f'"{member.value}"' for member in kind)
    assert f"\n- `{kind.__name__}`: {values}\n" in SPEC


def test_every_limit_on_the_wire_is_documented_with_its_value() -> None:
    rows = {name: int(value) for value, name in re.findall(r"^\| .* \| (\d+) \| `([\w.]+)` \|$", SPEC, re.MULTILINE)}
    values: dict[str, int] = {}
    for name, value in vars(limits).items():
        if isinstance(value, limits.FrameLimits):
            values |= {f"{name}.header_bytes": value.header_bytes, f"{name}.payload_bytes": value.payload_bytes}
        elif isinstance(value, int) and name.startswith(("MAX_", "MIN_", "BLOCK_")):
            values[name] = value
    own_taste = {"MAX_CONTROL_CONNECTIONS", "MAX_HANDSHAKES"}
    assert rows == {name: value for name, value in values.items() if name not in own_taste}


@pytest.mark.parametrize(("title", "table"), [("5. Control", CONTROL_TABLE), ("6. Bulk", BULK_TABLE)])
def test_who_may_say_what_when_is_documented_as_it_is(title: str, table: Table) -> None:
    section = SPEC.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    documented = {}
    for state in State:
        row = re.search(rf"^\| {state.value} \| (.*) \| (.*) \|$", section, re.MULTILINE)
        if row is None:
            assert not any(key[0] is state for key in table)
            continue
        for speaker, cell in zip(Speaker, row.groups(), strict=True):
            documented[state, speaker] = _said(cell, state)
    everything: dict[tuple[State, Speaker], dict[type, State]] = {(state, speaker): {} for state, speaker in documented}
    assert documented == {**everything, **{key: dict(row) for key, row in table.items()}}


def _said(cell: str, state: State) -> dict[type, State]:
    """A cell of the table of states: ``A`, `B` → next; any request`` and so on."""
    following: dict[type, State] = {}
    for clause in cell.split("; "):
        what, _, arrow = clause.partition(" → ")
        after = State(arrow) if arrow else state
        following |= {MESSAGES[tag]: after for tag in re.findall(r"`(\w+)`", what)}
        if "any request" in what:
            following |= dict.fromkeys(members(Request), after)
        if "the reply" in what:
            following |= dict.fromkeys(members(Reply), after)
    return following


def _example() -> list[bytes]:
    blocks = re.findall(r"```text\n([0-9a-f \n]+)```", SPEC)
    return [bytes.fromhex(block) for block in blocks]


def test_the_worked_example_is_what_the_codec_writes() -> None:
    frames = _example()
    assert len(frames) == 7
    for frame in frames:
        header_bytes, payload_bytes = PREFIX.unpack_from(frame)
        header, payload = frame[8 : 8 + header_bytes], frame[8 + header_bytes :]
        assert len(payload) == payload_bytes
        number, message = decode(header)
        assert frame_prefix(encode(message, number), payload_bytes) + payload == frame


def test_the_worked_example_is_a_conversation_that_the_machines_accept() -> None:
    hello, welcome, question, answer, compare, differs, data = _example()
    caller, listener = ControlConnection(Speaker.CALLER), ControlConnection(Speaker.LISTENER)
    (event,) = deliver([hello], listener)
    caller.say(event.message)
    (event,) = deliver([welcome], caller)
    listener.say(event.message)
    (event,) = deliver([question], listener)
    assert isinstance(event.message, messages.AskPower)
    caller.ask(event.message)
    assert deliver([answer], caller)[0].number == event.number

    source, target = open_bulk()
    (event,) = deliver([compare], target)
    assert isinstance(event.message, CompareSpan)
    source.send(event.message, event.payload)
    (event,) = deliver([differs], source)
    assert isinstance(event.message, SpanAnswer)
    target.send(event.message, event.payload)
    (event,) = deliver([data], target)
    assert isinstance(event.message, messages.BlockData)
    source.send(event.message, event.payload)


def test_the_digests_of_the_worked_example_are_made_as_it_says() -> None:
    """A superblock of two blocks, one of 512 bytes, and two details of ones at the target; seed 7."""
    block, short = xxh3_128_digest(bytes(65536), 7), xxh3_128_digest(bytes(512), 7)
    assert _example()[4].endswith(xxh3_128_digest(block + block, 7) + short)
    assert _example()[5].endswith(b"\x80\0" + xxh3_128_digest(b"\1" * 65536, 7) * 2)
    assert blake3(_example()[6][-16:]).digest() in _example()[6]
