"""Opening frames that may be anything."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import zstandard
from blake3 import blake3
from numpy.typing import NDArray

from agent.delta.blocks import split, to_ranges
from agent.delta.pack import Codec, Packed
from agent.errors import DamagedFrame
from tests.unit.delta_house import B, noise, pack, stored, unpack


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
    for tail in (b"\0", stored(packed)):
        with pytest.raises(DamagedFrame):
            unpack(packed, stored(packed) + tail)


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    # The content size of a small single-segment frame stands in its header (RFC 8878, 3.1.1.1.4).
    (packed,) = pack(b"x" * B)
    short = zstandard.ZstdCompressor().compress(b"x" * 100)
    at = short.index(bytes([100]))
    lying = short[:at] + bytes([101]) + short[at + 1 :]
    assert zstandard.frame_content_size(lying) == 101
    with pytest.raises(DamagedFrame, match="cannot be decompressed"):
        unpack(packed, lying, to_ranges([(B, 101)]))


def blocks_of(content: bytes) -> Packed:
    """A raw frame with a range for each block."""
    ranges = split(to_ranges([(B, len(content))]), B)
    starts: NDArray[np.uint64] = ranges[:, 0] - np.uint64(B)
    proofs = b"".join(blake3(content[start : start + B]).digest() for start in starts.tolist())
    return Packed(False, ranges, proofs, Codec.RAW, None, len(content), (content,))


def test_a_range_that_is_not_its_proof_is_named_by_its_offset() -> None:
    content = noise(3 * B)
    damaged = bytearray(content)
    damaged[B + 5] ^= 1
    with pytest.raises(DamagedFrame, match=f"from offset {2 * B} on arrived damaged") as caught:
        unpack(blocks_of(content), bytes(damaged))
    assert caught.value.code == "damaged-frame"
    assert caught.value.facts == {"offset_bytes": 2 * B}


def test_lengths_and_proofs_must_fit_what_came() -> None:
    packed = blocks_of(noise(2 * B))
    with pytest.raises(DamagedFrame, match=f"{2 * B} bytes came for ranges of {2 * B + 1}"):
        unpack(packed, ranges=to_ranges([(B, B), (2 * B, B + 1)]))
    with pytest.raises(DamagedFrame, match="64 bytes of digests came for 1 ranges"):
        unpack(packed, ranges=to_ranges([(B, 2 * B)]))


def test_lengths_that_would_wrap_around_are_refused() -> None:
    packed = blocks_of(noise(2 * B))
    with pytest.raises(DamagedFrame, match="came for ranges of"):
        unpack(packed, ranges=to_ranges([(B, 2**64 - B), (2 * B, 3 * B)]))


def test_an_unpacked_raw_frame_is_not_copied() -> None:
    payload = noise(B)
    plain = unpack(blocks_of(payload), payload)
    assert plain.obj is payload
