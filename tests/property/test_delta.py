"""For any two disks, a pass made of the pure parts alone makes them equal and sends nothing that was equal before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agent.delta.blocks import Batch, Ranges, ZeroRun, coalesce, plan_batches, split_blocks, to_ranges
from agent.delta.compare import differing
from agent.delta.compression import Choice
from agent.delta.digests import block_digests
from agent.delta.pack import Codec, Packed, Packer, Unpacker
from agent.disk.seam import Extent
from agent.errors import DamagedFrame
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage

BLOCK = 4096  # small, so that many blocks fit a test
BATCH = 4 * BLOCK
FRAME = 2 * BLOCK
CHOICE = Choice(level=1, frame_bytes=FRAME)

sizes = st.integers(1, 20 * BLOCK)

# What a run of a disk holds: nothing, zeroes that were written, or bytes of a pattern.
fills = st.sampled_from(["hole", "zeroes", "ones", "text", "noise"])


@st.composite
def writes(draw: st.DrawFn, size: int) -> list[tuple[int, int, str]]:
    """Runs (offset, length, fill) inside a disk; most start and end anywhere."""
    runs = []
    for _ in range(draw(st.integers(0, 8))):
        offset = draw(st.integers(0, size - 1))
        length = draw(st.integers(1, min(size - offset, 6 * BLOCK)))
        runs.append((offset, length, draw(fills)))
    return runs


@st.composite
def disk_pairs(draw: st.DrawFn) -> tuple[MemoryDisk, MemoryDisk]:
    """Source and target of one size: a common past, and a life of its own for each."""
    size = draw(sizes)
    past = draw(writes(size))
    return (
        filled("source", size, past + draw(writes(size))),
        filled("target", size, past + draw(writes(size))),
    )


def filled(name: str, size: int, runs: list[tuple[int, int, str]]) -> MemoryDisk:
    disk = MemoryDisk(name, MemoryStorage(size))
    for offset, length, fill in runs:
        match fill:
            case "hole":
                disk.write_zeroes(offset, length)
            case "zeroes":
                disk.write(offset, memoryview(bytes(length)))
            case "ones":
                disk.write(offset, memoryview(b"\xff" * length))
            case "text":
                disk.write(offset, memoryview((b"all work and no play " * length)[:length]))
            case _:
                disk.write(offset, memoryview(np.random.default_rng(offset).bytes(length)))
    return disk


def read(disk: MemoryDisk, ranges: Ranges) -> memoryview:
    buffer = memoryview(bytearray(int(ranges[:, 1].sum())))
    at = 0
    for offset, length in ranges.tolist():
        disk.read_into(offset, buffer[at : at + length])
        at += length
    return buffer


def stored(packed: Packed) -> memoryview:
    """The bytes of a frame, as they would cross the wire."""
    return memoryview(b"".join(packed.pieces))


def runs_of(blocks: Ranges, chosen: NDArray[np.bool_]) -> tuple[Ranges, NDArray[np.uint64]]:
    """The chosen of blocks that lie one behind the other in a buffer, and where they lie there."""
    return blocks[chosen], (np.cumsum(blocks[:, 1]) - blocks[:, 1])[chosen]


def apply(target: MemoryDisk, packed: Packed, unpacker: Unpacker) -> None:
    if packed.zero:
        for offset, length in packed.ranges.tolist():
            target.write_zeroes(offset, length)
        return
    plain = unpacker.unpack(stored(packed), packed.codec, packed.ranges, memoryview(packed.proofs))
    at = 0
    for offset, length in packed.ranges.tolist():
        target.write(offset, plain[at : at + length])
        at += length


@settings(max_examples=300, deadline=None)
@given(pair=disk_pairs(), seed=st.integers(0, 2**64 - 1))
def test_a_pass_ends_equal_and_sends_no_block_that_was_equal(pair: tuple[MemoryDisk, MemoryDisk], seed: int) -> None:
    source, target = pair
    size = source.size_bytes
    before = bytes(target.storage.content)
    packer, unpacker = Packer(), Unpacker()
    sent: list[Ranges] = []
    for item in plan_batches(source.extents(0, size), size, block_bytes=BLOCK, batch_bytes=BATCH):
        if isinstance(item, ZeroRun):
            for offset, length in item.ranges.tolist():
                target.write_zeroes(offset, length)
            continue
        ours, theirs = read(source, item.ranges), read(target, item.ranges)
        chosen = differing(
            block_digests(ours, item.block_lengths(), seed=seed), block_digests(theirs, item.block_lengths(), seed=seed)
        )
        frames = packer.pack(ours, *runs_of(item.blocks(), chosen), CHOICE)
        if frames:
            rising = np.concatenate([frame.ranges for frame in frames])
            assert (rising[1:, 0] >= rising[:-1, 0] + rising[:-1, 1]).all()
            sent.append(split_blocks(rising, BLOCK))
        for frame in frames:
            apply(target, frame, unpacker)
    content = bytes(source.storage.content)
    assert bytes(target.storage.content) == content
    for offset, length in (np.concatenate(sent) if sent else to_ranges([])).tolist():
        assert before[offset : offset + length] != content[offset : offset + length]


@st.composite
def maps(draw: st.DrawFn) -> list[Extent]:
    """The extents of a disk, as storage may tell them: neighbours of one kind included."""
    extents, offset = [], 0
    for length, zero in draw(st.lists(st.tuples(st.integers(1, 5 * BLOCK), st.booleans()), min_size=1, max_size=30)):
        extents.append(Extent(offset, length, zero))
        offset += length
    return extents


@given(extents=maps())
def test_batches_and_zero_runs_cover_the_disk_exactly_once(extents: list[Extent]) -> None:
    size = extents[-1].offset_bytes + extents[-1].length_bytes
    items = list(plan_batches(extents, size, block_bytes=BLOCK, batch_bytes=BATCH))
    batches = [item for item in items if isinstance(item, Batch)]
    zero_runs = [item for item in items if isinstance(item, ZeroRun)]
    assert [batch.number for batch in batches] == list(range(len(batches)))

    data = np.concatenate([batch.ranges for batch in batches]) if batches else to_ranges([])
    zeroes = np.concatenate([run.ranges for run in zero_runs]) if zero_runs else to_ranges([])
    everything = np.concatenate((data, zeroes))
    everything = everything[np.argsort(everything[:, 0])]
    assert coalesce(everything).tolist() == [[0, size]]
    for ranges in (data, zeroes):  # each kind rises
        assert (ranges[1:, 0] >= ranges[:-1, 0] + ranges[:-1, 1]).all()
    ends = everything[:, 0] + everything[:, 1]
    assert (everything[:, 0] % BLOCK == 0).all()
    assert ((ends % BLOCK == 0) | (ends == size)).all()

    for batch in batches:
        assert batch.data_bytes == BATCH or batch is batches[-1]
        assert coalesce(batch.ranges).tolist() == batch.ranges.tolist()
    known = np.zeros(size, dtype=bool)
    for extent in extents:
        known[extent.offset_bytes : extent.offset_bytes + extent.length_bytes] = extent.zero
    for offset, length in zeroes.tolist():
        assert known[offset : offset + length].all()
    for offset, length in split_blocks(data, BLOCK).tolist():
        assert not known[offset : offset + length].all()


contents = st.lists(
    st.sampled_from([bytes(BLOCK), b"\1" * BLOCK, b"text " * BLOCK, np.random.default_rng(1).bytes(BLOCK)]),
    min_size=1,
    max_size=12,
).map(lambda blocks: b"".join(block[:BLOCK] for block in blocks))


@given(content=contents, tail=st.integers(1, BLOCK), data=st.data())
def test_what_is_packed_is_what_is_unpacked(content: bytes, tail: int, data: st.DataObject) -> None:
    content += b"\x07" * tail
    blocks = split_blocks(to_ranges([(7 * BLOCK, len(content))]), BLOCK)
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(blocks), max_size=len(blocks))), dtype=bool)
    disk = MemoryDisk("vda", MemoryStorage(7 * BLOCK + len(content)))
    disk.write(0, memoryview(b"\xee" * disk.size_bytes))
    for packed in Packer().pack(memoryview(content), *runs_of(blocks, chosen), CHOICE):
        assert packed.zero or packed.plain_bytes <= FRAME
        apply(disk, packed, Unpacker())
    for (offset, length), wanted in zip(blocks.tolist(), chosen.tolist(), strict=True):
        expected = content[offset - 7 * BLOCK :][:length] if wanted else b"\xee" * length
        assert disk.storage.content[offset : offset + length] == expected


@settings(max_examples=400)
@given(content=contents, data=st.data())
def test_a_mutated_frame_is_refused_or_means_the_same(content: bytes, data: st.DataObject) -> None:
    blocks = split_blocks(to_ranges([(0, len(content))]), BLOCK)
    frames = Packer().pack(memoryview(content), *runs_of(blocks, np.ones(len(blocks), dtype=bool)), CHOICE)
    packed = next((frame for frame in frames if not frame.zero), None)
    if packed is None:
        return
    mutate = data.draw(st.sampled_from(["flip", "cut", "extend", "digest", "lengths", "codec"]))
    payload, proofs, ranges, codec = (
        bytearray(stored(packed)),
        bytearray(packed.proofs),
        packed.ranges.copy(),
        packed.codec,
    )
    match mutate:
        case "flip":
            payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
        case "cut":
            del payload[data.draw(st.integers(0, len(payload) - 1)) :]
        case "extend":
            payload += data.draw(st.binary(min_size=1, max_size=40))
        case "digest":
            proofs[data.draw(st.integers(0, len(proofs) - 1))] ^= data.draw(st.integers(1, 255))
        case "lengths":
            ranges[data.draw(st.integers(0, len(ranges) - 1)), 1] += data.draw(st.integers(1, 2**40))
        case _:
            codec = Codec.RAW if codec is Codec.ZSTD else Codec.ZSTD
    try:
        plain = Unpacker().unpack(memoryview(payload), codec, ranges, memoryview(proofs))
    except DamagedFrame:
        return
    # A bit of a compressed frame may mean nothing; bytes that come through must be the ones that were proven.
    assert mutate == "flip"
    assert codec is Codec.ZSTD
    at = 0
    for offset, length in ranges.tolist():
        assert plain[at : at + length] == content[offset : offset + length]
        at += length


ZERO = 16 * BLOCK  # the block of zeroes

stretches = st.lists(
    st.tuples(st.sampled_from(["zeroes", "text", "noise"]), st.integers(1, 40), st.booleans(), st.integers(0, 3)),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(plan=stretches, frame_pages=st.integers(1, 70), level=st.sampled_from([None, -5, 1]), tail=st.integers(0, 4095))
def test_frames_hold_each_byte_of_the_runs_once_in_order_and_zeroes_apart(
    plan: list[tuple[str, int, bool, int]], frame_pages: int, level: int | None, tail: int
) -> None:
    chance = np.random.default_rng(len(plan))
    runs: list[tuple[int, int]] = []
    starts: list[int] = []
    content, offset = bytearray(), 0
    for number, (kind, pages, wanted, gap) in enumerate(plan):
        offset += gap * BLOCK  # of the disk that is not in the batch
        length = pages * BLOCK - (tail if number == len(plan) - 1 else 0)
        if wanted:
            runs.append((offset, length))
            starts.append(len(content))
        fill = {"zeroes": bytes(length), "text": (b"so it goes. " * length)[:length], "noise": chance.bytes(length)}
        content += fill[kind]
        offset += length
    frames = Packer().pack(
        memoryview(content), to_ranges(runs), np.array(starts, dtype=np.uint64), Choice(level, frame_pages * BLOCK)
    )
    packed = np.concatenate([frame.ranges for frame in frames]) if frames else to_ranges([])
    assert coalesce(packed).tolist() == coalesce(to_ranges(runs)).tolist()
    disk = MemoryDisk("vda", MemoryStorage(offset))
    disk.write(0, memoryview(b"\xee" * offset))
    for frame in frames:
        apply(disk, frame, Unpacker())
        if frame.zero:
            assert not (frame.ranges % ZERO).any()
        else:
            assert frame.plain_bytes <= frame_pages * BLOCK
            for at, length in frame.ranges.tolist():
                assert at % BLOCK == 0
                # No whole aligned block of zeroes is left among the data of one range.
                first = -(-at // ZERO) * ZERO
                for block in range(first, at + length - ZERO + 1, ZERO):
                    assert any(disk.storage.content[block : block + ZERO])
    for (at, length), start in zip(runs, starts, strict=True):
        assert disk.storage.content[at : at + length] == content[start : start + length]


@given(garbage=st.binary(max_size=200), codec=st.sampled_from(Codec), count=st.integers(1, 3))
def test_garbage_is_a_damaged_frame(garbage: bytes, codec: Codec, count: int) -> None:
    blocks = split_blocks(to_ranges([(0, count * BLOCK)]), BLOCK)
    with pytest.raises(DamagedFrame):
        Unpacker().unpack(memoryview(garbage), codec, blocks, memoryview(bytes(32 * count)))
