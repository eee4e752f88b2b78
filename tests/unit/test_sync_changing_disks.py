"""Disks that shrink, grow or fail under a pass: both sides say which disk and where, and the pass can be run again."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

import pytest

from agent.delta.blocks import BLOCK_BYTES
from agent.disk.seam import Disk, Extent
from agent.errors import AgentError, DiskError, SyncError
from agent.sync.buffers import BufferPool
from agent.sync.conversation import PeerFailed
from agent.sync.tuning import Tuning
from protocol.messages import PassFailed
from tests.fakes.pass_bench import PassRun, run_disks
from tests.fakes.sparse_disk import SparseDisk, SparseStorage
from tests.fakes.wire import FakeWire

B = BLOCK_BYTES
COUNT = 40
SIZE = COUNT * B


def storage(seed: int) -> SparseStorage:
    dice = random.Random(seed)
    return SparseStorage(SIZE, {number: dice.randbytes(B) for number in range(COUNT)})


async def run(source: Disk, target: Disk, *, lanes: int = 1, quiet: bool = False) -> PassRun:
    """A pass in small batches; all buffers must come back."""
    pools = BufferPool(3, 2 * B), BufferPool(2, 1 << 20)
    done = await run_disks(
        source,
        target,
        size_bytes=SIZE,
        wires=[FakeWire.pair() for _ in range(lanes)],
        source_others={"buffers": pools[0], "tuning": Tuning(was_quiet=quiet)},
        target_others={"buffers": pools[1]},
    )
    assert all(pool.idle for pool in pools)
    return done


def told(done: PassRun, by_source: bool) -> PassFailed:
    """The last word of the side that failed."""
    said = done.said if by_source else done.answered
    failures = [message for message, _ in said if isinstance(message, PassFailed)]
    assert failures
    return failures[-1]


def assert_both_know(ours: AgentError, theirs: object, farewell: PassFailed) -> None:
    """The side that failed names disk and offset; the other repeats it."""
    assert isinstance(theirs, PeerFailed)
    assert theirs.sentence == ours.sentence == farewell.sentence
    assert "vda" in ours.sentence
    assert (farewell.code, farewell.target, farewell.offset_bytes) == (ours.code, "vda", ours.facts["offset_bytes"])


def broken(doing: str, number: int = errno.EIO) -> dict[str, tuple[int, OSError]]:
    """From the middle of the disk on it fails."""
    return {doing: (SIZE // 2, OSError(number, os.strerror(number)))}


@pytest.mark.parametrize("quiet", [False, True], ids=["held", "skimmed"])
@pytest.mark.parametrize("lanes", [1, 3])
async def test_a_source_that_fails_to_read_in_the_middle(quiet: bool, lanes: int) -> None:
    source, target = storage(1), storage(2)
    source.fail_from = broken("reading")
    done = await run(SparseDisk("vda", source, writable=False), SparseDisk("vda", target), lanes=lanes, quiet=quiet)
    assert isinstance(done.source_failure, DiskError)
    assert_both_know(done.source_failure, done.target_failure, told(done, by_source=True))
    offset = done.source_failure.facts["offset_bytes"]
    assert isinstance(offset, int)
    if not quiet:
        assert SIZE // 2 - 2 * B < offset < SIZE
    source.fail_from = {}
    assert (await run(SparseDisk("vda", source, writable=False), SparseDisk("vda", target))).complete
    assert source.blocks == target.blocks


@pytest.mark.parametrize("doing", ["reading", "writing", "reading back"])
async def test_a_target_that_fails_in_the_middle(doing: str) -> None:
    source, target = storage(1), storage(2)
    target.fail_from = broken(doing)
    done = await run(SparseDisk("vda", source, writable=False), SparseDisk("vda", target))
    assert isinstance(done.target_failure, DiskError)
    assert_both_know(done.target_failure, done.source_failure, told(done, by_source=False))
    target.fail_from = {}
    assert (await run(SparseDisk("vda", source, writable=False), SparseDisk("vda", target))).complete
    assert source.blocks == target.blocks


async def test_a_target_that_cannot_be_zeroed_in_the_middle() -> None:
    source, target = SparseStorage(SIZE), storage(2)
    target.fail_from = broken("zeroing")
    done = await run(SparseDisk("vda", source, writable=False), SparseDisk("vda", target))
    assert isinstance(done.target_failure, DiskError)
    assert_both_know(done.target_failure, done.source_failure, told(done, by_source=False))


async def test_a_source_that_is_smaller_than_was_granted() -> None:
    source, target = SparseStorage(SIZE - B, storage(1).blocks), storage(2)
    before = dict(target.blocks)
    del source.blocks[COUNT - 1]
    done = await run(SparseDisk("vda", source, writable=False), SparseDisk("vda", target))
    assert isinstance(done.source_failure, DiskError)
    assert isinstance(done.target_failure, PeerFailed)
    assert "vda" in done.target_failure.sentence
    assert target.blocks == before


class Remapped(SparseDisk):
    """A disk whose map ends elsewhere than the disk, as when it is resized while it is read."""

    def __init__(self, storage: SparseStorage, more_bytes: int) -> None:
        super().__init__("vda", storage, writable=False)
        self._more_bytes = more_bytes

    def extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
        end = self.size_bytes + self._more_bytes
        for start in range(0, end, B):
            yield Extent(start, min(B, end - start), zero=False)


@pytest.mark.parametrize("more_bytes", [B, -B, 512])
async def test_a_source_that_grows_or_shrinks_under_the_pass(more_bytes: int) -> None:
    source, target = storage(1), storage(2)
    done = await run(Remapped(source, more_bytes), SparseDisk("vda", target))
    assert isinstance(done.source_failure, SyncError | DiskError)
    assert isinstance(done.target_failure, PeerFailed)
    assert done.target_failure.facts["disk"] == "vda"
    assert target.blocks.keys() == set(range(COUNT))
    assert (await run(SparseDisk("vda", source, writable=False), SparseDisk("vda", target))).complete
    assert source.blocks == target.blocks


async def test_a_target_without_room_in_the_middle() -> None:
    source, target = storage(1), SparseStorage(SIZE)
    target.fail_from = broken("writing", errno.ENOSPC)
    done = await run(SparseDisk("vda", source, writable=False), SparseDisk("vda", target))
    assert isinstance(done.target_failure, DiskError)
    assert_both_know(done.target_failure, done.source_failure, told(done, by_source=False))
    assert done.target_failure.code == "disk-full"
