"""For any two disks, a pass made of the pure parts alone makes them equal and sends nothing that was equal before."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agent.delta.blocks import (
    BLOCK_BYTES,
    PAGE_BYTES,
    Ranges,
    coalesce,
    gaps,
    owners,
    plan_spans,
    split,
    to_ranges,
)
from agent.delta.compare import Held, answer, portions
from agent.delta.compression import Choice
from agent.delta.pack import Codec, Packed, Packer
from agent.delta.unpack import Unpacker
from agent.disk.seam import Extent
from agent.errors import DamagedFrame
from agent.sync.hashing import holds_data
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage

B, PAGE = BLOCK_BYTES, PAGE_BYTES
BLOCK = 4096  # small, so that many fit a test
FRAME = 2 * BLOCK
CHOICE = Choice(level=1, frame_bytes=FRAME)

sizes = st.integers(1, 20 * BLOCK) | st.integers(1, 20 * B)

# What a run of a disk holds: nothing, zeroes that were written, or bytes of a pattern.
fills = st.sampled_from(["hole", "zeroes", "ones", "text", "noise"])


@st.composite
def writes(draw: st.DrawFn, size: int) -> list[tuple[int, int, str]]:
    """Runs (offset, length, fill) inside a disk; most start and end anywhere."""
    runs = []
    for _ in range(draw(st.integers(0, 8))):
        offset = draw(st.integers(0, size - 1))
        length = draw(st.integers(1, min(size - offset, 6 * B)))
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


granularities = st.sampled_from([(B, PAGE), (B, B), (4 * B, PAGE), (4 * B, B), (64 * B, PAGE), (64 * B, B)])


@settings(max_examples=120, deadline=None)
@given(pair=disk_pairs(), sizes=granularities, seed=st.integers(0, 2**64 - 1), most_superblocks=st.integers(1, 5))
def test_a_pass_ends_equal_and_sends_no_detail_that_was_equal(
    pair: tuple[MemoryDisk, MemoryDisk], sizes: tuple[int, int], seed: int, most_superblocks: int
) -> None:
    source, target = pair
    superblock_bytes, detail_bytes = sizes
    size = source.size_bytes
    before, content = bytes(target.storage.content), bytes(source.storage.content)
    packer, unpacker = Packer(), Unpacker()
    sent: list[Ranges] = []
    unread: set[int] = set()
    for span in plan_spans(source.extents(0, size), size, batch_bytes=lambda: 4 * B):
        for offset, length in gaps(span.data, span.offset_bytes, span.length_bytes).tolist():
            target.write_zeroes(offset, length)
        if not len(span.data):
            continue
        held = Held(span.data, read(source, span.data))
        superblocks, digests = held.superblocks(superblock_bytes, seed=seed)
        theirs = superblocks[holds_data(target, superblocks)]
        told = answer(
            superblocks,
            digests,
            Held(theirs, read(target, theirs)),
            superblock_bytes=superblock_bytes,
            detail_bytes=detail_bytes,
            seed=seed,
        )
        for portion in portions(
            superblocks,
            told,
            superblock_bytes=superblock_bytes,
            detail_bytes=detail_bytes,
            most_bytes=most_superblocks * superblock_bytes,
        ):
            changed = portion.changed(held, seed=seed)
            sent.append(changed)
            unread |= set(split(portion.superblocks[portion.empty], min(superblock_bytes, detail_bytes))[:, 0].tolist())
            for frame in packer.pack(held.buffer, changed, held.starts(changed), CHOICE):
                apply(target, frame, unpacker)
    assert bytes(target.storage.content) == content
    everything = np.concatenate(sent) if sent else to_ranges([])
    assert (everything[1:, 0] >= everything[:-1, 0] + everything[:-1, 1]).all()
    for offset, length in split(everything, min(superblock_bytes, detail_bytes)).tolist():
        # What the target knew to be zero is sent whole, the rest only where it differs.
        assert offset in unread or before[offset : offset + length] != content[offset : offset + length]


@st.composite
def differences(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Two contents of one length that differ in some bytes, some of them next to borders."""
    length = draw(st.integers(1, 6 * B))
    ours = np.random.default_rng(length).bytes(length)
    theirs = bytearray(ours)
    borders = st.sampled_from(sorted({0, PAGE - 1, PAGE, B - 1, B, 4 * B - 1, 4 * B, length - 1}))
    for at in draw(st.lists(st.one_of(borders, st.integers(0, length - 1)), max_size=6)):
        if at < length:
            theirs[at] ^= draw(st.integers(1, 255))
    return ours, bytes(theirs)


@settings(deadline=None)
@given(contents=differences(), sizes=granularities, block=st.integers(0, 70), seed=st.integers(0, 2**64 - 1))
def test_what_changed_covers_every_differing_byte_and_of_pages_no_equal_one(
    contents: tuple[bytes, bytes], sizes: tuple[int, int], block: int, seed: int
) -> None:
    ours, theirs = contents
    superblock_bytes, detail_bytes = sizes
    data = to_ranges([(block * B, len(ours))])
    near, far = Held(data, memoryview(ours)), Held(data, memoryview(theirs))
    superblocks, digests = near.superblocks(superblock_bytes, seed=seed)
    told = answer(superblocks, digests, far, superblock_bytes=superblock_bytes, detail_bytes=detail_bytes, seed=seed)
    found = portions(
        superblocks, told, superblock_bytes=superblock_bytes, detail_bytes=detail_bytes, most_bytes=len(ours)
    )
    changed = np.zeros(len(ours), dtype=bool)
    for offset, length in (run for portion in found for run in portion.changed(near, seed=seed).tolist()):
        start = offset - block * B
        assert not changed[start : start + length].any()
        changed[start : start + length] = True
        if detail_bytes == PAGE:
            for page in range(start, start + length, PAGE):
                assert ours[page : page + PAGE] != theirs[page : page + PAGE]
    differs = np.frombuffer(ours, dtype=np.uint8) != np.frombuffer(theirs, dtype=np.uint8)
    assert not (differs & ~changed).any()


@st.composite
def maps(draw: st.DrawFn) -> list[Extent]:
    """The extents of a disk, as storage may tell them: neighbours of one kind included."""
    extents, offset = [], 0
    for length, zero in draw(st.lists(st.tuples(st.integers(1, 5 * B), st.booleans()), min_size=1, max_size=30)):
        extents.append(Extent(offset, length, zero))
        offset += length
    return extents


@given(extents=maps(), batch_ranges=st.integers(1, 5))
def test_spans_cover_the_disk_exactly_once_and_leave_out_only_known_zeroes(
    extents: list[Extent], batch_ranges: int
) -> None:
    size = extents[-1].offset_bytes + extents[-1].length_bytes
    spans = list(plan_spans(extents, size, batch_bytes=lambda: 4 * B, batch_ranges=batch_ranges))
    assert [span.number for span in spans] == list(range(len(spans)))
    assert [span.offset_bytes for span in spans] == [0, *(span.end_bytes for span in spans[:-1])]
    assert spans[-1].end_bytes == size
    known = np.zeros(size, dtype=bool)
    for extent in extents:
        known[extent.offset_bytes : extent.offset_bytes + extent.length_bytes] = extent.zero
    for span in spans:
        assert not span.offset_bytes % B
        assert len(span.data) <= batch_ranges
        full = span.data_bytes == 4 * B or len(span.data) == batch_ranges
        assert full or (span.data_bytes < 4 * B and span is spans[-1])
        assert coalesce(span.data).tolist() == span.data.tolist()
        zeroes = gaps(span.data, span.offset_bytes, span.length_bytes)
        both = np.concatenate((span.data, zeroes))
        assert coalesce(both[np.argsort(both[:, 0])]).tolist() == [[span.offset_bytes, span.length_bytes]]
        for offset, length in zeroes.tolist():
            assert known[offset : offset + length].all()
        for offset, length in split(span.data, B).tolist():
            assert not offset % B
            assert length == B or offset + length == size
            assert not known[offset : offset + length].all()


ranges = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), max_size=8).map(
    lambda steps: to_ranges(_rising(steps))
)


def _rising(steps: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    at = 0
    for skip, length in steps:
        yield at + skip, length
        at += skip + length


@given(ranges=ranges, unit=st.integers(1, 40))
def test_pieces_are_their_ranges_and_know_them(ranges: Ranges, unit: int) -> None:
    pieces = split(ranges, unit)
    assert coalesce(pieces).tolist() == coalesce(ranges).tolist()
    assert (pieces[:, 0] // np.uint64(unit) == (pieces[:, 0] + pieces[:, 1] - np.uint64(1)) // np.uint64(unit)).all()
    for (offset, length), owner in zip(pieces.tolist(), owners(ranges, pieces).tolist(), strict=True):
        start, size = ranges[owner].tolist()
        assert start <= offset < offset + length <= start + size


contents = st.lists(
    st.sampled_from([bytes(BLOCK), b"\1" * BLOCK, b"text " * BLOCK, np.random.default_rng(1).bytes(BLOCK)]),
    min_size=1,
    max_size=12,
).map(lambda blocks: b"".join(block[:BLOCK] for block in blocks))


@given(content=contents, tail=st.integers(1, BLOCK), data=st.data())
def test_what_is_packed_is_what_is_unpacked(content: bytes, tail: int, data: st.DataObject) -> None:
    content += b"\x07" * tail
    blocks = split(to_ranges([(7 * BLOCK, len(content))]), BLOCK)
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
    blocks = split(to_ranges([(0, len(content))]), BLOCK)
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
    blocks = split(to_ranges([(0, count * BLOCK)]), BLOCK)
    with pytest.raises(DamagedFrame):
        Unpacker().unpack(memoryview(garbage), codec, blocks, memoryview(bytes(32 * count)))
