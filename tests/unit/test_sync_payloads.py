"""Ranges from the peer: checked whole before any is used."""

from __future__ import annotations

import numpy as np
import pytest

from agent.sync.payloads import RisingRanges, ranges_from_wire, ranges_to_wire
from protocol.errors import PeerViolation

KIB64 = 65536


def _ranges(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array(pairs, dtype=np.uint64).reshape(-1, 2)


def _reader(size: int = 10 * KIB64 + 512) -> RisingRanges:
    return RisingRanges("ranges", size, KIB64)


def test_ranges_survive_the_wire() -> None:
    ranges = _ranges((0, 1), (KIB64, 2**40))
    assert (ranges_from_wire(ranges_to_wire(ranges), 2) == ranges).all()


def test_a_payload_that_is_too_short_is_a_violation() -> None:
    with pytest.raises(PeerViolation):
        ranges_from_wire(b"\0" * 31, 2)


def test_ranges_that_rise_are_accepted_across_messages() -> None:
    reader = _reader()
    reader.accept(_ranges((0, KIB64), (2 * KIB64, 2 * KIB64)))
    reader.accept(_ranges((4 * KIB64, 6 * KIB64), (10 * KIB64, 512)))
    assert reader.cursor_bytes == 10 * KIB64 + 512


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(0, 0)],
        [(1, KIB64)],
        [(0, KIB64 - 1)],
        [(0, 11 * KIB64)],
        [(11 * KIB64, KIB64)],
        [(0, 2**64 - 1)],
        [(2**64 - KIB64, KIB64)],
        [(KIB64, KIB64), (0, KIB64)],
        [(0, 2 * KIB64), (KIB64, KIB64)],
        [(0, KIB64), (0, KIB64)],
        [(10 * KIB64, 511)],
    ],
)
def test_ranges_outside_unaligned_repeated_or_falling_are_violations(pairs: list[tuple[int, int]]) -> None:
    reader = _reader()
    with pytest.raises(PeerViolation):
        reader.accept(_ranges(*pairs))
    assert reader.cursor_bytes == 0


def test_ranges_of_an_earlier_message_cannot_come_again() -> None:
    reader = _reader()
    reader.accept(_ranges((KIB64, KIB64)))
    with pytest.raises(PeerViolation, match="rising from 131072"):
        reader.accept(_ranges((KIB64, KIB64)))
