"""Whatever two disks hold, a pass makes the target equal the source and sends no block that was equal."""

from __future__ import annotations

import functools
import random

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.delta.blocks import BLOCK_BYTES
from agent.delta.granularity import DETAIL_SIZES, SUPERBLOCK_SIZES, Granularity
from protocol.messages import BlockData
from tests.fakes.memory_disk import MemoryStorage
from tests.fakes.pass_bench import PassRun, run_pass

ZERO, DATA, ALLOCATED_ZERO = "zero", "data", "allocated zeroes"

blocks = st.lists(
    st.tuples(
        st.sampled_from([ZERO, DATA, ALLOCATED_ZERO]),
        st.sampled_from([ZERO, DATA, ALLOCATED_ZERO, "equal"]),
    ),
    min_size=1,
    max_size=40,
)
granularities = st.builds(
    Granularity,
    superblock_bytes=st.sampled_from(SUPERBLOCK_SIZES),
    detail_bytes=st.sampled_from(DETAIL_SIZES),
)
tails = st.sampled_from([0, 1, 511, 512, 4096, BLOCK_BYTES - 1])


def _fill(storage: MemoryStorage, number: int, kind: str, dice: random.Random) -> None:
    start = number * BLOCK_BYTES
    length = min(BLOCK_BYTES, storage.size_bytes - start)
    if kind == ZERO or length <= 0:
        return
    storage.allocate(start, length)
    if kind == DATA:
        storage.content[start : start + length] = dice.randbytes(length)


def _equal_blocks(source: MemoryStorage, target: MemoryStorage) -> set[int]:
    starts = range(0, source.size_bytes, BLOCK_BYTES)
    return {s for s in starts if source.content[s : s + BLOCK_BYTES] == target.content[s : s + BLOCK_BYTES]}


def _sent_blocks(run: PassRun) -> set[int]:
    sent: set[int] = set()
    for message, payload in (said for wire in run.wires for said in wire.sent):
        if isinstance(message, BlockData):
            for at in range(0, message.count * 16, 16):
                start = int.from_bytes(payload[at : at + 8], "little")
                length = int.from_bytes(payload[at + 8 : at + 16], "little")
                sent |= set(range(start // BLOCK_BYTES * BLOCK_BYTES, start + length, BLOCK_BYTES))
    return sent


@settings(max_examples=60, deadline=None)
@given(
    kinds=blocks,
    tail=tails,
    larger=st.sampled_from([0, 512, BLOCK_BYTES + 7]),
    seed=st.integers(0, 2**32),
    granularity=granularities,
    lanes=st.sampled_from([1, 1, 3]),
)
def test_the_target_ends_equal_and_no_equal_block_is_sent(
    kinds: list[tuple[str, str]], tail: int, larger: int, seed: int, granularity: Granularity, lanes: int
) -> None:
    dice = random.Random(seed)
    size = len(kinds) * BLOCK_BYTES - (BLOCK_BYTES - tail if tail else 0)
    source, target = MemoryStorage(size), MemoryStorage(size + larger)
    for number, (ours, theirs) in enumerate(kinds):
        _fill(source, number, ours, dice)
        if theirs == "equal":
            start, end = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, size)
            target.allocate(start, end - start)
            target.content[start:end] = source.content[start:end]
        else:
            _fill(target, number, theirs, dice)
    equal_before = _equal_blocks(source, target)
    if tail:
        equal_before.discard(size - tail)  # zeroes are told apart in whole blocks: a short last one may go as data

    run = trio.run(
        functools.partial(run_pass, source, target, batch_bytes=8 * BLOCK_BYTES, granularity=granularity, lanes=lanes)
    )

    assert run.source_failure is None
    assert run.target_failure is None
    assert target.content == source.content + bytes(larger)
    if larger == 0:
        assert not _sent_blocks(run) & equal_before
    assert run.target.verified_bytes == run.target.written_bytes + run.target.zeroed_bytes
    assert run.source.settled_bytes == size
