"""The pure parts of the delta engine, by values."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
import zstandard
from blake3 import blake3

from agent.delta.blocks import (
    BATCH_BYTES,
    BLOCK_BYTES,
    Batch,
    Ranges,
    ZeroRun,
    block_lengths,
    coalesce,
    plan_batches,
    split_blocks,
    to_ranges,
)
from agent.delta.compare import differing
from agent.delta.digests import block_digests, digests_from_wire, digests_to_wire, zero_digest
from agent.delta.pack import Codec, Packed, Packer, Unpacker
from agent.delta.zeroes import is_zero
from agent.disk.seam import Extent
from agent.errors import DamagedFrame, SyncError

B = BLOCK_BYTES


def plan(*runs: tuple[int, bool], batch_bytes: int = 4 * B) -> list[tuple[str, list[list[int]]]]:
    """The plan for runs of (length, zero), as plain values."""
    extents, offset = [], 0
    for length, zero in runs:
        extents.append(Extent(offset, length, zero))
        offset += length
    items = plan_batches(extents, offset, batch_bytes=batch_bytes)
    return [("data" if isinstance(item, Batch) else "zero", item.ranges.tolist()) for item in items]


# --- planning -------------------------------------------------------------------------------------------------------


def test_data_is_widened_to_blocks_and_zeroes_are_narrowed() -> None:
    assert plan((B + 1, True), (10, False), (3 * B - 11, True)) == [
        ("zero", [[0, B], [2 * B, 2 * B]]),
        ("data", [[B, B]]),
    ]


def test_a_block_that_is_zero_in_two_pieces_is_zero() -> None:
    assert plan((B // 2, True), (B // 2, True), (B, False)) == [("zero", [[0, B]]), ("data", [[B, B]])]


def test_a_hole_smaller_than_a_block_is_data() -> None:
    assert plan((B, False), (100, True), (2 * B - 100, False)) == [("data", [[0, 3 * B]])]


def test_the_short_last_block_is_data_or_zero_by_itself() -> None:
    assert plan((2 * B, True), (517, False)) == [("zero", [[0, 2 * B]]), ("data", [[2 * B, 517]])]
    assert plan((2 * B, False), (517, True)) == [("zero", [[2 * B, 517]]), ("data", [[0, 2 * B]])]
    assert plan((2 * B, True), (517, True)) == [("zero", [[0, 2 * B + 517]])]


def test_long_data_is_cut_into_full_batches() -> None:
    assert plan((9 * B + 1, False)) == [
        ("data", [[0, 4 * B]]),
        ("data", [[4 * B, 4 * B]]),
        ("data", [[8 * B, B + 1]]),
    ]


def test_scattered_data_shares_a_batch_preceded_by_its_zeroes() -> None:
    scattered = [(B, False), (B, True)] * 5
    assert plan(*scattered) == [
        ("zero", [[B, B], [3 * B, B], [5 * B, B]]),
        ("data", [[0, B], [2 * B, B], [4 * B, B], [6 * B, B]]),
        ("zero", [[7 * B, B], [9 * B, B]]),
        ("data", [[8 * B, B]]),
    ]


def test_an_empty_disk_needs_nothing() -> None:
    assert plan() == []


def test_ten_empty_terabytes_are_one_range_and_no_memory() -> None:
    window = 1 << 30

    def windows() -> Iterator[Extent]:
        for number in range(10 * 1024):
            yield Extent(number * window, window, zero=True)

    tracemalloc.start()
    items = list(plan_batches(windows(), 10 * 1024 * window))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [item.ranges.tolist() for item in items] == [[[0, 10 << 40]]]
    assert isinstance(items[0], ZeroRun)
    assert items[0].zero_bytes == 10 << 40
    assert peak_bytes < 100_000


def test_planning_is_lazy() -> None:
    asked: list[int] = []

    def extents() -> Iterator[Extent]:
        for number in range(1000):
            asked.append(number)
            yield Extent(number * BATCH_BYTES, BATCH_BYTES, zero=number % 2 == 1)

    items = plan_batches(extents(), 1000 * BATCH_BYTES)
    next(items)
    assert len(asked) < 5


@pytest.mark.parametrize(
    "extents",
    [
        [Extent(0, B, False)],
        [Extent(0, 2 * B, False), Extent(2 * B, B, True)],
        [Extent(0, B, False), Extent(B + 1, B - 1, False)],
        [Extent(0, B, False), Extent(0, B, False)],
        [Extent(1, 2 * B - 1, False)],
        [],
    ],
)
def test_a_map_that_does_not_cover_the_disk_is_refused(extents: list[Extent]) -> None:
    with pytest.raises(SyncError, match="cannot be trusted"):
        list(plan_batches(extents, 2 * B))


def test_batches_are_made_of_whole_blocks() -> None:
    with pytest.raises(ValueError, match="not made of blocks"):
        list(plan_batches([], 0, batch_bytes=B + 1))


def test_a_batch_knows_its_blocks() -> None:
    batch = Batch(0, to_ranges([(0, 2 * B), (5 * B, B + 9)]), B)
    assert batch.blocks().tolist() == [[0, B], [B, B], [5 * B, B], [6 * B, 9]]
    assert batch.block_lengths().tolist() == [B, B, B, 9]
    assert batch.data_bytes == 3 * B + 9


def test_lengths_of_blocks() -> None:
    assert block_lengths(2 * B + 1).tolist() == [B, B, 1]
    assert block_lengths(B).tolist() == [B]
    assert block_lengths(0).tolist() == []
    assert block_lengths(5, block_bytes=2).tolist() == [2, 2, 1]


def test_adjoining_ranges_are_joined_and_others_are_not() -> None:
    assert coalesce(to_ranges([(0, 1), (1, 2), (4, 1), (5, 5), (100, 1)])).tolist() == [[0, 3], [4, 6], [100, 1]]
    assert coalesce(to_ranges([])).shape == (0, 2)


def test_offsets_of_huge_disks_stay_exact() -> None:
    offset = (1 << 62) // B * B
    blocks = split_blocks(to_ranges([(offset, 2 * B + 1)]))
    assert blocks.tolist() == [[offset, B], [offset + B, B], [offset + 2 * B, 1]]
    assert coalesce(blocks).tolist() == [[offset, 2 * B + 1]]


# --- digests ----------------------------------------------------------------------------------------------------------


def test_digests_are_canonical_xxh3_of_each_block_under_the_seed() -> None:
    content = random.Random(0).randbytes(2 * B + 77)
    digests = block_digests(memoryview(content), block_lengths(len(content)), seed=2**64 - 1)
    wire = digests_to_wire(digests)
    assert digests.shape == (3,)
    for number, start in enumerate((0, B, 2 * B)):
        expected = xxhash.xxh3_128_intdigest(content[start : start + B], seed=2**64 - 1)
        assert int.from_bytes(wire[number * 16 :][:16], "big") == expected


def test_the_digest_of_nothing_is_the_one_of_the_specification() -> None:
    # XXH3_128bits of an empty input, seed 0 (xxhash, tests/sanity_test_vectors.h).
    assert zero_digest(0, seed=0).hex() == "99aa06d3014798d86001c324468d497f"


def test_digests_of_zeroes_are_made_once_and_depend_on_length_and_seed() -> None:
    digests = block_digests(memoryview(bytes(B + 5)), block_lengths(B + 5), seed=9)
    assert digests.tolist() == [zero_digest(B, seed=9), zero_digest(5, seed=9)]
    assert zero_digest(B, seed=9) is zero_digest(B, seed=9)
    assert zero_digest(B, seed=9) != zero_digest(B, seed=8)


def test_digests_survive_the_wire() -> None:
    digests = block_digests(memoryview(bytes(range(256)) * 1024), block_lengths(4 * B), seed=1)
    assert digests_from_wire(memoryview(digests_to_wire(digests))).tolist() == digests.tolist()
    with pytest.raises(SyncError, match="whole number of digests"):
        digests_from_wire(b"x" * 17)


def test_a_buffer_that_is_not_the_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="in a buffer of"):
        block_digests(memoryview(bytes(B)), block_lengths(B + 1), seed=0)


def test_differing_tells_each_block() -> None:
    ours = digests_from_wire(b"a" * 16 + b"b" * 16 + b"c" * 15 + b"\0")
    theirs = digests_from_wire(b"a" * 16 + b"x" + b"b" * 15 + b"c" * 15 + b"\1")
    assert differing(ours, theirs).tolist() == [False, True, True]
    assert differing(ours, ours.copy()).tolist() == [False, False, False]
    with pytest.raises(SyncError, match="hashed 3 and 2 blocks"):
        differing(ours, theirs[:2])


# --- zeroes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 4096, B, B + 3])
def test_only_a_block_of_zeroes_is_zero(length: int) -> None:
    block = bytearray(length)
    assert is_zero(memoryview(block))
    for at in {0, length // 2, length - 1}:
        block[at] = 0x80
        assert not is_zero(memoryview(block))
        block[at] = 0


# --- packing ----------------------------------------------------------------------------------------------------------


def pack(content: bytes, chosen: list[bool] | None = None, packer: Packer | None = None) -> list[Packed]:
    blocks = split_blocks(to_ranges([(B, len(content))]))
    mask = np.array([True] * len(blocks) if chosen is None else chosen, dtype=bool)
    return list((packer or Packer()).pack(memoryview(content), blocks, mask))


def unpack(packed: Packed, payload: bytes | None = None, ranges: Ranges | None = None) -> memoryview:
    stored = memoryview(packed.payload if payload is None else payload)
    return Unpacker().unpack(
        stored, packed.codec, packed.ranges if ranges is None else ranges, memoryview(packed.blake3)
    )


def test_text_is_compressed_and_noise_is_not() -> None:
    text, noise = (b"so it goes. " * B)[: 4 * B], random.Random(0).randbytes(4 * B)
    (compressed,) = pack(text)
    assert compressed.codec is Codec.ZSTD
    assert len(compressed.payload) < len(text) // 10
    assert zstandard.frame_content_size(compressed.payload) == len(text) == compressed.plain_bytes
    assert unpack(compressed) == text
    (raw,) = pack(noise)
    assert (raw.codec, raw.payload) == (Codec.RAW, noise)
    assert unpack(raw) == noise


def test_what_saves_too_little_is_sent_as_it_is() -> None:
    # One byte in sixteen is predictable: zstd saves something, but not the fifth that this packer asks for.
    chance = random.Random(0)
    content = b"".join(chance.randbytes(15) + b"\0" for _ in range(B // 8))
    (packed,) = pack(content, packer=Packer(min_saving=0.2))
    assert packed.codec is Codec.RAW


def test_compressible_only_where_the_sample_does_not_look_costs_nothing_but_bytes() -> None:
    content = random.Random(0).randbytes(3 * B)
    (packed,) = pack(content[:8192] + bytes(100) + content)
    assert unpack(packed) == content[:8192] + bytes(100) + content


def test_each_block_has_its_blake3() -> None:
    content = random.Random(1).randbytes(B + 100)
    (packed,) = pack(content)
    assert packed.ranges.tolist() == [[B, B], [2 * B, 100]]
    assert packed.blake3 == blake3(content[:B]).digest() + blake3(content[B:]).digest()


def test_blocks_of_zeroes_become_ranges_in_their_turn() -> None:
    frames = pack(b"x" * B + bytes(2 * B) + b"y" * B + bytes(5))
    assert [(frame.zero, frame.ranges.tolist()) for frame in frames] == [
        (False, [[B, B]]),
        (True, [[2 * B, 2 * B]]),
        (False, [[4 * B, B]]),
        (True, [[5 * B, 5]]),
    ]
    assert frames[1].payload == frames[1].blake3 == b""


def test_frames_are_bounded_and_hold_at_least_one_block() -> None:
    content = random.Random(2).randbytes(5 * B)
    assert [frame.plain_bytes for frame in pack(content, packer=Packer(frame_bytes=2 * B))] == [2 * B, 2 * B, B]
    assert [frame.plain_bytes for frame in pack(content, packer=Packer(frame_bytes=1))] == [B] * 5


def test_only_chosen_blocks_are_packed() -> None:
    content = b"".join(bytes([number]) * B for number in range(1, 6))
    (packed,) = pack(content, [True, False, False, True, True])
    assert packed.ranges[:, 0].tolist() == [B, 4 * B, 5 * B]
    assert unpack(packed) == content[:B] + content[3 * B :]
    assert pack(content, [False] * 5) == []


def test_a_frame_does_not_refer_to_the_buffer_it_came_from() -> None:
    buffer = bytearray(random.Random(3).randbytes(B))
    kept = bytes(buffer)
    (packed,) = Packer().pack(memoryview(buffer), to_ranges([(0, B)]), np.ones(1, dtype=bool))
    buffer[:] = bytes(B)
    assert unpack(packed) == kept


def test_a_bomb_is_refused_by_its_declared_size_before_it_is_opened() -> None:
    (packed,) = pack(b"x" * B)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    tracemalloc.start()
    with pytest.raises(DamagedFrame, match=f"declares {1 << 28} bytes instead of {B}"):
        unpack(packed, bomb)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_a_frame_that_hides_its_size_is_refused() -> None:
    (packed,) = pack(b"x" * B)
    streamed = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
    with pytest.raises(DamagedFrame, match="declares"):
        unpack(packed, streamed)


def test_a_frame_with_something_behind_it_is_refused() -> None:
    (packed,) = pack(b"x" * B)
    for tail in (b"\0", packed.payload):
        with pytest.raises(DamagedFrame):
            unpack(packed, packed.payload + tail)


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    # The content size of a small single-segment frame stands in its header (RFC 8878, 3.1.1.1.4).
    (packed,) = pack(b"x" * B, packer=Packer())
    short = zstandard.ZstdCompressor().compress(b"x" * 100)
    at = short.index(bytes([100]))
    lying = short[:at] + bytes([101]) + short[at + 1 :]
    assert zstandard.frame_content_size(lying) == 101
    with pytest.raises(DamagedFrame, match="cannot be decompressed"):
        unpack(packed, lying, to_ranges([(B, 101)]))


def test_a_block_that_is_not_its_digests_is_named_by_its_offset() -> None:
    content = random.Random(4).randbytes(3 * B)
    (packed,) = pack(content)
    damaged = bytearray(content)
    damaged[B + 5] ^= 1
    with pytest.raises(DamagedFrame, match=f"from offset {2 * B} on arrived damaged") as caught:
        unpack(packed, bytes(damaged))
    assert caught.value.code == "damaged-frame"
    assert caught.value.facts == {"offset_bytes": 2 * B}


def test_lengths_and_digests_must_fit_what_came() -> None:
    (packed,) = pack(random.Random(5).randbytes(2 * B))
    with pytest.raises(DamagedFrame, match=f"{2 * B} bytes came for blocks of {2 * B + 1}"):
        unpack(packed, ranges=to_ranges([(B, B), (2 * B, B + 1)]))
    with pytest.raises(DamagedFrame, match="64 bytes of digests came for 1 blocks"):
        unpack(packed, ranges=to_ranges([(B, 2 * B)]))
