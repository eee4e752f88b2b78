"""Headers: strict in both directions, bounded in memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest

from protocol import limits
from protocol.codec import MESSAGES, Message, decode, encode
from protocol.errors import LocalMisuse, PeerViolation
from protocol.messages import (
    Credit,
    Failure,
    FenceDescription,
    Goodbye,
    LiftFence,
    OnTimeout,
    Order,
    PassReport,
    Ping,
    PowerOff,
    Side,
)

ORDER = Order(pair="p", run="r", epoch=3)
FENCE = FenceDescription(
    pair="p",
    run="r",
    side=Side.ORIGINAL,
    autostart_before=True,
    locked=("vda", "vdb"),
    unlocked=(),
    condition=None,
    view=None,
)


def _header(tag: object, body: object, number: object = 1) -> bytes:
    return msgpack.packb([tag, number, body])  # type: ignore[no-any-return]


def _body(message: Message) -> dict[str, Any]:
    """The body of a message as plain values, to be spoilt."""
    return msgpack.unpackb(encode(message))[2]  # type: ignore[no-any-return]


def test_a_header_is_tag_number_and_body() -> None:
    assert msgpack.unpackb(encode(Credit(payload_bytes=5), 7)) == ["Credit", 7, {"payload_bytes": 5}]


def test_enums_tuples_options_and_nested_messages_come_back_as_they_were() -> None:
    message = PowerOff(order=ORDER, vm_uuid="u", timeout_s=1.5, on_timeout=OnTimeout.FORCE)
    assert decode(encode(message, 9)) == (9, message)
    assert decode(encode(FENCE)) == (0, FENCE)


def test_a_whole_number_of_seconds_is_written_as_a_float() -> None:
    message = PowerOff(order=ORDER, vm_uuid="u", timeout_s=900, on_timeout=OnTimeout.ABORT)
    decoded = decode(encode(message))[1]
    assert isinstance(decoded, PowerOff)
    assert type(decoded.timeout_s) is float


def test_a_field_with_a_default_is_written_and_required_all_the_same() -> None:
    body = _body(LiftFence(order=ORDER, vm_uuid="u", restore_autostart=True))
    assert body["autostart"] is None
    del body["autostart"]
    with pytest.raises(PeerViolation, match="lacks a key"):
        decode(_header("LiftFence", body))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (Credit(payload_bytes=1), {"payload_bytes": True}),
        (Credit(payload_bytes=1), {"payload_bytes": "1"}),
        (Credit(payload_bytes=1), {"payload_bytes": 1.0}),
        (Credit(payload_bytes=1), {"payload_bytes": None}),
        (Credit(payload_bytes=1), {"extra": 1}),
        (Goodbye(code="a", sentence="b"), {"code": b"a"}),
        (Goodbye(code="a", sentence="b"), {"code": 1}),
        (Goodbye(code="a", sentence="b"), {"code": ["a"]}),
        (FENCE, {"side": "left"}),
        (FENCE, {"side": 0}),
        (FENCE, {"side": ["original"]}),
        (FENCE, {"side": "ORIGINAL"}),
        (FENCE, {"autostart_before": 1}),
        (FENCE, {"locked": "vda"}),
        (FENCE, {"locked": {"vda": 1}}),
        (FENCE, {"locked": ["vda", 1]}),
        (FENCE, {"locked": None}),
        (FENCE, {"condition": False}),
        (FENCE, {"view": 0}),
        (LiftFence(order=ORDER, vm_uuid="u", restore_autostart=True), {"order": ["p", "r", 3]}),
        (LiftFence(order=ORDER, vm_uuid="u", restore_autostart=True), {"order": {"pair": "p", "run": "r"}}),
        (
            LiftFence(order=ORDER, vm_uuid="u", restore_autostart=True),
            {"order": {"pair": "p", "run": "r", "epoch": 1, "x": 1}},
        ),
        (Failure(code="a", sentence="b", facts={}), {"facts": {"a": True}}),
        (Failure(code="a", sentence="b", facts={}), {"facts": {"a": None}}),
        (Failure(code="a", sentence="b", facts={}), {"facts": {"a": 1.5}}),
        (Failure(code="a", sentence="b", facts={}), {"facts": {b"a": 1}}),
        (Failure(code="a", sentence="b", facts={}), {"facts": []}),
        (PassReport(view="v", elapsed_s=1.0, disks=()), {"elapsed_s": 1}),
        (PassReport(view="v", elapsed_s=1.0, disks=()), {"elapsed_s": float("nan")}),
        (PassReport(view="v", elapsed_s=1.0, disks=()), {"elapsed_s": float("inf")}),
        (PassReport(view="v", elapsed_s=1.0, disks=()), {"disks": [[]]}),
    ],
)
def test_nothing_is_coerced_and_nothing_is_ignored(message: Message, change: dict[str, object]) -> None:
    tag = type(message).__name__
    with pytest.raises(PeerViolation, match=f"{tag} is malformed"):
        decode(_header(tag, {**_body(message), **change}))


@pytest.mark.parametrize("tag", sorted(MESSAGES))
def test_a_body_that_is_no_map_is_refused(tag: str) -> None:
    for body in ([], None, 1, "x", [1]):
        with pytest.raises(PeerViolation, match="map was expected"):
            decode(_header(tag, body))


@pytest.mark.parametrize(
    "tag", [tag for tag in sorted(MESSAGES) if tag not in ("Ping", "Pong", "Done", "DescribeHost", "AskHoldings")]
)
def test_a_body_without_its_keys_is_refused(tag: str) -> None:
    with pytest.raises(PeerViolation, match="lacks"):
        decode(_header(tag, {}))


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"", "incomplete"),
        (b"\x93", "incomplete"),
        (b"\xc1", "FormatError"),
        (encode(Ping()) + b"\x00", "extra data"),
        (b"\x93\xa6Credit\x00\x82\xadpayload_bytes\x01\xadpayload_bytes\x02", "same key twice"),
        (b"\x93\xa4Ping\x00\xd4\x05\x00", "max_ext_len"),
        (b"\x93\xa4Ping\x00\xd6\xff\x00\x00\x00\x00", "max_ext_len"),
        (b"\x93\xa4Ping\x00\xc7\x00\x05", "extension type 5"),
        (b"\x93\xa4Ping\x00\x81\x01\x02", "not allowed for map key"),
        (b"\x93\xa1\xff\x00\x80", "not UTF-8"),
        (_header("Ping", {})[1:], "extra data"),
        (msgpack.packb(["Ping", 0]), "array of tag"),
        (msgpack.packb(["Ping", 0, {}, 0]), "array of tag"),
        (msgpack.packb({"Ping": 0}), "array of tag"),
        (msgpack.packb("Ping"), "array of tag"),
        (_header("ping", {}), "unknown tag: 'ping'"),
        (_header("Order", {"pair": "p", "run": "r", "epoch": 1}), "unknown tag"),
        (_header(b"Ping", {}), "unknown tag"),
        (_header(None, {}), "unknown tag"),
        (_header("Ping", {}, -1), "request number"),
        (_header("Ping", {}, 2**32), "request number"),
        (_header("Ping", {}, True), "request number"),
        (_header("Ping", {}, "1"), "request number"),
        (_header("Goodbye", {"code": "x" * (limits.MAX_TEXT_BYTES + 1), "sentence": ""}), "max_str_len"),
        (_header("Goodbye", {"code": b"x" * (limits.MAX_TEXT_BYTES + 1), "sentence": ""}), "max_bin_len"),
        (_header("Ping", [0] * (limits.MAX_ARRAY_ITEMS + 1)), "max_array_len"),
        (_header("Ping", {str(n): 0 for n in range(limits.MAX_MAP_KEYS + 1)}), "max_map_len"),
        (_header("Ping", [[]] * (limits.MAX_CONTAINERS + 1)), "maps and arrays"),
        (b"\x93\xa4Ping\x00" + b"\x91" * 5000 + b"\x90", "StackError"),
    ],
)
def test_what_is_no_message_is_refused(header: bytes, why: str) -> None:
    with pytest.raises(PeerViolation, match=why):
        decode(header)


def test_integers_of_64_bits_come_through_and_no_others() -> None:
    for value in (limits.INTEGER_MIN, 0, limits.INTEGER_MAX):
        assert decode(encode(Credit(payload_bytes=value)))[1] == Credit(payload_bytes=value)
    for value in (limits.INTEGER_MIN - 1, limits.INTEGER_MAX + 1):
        with pytest.raises(LocalMisuse):
            encode(Credit(payload_bytes=value))


@pytest.mark.parametrize(
    "message",
    [
        Credit(payload_bytes="5"),  # type: ignore[arg-type]
        Credit(payload_bytes=object()),  # type: ignore[arg-type]
        Goodbye(code="a", sentence="x" * (limits.MAX_TEXT_BYTES + 1)),
        Goodbye(code="a", sentence="\udcff"),  # a file name that is not UTF-8, as Python keeps it
        Failure(code="a", sentence="b", facts={"a": 1.5}),  # type: ignore[dict-item]
        PassReport(view="v", elapsed_s=float("nan"), disks=()),
        ORDER,
        "Ping",
    ],
)
def test_what_cannot_be_written_down_is_our_own_mistake(message: Any) -> None:
    with pytest.raises(LocalMisuse):
        encode(message)


def test_the_sentence_of_a_violation_stays_short_whatever_the_peer_wrote() -> None:
    for header in (
        _header("x" * 60_000, {}),
        _header("Ping", {"y" * 60_000: 1}),
        _header("Goodbye", {"a" * 60_000: 0}),
    ):
        with pytest.raises(PeerViolation) as caught:
            decode(header)
        assert len(caught.value.sentence) < 400


@pytest.mark.parametrize(
    "filler",
    [b"\x80", b"\x90", b"\xa1x", b"\xa2\xc3\xa4", b"\xc4\x01x", b"\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00"],
    ids=["maps", "arrays", "letters", "characters", "bytes", "floats"],
)
def test_a_header_of_the_largest_size_cannot_take_much_memory(filler: bytes) -> None:
    """Nested as deep as it goes and full of what is short on the wire and large in memory."""
    size = limits.CONTROL.header_bytes
    inner = (b"\xdd" + (limits.MAX_ARRAY_ITEMS).to_bytes(4, "big")) + filler * limits.MAX_ARRAY_ITEMS
    count = size // len(inner)
    header = (b"\x93\xa4Ping\x00\xdd" + count.to_bytes(4, "big") + inner * count)[:size]
    tracemalloc.start()
    try:
        with pytest.raises(PeerViolation):
            decode(header)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 48 * 2**20
