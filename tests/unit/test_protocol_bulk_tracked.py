"""Tracked spans on the bulk conversation, by values."""

from __future__ import annotations

import pytest

from protocol.errors import LocalMisuse
from protocol.messages import TrackedSpan
from tests.unit.protocol_house import BLOCK, MIB, answer, deliver, open_bulk, ranges, span, violates

Pairs = tuple[tuple[int, int], ...]


def tracked(
    data: Pairs = (),
    zeroes: Pairs = (),
    *,
    batch: int = 1,
    at: int = 0,
    length: int = MIB,
    superblock: int = 0,
    detail: int = 0,
    digests: int = 0,
) -> tuple[TrackedSpan, bytes]:
    message = TrackedSpan(
        batch=batch,
        offset_bytes=at,
        length_bytes=length,
        superblock_bytes=superblock,
        detail_bytes=detail,
        data_count=len(data),
        zero_count=len(zeroes),
    )
    return message, ranges(*data) + ranges(*zeroes) + bytes(16 * digests)


def test_a_span_that_asks_nothing_is_not_answered_and_takes_no_room() -> None:
    source, target = open_bulk(ahead_bytes=MIB)
    told = tracked(((0, MIB), (2 * MIB, MIB)), ((MIB, BLOCK),), length=2**62)
    assert not source.must_wait(*told)
    assert deliver(source.send(*told), target)[0].message == told[0]
    assert source.ahead_left_bytes == MIB
    with pytest.raises(LocalMisuse, match="not open"):
        target.send(answer())


def test_a_span_that_asks_is_answered_and_waits_for_room() -> None:
    source, target = open_bulk(ahead_bytes=MIB)
    first = tracked(((0, MIB),), ((2 * MIB, BLOCK),), length=4 * MIB, superblock=BLOCK, detail=BLOCK, digests=16)
    second = tracked(((4 * MIB, BLOCK),), batch=2, at=4 * MIB, superblock=BLOCK, detail=BLOCK, digests=1)
    deliver(source.send(*first), target)
    assert source.must_wait(*second)
    deliver(target.send(answer(read=MIB), bytes(4)), source)
    assert not source.must_wait(*second)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        pytest.param(tracked(((BLOCK, BLOCK), (0, BLOCK))), "empty, overlaps", id="data falls"),
        pytest.param(tracked((), ((BLOCK, BLOCK), (0, BLOCK))), "empty, overlaps", id="zeroes fall"),
        pytest.param(tracked(((0, 2 * BLOCK),), ((BLOCK, BLOCK),)), "empty, overlaps", id="both at once"),
        pytest.param(tracked(((0, 0),)), "is empty", id="an empty range"),
        pytest.param(tracked(((0, 512),)), "multiples of 65536", id="data of half a block"),
        pytest.param(tracked((), ((512, BLOCK),)), "multiples of 65536", id="zeroes off a block"),
        pytest.param(tracked(((MIB, BLOCK),)), "out of their span", id="data behind the span"),
        pytest.param(tracked((), ((MIB, BLOCK),)), "out of their span", id="zeroes behind the span"),
        pytest.param(tracked(((0, BLOCK),), digests=1), "16 bytes of payload, not 32", id="digests unasked"),
        pytest.param(tracked(detail=4096), "detail_bytes is 4096", id="details of nothing"),
        pytest.param(
            tracked(((0, 2 * BLOCK),), superblock=BLOCK, detail=BLOCK, digests=1), "1 digests came for 2", id="too few"
        ),
        pytest.param(tracked(superblock=BLOCK, detail=BLOCK, digests=1), "0 bytes of payload", id="no data, a digest"),
        pytest.param(tracked(superblock=3 * BLOCK, detail=BLOCK), "no power of two", id="an odd superblock"),
    ],
)
def test_what_a_tracked_span_must_not_be(told: tuple[TrackedSpan, bytes], why: str) -> None:
    source, target = open_bulk()
    with pytest.raises(LocalMisuse, match=why):
        source.send(*told)
    violates(target, *told, why)


def test_tracked_spans_rise_like_others() -> None:
    source, target = open_bulk()
    deliver(source.send(*span(3, 0, MIB)), target)
    violates(target, *tracked(batch=4, at=0), "stands before byte 1048576")
