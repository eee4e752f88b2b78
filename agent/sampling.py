"""A look at some blocks of a disk that may be in use, for the estimates of a plan: bounded in time, changing nothing.

No lock is taken and reads have idle priority, so a running VM does not notice. What is read of it may be torn or old,
so no evidence is ever made of these digests.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from agent.delta.blocks import BLOCK_BYTES
from agent.disk.open import open_shared
from agent.disk.seam import Disk, Extent
from agent.errors import DiskError, HypervisorError
from agent.virt.seam import Hypervisor
from protocol.messages import BlockSamples, SampleBlocks

MAX_SAMPLES = 4096
"""A share of 1 % is told to a third of itself by so many; their digests fit the longest byte string of a message."""
MAP_WITHIN_S = 3.0
READ_WITHIN_S = 5.0
PACE_WITHIN_S = 1.0
"""Time for walking the disk's extents, for the blocks, and for measuring how fast it reads: together well below the
time a question may take."""
MAX_EXTENTS = 262_144
"""Of data, at most: 4 MiB of books. What lies behind them counts as data."""
RUN_BYTES = 8 << 20
"""Long enough that the storage's speed shows and not its latency, as in a pass."""
MAX_RUNS = 16
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, eq=False)
class DataMap:
    """Where a disk has data, in whole blocks.

    Attributes:
        first: number of the first block of each run of data, rising; shape (n,).
        counts: blocks in each run; shape (n,).
        data_bytes: how much data there is.
    """

    first: NDArray[np.int64]
    counts: NDArray[np.int64]
    data_bytes: int

    @property
    def blocks(self) -> int:
        """How many blocks hold data."""
        return int(self.counts.sum())

    def offsets_of(self, ranks: NDArray[np.int64]) -> list[int]:
        """The places on the disk, in bytes, of the data blocks of those ranks (0 is the first)."""
        ends = np.cumsum(self.counts)
        runs = np.searchsorted(ends, ranks, side="right")
        before = ends[runs] - self.counts[runs]
        return [int(offset) for offset in (self.first[runs] + ranks - before) * BLOCK_BYTES]


def sample_disk(hypervisor: Hypervisor, socket_dir: Path, request: SampleBlocks) -> BlockSamples:
    """Answer the question; blocks for up to some ten seconds.

    Raises:
        HypervisorError: no such VM, or its disk has no image that can be read.
        DiskError: the image cannot be read.
    """
    check_question(request)
    domain = hypervisor.inspect(request.vm_uuid)
    disk = next((disk for disk in domain.disks if disk.target == request.target), None)
    if disk is None or not disk.chain:
        why = "has no such disk" if disk is None else disk.problem or "has no image there"
        raise HypervisorError(
            f"the disk {request.target} of the VM {domain.name} cannot be sampled: the VM {why}", vm=domain.name
        )
    top = disk.chain[0]
    opened = open_shared(request.target, top.path, top.format, socket_dir)
    try:
        return sample(opened, request)
    finally:
        opened.close()


def check_question(request: SampleBlocks) -> None:
    """Raise `DiskError` for a question no disk could answer."""
    asked = len(request.offsets) or request.choose
    if not 0 <= asked <= MAX_SAMPLES or request.choose < 0 or (request.offsets and request.choose):
        raise DiskError(
            f"Disk {request.target}: {asked} samples are asked for; ask for at most {MAX_SAMPLES}, by offsets or by "
            "number.",
            disk=request.target,
        )
    if any(offset < 0 or offset % BLOCK_BYTES for offset in request.offsets):
        raise DiskError(
            f"Disk {request.target}: samples are blocks at multiples of {BLOCK_BYTES} bytes; ask for such.",
            disk=request.target,
        )


def sample(disk: Disk, request: SampleBlocks, clock: Clock = time.monotonic) -> BlockSamples:
    """The samples of an open disk.

    Raises:
        DiskError: a block cannot be read.
    """
    data = data_map(disk.extents(0, disk.size_bytes), disk.size_bytes, clock)
    generator = random.Random(request.seed)  # no secret: both sides must look at the same blocks
    offsets = request.offsets or choose_blocks(data, request.choose, generator)
    digests = list(_digests(disk, offsets, request.seed, clock))
    return BlockSamples(
        digests=b"".join(digests),
        data_bytes=data.data_bytes,
        read_bytes_s=_pace(disk, data, generator, clock),
        offsets=offsets[: len(digests)] if request.choose else (),
    )


def data_map(extents: Iterable[Extent], size_bytes: int, clock: Clock) -> DataMap:
    """Where a disk has data; what could not be walked in time, or is beyond counting, counts as data.

    Args:
        extents: of the whole disk, in order.
        size_bytes: of the disk.
        clock: monotonic seconds.
    """
    deadline = clock() + MAP_WITHIN_S
    first: list[int] = []
    counts: list[int] = []
    known_bytes, data_bytes = 0, 0

    def take(start: int, length: int) -> None:
        begin, end = start // BLOCK_BYTES, -(-(start + length) // BLOCK_BYTES)
        if first and begin <= first[-1] + counts[-1]:
            counts[-1] = end - first[-1]
        else:
            first.append(begin)
            counts.append(end - begin)

    for extent in extents:
        known_bytes = extent.offset_bytes + extent.length_bytes
        if not extent.zero:
            data_bytes += extent.length_bytes
            take(extent.offset_bytes, extent.length_bytes)
        if len(first) >= MAX_EXTENTS or clock() > deadline:
            break
    if known_bytes < size_bytes:
        data_bytes += size_bytes - known_bytes
        take(known_bytes, size_bytes - known_bytes)
    return DataMap(np.array(first, dtype=np.int64), np.array(counts, dtype=np.int64), data_bytes)


def choose_blocks(data: DataMap, count: int, generator: random.Random) -> tuple[int, ...]:
    """Offsets of `count` blocks of data, in bytes, in random order: one at random out of each of so many equal parts of
    the data, or every block where there are no more."""
    if data.blocks <= count:
        ranks = list(range(data.blocks))
    else:
        ranks = [min(int((part + generator.random()) * data.blocks / count), data.blocks - 1) for part in range(count)]
    generator.shuffle(ranks)
    return tuple(data.offsets_of(np.array(ranks, dtype=np.int64)))


def _digests(disk: Disk, offsets: Sequence[int], seed: int, clock: Clock) -> Iterator[bytes]:
    """The digest of each block, as far as time allows; a block behind the disk's end has that of nothing."""
    deadline = clock() + READ_WITHIN_S
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for offset in offsets:
        if clock() > deadline:
            return
        length = max(0, min(BLOCK_BYTES, disk.size_bytes - offset))
        if length:
            disk.read_into(offset, buffer[:length])
        yield xxh3_128_digest(buffer[:length], seed)


def _pace(disk: Disk, data: DataMap, generator: random.Random, clock: Clock) -> float:
    """Bytes a second at which runs of data are read; 0 where there are none worth measuring."""
    long = np.flatnonzero(data.counts * BLOCK_BYTES >= RUN_BYTES)
    if not len(long):
        return 0.0
    buffer = memoryview(bytearray(RUN_BYTES))
    begun = clock()
    read_bytes = 0
    for _ in range(MAX_RUNS):
        run = int(long[generator.randrange(len(long))])
        room = int(data.counts[run]) - RUN_BYTES // BLOCK_BYTES
        offset = (int(data.first[run]) + generator.randint(0, room)) * BLOCK_BYTES
        length = min(RUN_BYTES, disk.size_bytes - offset)
        disk.read_into(offset, buffer[:length])
        read_bytes += length
        if clock() - begun >= PACE_WITHIN_S:
            break
    elapsed_s = clock() - begun
    return read_bytes / elapsed_s if elapsed_s > 0 else 0.0
