"""Messages to headers and back: msgpack arrays ``[tag, request number, body]``, strict in both directions.

Nothing is coerced and nothing is ignored: a key too many or too few, ``true`` for a number, a number as text, the same
key twice, bytes behind the end, an extension type, an unknown tag: each is a `PeerViolation`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Callable
from typing import Any, NoReturn

import msgpack
from cattrs import Converter
from cattrs.errors import ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn

from protocol import limits
from protocol.errors import LocalMisuse, PeerViolation
from protocol.messages import BulkMessage, ControlMessage

Message = ControlMessage | BulkMessage


def members(union: object) -> frozenset[type]:
    """The classes of a union of unions."""
    if isinstance(union, type):
        return frozenset((union,))
    return frozenset().union(*(members(member) for member in typing.get_args(union)))


MESSAGES: dict[str, type] = {message.__name__: message for message in members(Message)}
"""Every message by its tag, which is its class's name."""


def encode(message: Message, number: int = 0) -> bytes:
    """The header of a message. Raises LocalMisuse for what cannot be written down."""
    kind = type(message)
    unstructure = _WRITERS.get(kind)
    if unstructure is None:
        raise LocalMisuse(f"{kind.__name__} is no message")
    try:
        header = typing.cast("bytes", msgpack.packb([kind.__name__, number, unstructure(message)]))
        # The peer's own rules, applied before it sees anything: a value of a wrong type, a number too large, a text too
        # long are ours to notice. Costs a few microseconds.
        decode(header)
    except (ValueError, TypeError, AttributeError, OverflowError, PeerViolation) as error:
        raise LocalMisuse(f"{kind.__name__} cannot be encoded: {error}") from error
    return header


def decode(header: bytes) -> tuple[int, Message]:
    """The request number and the message in a header. Raises PeerViolation for anything but exactly one message."""
    try:
        outer = msgpack.unpackb(
            header,
            raw=False,
            strict_map_key=True,
            ext_hook=_no_extension,
            max_str_len=limits.MAX_TEXT_BYTES,
            max_bin_len=limits.MAX_TEXT_BYTES,
            max_array_len=limits.MAX_ARRAY_ITEMS,
            max_map_len=limits.MAX_MAP_KEYS,
            max_ext_len=0,
            **_Counter().hooks(),
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        # ExtraData, FormatError, StackError and UnicodeDecodeError are all ValueErrors; OutOfData is not.
        raise PeerViolation(f"a header is no acceptable msgpack: {_short(error)}") from error
    if type(outer) is not list or len(outer) != 3:
        raise PeerViolation("a header is not an array of tag, request number and body")
    tag, number, body = outer
    if type(tag) is not str or tag not in _READERS:
        raise PeerViolation("a header carries an unknown tag" + (f": {tag[:40]!r}" if type(tag) is str else ""))
    if type(number) is not int or not 0 <= number <= limits.MAX_REQUEST_NUMBER:
        raise PeerViolation(f"the request number of {tag} is no 32-bit number")
    try:
        return number, _READERS[tag](body)
    except _REJECTED as error:
        raise PeerViolation(f"{tag} is malformed: {_short(error)}") from error


class _Malformed(ValueError):
    """A value is not of its field's type."""


_REJECTED = (_Malformed, KeyError, ForbiddenExtraKeysError)


def _short(error: Exception) -> str:
    """What was wrong, without repeating what may be a megabyte of the peer's making."""
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]!r}"
    if isinstance(error, ForbiddenExtraKeysError):
        return "it has a key that does not belong there"
    if isinstance(error, UnicodeDecodeError):
        return "a string is not UTF-8"
    return (str(error) or type(error).__name__)[:200]


def _no_extension(code: int, data: bytes) -> NoReturn:
    raise _Malformed(f"extension type {code} ({len(data)} bytes)")


class _Counter:
    """Counts the containers of one header while msgpack builds them, and looks for keys that come twice."""

    def __init__(self) -> None:
        self._left = limits.MAX_CONTAINERS

    def hooks(self) -> dict[str, Callable[..., object]]:
        return {"object_pairs_hook": self._map, "list_hook": self._array}

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise _Malformed(f"more than {limits.MAX_CONTAINERS} maps and arrays")

    def _map(self, pairs: list[tuple[object, object]]) -> dict[object, object]:
        self._count()
        built = dict(pairs)
        if len(built) != len(pairs):
            raise _Malformed("a map has the same key twice")
        return built

    def _array(self, items: list[object]) -> list[object]:
        self._count()
        return items


# --- strict reading: one cattrs converter, hooks made once per message class -----------------------------------


def _exactly(kind: type) -> Callable[[object, Any], object]:
    def structure(value: object, _: Any) -> object:
        if type(value) is not kind:
            raise _Malformed(f"{kind.__name__} was expected, not {type(value).__name__}")
        return value

    return structure


def _integer(value: object, _: Any) -> int:
    if type(value) is not int:
        raise _Malformed(f"int was expected, not {type(value).__name__}")
    if not limits.INTEGER_MIN <= value <= limits.INTEGER_MAX:
        raise _Malformed("an integer does not fit 64 bits")
    return value


def _finite(value: object, _: Any) -> float:
    if type(value) is not float:
        raise _Malformed(f"float was expected, not {type(value).__name__}")
    if not math.isfinite(value):
        raise _Malformed("a float is infinite or no number")
    return value


def _enum_reader(kind: type[enum.Enum]) -> Callable[[object, Any], enum.Enum]:
    by_value = {member.value: member for member in kind}

    def structure(value: object, _: Any) -> enum.Enum:
        if type(value) is not str or value not in by_value:
            raise _Malformed(f"one of {', '.join(by_value)} was expected for {kind.__name__}")
        return by_value[value]

    return structure


def _is_tuple(kind: Any) -> bool:
    arguments = typing.get_args(kind)
    return typing.get_origin(kind) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis


def _tuple_reader(kind: Any) -> Callable[[object, Any], object]:
    (item, _) = typing.get_args(kind)
    read = _converter.get_structure_hook(item)

    def structure(value: object, _: Any) -> object:
        if type(value) is not list:
            raise _Malformed(f"array was expected, not {type(value).__name__}")
        return tuple([read(each, item) for each in value])

    return structure


def _is_dict(kind: Any) -> bool:
    return typing.get_origin(kind) is dict


def _dict_reader(kind: Any) -> Callable[[object, Any], object]:
    key_type, value_type = typing.get_args(kind)
    read_key, read_value = _converter.get_structure_hook(key_type), _converter.get_structure_hook(value_type)

    def structure(value: object, _: Any) -> object:
        if type(value) is not dict:
            raise _Malformed(f"map was expected, not {type(value).__name__}")
        return {read_key(key, key_type): read_value(each, value_type) for key, each in value.items()}

    return structure


def _is_union(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def _union_reader(kind: Any) -> Callable[[object, Any], object]:
    """Optional of anything, or a choice of plain types told apart by their own type."""
    choices = [choice for choice in typing.get_args(kind) if choice is not types.NoneType]
    optional = len(choices) < len(typing.get_args(kind))
    readers = {choice: _converter.get_structure_hook(choice) for choice in choices}
    only = choices[0] if len(choices) == 1 else None

    def structure(value: object, _: Any) -> object:
        if value is None and optional:
            return None
        chosen = only or type(value)
        if chosen not in readers:
            raise _Malformed(f"{kind} was expected, not {type(value).__name__}")
        return readers[chosen](value, chosen)

    return structure


def _dataclass_reader(kind: type) -> Callable[[object, Any], object]:
    fields = len(dataclasses.fields(kind))
    read: Callable[[Any, Any], object] = make_dict_structure_fn(
        kind, _converter, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=False
    )

    def structure(value: object, _: Any) -> object:
        if type(value) is not dict:
            raise _Malformed(f"map was expected for {kind.__name__}, not {type(value).__name__}")
        if len(value) < fields:  # cattrs would fill in defaults
            raise _Malformed(f"{kind.__name__} lacks a key")
        return read(value, kind)

    return structure


def _make_converter() -> Converter:
    converter = Converter(detailed_validation=False, forbid_extra_keys=True)
    for kind in (str, bool, bytes):
        converter.register_structure_hook(kind, _exactly(kind))
    converter.register_structure_hook(int, _integer)
    converter.register_structure_hook(float, _finite)
    converter.register_structure_hook_factory(dataclasses.is_dataclass, _dataclass_reader)
    converter.register_structure_hook_factory(_is_union, _union_reader)
    converter.register_structure_hook_factory(_is_tuple, _tuple_reader)
    converter.register_structure_hook_factory(_is_dict, _dict_reader)
    converter.register_structure_hook_factory(
        lambda kind: isinstance(kind, type) and issubclass(kind, enum.Enum), _enum_reader
    )
    # A whole number in a float field is Python's habit; on the wire it is a float.
    converter.register_unstructure_hook(float, float)
    return converter


def _reader(kind: type) -> Callable[[object], Message]:
    hook = _converter.get_structure_hook(kind)

    def read(body: object) -> Message:
        return typing.cast("Message", hook(body, kind))

    return read


_converter = _make_converter()
_READERS: dict[str, Callable[[object], Message]] = {tag: _reader(kind) for tag, kind in MESSAGES.items()}
_WRITERS: dict[type, Callable[[Any], dict[str, Any]]] = {
    kind: make_dict_unstructure_fn(kind, _converter) for kind in MESSAGES.values()
}
