"""Zeroes in what is packed, by values."""

from __future__ import annotations

import random

import numpy as np
import pytest

from agent.delta.blocks import BLOCK_BYTES
from agent.delta.zeroes import is_zero, split_zeroes

B = BLOCK_BYTES
P = 4096


def noise(length: int) -> bytes:
    return random.Random(0).randbytes(length)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 4096, B, B + 3])
def test_only_a_block_of_zeroes_is_zero(length: int) -> None:
    block = bytearray(length)
    assert is_zero(memoryview(block))
    for at in {0, length // 2, length - 1}:
        block[at] = 0x80
        assert not is_zero(memoryview(block))
        block[at] = 0


def cut(content: bytes, first: int, runs: list[tuple[int, int]]) -> list[tuple[int, int, int, bool]]:
    ranges = np.array(runs, dtype=np.int64)
    offsets, lengths = ranges[:, 0], ranges[:, 1]
    parts = split_zeroes(memoryview(content), offsets, lengths, offsets - first)
    return list(zip(*(part.tolist() for part in parts), strict=True))


def test_runs_are_cut_where_aligned_blocks_of_zeroes_begin_and_end() -> None:
    content = noise(P) + bytes(B + 2 * B) + noise(P)
    # The run begins a page before a boundary: of its zeroes, three blocks are aligned.
    assert cut(content, B - P, [(B - P, len(content))]) == [
        (B - P, P, 0, False),
        (B, 3 * B, P, True),
        (4 * B, P, P + 3 * B, False),
    ]


def test_zeroes_that_fill_no_aligned_block_stay_data() -> None:
    content = bytes(2 * B - P)
    assert cut(content, P, [(P, len(content))]) == [(P, B - P, 0, False), (B, B, B - P, True)]
    assert cut(content, P, [(P, B)]) == [(P, B, 0, False)]


def test_neighbours_of_different_runs_are_told_apart() -> None:
    content = bytes(4 * B)
    assert cut(content, 0, [(0, B), (2 * B, 2 * B)]) == [(0, B, 0, True), (2 * B, 2 * B, 2 * B, True)]


def test_one_byte_makes_a_block_data_wherever_it_stands() -> None:
    for at in (0, 1, 4092, 4093, 4096, B - 1):
        content = bytearray(2 * B)
        content[at] = 1
        assert cut(bytes(content), 0, [(0, 2 * B)]) == [(0, B, 0, False), (B, B, B, True)]
