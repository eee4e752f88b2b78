"""Buffers, windows, lanes and limits: what passes share, and that nobody waits for ever for it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from agent.delta.blocks import BLOCK_BYTES, PAGE_BYTES
from agent.delta.compression import Choice
from agent.delta.granularity import Granularity
from agent.sync.buffers import LEAST_WINDOW_BYTES, MOST_WINDOW_BYTES, RECEIVED_BYTES, BufferPool, Windows
from agent.sync.payloads import fitting_frame_bytes
from agent.sync.rate import Limits, RateLimit
from agent.sync.tuning import Tuning
from protocol.messages import BlockData, CompareSpan
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage
from tests.fakes.pass_bench import CountingThreads, PassRun, run_disks, run_pass
from tests.fakes.sparse_disk import SparseDisk, SparseStorage
from tests.fakes.wire import FakeWire
from tests.unit.sync_scripts import storage

B, P, MIB = BLOCK_BYTES, PAGE_BYTES, 1 << 20
FINE = Granularity(B, P)
SIZE = 40 * B + 512

# --- the pool ---------------------------------------------------------------------------------------------------------


async def test_the_buffer_that_came_back_last_is_lent_first() -> None:
    pool = BufferPool(2, B)
    idle = [pool.idle]
    first, second = await pool.take(), await pool.take()
    idle.append(pool.idle)
    assert first.nbytes == second.nbytes == B
    pool.give(first)
    pool.give(second)
    idle.append(pool.idle)
    assert idle == [True, False, True]
    assert await pool.take() is second


async def test_whoever_waits_longest_for_a_buffer_is_first() -> None:
    pool = BufferPool(1, B)
    buffer = await pool.take()
    served: list[int] = []

    async def wait(number: int) -> None:
        taken = await pool.take()
        served.append(number)
        pool.give(taken)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(wait, number)
            await wait_all_tasks_blocked()
        pool.give(buffer)
    assert served == [0, 1, 2, 3, 4]
    assert pool.idle


async def test_buffers_are_made_when_they_are_needed_and_used_again() -> None:
    pool = BufferPool(1000, B)
    first = await pool.take()
    pool.give(first)
    for _ in range(10):
        buffer = await pool.take()
        assert buffer is first
        pool.give(buffer)


# --- windows ----------------------------------------------------------------------------------------------------------


def test_the_first_connections_get_more_and_each_gets_some() -> None:
    windows = Windows()
    leases = [windows.lease() for _ in range(12)]
    assert leases[0] == min(MOST_WINDOW_BYTES, RECEIVED_BYTES // 2)
    assert leases == sorted(leases, reverse=True)
    assert min(leases) == LEAST_WINDOW_BYTES
    assert sum(leases) <= RECEIVED_BYTES + 12 * LEAST_WINDOW_BYTES


def test_what_is_given_back_can_be_leased_again() -> None:
    windows = Windows()
    for _ in range(5):
        leases = [windows.lease() for _ in range(20)]
        for lease in leases:
            windows.give_back(lease)
    assert windows.lease() == MOST_WINDOW_BYTES


@pytest.mark.parametrize("window", [MIB, 2 * MIB, 4 * MIB, 4 * MIB + 1, 32 * MIB])
def test_a_frame_of_scattered_pages_fits_the_window_it_was_made_for(window: int) -> None:
    frame = fitting_frame_bytes(window)
    # At most one range of a frame is shorter than a page.
    assert frame + (frame // P + 1) * 48 <= window
    assert frame >= window * 0.98 - P
    assert frame % P == 0


@pytest.mark.parametrize("window", [MIB, 2 * MIB])
async def test_frames_of_strong_compression_fit_a_small_window(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # What does not shrink is sent raw, in frames as large as the level asks for.
    monkeypatch.setattr("agent.delta.compression.CompressionController.choice", Choice(6, 4 * MIB))
    source, target = storage(1, 6 * MIB), MemoryStorage(6 * MIB)
    run = await run_disks(
        MemoryDisk("vda", source, writable=False),
        MemoryDisk("vda", target),
        wires=[FakeWire.pair(window_bytes=window)],
        source_others={"buffers": BufferPool(2, 6 * MIB), "tuning": Tuning(window_bytes=window)},
    )
    assert run.complete
    assert target.content == source.content


async def test_no_more_is_asked_about_at_once_than_the_target_lets() -> None:
    source, target = storage(1, 6 * MIB), storage(2, 6 * MIB)
    run = await run_disks(
        MemoryDisk("vda", source, writable=False),
        MemoryDisk("vda", target),
        wires=[FakeWire.pair(ahead_bytes=MIB)],
        source_others={"buffers": BufferPool(4, 4 * MIB), "ahead_bytes": MIB},
    )
    assert run.complete
    assert run.asked == 6
    assert target.content == source.content


# --- lanes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2, 5])
async def test_spans_take_turns_on_the_connections_and_together_are_the_disk(lanes: int) -> None:
    source, target = storage(1, SIZE), storage(2, SIZE)
    run = await run_pass(source, target, batch_bytes=4 * B, granularity=FINE, lanes=lanes)
    assert run.complete
    assert target.content == source.content
    counts = [sum(isinstance(message, CompareSpan) for message, _ in wire.sent) for wire in run.wires]
    assert sum(counts) == 11
    assert max(counts) - min(counts) <= 1
    assert run.target.verified_bytes == SIZE
    assert run.target.lanes == lanes


async def test_connections_without_a_span_end_as_well() -> None:
    source, target = storage(1, B), storage(2, B)
    run = await run_pass(source, target, lanes=5)
    assert run.complete
    assert target.content == source.content


# --- several disks ----------------------------------------------------------------------------------------------------


@dataclass
class Host:
    """What the passes of one host share."""

    sending: BufferPool = field(default_factory=lambda: BufferPool(2, 2 * B))
    receiving: BufferPool = field(default_factory=lambda: BufferPool(2, 2 * B))


async def between(here: Host, there: Host, seed: int, *, lanes: int = 1, quiet: bool = False) -> PassRun:
    """A pass over a disk that differs everywhere, from one host to another."""
    source, target = storage(seed, SIZE), storage(seed + 1000, SIZE)
    run = await run_disks(
        MemoryDisk("vda", source, writable=False),
        MemoryDisk("vda", target),
        wires=[FakeWire.pair() for _ in range(lanes)],
        source_others={"buffers": here.sending, "tuning": Tuning(FINE, was_quiet=quiet)},
        target_others={"buffers": there.receiving},
    )
    assert run.complete, (run.source_failure, run.target_failure)
    assert target.content == source.content
    return run


@pytest.mark.parametrize("quiet", [False, True])
async def test_several_disks_share_two_buffers_without_waiting_for_each_other_for_ever(quiet: bool) -> None:
    here, there = Host(), Host()
    async with trio.open_nursery() as nursery:
        for seed in range(6):
            nursery.start_soon(partial(between, here, there, seed, lanes=1 + seed % 3, quiet=quiet))
    assert here.sending.idle
    assert there.receiving.idle


async def test_two_hosts_may_send_to_each_other_with_two_buffers_each() -> None:
    here, there = Host(), Host()
    async with trio.open_nursery() as nursery:
        for seed in range(4):
            nursery.start_soon(between, here, there, seed)
            nursery.start_soon(between, there, here, seed + 100)
    assert all(pool.idle for host in (here, there) for pool in (host.sending, host.receiving))


async def test_a_host_may_send_to_itself() -> None:
    host = Host()
    await between(host, host, 1)
    assert host.sending.idle
    assert host.receiving.idle


async def test_cancelled_at_any_moment_a_pass_gives_its_buffers_back_and_can_be_run_again() -> None:
    dice = random.Random(5)
    here, there = Host(), Host()
    for number in range(30):
        with trio.move_on_after(dice.random() * 0.05):
            await between(here, there, number, lanes=1 + number % 2, quiet=number % 3 == 0)
        assert here.sending.idle
        assert there.receiving.idle
    await between(here, there, 99)


# --- limits -----------------------------------------------------------------------------------------------------------


class Counting(RateLimit):
    """A limit that limits nothing and counts what is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.taken_bytes = 0

    async def take(self, size_bytes: int) -> None:
        self.taken_bytes += size_bytes
        await super().take(size_bytes)


async def test_every_byte_read_to_compare_and_every_frame_is_taken_from_the_limits() -> None:
    source, target = storage(1, SIZE), storage(2, SIZE)
    ours, theirs = Limits(Counting(), Counting()), Limits(Counting(), Counting())
    run = await run_disks(
        MemoryDisk("vda", source, writable=False),
        MemoryDisk("vda", target),
        source_others={"limits": ours},
        target_others={"limits": theirs},
    )
    frames = sum(len(payload) for message, payload in run.said if isinstance(message, BlockData))
    taken = [limit.taken_bytes for limits in (ours, theirs) for limit in (limits.network, limits.read)]  # type: ignore[attr-defined]
    assert taken == [frames, SIZE, 0, SIZE]


class Closing(RateLimit):
    """A limit that lets so much through, and then nothing any more."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self._left_bytes = size_bytes

    async def take(self, size_bytes: int) -> None:
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            await trio.sleep_forever()


@pytest.mark.parametrize("limited", ["reads of the source", "reads of the target", "the network"])
async def test_nothing_is_read_or_sent_that_the_limits_have_not_let_through(limited: str) -> None:
    ours, theirs = Limits(), Limits()
    match limited:
        case "reads of the source":
            ours = Limits(read=Closing(20 * B))
        case "reads of the target":
            theirs = Limits(read=Closing(20 * B))
        case _:
            ours = Limits(network=Closing(20 * B))
    source, target = (
        SparseDisk("vda", SparseStorage(40 * B, dict.fromkeys(range(40), random.Random(seed).randbytes(B))))
        for seed in (1, 2)
    )
    wires, threads = FakeWire.pair(), CountingThreads()
    values = {"buffers": BufferPool(20, 2 * B), "limits": ours, "tuning": Tuning(Granularity(B, B))}

    async def carry() -> None:
        others = {"limits": theirs}
        await run_disks(source, target, wires=[wires], threads=threads, source_others=values, target_others=others)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(carry)
        await threads.quiet(wires)
        sent = sum(len(payload) for message, payload in wires[0].sent if isinstance(message, BlockData))
        amounts = {"reads of the source": source.read_bytes, "reads of the target": target.read_bytes}
        assert 0 < amounts.get(limited, sent) <= 20 * B
        nursery.cancel_scope.cancel()
