"""A look at some blocks: which ones, how many, and in how much time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from xxhash import xxh3_128_digest

from agent.disk.seam import Extent
from agent.errors import DiskError, HypervisorError
from agent.sampling import MAX_SAMPLES, READ_WITHIN_S, choose_blocks, data_map, sample
from protocol.messages import BlockSamples, DescribeHost, HostDescription, InspectVm, SampleBlocks, VmDescription
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage
from tests.unit.agent_house import AgentHouse, open_house

BLOCK = 64 * 1024
SEED = 77


@pytest.fixture
def house(tmp_path: Path) -> Iterator[AgentHouse]:
    with open_house(tmp_path) as opened:
        yield opened


def at_rest() -> float:
    """A clock that stands still: there is always time."""
    return 0.0


def ticking(step_s: float) -> Callable[[], float]:
    """A clock that goes on by so much at every look."""
    count = itertools.count()
    return lambda: next(count) * step_s


def question(*offsets: int, choose: int = 0) -> SampleBlocks:
    return SampleBlocks(vm_uuid="u", target="vda", seed=SEED, offsets=offsets, choose=choose)


def disk_of(*blocks: bytes | None) -> MemoryDisk:
    """A disk of such blocks, each filled with that byte; None: a hole."""
    storage = MemoryStorage(len(blocks) * BLOCK)
    disk = MemoryDisk("vda", storage)
    for number, content in enumerate(blocks):
        if content is not None:
            disk.write(number * BLOCK, memoryview(content * BLOCK))
    return disk


def digest(content: bytes, length: int = BLOCK) -> bytes:
    return xxh3_128_digest(content * length, SEED)


def test_blocks_that_are_named_are_digested_in_order() -> None:
    answer = sample(disk_of(b"a", None, b"c"), question(2 * BLOCK, 0, BLOCK), at_rest)
    assert answer.digests == digest(b"c") + digest(b"a") + digest(b"\0")
    assert answer.data_bytes == 2 * BLOCK
    assert answer.offsets == ()


def test_a_block_at_the_end_is_as_short_as_the_disk_and_one_behind_it_is_empty() -> None:
    disk = MemoryDisk("vda", MemoryStorage(BLOCK + 512))
    disk.write(BLOCK, memoryview(b"z" * 512))
    answer = sample(disk, question(BLOCK, 2 * BLOCK), at_rest)
    assert answer.digests == digest(b"z", 512) + digest(b"", 0)


def test_blocks_are_chosen_among_data_alone_and_told() -> None:
    disk = disk_of(*([None] * 50), b"a", *([None] * 40), b"b", b"c")
    answer = sample(disk, question(choose=100), at_rest)
    assert sorted(answer.offsets) == [50 * BLOCK, 91 * BLOCK, 92 * BLOCK]
    by_offset = dict(zip(answer.offsets, _cut(answer.digests), strict=True))
    assert by_offset[91 * BLOCK] == digest(b"b")


def test_chosen_blocks_are_spread_evenly_over_the_data() -> None:
    data = data_map([Extent(0, 1000 * BLOCK, zero=False)], 1000 * BLOCK, at_rest)
    chosen = choose_blocks(data, 100, random.Random(1))
    assert sorted(offset // (10 * BLOCK) for offset in chosen) == list(range(100))
    assert list(chosen) != sorted(chosen), "the first of them must be a sample of the whole disk as well"


def test_other_seeds_choose_other_blocks_and_the_same_seed_the_same() -> None:
    data = data_map([Extent(0, 1000 * BLOCK, zero=False)], 1000 * BLOCK, at_rest)
    one, same, other = (choose_blocks(data, 10, random.Random(seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_a_disk_without_data_has_no_samples() -> None:
    answer = sample(disk_of(None, None), question(choose=10), at_rest)
    assert answer == BlockSamples(digests=b"", data_bytes=0, read_bytes_s=0.0)


def test_where_time_runs_out_the_first_blocks_are_told_and_no_more() -> None:
    answer = sample(disk_of(*([b"x"] * 20)), question(choose=20), ticking(READ_WITHIN_S / 6))
    assert 0 < len(answer.offsets) < 20
    assert len(answer.digests) == 16 * len(answer.offsets)


def test_extents_that_cannot_be_walked_in_time_count_as_data() -> None:
    extents = [Extent(number * BLOCK, BLOCK, zero=True) for number in range(100)]
    data = data_map(extents, 100 * BLOCK, ticking(1.0))
    assert 0 < data.data_bytes < 100 * BLOCK
    assert data.data_bytes == data.blocks * BLOCK


def test_the_pace_is_that_of_long_runs() -> None:
    disk = MemoryDisk("vda", MemoryStorage(16 << 20))
    disk.write(0, memoryview(b"d" * (16 << 20)))
    answer = sample(disk, question(), ticking(0.5))
    # Every look at that clock takes half a second, so the time for it is over after two runs.
    assert answer.read_bytes_s == pytest.approx(2 * (8 << 20) / 1.5)


@pytest.mark.parametrize(
    "asked",
    [question(choose=MAX_SAMPLES + 1), question(choose=-1), question(1), question(-BLOCK), question(0, choose=1)],
)
async def test_questions_nobody_could_mean_are_refused(house: AgentHouse, asked: SampleBlocks) -> None:
    with pytest.raises(DiskError, match="Disk vda"):
        await house.ask(asked)


async def test_the_agent_samples_the_disk_of_its_vm(house: AgentHouse) -> None:
    house.image.write_bytes(b"q" * BLOCK + bytes(BLOCK))
    answer = await house.ask(SampleBlocks(vm_uuid=house.vm.uuid, target="vda", seed=SEED, offsets=(0,)))
    assert isinstance(answer, BlockSamples)
    assert answer.digests == digest(b"q")


async def test_a_disk_the_vm_does_not_have_is_named(house: AgentHouse) -> None:
    with pytest.raises(HypervisorError, match="the disk vdz of the VM web cannot be sampled: the VM has no such disk"):
        await house.ask(SampleBlocks(vm_uuid=house.vm.uuid, target="vdz", seed=SEED, offsets=(0,)))


async def test_a_fenced_disk_is_sampled_and_stays_fenced(house: AgentHouse) -> None:
    await house.fence()
    answer = await house.ask(SampleBlocks(vm_uuid=house.vm.uuid, target="vda", seed=SEED, choose=1))
    assert isinstance(answer, BlockSamples)
    fenced = await house.ask(InspectVm(vm="web"))
    assert isinstance(fenced, VmDescription)
    assert fenced.fence is not None
    assert fenced.fence.locked == ("vda",)


async def test_the_host_tells_its_clock_and_the_room_for_maps(house: AgentHouse) -> None:
    answer = await house.ask(DescribeHost())
    assert isinstance(answer, HostDescription)
    assert answer.clock_s > 1_600_000_000
    assert answer.state_free_bytes > 0


def _cut(digests: bytes) -> list[bytes]:
    return [digests[at : at + 16] for at in range(0, len(digests), 16)]
