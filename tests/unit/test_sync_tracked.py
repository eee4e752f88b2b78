"""Passes that are limited to what was written: what they cost in counts, and peers that lie in them."""

from __future__ import annotations

import random

import pytest

from agent.delta.blocks import BLOCK_BYTES, to_ranges
from agent.errors import AgentError
from agent.sync.buffers import TARGET_BUFFER_BYTES, BufferPool
from agent.sync.payloads import ranges_to_wire
from agent.sync.tuning import Tuning
from protocol.errors import PeerViolation
from protocol.messages import BlockData, CompareSpan, EndOfPass, TrackedSpan
from tests.fakes.memory_dirty import MemoryDirtyRanges
from tests.fakes.memory_disk import MemoryDisk
from tests.fakes.pass_bench import CountingThreads, PassRun, run_disks
from tests.fakes.sparse_disk import SparseDisk, SparseStorage
from tests.fakes.wire import FakeWire, ScriptedEnd
from tests.unit.sync_scripts import SIZE, Ending, ask, give, storage, tracked_target_against

B, MIB, TIB = BLOCK_BYTES, 1 << 20, 1 << 40
_NOISE = [random.Random(number).randbytes(B) for number in range(31)]


async def tracked(
    source: SparseDisk,
    target: SparseDisk,
    written: list[tuple[int, int]],
    *,
    scarce: bool = False,
    threads: CountingThreads | None = None,
) -> PassRun:
    run = await run_disks(
        source,
        target,
        wires=[FakeWire.pair(window_bytes=32 * MIB)],
        threads=threads,
        source_others={
            "buffers": BufferPool(4, 16 * MIB),
            "tuning": Tuning(link_is_scarce=scarce),
            "dirty": MemoryDirtyRanges(source.size_bytes, written),
        },
        target_others={"buffers": BufferPool(2, TARGET_BUFFER_BYTES), "since": "r1-1"},
    )
    assert run.complete, (run.source_failure, run.target_failure)
    return run


def disks(size_bytes: int, runs: list[tuple[int, int]]) -> tuple[SparseDisk, SparseDisk]:
    """A source with noise in those runs, and an empty target."""
    blocks = {n: _NOISE[n % 31] for offset, length in runs for n in range(offset // B, (offset + length) // B)}
    source = SparseStorage(size_bytes, blocks)
    return SparseDisk("vda", source, writable=False), SparseDisk("vda", SparseStorage(size_bytes))


@pytest.mark.parametrize("size_bytes", [8 << 30, 8 * TIB])
async def test_a_tracked_pass_costs_what_changed_whatever_the_disk_is(size_bytes: int) -> None:
    step = size_bytes // 64
    runs = [(n * step + 5 * MIB, MIB) for n in range(64)]
    source, target = disks(size_bytes, runs)
    threads = CountingThreads()
    run = await tracked(source, target, runs, threads=threads)
    assert source.storage.blocks == target.storage.blocks
    assert sorted(source.reads) == runs  # each written run once, nothing else
    assert target.read_bytes == 0
    assert source.requests["mapping"] == 64
    assert run.asked == 64 // 16 + 1
    assert len(run.said) <= 5 + 40 + 1
    assert sum(threads.hops.values()) <= 300
    assert run.source.unchanged_bytes == size_bytes - 64 * MIB
    assert run.source.progress().total_bytes == run.source.progress().done_bytes == 64 * MIB
    assert run.wire_bytes <= 64 * MIB + 64 * 16 * 64 + 8192


async def test_a_disk_nobody_wrote_to_costs_one_message_and_no_write() -> None:
    source, target = disks(8 * TIB, [])
    run = await tracked(source, target, [])
    assert run.asked == 1
    assert "mapping" not in source.requests
    assert not target.requests.keys() & {"writing", "zeroing"}
    assert run.marked == 0


async def test_what_was_written_and_reads_as_zero_is_neither_read_nor_sent() -> None:
    source, target = disks(TIB, [(0, B)])
    target.storage.blocks = {0: _NOISE[0], 5: _NOISE[1], 900: _NOISE[2]}
    run = await tracked(source, target, [(5 * B, 200 * MIB)])
    assert source.read_bytes == 0
    assert run.quiet
    assert target.storage.blocks == {0: _NOISE[0]}
    assert run.target.zeroed_bytes == run.target.verified_bytes == 2 * B


@pytest.mark.parametrize("scarce", [False, True])
async def test_on_a_scarce_link_what_was_written_is_compared_before_it_is_sent(scarce: bool) -> None:
    runs = [(0, 2 * MIB), (TIB // 2, 2 * MIB)]
    source, target = disks(TIB, runs)
    target.storage.blocks = dict(source.storage.blocks)
    target.storage.write(MIB + 17, b"another byte")
    run = await tracked(source, target, runs, scarce=scarce)
    assert source.storage.blocks == target.storage.blocks
    assert run.source.changed_bytes == (4096 if scarce else 4 * MIB)
    assert target.read_bytes == (4 * MIB if scarce else 0)
    assert run.sent(CompareSpan) == 0


# --- peers that lie ---------------------------------------------------------------------------------------------------


def tell(
    end: ScriptedEnd,
    *data: tuple[int, int],
    batch: int = 0,
    offset: int = 0,
    length: int = SIZE,
    zeroes: tuple[tuple[int, int], ...] = (),
) -> None:
    """A tracked span that asks nothing."""
    message = TrackedSpan(
        batch=batch,
        offset_bytes=offset,
        length_bytes=length,
        superblock_bytes=0,
        detail_bytes=0,
        data_count=len(data),
        zero_count=len(zeroes),
    )
    end.say(message, ranges_to_wire(to_ranges(data)) + ranges_to_wire(to_ranges(zeroes)))


def finish(end: ScriptedEnd, *, data: int = 0, zero: int = 0, compared: int = 0, unchanged: int = SIZE) -> None:
    end.say(EndOfPass(lanes=1, data_bytes=data, zero_bytes=zero, compared_bytes=compared, unchanged_bytes=unchanged))


async def refused(script: object, code: type[Exception], why: str, *, since: str | None = "r1-1") -> Ending:
    target = storage(1)
    before = bytes(target.content)
    ending = await tracked_target_against(target, script, since=since)  # type: ignore[arg-type]
    assert isinstance(ending.failure, code)
    assert why in str(ending.failure)
    assert bytes(target.content) == before
    return ending


async def test_a_tracked_span_without_a_grant_since_a_view_is_refused() -> None:
    ending = await refused(lambda end: tell(end), AgentError, "no such view was granted", since=None)
    assert ending.farewell.code == "evidence"


async def test_a_span_that_may_change_anything_is_refused_in_a_tracked_pass() -> None:
    content = bytes(storage(2).content)
    await refused(lambda end: ask(end, content), PeerViolation, "limited to what changed since r1-1")


async def test_data_outside_of_what_was_written_is_refused() -> None:
    content = bytes(storage(2).content)

    def script(end: ScriptedEnd) -> None:
        tell(end, (B, B))
        give(end, content, (2 * B, B))

    await refused(script, PeerViolation, "outside what the answers allow")


async def test_data_that_reaches_over_what_was_written_is_refused() -> None:
    content = bytes(storage(2).content)

    def script(end: ScriptedEnd) -> None:
        tell(end, (B, B))
        give(end, content, (B, 2 * B))

    await refused(script, PeerViolation, "outside what the answers allow")


async def test_the_end_while_data_is_owed_is_refused() -> None:
    content = bytes(storage(2).content)

    def script(end: ScriptedEnd) -> None:
        tell(end, (B, 2 * B))
        give(end, content, (B, B))
        finish(end, data=B, compared=2 * B, unchanged=SIZE - 2 * B)

    target = storage(1)
    ending = await tracked_target_against(target, script)
    assert isinstance(ending.failure, PeerViolation)
    assert f"owes {B} bytes" in str(ending.failure)


@pytest.mark.parametrize(
    ("books", "why"),
    [
        pytest.param({"unchanged": SIZE - B, "compared": B}, "books of source and target differ", id="less unchanged"),
        pytest.param({"unchanged": SIZE, "compared": B}, "books of source and target differ", id="too much in all"),
    ],
)
async def test_books_that_differ_about_what_is_unchanged_are_refused(books: dict[str, int], why: str) -> None:
    def script(end: ScriptedEnd) -> None:
        tell(end)
        finish(end, **books)

    await refused(script, PeerViolation, why)


async def test_a_tracked_pass_that_leaves_part_of_the_disk_out_is_refused() -> None:
    def script(end: ScriptedEnd) -> None:
        tell(end, length=2 * B)
        finish(end, unchanged=2 * B)

    await refused(script, PeerViolation, f"after {2 * B} of {SIZE} bytes")


async def test_zero_ranges_of_a_tracked_span_that_overlap_its_data_are_refused() -> None:
    await refused(lambda end: tell(end, (0, 2 * B), zeroes=((B, B),)), PeerViolation, "empty, overlaps the one before")


async def test_a_record_that_breaks_ends_the_pass() -> None:
    source = storage(1)
    dirty = MemoryDirtyRanges(source.size_bytes, [(B, B), (0, B)])
    run = await run_disks(
        MemoryDisk("vda", source, writable=False),
        MemoryDisk("vda", storage(2)),
        source_others={"dirty": dirty},
        target_others={"since": "r1-1"},
    )
    assert run.source_failure is not None
    assert "cannot be trusted" in str(run.source_failure)
    assert run.sent(BlockData) == 0
