"""Digests, answers and what follows from them, by values."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash

from agent.delta.blocks import BLOCK_BYTES, PAGE_BYTES, Ranges, split, to_ranges, total_bytes
from agent.delta.compare import Answer, Held, answer, detail_pieces, differing, groups, joined, portions
from agent.delta.digests import (
    block_digests,
    digests_from_wire,
    digests_to_wire,
    piece_digests,
    superblock_digests,
    zero_digest,
)
from agent.errors import SyncError

B, P = BLOCK_BYTES, PAGE_BYTES
MIB = 1 << 20
SEED = 2**64 - 1
NOTHING = digests_from_wire(b"")


def lengths(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def xxh3(content: bytes, seed: int = SEED) -> bytes:
    return xxhash.xxh3_128_intdigest(content, seed=seed).to_bytes(16, "big")


# --- digests ----------------------------------------------------------------------------------------------------------


def test_digests_are_canonical_xxh3_of_each_piece_under_the_seed() -> None:
    content = random.Random(0).randbytes(2 * B + 77)
    digests = piece_digests(memoryview(content), lengths(B, B, 77), seed=SEED)
    assert digests.shape == (3,)
    assert digests_to_wire(digests) == b"".join(xxh3(content[start : start + B]) for start in (0, B, 2 * B))


def test_the_digest_of_nothing_is_the_one_of_the_specification() -> None:
    # XXH3_128bits of an empty input, seed 0 (xxhash, tests/sanity_test_vectors.h).
    assert piece_digests(memoryview(b""), lengths(0), seed=0).tobytes().hex() == "99aa06d3014798d86001c324468d497f"


def test_a_superblock_is_hashed_over_the_digests_of_its_blocks() -> None:
    content = random.Random(1).randbytes(4 * B + 5)
    ranges = to_ranges([(B, 4 * B + 5)])
    superblocks, digests = Held(ranges, memoryview(content)).superblocks(2 * B, seed=SEED)
    block = [xxh3(content[start : start + B]) for start in range(0, len(content), B)]
    assert superblocks.tolist() == [[B, B], [2 * B, 2 * B], [4 * B, B + 5]]
    # A superblock of one block has that block's digest.
    assert digests_to_wire(digests) == block[0] + xxh3(block[1] + block[2]) + xxh3(block[3] + block[4])


def test_block_digests_are_enough_for_superblocks_of_any_size() -> None:
    content = random.Random(2).randbytes(9 * B)
    held = Held(to_ranges([(0, 5 * B), (7 * B, 4 * B)]), memoryview(content))
    blocks = held.blocks(seed=SEED)
    assert blocks == [xxh3(content[at : at + B]) for at in range(0, 9 * B, B)]
    for size in (B, 2 * B, 4 * B, 64 * B):
        made = superblock_digests(held.ranges.tolist(), blocks, size, seed=SEED)
        superblocks, digests = held.superblocks(size, seed=SEED)
        assert b"".join(made) == digests.tobytes()
        assert len(made) == len(superblocks)


def test_blocks_of_a_run_are_hashed_and_the_last_may_be_short() -> None:
    content = random.Random(3).randbytes(2 * B + 7)
    assert block_digests(memoryview(content), seed=SEED) == [xxh3(content[at : at + B]) for at in (0, B, 2 * B)]
    assert block_digests(memoryview(b""), seed=SEED) == []


@pytest.mark.parametrize("length", [1, P, B - 1, B, B + 5, 2 * B, MIB - B, MIB, MIB + 1])
def test_digests_of_zeroes_are_those_of_zeroes_that_were_read(length: int) -> None:
    held = Held(to_ranges([(4 * MIB, length)]), memoryview(bytes(length)))
    _, digests = held.superblocks(4 * MIB, seed=9)
    assert digests.tobytes() == zero_digest(length, seed=9)
    assert zero_digest(length, seed=9) is zero_digest(length, seed=9)
    assert zero_digest(length, seed=9) != zero_digest(length, seed=8)


def test_digests_survive_the_wire() -> None:
    digests = piece_digests(memoryview(bytes(range(256)) * 1024), lengths(*[B] * 4), seed=1)
    assert digests_from_wire(memoryview(digests_to_wire(digests))).tolist() == digests.tolist()
    with pytest.raises(SyncError, match="whole number of digests"):
        digests_from_wire(b"x" * 17)


def test_a_buffer_that_is_not_the_pieces_is_refused() -> None:
    with pytest.raises(ValueError, match="in a buffer of"):
        piece_digests(memoryview(bytes(B)), lengths(B + 1), seed=0)


def test_differing_tells_each_piece() -> None:
    ours = digests_from_wire(b"a" * 16 + b"b" * 16 + b"c" * 15 + b"\0")
    theirs = digests_from_wire(b"a" * 16 + b"x" + b"b" * 15 + b"c" * 15 + b"\1")
    assert differing(ours, theirs).tolist() == [False, True, True]
    assert differing(ours, ours.copy()).tolist() == [False, False, False]
    with pytest.raises(SyncError, match="hashed 3 and 2 blocks"):
        differing(ours, theirs[:2])


# --- what is held -----------------------------------------------------------------------------------------------------


def test_pieces_are_found_in_the_buffer() -> None:
    held = Held(to_ranges([(0, 2 * B), (5 * B, B)]), memoryview(bytes(3 * B)))
    pieces = to_ranges([(P, P), (B, B), (5 * B + P, P)])
    assert held.starts(pieces).tolist() == [P, B, 2 * B + P]


def test_details_are_hashed_where_they_lie_adjoining_or_not() -> None:
    content = random.Random(3).randbytes(3 * B)
    held = Held(to_ranges([(0, 2 * B), (5 * B, B)]), memoryview(content))
    pieces = to_ranges([(0, P), (P, P), (B, P), (5 * B, P), (5 * B + P, P)])
    starts = (0, P, B, 2 * B, 2 * B + P)
    assert digests_to_wire(held.details(pieces, seed=SEED)) == b"".join(xxh3(content[at : at + P]) for at in starts)


# --- asking and answering ---------------------------------------------------------------------------------------------


def ask(
    ours: bytes, theirs: bytes, data: Ranges, *, superblock_bytes: int, detail_bytes: int, empty: tuple[int, ...] = ()
) -> tuple[Answer, list[tuple[int, int]]]:
    """The target's answer about two disks from 0 on, and what the source then sends. `empty`: superblocks by offset
    that the target knows to be zero and does not read."""
    near = Held(data, memoryview(b"".join(ours[o : o + n] for o, n in data.tolist())))
    superblocks, digests = near.superblocks(superblock_bytes, seed=SEED)
    kept = superblocks[~np.isin(superblocks[:, 0], np.array(empty, dtype=np.uint64))]
    far = Held(kept, memoryview(b"".join(theirs[o : o + n] for o, n in kept.tolist())))
    told = answer(superblocks, digests, far, superblock_bytes=superblock_bytes, detail_bytes=detail_bytes, seed=SEED)
    found = portions(
        superblocks, told, superblock_bytes=superblock_bytes, detail_bytes=detail_bytes, most_bytes=len(ours)
    )
    sent: list[tuple[int, int]] = []
    for portion in found:
        sent += [(offset, length) for offset, length in portion.changed(near, seed=SEED).tolist()]
    return told, sent


def test_equal_data_is_answered_without_details_and_nothing_is_sent() -> None:
    content = random.Random(4).randbytes(5 * B + 9)
    told, sent = ask(content, content, to_ranges([(0, len(content))]), superblock_bytes=4 * B, detail_bytes=P)
    assert (told.differs.tolist(), told.empty.tolist(), len(told.details)) == ([False, False], [False, False], 0)
    assert sent == []


def test_one_changed_byte_sends_one_page_and_asks_details_of_one_superblock() -> None:
    ours = random.Random(5).randbytes(8 * B)
    theirs = bytearray(ours)
    theirs[5 * B + 3 * P + 1] ^= 1
    told, sent = ask(ours, bytes(theirs), to_ranges([(0, 8 * B)]), superblock_bytes=4 * B, detail_bytes=P)
    assert told.differs.tolist() == [False, True]
    assert len(told.details) == 4 * B // P
    assert sent == [(5 * B + 3 * P, P)]


def test_a_superblock_that_is_its_own_detail_is_sent_whole_and_tells_none() -> None:
    ours = random.Random(6).randbytes(3 * B)
    theirs = ours[:B] + bytes(B) + ours[2 * B :]
    told, sent = ask(ours, theirs, to_ranges([(0, 3 * B)]), superblock_bytes=B, detail_bytes=B)
    assert len(told.details) == 0
    assert sent == [(B, B)]


def test_what_is_empty_at_the_target_is_sent_whole_between_what_differs_in_part() -> None:
    ours = random.Random(7).randbytes(6 * B)
    theirs = bytearray(ours)
    theirs[P] ^= 1
    theirs[5 * B] ^= 1
    told, sent = ask(
        ours, bytes(theirs), to_ranges([(0, 6 * B)]), superblock_bytes=2 * B, detail_bytes=P, empty=(2 * B,)
    )
    assert told.differs.tolist() == [True, True, True]
    assert told.empty.tolist() == [False, True, False]
    assert sent == [(P, P), (2 * B, 2 * B), (5 * B, P)]


def test_zeroes_at_the_source_equal_what_the_target_does_not_read() -> None:
    ours = bytes(2 * B) + b"x" * B
    told, sent = ask(
        ours, bytes(3 * B), to_ranges([(0, 3 * B)]), superblock_bytes=2 * B, detail_bytes=P, empty=(0, 2 * B)
    )
    assert told.differs.tolist() == [False, True]
    assert told.empty.tolist() == [False, True]
    assert sent == [(2 * B, B)]


def test_the_short_end_of_a_disk_is_compared_in_pages_and_a_rest() -> None:
    ours = random.Random(8).randbytes(B + P + 100)
    theirs = bytearray(ours)
    theirs[-1] ^= 1
    _, sent = ask(ours, bytes(theirs), to_ranges([(0, len(ours))]), superblock_bytes=16 * B, detail_bytes=P)
    assert sent == [(B + P, 100)]


def test_only_superblocks_coarser_than_details_have_details() -> None:
    superblocks = to_ranges([(0, 2 * B)])
    assert len(detail_pieces(superblocks, 2 * B, 2 * B)) == 0
    assert len(detail_pieces(superblocks, 2 * B, B)) == 2
    assert len(detail_pieces(superblocks, 2 * B, P)) == 2 * B // P


def test_portions_take_their_details_in_order_and_stay_small() -> None:
    superblocks = split(to_ranges([(0, 8 * B)]), 2 * B)
    differs, empty = np.array([True, True, False, True]), np.array([False, True, False, False])
    details = digests_from_wire(bytes(range(64)) * 4)
    told = Answer(differs, empty, details[: 2 * 2])
    parts = list(portions(superblocks, told, superblock_bytes=2 * B, detail_bytes=B, most_bytes=4 * B))
    assert [part.superblocks.tolist() for part in parts] == [[[0, 2 * B], [2 * B, 2 * B]], [[6 * B, 2 * B]]]
    assert [part.pieces.tolist() for part in parts] == [[[0, B], [B, B]], [[6 * B, B], [7 * B, B]]]
    assert np.concatenate([part.details for part in parts]).tolist() == told.details.tolist()
    assert all(total_bytes(part.superblocks) <= 4 * B for part in parts)


def test_groups_are_full_and_never_empty() -> None:
    assert list(groups(lengths(3, 3, 3, 9, 1), 6)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert list(groups(lengths(), 6)) == []


def test_answers_that_follow_one_another_are_joined() -> None:
    first = Answer(np.array([True]), np.array([False]), digests_from_wire(b"a" * 16))
    second = Answer(np.array([False, True]), np.array([False, True]), NOTHING)
    whole = joined([first, second])
    assert whole.differs.tolist() == [True, False, True]
    assert whole.empty.tolist() == [False, False, True]
    assert whole.details.tobytes() == b"a" * 16
