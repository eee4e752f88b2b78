"""A target with a digest map, over many passes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent.delta.blocks import BLOCK_BYTES, PAGE_BYTES
from agent.delta.digests import block_digests
from agent.delta.granularity import Granularity
from agent.disk.seam import Disk
from agent.sync.buffers import TARGET_BUFFER_BYTES, BufferPool
from agent.sync.map_file import Header, MapFile, NoMap
from agent.sync.pass_map import PassMap
from agent.sync.tuning import Tuning
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage
from tests.fakes.pass_bench import SEED, CountingThreads, PassRun, run_disks
from tests.fakes.wire import FakeWire

B, P, MIB, TIB = BLOCK_BYTES, PAGE_BYTES, 1 << 20, 1 << 40
SIZE = 40 * B + 3 * P + 512


def noise(seed: int, size: int) -> MemoryStorage:
    """A disk full of noise."""
    made = MemoryStorage(size)
    made.allocate(0, size)
    made.content[:] = random.Random(seed).randbytes(size)
    return made


@dataclass
class MapHouse:
    """One target's map over many passes.

    Attributes:
        path: its file.
        view: how many passes there were.
    """

    path: Path
    size_bytes: int
    view: int = 0

    def begin(self) -> PassMap:
        """The map, made if there is none that can be used."""
        try:
            return PassMap(MapFile.open(self.path, writable=True))
        except NoMap:
            return PassMap(MapFile.create(self.path, Header(seed=SEED, size_bytes=self.size_bytes, image="vda")))

    @property
    def known_bytes(self) -> int:
        """By the file alone."""
        file = MapFile.open(self.path, writable=False)
        try:
            return file.known_bytes
        finally:
            file.close()

    @property
    def header(self) -> Header:
        """As it is stored."""
        file = MapFile.open(self.path, writable=False)
        file.close()
        return file.header

    def agrees_with(self, content: bytes) -> bool:
        """Whether every block that is known holds what the map says."""
        found = PassMap(MapFile.open(self.path, writable=False))
        entries, known = found.look_up([(0, self.size_bytes)])
        found.close()
        digests = b"".join(block_digests(memoryview(content)[: self.size_bytes], seed=SEED))
        theirs = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 16)
        return bool((entries[known] == theirs[known]).all())

    async def run(
        self,
        source: Disk,
        target: Disk,
        *,
        granularity: Granularity | None = None,
        threads: CountingThreads | None = None,
        lanes: int = 1,
        digest_map: PassMap | None = None,
    ) -> PassRun:
        """A pass, complete or not; the map is put away as it deserves."""
        digest_map = digest_map or self.begin()
        run = await run_disks(
            source,
            target,
            wires=[FakeWire.pair(window_bytes=32 * MIB) for _ in range(lanes)],
            threads=threads,
            source_others={"buffers": BufferPool(4, 1 * MIB), "tuning": Tuning(granularity)},
            target_others={"buffers": BufferPool(2, TARGET_BUFFER_BYTES), "digest_map": digest_map},
            size_bytes=self.size_bytes,
        )
        self.view += 1
        digest_map.settle(f"v{self.view}" if run.complete else None, None)
        return run


def disks(source: MemoryStorage, target: MemoryStorage) -> tuple[MemoryDisk, MemoryDisk]:
    return MemoryDisk("vda", source, writable=False), MemoryDisk("vda", target)
