"""Spans, superblocks and answers of the bulk conversation, by values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocol import limits
from protocol.connection import State
from protocol.errors import LocalMisuse
from protocol.messages import CompareSpan, EndOfPass
from tests.unit.protocol_house import MIB, answer, ask_nine, compare, deliver, open_bulk, span, violates

K = 1024
END = EndOfPass(lanes=1, data_bytes=0, zero_bytes=0, compared_bytes=0)


def test_spans_may_be_answered_in_any_order() -> None:
    source, target = open_bulk(ahead_bytes=MIB)
    for batch in (1, 2, 7):
        deliver(source.send(*span(batch, batch * MIB, 128 * K)), target)
    assert source.ahead_left_bytes == MIB - 3 * 128 * K
    assert source.must_wait(*span(8, 8 * MIB, MIB))
    for batch in (7, 1, 2):
        deliver(target.send(answer(batch), bytes(2)), source)
    assert source.ahead_left_bytes == target.ahead_left_bytes == MIB
    assert not source.must_wait(*span(8, 8 * MIB, MIB))
    with pytest.raises(LocalMisuse, match="not open"):
        target.send(answer(1), bytes(2))


@pytest.mark.parametrize(
    ("following", "why"),
    [
        pytest.param(span(3, MIB, MIB), "batch 3 does not rise above 3", id="the same batch"),
        pytest.param(span(2, MIB, MIB), "batch 2 does not rise above 3", id="a lower batch"),
        pytest.param(span(4, 0, 64 * K), "stands before byte 1048576", id="the same span"),
        pytest.param(span(4, MIB - 64 * K, MIB), "stands before byte 1048576", id="an overlapping span"),
        pytest.param(span(4, MIB, MIB), "", id="an adjoining span"),
        pytest.param(span(9, 5 * MIB, MIB), "", id="a span further on"),
        pytest.param(compare(batch=4, at=MIB), "", id="a span without data"),
    ],
)
def test_batches_and_spans_rise(following: tuple[CompareSpan, bytes], why: str) -> None:
    source, target = open_bulk()
    deliver(source.send(*span(3, 0, MIB)), target)
    if why:
        with pytest.raises(LocalMisuse, match=why):
            source.send(*following)
        violates(target, *following, why)
    else:
        assert deliver(source.send(*following), target)[0].message == following[0]


def test_a_span_that_ends_off_a_block_is_the_last() -> None:
    source, target = open_bulk()
    deliver(source.send(*span(1, 0, MIB + 1)), target)
    following = span(2, MIB + 64 * K, 64 * K)
    with pytest.raises(LocalMisuse, match="the disk ended there"):
        source.send(*following)
    violates(target, *following, "the disk ended there")


@pytest.mark.parametrize(
    ("pairs", "superblock", "count"),
    [
        pytest.param([(0, MIB)], 64 * K, 16, id="each block"),
        pytest.param([(0, MIB)], MIB, 1, id="all under one"),
        pytest.param([(64 * K, 128 * K)], 128 * K, 2, id="cut at a multiple"),
        pytest.param([(0, 64 * K), (128 * K, 64 * K)], MIB, 2, id="none reaches over a gap"),
        pytest.param([(0, 64 * K), (64 * K, 64 * K)], MIB, 2, id="nor into an adjoining range"),
        pytest.param([(896 * K, 128 * K + 1)], 512 * K, 2, id="the last a byte long"),
        pytest.param([(0, 64 * K), (MIB, 1)], 64 * K, 2, id="a range of a byte"),
    ],
)
def test_a_superblock_is_what_of_one_range_lies_between_two_multiples(
    pairs: list[tuple[int, int]], superblock: int, count: int
) -> None:
    end = sum(pairs[-1])
    for digests in range(len(pairs), count + 3):
        source, target = open_bulk()
        question = compare(*pairs, length=end, superblock=superblock, digests=digests)
        if digests == count:
            deliver(source.send(*question), target)
            told = answer(read=sum(length for _, length in pairs))
            deliver(target.send(told, bytes(2 * -(-count // 8))), source)
        else:
            with pytest.raises(LocalMisuse, match=f"{digests} digests came for {count} superblocks"):
                source.send(*question)


@pytest.mark.parametrize(
    ("rows", "details"),
    [
        pytest.param(b"\0\0\0\0", 0, id="all the same"),
        pytest.param(b"\x80\0\0\0", 2, id="the first differs"),
        pytest.param(b"\0\x80\0\0", 1, id="the last differs, which is short"),
        pytest.param(b"\x80\x80\x80\0", 1, id="the first is empty"),
        pytest.param(b"\xff\x80\0\0", 17, id="all differ"),
        pytest.param(b"\xff\x80\xff\x80", 0, id="all are empty"),
    ],
)
def test_an_answer_tells_the_details_of_what_differs_and_is_not_empty(rows: bytes, details: int) -> None:
    source, target = open_bulk()
    ask_nine(source, target)
    told = answer(read=17 * 64 * K, details=details)
    assert deliver(target.send(told, rows, bytes(16 * details)), source)[0].message == told


def test_an_answer_may_come_in_pieces_of_any_length() -> None:
    source, target = open_bulk()
    ask_nine(source, target)
    with pytest.raises(LocalMisuse, match="bits behind"):
        target.send(answer(), b"", b"\0", b"", b"\x01\0", b"\0")
    deliver(target.send(answer(details=1), b"", b"\0", b"\x80\0", b"\0" + bytes(3), bytes(13)), source)


def test_where_details_are_as_large_as_superblocks_none_are_told() -> None:
    source, target = open_bulk()
    deliver(source.send(*span(1, 0, 64 * K)), target)
    with pytest.raises(LocalMisuse, match="details is 1; allowed are 0 to 0"):
        target.send(answer(details=1), b"\x80\0" + bytes(16))
    deliver(target.send(answer(), b"\x80\0"), source)


@pytest.mark.parametrize(("more_bytes", "fits"), [(0, True), (64 * K, False)])
def test_no_span_is_asked_about_whose_details_no_answer_can_tell(more_bytes: int, fits: bool) -> None:
    source, target = open_bulk(ahead_bytes=limits.MAX_AHEAD_BYTES)
    size = limits.MAX_DIGESTS * 4 * K + more_bytes
    question = compare((0, size), length=size, superblock=4 * MIB, detail=4 * K, digests=-(-size // (4 * MIB)))
    if fits:
        deliver(source.send(*question), target)
    else:
        with pytest.raises(LocalMisuse, match="details; an answer tells 262144 at most"):
            source.send(*question)


def test_a_span_without_data_waits_for_no_answer() -> None:
    source, target = open_bulk()
    deliver(source.send(*compare(length=2**62)), target)
    with pytest.raises(LocalMisuse, match="not open"):
        target.send(answer())
    assert source.ahead_left_bytes == 4 * MIB
    deliver(source.send(replace(END, lanes=2)), target)
    assert target.state is State.ENDING
