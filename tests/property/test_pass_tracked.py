"""A pass limited to what was written makes the target equal the view exactly where the base claim was true."""

from __future__ import annotations

import functools
import random
from typing import Any

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.delta.blocks import BLOCK_BYTES
from tests.fakes.memory_disk import MemoryStorage
from tests.fakes.pass_bench import PassRun, run_pass

B = BLOCK_BYTES
Writes = list[tuple[int, int, bool]]

writes = st.lists(st.tuples(st.integers(0, 24 * 16 - 1), st.integers(1, 40), st.booleans()), max_size=8)
"""Pages written to: the first, how many, and whether with zeroes (which releases them) or with noise."""


def base(size: int, dice: random.Random) -> MemoryStorage:
    """A disk of noise and holes."""
    storage = MemoryStorage(size)
    for start in range(0, size, B):
        if dice.random() < 0.6:
            put(storage, start, dice.randbytes(min(B, size - start)))
    return storage


def put(storage: MemoryStorage, offset: int, content: bytes) -> None:
    storage.allocate(offset, len(content))
    storage.content[offset : offset + len(content)] = content


def copy(storage: MemoryStorage) -> MemoryStorage:
    other = MemoryStorage(storage.size_bytes)
    other.content[:] = storage.content
    other.allocated[:] = storage.allocated
    return other


def apply(storage: MemoryStorage, todo: Writes, dice: random.Random) -> list[tuple[int, int]]:
    """Write; what a dirty bitmap would then say, page by page."""
    pages = set[int]()
    for page, count, zero in todo:
        start, end = page * 4096, min((page + count) * 4096, storage.size_bytes)
        if start >= end:
            continue
        pages |= set(range(page, -(-end // 4096)))
        if zero:
            storage.content[start:end] = bytes(end - start)
            storage.allocated[start // 4096 : end // 4096] = False
        else:
            put(storage, start, dice.randbytes(end - start))
    return [(p * 4096, min(4096, storage.size_bytes - p * 4096)) for p in sorted(pages)]


def carry(source: MemoryStorage, target: MemoryStorage, written: list[tuple[int, int]], **others: Any) -> PassRun:
    return trio.run(functools.partial(run_pass, source, target, written=written, batch_bytes=4 * B, **others))


def in_written(offset: int, written: list[tuple[int, int]]) -> bool:
    return any(start // B * B <= offset < -(-(start + length) // B) * B for start, length in written)


@settings(max_examples=80, deadline=None)
@given(
    todo=writes,
    size=st.sampled_from([24 * B, 20 * B + 512, 7 * B + 4096]),
    seed=st.integers(0, 2**32),
    lanes=st.sampled_from([1, 3]),
    link_is_scarce=st.booleans(),
    defect=st.one_of(st.none(), st.integers(0, 20 * B)),
)
def test_the_target_equals_the_view_exactly_if_it_equalled_the_base(
    todo: Writes, size: int, seed: int, lanes: int, link_is_scarce: bool, defect: int | None
) -> None:
    dice = random.Random(seed)
    source = base(size, dice)
    target = copy(source)
    written = apply(source, todo, dice)
    outside = False
    if defect is not None and defect < size:
        put(target, defect, bytes([target.content[defect] ^ 1]))
        outside = not in_written(defect, written)

    run = carry(source, target, written, lanes=lanes, link_is_scarce=link_is_scarce)

    assert run.complete, (run.source_failure, run.target_failure)
    assert (target.content == source.content) is not outside
    books = run.source
    assert books.zero_bytes + books.compared_bytes + books.unchanged_bytes == size
    assert run.target.unchanged_bytes == books.unchanged_bytes
    assert books.settled_bytes == books.work_bytes == size - books.unchanged_bytes
    assert run.target.verified_bytes == run.target.written_bytes + run.target.zeroed_bytes
    assert run.target.written_bytes == books.changed_bytes


@settings(max_examples=40, deadline=None)
@given(
    first=writes, second=writes, seed=st.integers(0, 2**32), fails_at=st.integers(1, 4), link_is_scarce=st.booleans()
)
def test_a_pass_that_failed_half_way_is_made_good_by_a_later_one_since_the_same_base(
    first: Writes, second: Writes, seed: int, fails_at: int, link_is_scarce: bool
) -> None:
    dice = random.Random(seed)
    source = base(24 * B, dice)
    before, target = copy(source), copy(source)
    written = apply(source, first, dice)
    doing = ("writing", "zeroing", "flushing", "reading back")[fails_at - 1]
    target.fail_next(doing)
    carry(source, target, written, link_is_scarce=link_is_scarce)
    target._failures.clear()
    for start in range(0, 24 * B, B):
        if not in_written(start, written):  # torn from the base, and nowhere else
            assert target.content[start : start + B] == before.content[start : start + B]

    later = apply(source, second, dice)
    both = sorted(set(written) | set(later))
    run = carry(source, target, both, link_is_scarce=link_is_scarce)
    assert run.complete, (run.source_failure, run.target_failure)
    assert target.content == source.content
