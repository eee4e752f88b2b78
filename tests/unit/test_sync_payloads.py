"""Payloads from the peer: checked whole before any of them is used."""

from __future__ import annotations

import numpy as np
import pytest

from agent.delta.blocks import BLOCK_BYTES, PAGE_BYTES, Ranges, split, to_ranges
from agent.delta.compare import Answer
from agent.delta.digests import digests_from_wire
from agent.errors import SyncError
from agent.sync.payloads import (
    Allowed,
    answer_from_wire,
    answer_to_wire,
    question_from_wire,
    ranges_from_wire,
    ranges_to_wire,
)
from protocol.errors import PeerViolation
from protocol.messages import CompareSpan

B, P = BLOCK_BYTES, PAGE_BYTES

# --- ranges -----------------------------------------------------------------------------------------------------------


def test_ranges_survive_the_wire() -> None:
    ranges = to_ranges([(0, 1), (B, 2**40)])
    assert (ranges_from_wire(ranges_to_wire(ranges), 2) == ranges).all()
    assert ranges_to_wire(ranges)[:16] == bytes(8) + (1).to_bytes(8, "little")


def test_a_payload_that_is_too_short_is_a_violation() -> None:
    with pytest.raises(PeerViolation):
        ranges_from_wire(b"\0" * 31, 2)
    with pytest.raises(PeerViolation):
        ranges_from_wire(b"\0" * 31, -1)


# --- answers ----------------------------------------------------------------------------------------------------------


def _superblocks(count: int) -> Ranges:
    return split(to_ranges([(B, 2 * B * count)]), 2 * B)[:count]


def _answer(differs: list[bool], empty: list[bool], details: int) -> Answer:
    content = b"".join(number.to_bytes(16, "big") for number in range(details))
    return Answer(np.array(differs), np.array(empty), digests_from_wire(content))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 17])
def test_answers_survive_the_wire_whatever_their_number_of_superblocks(count: int) -> None:
    superblocks = split(to_ranges([(4 * B, 2 * B * count)]), 2 * B)
    differs = [number % 3 != 1 for number in range(count)]
    empty = [number % 6 == 2 for number in range(count)]
    told = _answer(differs, empty, 2 * sum(d and not e for d, e in zip(differs, empty, strict=True)))
    payload = b"".join(answer_to_wire(told))
    assert len(payload) == 2 * -(-count // 8) + 16 * len(told.details)
    read = answer_from_wire(payload, superblocks, superblock_bytes=2 * B, detail_bytes=B)
    assert read.differs.tolist() == differs
    assert read.empty.tolist() == empty
    assert read.details.tolist() == told.details.tolist()


@pytest.mark.parametrize(
    ("differs", "empty", "details"),
    [
        ([False, False], [True, False], 0),  # empty, and yet the same
        ([True, False], [False, False], 1),  # a detail is missing
        ([True, False], [False, False], 3),
        ([True, True], [True, False], 4),  # of an empty one details are told
        ([False, False], [False, False], 2),
    ],
)
def test_an_answer_that_contradicts_itself_is_a_violation_naming_the_offset(
    differs: list[bool], empty: list[bool], details: int
) -> None:
    superblocks = split(to_ranges([(4 * B, 4 * B)]), 2 * B)
    payload = b"".join(answer_to_wire(_answer(differs, empty, details)))
    with pytest.raises(PeerViolation, match=f"from byte {4 * B} on contradicts itself"):
        answer_from_wire(payload, superblocks, superblock_bytes=2 * B, detail_bytes=B)


def test_half_a_digest_in_an_answer_is_refused() -> None:
    payload = b"".join(answer_to_wire(_answer([False], [False], 0))) + b"x" * 8
    with pytest.raises(SyncError, match="whole number of digests"):
        answer_from_wire(payload, _superblocks(1), superblock_bytes=2 * B, detail_bytes=B)


def test_superblocks_that_are_their_own_details_bring_none() -> None:
    superblocks = split(to_ranges([(0, 4 * B)]), 2 * B)
    told = _answer([True, False], [False, False], 0)
    read = answer_from_wire(b"".join(answer_to_wire(told)), superblocks, superblock_bytes=2 * B, detail_bytes=2 * B)
    assert read.differs.tolist() == [True, False]


# --- questions --------------------------------------------------------------------------------------------------------


def _span(offset: int, length: int, *data: tuple[int, int]) -> tuple[CompareSpan, memoryview]:
    superblocks = split(to_ranges(data), 2 * B)
    payload = ranges_to_wire(to_ranges(data)) + b"d" * 16 * len(superblocks)
    message = CompareSpan(
        batch=0, offset_bytes=offset, length_bytes=length, superblock_bytes=2 * B, detail_bytes=P, count=len(data)
    )
    return message, memoryview(payload)


def test_a_question_comes_with_its_superblocks_and_their_digests() -> None:
    question = question_from_wire(*_span(0, 6 * B, (B, 2 * B), (5 * B, B)), 6 * B)
    assert question.data.tolist() == [[B, 2 * B], [5 * B, B]]
    assert question.superblocks.tolist() == [[B, B], [2 * B, B], [5 * B, B]]
    assert question.digests.tobytes() == b"d" * 48


def test_a_span_may_end_off_a_block_only_where_the_disk_ends() -> None:
    assert question_from_wire(*_span(B, B + 5), 2 * B + 5).data.shape == (0, 2)
    for size in (3 * B, 2 * B + 4, B):
        with pytest.raises(PeerViolation, match=f"at offset {B} does not fit the disk of {size} bytes"):
            question_from_wire(*_span(B, B + 5), size)


# --- what may be sent -------------------------------------------------------------------------------------------------


def _allowed(*spans: tuple[int, Ranges], size: int = 100 * B) -> Allowed:
    allowed = Allowed(size)
    for offset, superblocks in spans:
        allowed.open(offset, superblocks)
    return allowed


def test_pages_and_blocks_of_differing_superblocks_are_allowed_each_once_and_rising() -> None:
    allowed = _allowed((0, to_ranges([(0, 2 * B), (6 * B, 2 * B)])))
    allowed.accept(to_ranges([(P, P), (3 * P, B)]))
    allowed.accept(to_ranges([(B + 3 * P, P), (6 * B, 2 * B)]))
    for again in ((7 * B, B), (P, P), (8 * B, P)):
        with pytest.raises(PeerViolation, match=f"at offset {again[0]} is outside"):
            allowed.accept(to_ranges([again]))


def test_a_range_may_reach_over_superblocks_that_adjoin() -> None:
    _allowed((0, to_ranges([(0, 2 * B), (2 * B, 2 * B)]))).accept(to_ranges([(B, 2 * B)]))


@pytest.mark.parametrize(
    ("pairs", "wrong"),
    [
        ([(4 * B, P)], 4 * B),  # of a superblock that is the same
        ([(B, 2 * B)], B),  # over the end of one
        ([(B, 6 * B)], B),  # across a gap between two
        ([(5 * B, 2 * B)], 5 * B),  # from the gap into one
        ([(0, P), (3 * B, P)], 3 * B),  # the second
        ([(P, P), (0, P)], 0),  # falling
        ([(0, 2 * P), (P, P)], P),  # overlapping
        ([(0, P), (0, P)], 0),  # twice
        ([(1, P)], 1),  # off a page
        ([(0, P - 1)], 0),  # ends off a page
        ([(0, 0)], 0),  # nothing
        ([(8 * B, P)], 8 * B),  # behind the last
        ([(200 * B, P)], 200 * B),  # outside the disk
        ([(2**64 - P, P)], 2**64 - P),
        ([(P, 2**64 - P)], P),  # a sum that wraps around
    ],
)
def test_what_is_not_allowed_is_a_violation_naming_the_first_wrong_range(
    pairs: list[tuple[int, int]], wrong: int
) -> None:
    allowed = _allowed((0, to_ranges([(0, 2 * B), (6 * B, 2 * B)])))
    with pytest.raises(PeerViolation, match=f"at offset {wrong} is outside"):
        allowed.accept(to_ranges(pairs))
    allowed.accept(to_ranges([(0, P)]))  # nothing of the refused message counts


def test_nothing_is_allowed_before_an_answer() -> None:
    with pytest.raises(PeerViolation, match=r"at offset 0 is outside"):
        _allowed().accept(to_ranges([(0, P)]))
    with pytest.raises(PeerViolation, match="names no range"):
        _allowed().accept(to_ranges([]))


def test_data_must_be_of_one_span_and_never_of_one_before() -> None:
    spans = ((0, to_ranges([(0, B)])), (4 * B, to_ranges([(4 * B, B)])))
    with pytest.raises(PeerViolation, match=f"at offset {4 * B} is outside"):
        _allowed(*spans).accept(to_ranges([(0, P), (4 * B, P)]))
    allowed = _allowed(*spans)
    allowed.accept(to_ranges([(4 * B, P)]))
    with pytest.raises(PeerViolation, match="at offset 0 is outside"):
        allowed.accept(to_ranges([(0, P)]))


def test_spans_may_be_answered_out_of_turn_and_are_forgotten_when_data_moves_on() -> None:
    allowed = _allowed((8 * B, to_ranges([(8 * B, B)])), (0, to_ranges([(0, B)])), (4 * B, to_ranges([(4 * B, B)])))
    assert allowed.open_spans == 3
    for offset in (0, 4 * B, 8 * B):
        allowed.accept(to_ranges([(offset, P)]))
    assert allowed.open_spans == 1


def test_the_end_of_the_disk_may_lie_off_a_page() -> None:
    size = 2 * B + 517
    superblocks = to_ranges([(0, size)])
    _allowed((0, superblocks), size=size).accept(to_ranges([(2 * B, 517)]))
    for length in (516, 518):
        with pytest.raises(PeerViolation):
            _allowed((0, superblocks), size=size).accept(to_ranges([(2 * B, length)]))


def test_a_span_in_which_nothing_differs_is_not_kept() -> None:
    assert _allowed((0, to_ranges([]))).open_spans == 0
