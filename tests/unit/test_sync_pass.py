"""A pass over one disk, and every way it can end short."""

from __future__ import annotations

import random

import pytest

from agent.delta.blocks import BLOCK_BYTES, PAGE_BYTES
from agent.errors import DiskError, VerificationFailed
from agent.sync.conversation import PeerFailed
from protocol.messages import BlockData, ZeroRanges
from tests.fakes.memory_disk import MemoryStorage
from tests.fakes.pass_bench import run_pass

SIZE = 24 * BLOCK_BYTES + 512


def _storage(seed: int | None, size: int = SIZE) -> MemoryStorage:
    storage = MemoryStorage(size)
    if seed is not None:
        storage.allocate(0, size)
        storage.content[:] = random.Random(seed).randbytes(size)
    return storage


async def test_equal_disks_send_no_block_and_leave_the_original_intact() -> None:
    source, target = _storage(1), _storage(1)
    run = await run_pass(source, target)
    assert run.source_failure is None
    assert run.quiet
    assert run.marked == 0
    assert run.source.compared_bytes == run.target.compared_bytes == SIZE


async def test_an_empty_target_gets_everything_and_reads_nothing() -> None:
    source, target = _storage(1), _storage(None)
    run = await run_pass(source, target)
    assert target.content == source.content
    assert run.target.compared_bytes == 0
    assert run.target.verified_bytes == SIZE
    assert run.marked == 1


async def test_a_sparse_source_is_not_read_and_clears_the_target() -> None:
    source, target = _storage(None), _storage(1)
    run = await run_pass(source, target)
    assert target.content == bytes(SIZE)
    assert run.source.compared_bytes == 0
    assert run.sent(BlockData) == 0
    assert (run.asked, run.sent(ZeroRanges)) == (1, 0)
    assert run.target.zeroed_bytes == run.target.verified_bytes == SIZE


async def test_one_changed_byte_costs_one_page() -> None:
    source, target = _storage(1), _storage(1)
    source.content[5 * BLOCK_BYTES + 3] ^= 1
    run = await run_pass(source, target)
    assert target.content == source.content
    assert run.source.changed_bytes == run.target.written_bytes == PAGE_BYTES


async def test_what_a_larger_target_has_more_is_zeroed() -> None:
    source, target = _storage(1), _storage(2, SIZE + 3 * BLOCK_BYTES)
    run = await run_pass(source, target)
    assert run.target_failure is None
    assert target.content == source.content + bytes(3 * BLOCK_BYTES)


async def test_storage_that_does_not_keep_what_is_written_fails_verification_on_both_sides() -> None:
    source, target = _storage(1), _storage(2)
    # The rot is below what is written, as of a disk that acknowledges and loses: it must survive the writing.
    target.forget_rot = lambda *_: None  # type: ignore[method-assign]
    target.rot(7 * BLOCK_BYTES + 9)
    run = await run_pass(source, target)
    assert isinstance(run.target_failure, VerificationFailed)
    assert run.target_failure.facts["offset_bytes"] == 7 * BLOCK_BYTES
    assert isinstance(run.source_failure, PeerFailed)
    assert run.source_failure.facts["peer_code"] == "verification-failed"


@pytest.mark.parametrize("doing", ["writing", "flushing", "reading back", "reading", "mapping"])
async def test_a_target_that_fails_ends_the_pass_on_both_sides(doing: str) -> None:
    source, target = _storage(1), _storage(2)
    target.fail_next(doing)
    run = await run_pass(source, target)
    assert isinstance(run.target_failure, DiskError)
    assert isinstance(run.source_failure, PeerFailed)
    assert "vda" in run.source_failure.sentence


@pytest.mark.parametrize("doing", ["reading", "mapping"])
async def test_a_source_that_fails_ends_the_pass_on_both_sides(doing: str) -> None:
    source, target = _storage(1), _storage(2)
    source.fail_next(doing)
    run = await run_pass(source, target)
    assert isinstance(run.source_failure, DiskError)
    assert isinstance(run.target_failure, PeerFailed)


async def test_a_target_without_room_says_so_on_both_sides() -> None:
    source = _storage(1)
    target = MemoryStorage(SIZE, capacity_bytes=4 * BLOCK_BYTES)
    run = await run_pass(source, target)
    assert isinstance(run.target_failure, DiskError)
    assert isinstance(run.source_failure, PeerFailed)
    assert run.source_failure.sentence == run.target_failure.sentence


async def test_a_pass_that_failed_can_be_run_again() -> None:
    source, target = _storage(1), _storage(2)
    target.fail_next("writing")
    assert (await run_pass(source, target)).target_failure is not None
    run = await run_pass(source, target)
    assert run.target_failure is None
    assert target.content == source.content
