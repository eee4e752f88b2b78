"""Frames: limits are checked as soon as the prefix is there."""

from __future__ import annotations

import struct

import pytest

from protocol.errors import PeerViolation
from protocol.framing import FrameReader, Stage, frame_prefix
from protocol.limits import FrameLimits

LIMITS = FrameLimits(header_bytes=100, payload_bytes=1000)


def _put(reader: FrameReader, data: bytes) -> list[Stage]:
    """Give `data` byte by byte; the stages completed."""
    stages = []
    for byte in data:
        reader.want()[0] = byte
        stage = reader.filled(1)
        if stage is not None:
            stages.append(stage)
            if stage is Stage.HEADER and reader.payload_bytes:
                reader.begin_payload(memoryview(bytearray(reader.payload_bytes)))
    return stages


def test_a_frame_is_prefix_header_payload() -> None:
    assert frame_prefix(b"head", 3) == b"\x00\x00\x00\x04\x00\x00\x00\x03head"


def test_a_reader_goes_through_the_stages_and_starts_over() -> None:
    reader = FrameReader(LIMITS)
    with_payload = frame_prefix(b"head", 2) + b"xy"
    without = frame_prefix(b"h", 0)
    assert _put(reader, with_payload + without) == [
        Stage.PREFIX,
        Stage.HEADER,
        Stage.PAYLOAD,
        Stage.PREFIX,
        Stage.HEADER,
    ]
    assert reader.header == b"h"
    assert reader.between_frames


def test_a_payload_lands_in_the_buffer_given_for_it() -> None:
    reader = FrameReader(LIMITS)
    buffer = memoryview(bytearray(2))
    for byte in frame_prefix(b"head", 2):
        reader.want()[0] = byte
        reader.filled(1)
    reader.begin_payload(buffer)
    reader.want()[:2] = b"xy"
    assert reader.filled(2) is Stage.PAYLOAD
    assert bytes(buffer) == b"xy"


@pytest.mark.parametrize(
    ("header_bytes", "payload_bytes", "what"),
    [(101, 0, "header of 101"), (0, 0, "header of 0"), (2**32 - 1, 0, "header of"), (1, 1001, "payload of 1001")],
)
def test_lengths_beyond_the_limits_are_refused_before_anything_follows(
    header_bytes: int, payload_bytes: int, what: str
) -> None:
    reader = FrameReader(LIMITS)
    prefix = struct.pack(">II", header_bytes, payload_bytes)
    assert _put(reader, prefix[:7]) == []
    with pytest.raises(PeerViolation, match=what):
        _put(reader, prefix[7:])


def test_lengths_at_the_limits_are_taken() -> None:
    assert _put(FrameReader(LIMITS), struct.pack(">II", 100, 1000)) == [Stage.PREFIX]


def test_the_limits_may_change_between_frames() -> None:
    reader = FrameReader(LIMITS)
    _put(reader, frame_prefix(b"h", 0))
    reader.limits = FrameLimits(header_bytes=2, payload_bytes=0)
    with pytest.raises(PeerViolation):
        _put(reader, frame_prefix(b"hhh", 0))
