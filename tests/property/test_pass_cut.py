"""A pass whose link is cut at any message ends with equal disks, and does again only what was on its way."""

from __future__ import annotations

import functools
import random

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import reconnect
from agent.delta.blocks import BLOCK_BYTES
from agent.sync import source as source_side
from agent.sync import writing
from tests.fakes.cut_link import WINDOW_BYTES, CutLinks, run_cut
from tests.fakes.memory_dirty import MemoryDirtyRanges
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage

BATCH_BYTES = 2 * BLOCK_BYTES
ON_ITS_WAY_BYTES = 2 * WINDOW_BYTES + 24 * BATCH_BYTES
"""Per cut: on the wire and waiting to be written (a window), waiting to be verified (as much), in the source's buffers,
and spans that wait for the word that they are settled."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnect, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(source_side, "TELL_EVERY_BYTES", 1)
    monkeypatch.setattr(writing, "VERIFY_WHEN_IDLE_BYTES", 1)


def _disks(blocks: int, differing: float, dice: random.Random) -> tuple[MemoryStorage, MemoryStorage]:
    source, target = MemoryStorage(blocks * BLOCK_BYTES), MemoryStorage(blocks * BLOCK_BYTES)
    for number in range(blocks):
        start = number * BLOCK_BYTES
        for storage in (source, target):
            if dice.random() < 0.8:
                storage.allocate(start, BLOCK_BYTES)
                storage.content[start : start + BLOCK_BYTES] = dice.randbytes(BLOCK_BYTES)
        if dice.random() > differing:
            target.allocate(start, BLOCK_BYTES)
            target.content[start : start + BLOCK_BYTES] = source.content[start : start + BLOCK_BYTES]
    return source, target


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocks=st.integers(1, 160),
    differing=st.sampled_from([0.0, 0.1, 1.0]),
    cuts=st.lists(st.one_of(st.integers(0, 20), st.integers(0, 400)), max_size=5),
    seed=st.integers(0, 2**32),
    tracked=st.booleans(),
)
def test_disks_are_equal_after_any_cuts_and_only_what_was_on_its_way_is_done_again(
    blocks: int, differing: float, cuts: list[int], seed: int, tracked: bool
) -> None:
    source, target = _disks(blocks, differing, random.Random(seed))
    links = CutLinks(cuts)
    size = source.size_bytes
    sending = {"written": MemoryDirtyRanges(size, [(0, size)])} if tracked else None

    run = trio.run(
        functools.partial(
            run_cut,
            MemoryDisk("vda", source, writable=False),
            MemoryDisk("vda", target),
            links,
            batch_bytes=BATCH_BYTES,
            sending=sending,
            since="an earlier view" if tracked else None,
        )
    )

    assert run.failures == []
    assert target.content == source.content
    assert run.proven.size_bytes == size
    ours, theirs = run.source, run.target
    assert ours.zero_bytes + ours.compared_bytes + ours.unchanged_bytes + ours.resumed_bytes == size
    assert ours.resumed_bytes == theirs.resumed_bytes
    assert ours.reconnects == theirs.reconnects == len(links.hellos) - 1
    told = [sum(length for _, length in runs) for runs in links.told]
    assert told == sorted(told)  # what is proven stays so
    read_bytes = ours.compared_bytes + ours.earlier_compared_bytes
    assert read_bytes <= size + ours.reconnects * ON_ITS_WAY_BYTES
    sent_bytes = ours.changed_bytes + ours.earlier_changed_bytes
    assert sent_bytes <= size + ours.reconnects * ON_ITS_WAY_BYTES
