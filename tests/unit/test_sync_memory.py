"""Memory of received payloads: used again, and never lost, however a pass ends."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import trio

from agent.delta.blocks import BLOCK_BYTES
from agent.errors import DiskError
from agent.sync.buffers import LEAST_REUSED_BYTES, ReusedMemory
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage
from tests.fakes.pass_bench import PassRun, run_disks
from tests.fakes.wire import FakeWire

MIB = 1 << 20
SIZE = 64 * BLOCK_BYTES


@dataclass
class Watched:
    """Memory whose lent pieces are known.

    Attributes:
        lent: everything that was ever lent.
    """

    memory: ReusedMemory = field(default_factory=ReusedMemory)
    lent: list[weakref.ref[object]] = field(default_factory=list)

    def allocate(self, size_bytes: int) -> memoryview:
        view = self.memory.allocate(size_bytes)
        if size_bytes >= LEAST_REUSED_BYTES:
            self.lent.append(weakref.ref(view.obj))
        return view

    @property
    def out(self) -> int:
        """How many pieces are still lent."""
        gc.collect()
        return sum(piece() is not None for piece in self.lent)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


# --- the memory -------------------------------------------------------------------------------------------------------


def test_memory_is_used_again_once_the_last_view_of_it_is_gone() -> None:
    memory = ReusedMemory()
    first = memory.allocate(2 * MIB)
    assert first.nbytes == 2 * MIB
    assert not first.readonly
    address, part = _address(first), np.frombuffer(first[MIB:], dtype=np.uint8)
    del first
    other = memory.allocate(MIB)
    assert (_address(other) == address, memory.idle) == (False, 0)
    del part
    assert memory.idle == 1
    assert _address(memory.allocate(3 * MIB)) == address


def test_no_more_than_a_few_idle_pieces_are_kept() -> None:
    memory = ReusedMemory(MIB, kept=2)
    lent = [memory.allocate(MIB) for _ in range(5)]
    assert len({_address(view) for view in lent}) == 5
    lent.clear()
    assert memory.idle == 2


def test_what_is_small_or_larger_than_a_piece_is_not_kept() -> None:
    memory = ReusedMemory(MIB)
    for size in (0, 1, LEAST_REUSED_BYTES - 1, MIB + 1):
        assert memory.allocate(size).nbytes == size
    assert memory.idle == 0


def test_threads_never_get_the_same_memory_at_once() -> None:
    memory = ReusedMemory(LEAST_REUSED_BYTES, kept=3)

    def fill(number: int) -> bool:
        same = True
        for turn in range(200):
            view = memory.allocate(LEAST_REUSED_BYTES)
            content = np.frombuffer(view, dtype=np.uint32)
            content[:] = number * 1000 + turn
            same = same and bool((content == number * 1000 + turn).all())
        return same

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(fill, range(4))) == [True] * 4
    assert 1 <= memory.idle <= 3


# --- in a pass --------------------------------------------------------------------------------------------------------


class FailingDisk(MemoryDisk):
    """Takes one frame, and no more."""

    taken = 0

    def write_runs(self, runs: Sequence[tuple[int, int]], data: memoryview) -> None:
        self.taken += 1
        if self.taken > 1:
            raise DiskError(f"disk {self.name}: no space left: make room")
        super().write_runs(runs, data)


async def _pass(watched: Watched, kind: type[MemoryDisk], target: MemoryStorage) -> PassRun:
    source = MemoryStorage(SIZE)
    source.allocate(0, SIZE)
    source.content[:] = random.Random(5).randbytes(SIZE)
    run = await run_disks(
        MemoryDisk("vda", source, writable=False), kind("vda", target), wires=[FakeWire.pair(allocate=watched.allocate)]
    )
    assert (bytes(target.content) == bytes(source.content)) is run.complete
    return run


async def test_after_a_pass_all_memory_is_back() -> None:
    watched = Watched()
    run = await _pass(watched, MemoryDisk, MemoryStorage(SIZE))
    assert run.complete
    assert len(watched.lent) >= 4
    assert watched.out == 0
    assert 1 <= watched.memory.idle < len(watched.lent)


async def test_after_a_failed_write_all_memory_is_back() -> None:
    watched = Watched()
    run = await _pass(watched, FailingDisk, MemoryStorage(SIZE))
    assert isinstance(run.target_failure, DiskError)
    del run  # an error keeps the frames it passed through
    assert len(watched.lent) >= 2
    with trio.fail_after(30):
        while watched.out:  # a worker thread still holds the error it has just handed over, until it gets to run again
            await trio.lowlevel.checkpoint()
    assert watched.memory.idle >= 1
