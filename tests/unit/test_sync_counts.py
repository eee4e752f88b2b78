"""What a pass costs, in counts: bytes on the wire, reads, round trips, thread hops. Nothing here is timed."""

from __future__ import annotations

import random

import trio

from agent.delta.blocks import BATCH_BYTES, BLOCK_BYTES, PAGE_BYTES
from agent.delta.granularity import Granularity
from agent.sync.buffers import TARGET_BUFFER_BYTES, BufferPool
from agent.sync.tuning import Tuning
from agent.sync.writing import VERIFY_WHEN_IDLE_BYTES
from protocol.messages import BlockData, CompareSpan, Credit, EndOfPass, SpanAnswer, ZeroRanges
from tests.fakes.pass_bench import CountingThreads, PassRun, run_disks
from tests.fakes.sparse_disk import SparseDisk, SparseStorage
from tests.fakes.wire import FakeWire

B, P, MIB, TIB = BLOCK_BYTES, PAGE_BYTES, 1 << 20, 1 << 40
BLOCKS_OF_MIB = MIB // B
BATCH = BATCH_BYTES
_NOISE = [random.Random(number).randbytes(B) for number in range(31)]


def storage(size_bytes: int, blocks: range) -> SparseStorage:
    """A disk with data in those blocks."""
    return SparseStorage(size_bytes, {number: _NOISE[number % len(_NOISE)] for number in blocks})


def disks(source: SparseStorage, target: SparseStorage) -> tuple[SparseDisk, SparseDisk]:
    return SparseDisk("vda", source, writable=False), SparseDisk("vda", target)


def twins(size_bytes: int, blocks: range) -> tuple[SparseDisk, SparseDisk]:
    """Two disks that are the same."""
    return disks(storage(size_bytes, blocks), storage(size_bytes, blocks))


async def compare(
    source: SparseDisk,
    target: SparseDisk,
    *,
    buffers: int = 4,
    tuning: Tuning | None = None,
    threads: CountingThreads | None = None,
    lanes: int = 1,
) -> PassRun:
    """A complete pass with buffers of the real size."""
    run = await run_disks(
        source,
        target,
        wires=[FakeWire.pair(window_bytes=32 * MIB) for _ in range(lanes)],
        threads=threads,
        source_others={"buffers": BufferPool(buffers, BATCH), "tuning": tuning or Tuning()},
        target_others={"buffers": BufferPool(2, TARGET_BUFFER_BYTES)},
    )
    assert run.complete, (run.source_failure, run.target_failure)
    assert source.storage.read(0, min(source.size_bytes, 64 * MIB)) == target.storage.read(
        0, min(source.size_bytes, 64 * MIB)
    )
    return run


def once(reads: list[tuple[int, int]]) -> int:
    """How many bytes were read; none of them twice."""
    end = 0
    for offset, length in sorted(reads):
        assert offset >= end, f"{offset} was read before"
        end = offset + length
    return sum(length for _, length in reads)


# --- identical disks --------------------------------------------------------------------------------------------------


async def test_identical_disks_cost_at_most_32_bytes_on_the_wire_for_each_mib() -> None:
    source, target = twins(256 * MIB, range(256 * BLOCKS_OF_MIB))
    run = await compare(source, target)
    assert run.wire_bytes <= 32 * 256
    assert run.quiet
    assert run.source.wire_bytes == run.wire_bytes


async def test_identical_disks_cost_no_more_over_several_connections() -> None:
    source, target = twins(256 * MIB, range(256 * BLOCKS_OF_MIB))
    run = await compare(source, target, lanes=4)
    assert run.wire_bytes <= 32 * 256


async def test_identical_disks_are_read_once_on_each_side_and_not_written() -> None:
    source, target = twins(100 * MIB, range(100 * BLOCKS_OF_MIB))
    run = await compare(source, target)
    assert once(source.reads) == once(target.reads) == 100 * MIB
    assert "writing" not in target.requests
    assert "zeroing" not in target.requests
    assert run.marked == 0


async def test_a_disk_known_to_be_quiet_is_read_once_as_well() -> None:
    source, target = twins(200 * MIB, range(200 * BLOCKS_OF_MIB))
    run = await compare(source, target, tuning=Tuning(was_quiet=True))
    assert once(source.reads) == once(target.reads) == 200 * MIB
    assert run.asked <= 200 * MIB // BATCH_BYTES + 1  # it never gets far enough from its ends for more at once


async def test_thread_hops_are_few_for_each_mib() -> None:
    source, target = twins(128 * MIB, range(128 * BLOCKS_OF_MIB))
    threads = CountingThreads()
    run = await compare(source, target, threads=threads)
    spans = run.asked
    # A span is read once by each side, planned with three others, asked, heard, answered and heard again.
    assert threads.hops["disk"] <= 3 * spans + 8
    assert threads.hops["wire"] <= 4 * spans + 8
    assert threads.hops.get("compute", 0) == 0


# --- changed disks ----------------------------------------------------------------------------------------------------


async def test_one_changed_page_costs_one_page_and_a_bounded_overhead() -> None:
    source, target = twins(256 * MIB, range(256 * BLOCKS_OF_MIB))
    target.storage.write(7 * MIB + 3 * P + 5, b"changed")
    run = await compare(source, target)
    assert run.source.changed_bytes == run.target.written_bytes == run.target.verified_bytes == P
    # Beside the page, and what identical disks may cost: the digests of the pages of one superblock of 4 MiB.
    assert run.wire_bytes <= 32 * 256 + P + 4 * MIB // P * 16


async def test_a_held_span_is_never_read_twice_however_much_of_it_differs() -> None:
    blocks = range(40 * BLOCKS_OF_MIB)
    source, target = disks(storage(40 * MIB, blocks), SparseStorage(40 * MIB))
    for number in blocks:
        target.storage.blocks[number] = bytes([number % 251 + 1]) * B
    run = await compare(source, target)
    assert once(source.reads) == once(target.reads) == 40 * MIB
    assert run.source.changed_bytes == 40 * MIB


async def test_of_a_skimmed_span_only_what_differs_is_read_again() -> None:
    source, target = twins(512 * MIB, range(512 * BLOCKS_OF_MIB))
    target.storage.write(100 * MIB + 5, b"changed")
    target.storage.write(130 * MIB + 3 * B, b"changed")
    run = await compare(source, target, tuning=Tuning(Granularity(MIB, P), was_quiet=True))
    assert once(target.reads) == 512 * MIB
    assert source.read_bytes == 512 * MIB + 2 * MIB  # the two superblocks
    assert run.source.changed_bytes == 2 * P


async def test_adjoining_data_is_written_in_few_requests() -> None:
    blocks = range(32 * BLOCKS_OF_MIB)
    source, target = disks(storage(32 * MIB, blocks), SparseStorage(32 * MIB))
    run = await compare(source, target)
    assert run.source.changed_bytes == 32 * MIB
    assert target.read_bytes == 0
    assert target.requests["writing"] == run.sent(BlockData) <= 32 + 4
    assert 1 <= target.requests["flushing"] <= run.target.written_bytes // VERIFY_WHEN_IDLE_BYTES + 1


# --- sparse disks -----------------------------------------------------------------------------------------------------


async def test_a_sparse_disk_of_eight_tib_costs_what_its_data_costs() -> None:
    blocks = range(2**24, 2**24 + 4 * BLOCKS_OF_MIB)  # 4 MiB, one TiB from the beginning
    source, target = disks(storage(8 * TIB, blocks), storage(8 * TIB, range(2**26, 2**26 + 3)))
    threads = CountingThreads()
    run = await compare(source, target, threads=threads)
    assert source.storage.blocks == target.storage.blocks
    assert once(source.reads) == 4 * MIB
    assert target.read_bytes == 0
    assert run.asked == 1
    assert len(run.said) + len(run.answered) <= 20
    assert sum(threads.hops.values()) <= 60
    assert run.target.zeroed_bytes == 3 * B  # the target's own data, where the source has none
    assert run.source.zero_bytes == 8 * TIB - 4 * MIB


async def test_scattered_data_of_a_sparse_disk_shares_messages() -> None:
    blocks = range(0, 2**20, 2**10)  # 1024 blocks, one in each 64 MiB
    source, target = twins(64 * 2**30, blocks)
    run = await compare(source, target)
    assert once(source.reads) == once(target.reads) == 1024 * B
    assert run.asked == 1024 * B // BATCH + 1  # and the hole behind the last
    assert run.wire_bytes <= 1024 * 33 + 8 * 256  # a range and a digest for each, and two bits


async def test_zeroes_that_were_read_are_sent_as_ranges_and_not_as_bytes() -> None:
    source, target = disks(
        SparseStorage(16 * MIB, dict.fromkeys(range(16 * BLOCKS_OF_MIB), bytes(B))),
        storage(16 * MIB, range(16 * BLOCKS_OF_MIB)),
    )
    run = await compare(source, target)
    assert run.sent(BlockData) == 0
    assert run.sent(ZeroRanges) <= 2
    assert run.target.zeroed_bytes == 16 * MIB


# --- round trips ------------------------------------------------------------------------------------------------------


async def test_a_pass_takes_two_round_trips_however_many_spans_it_has() -> None:
    source, target = twins(32 * MIB, range(32 * BLOCKS_OF_MIB))
    for at in range(0, 32 * MIB, 3 * MIB):
        target.storage.write(at + 17, b"changed")
    pairs = [FakeWire.pair(window_bytes=32 * MIB, stepped=True) for _ in range(2)]
    wires = [end for pair in pairs for end in pair]
    threads = CountingThreads()
    runs: list[PassRun] = []

    async def carry() -> None:
        runs.append(
            await run_disks(
                source,
                target,
                wires=pairs,
                threads=threads,
                source_others={"buffers": BufferPool(16, 2 * MIB)},
            )
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(carry)
        for _ in range(2):
            await threads.quiet(wires)
            assert not runs
            assert sum(near.deliver() for near, _ in pairs)
            await threads.quiet(wires)
            assert not runs
            assert sum(far.deliver() for _, far in pairs)
    (run,) = runs
    assert run.complete
    assert run.asked == 16
    assert source.storage.blocks == target.storage.blocks
    kinds = [[type(message) for message, _ in near.sent] for near, _ in pairs]
    assert all(said[-1] is EndOfPass and said[0] is CompareSpan for said in kinds)
    assert sum(isinstance(message, SpanAnswer) for message, _ in run.answered) == 16
    assert sum(isinstance(message, Credit) for message, _ in run.answered) == run.sent(BlockData)
