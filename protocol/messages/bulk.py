"""What a source agent and a target agent say to each other in a pass.

Ranges travel in the payload as little-endian unsigned 64-bit pairs (offset, length); digests as 16 or 32 raw bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages.words import Codec


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSpan:
    """A stretch of the disk, whole: the ranges of it that hold data, with their digests; the rest of it reads as zero.
    Answered with `SpanAnswer`, unless nothing of it is data. The spans of one connection rise; together those of all
    connections are the disk.

    Payload: `count` ranges, then one digest (16 bytes) for each superblock of them, in order. Ranges start at multiples
    of 64 KiB and end there, or where the span ends. A superblock is what of one range lies between two multiples of
    `superblock_bytes`. `detail_bytes`: what the answer shall tell digests of within superblocks that differ; where it
    equals `superblock_bytes`, it tells none.
    """

    batch: int
    offset_bytes: int
    length_bytes: int
    superblock_bytes: int
    detail_bytes: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedSpan:
    """A stretch of the disk, whole, of which is told only what was written since the view that the grant's `since`
    names: the rest, however much, is unchanged. Allowed only where the grant has `since`, and `CompareSpan` is not.

    Payload: `data_count` ranges that hold data, `zero_count` ranges that read as zero, then, where it asks, one digest
    (16 bytes) for each superblock of the data. `superblock_bytes` 0: it asks nothing and is not answered, and all of
    its data comes. Otherwise it asks about its data as `CompareSpan` does, and is answered with `SpanAnswer` unless it
    has none. Both kinds of ranges start at multiples of 64 KiB and end there, or where the span ends.
    """

    batch: int
    offset_bytes: int
    length_bytes: int
    superblock_bytes: int
    detail_bytes: int
    data_count: int
    zero_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroRanges:
    """Ranges that were compared, differ, and turned out to hold only zeroes. Payload: `count` ranges."""

    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockData:
    """What differs. Payload: `count` ranges, then `count` BLAKE3 digests (32 bytes each, of the plain bytes),
    then the ranges' bytes, concatenated, stored as `codec` says; `plain_bytes` is their length before that."""

    count: int
    codec: Codec
    plain_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpansSettled:
    """Whatever differs of the spans of this connection up to `batch` has been sent; -1: nothing is settled yet.
    Repeated it is a sign of life."""

    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EndOfPass:
    """Nothing more comes on this connection: when all `lanes` connections of the disk have said so, the target flushes,
    reads back, verifies, and answers `PassVerified` on each. The counts are the source's own books of this connection,
    for the target to check against its own."""

    lanes: int
    data_bytes: int
    zero_bytes: int
    compared_bytes: int
    unchanged_bytes: int = 0


# --- bulk: target to source -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvenRanges:
    """Of these ranges it is proven, by an earlier attempt at the same view, that they equal it: written ones flushed
    and read back. They are not spoken of in this attempt. Payload: `count` ranges, the same on all connections."""

    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanAnswer:
    """Which superblocks of a span differ at the target.

    Payload: a bit for each superblock, set where it differs; a bit for each, set where it differs and the target reads
    as zero there (each row of bits, most significant first, fills whole bytes); then `details` digests (16 bytes): of
    each `detail_bytes` of the superblocks that differ and are not zero here, in order.
    `read_bytes`: what the target had to read for it (the rest is known to be zero).
    """

    batch: int
    read_bytes: int
    details: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """`payload_bytes` of `BlockData` payload more are off the wire and out of memory."""

    payload_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassVerified:
    """Everything is flushed, read back past the page cache and equal to what was sent."""

    written_bytes: int
    zeroed_bytes: int
    verified_bytes: int
    compared_bytes: int
    past_cache: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PassFailed:
    """The pass ends here on the side that says so; both sides report it. `offset_bytes` is -1 where there is none."""

    code: str
    sentence: str
    target: str
    offset_bytes: int
