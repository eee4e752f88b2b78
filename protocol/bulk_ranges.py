"""The ranges that payloads of bulk messages are made of, taken apart and checked without numpy."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from functools import reduce
from operator import or_

from protocol import limits
from protocol.connection import Breach, Buffer
from protocol.messages import CompareSpan, TrackedSpan

RANGE_BYTES = 16  # offset and length, each an unsigned 64-bit little-endian number


def split_ranges(payload: Sequence[Buffer], count: int) -> tuple[array[int], array[int]]:
    """The first `count` ranges of a payload that has at least so many: their offsets and their lengths, in bytes."""
    numbers = array("Q")
    numbers.frombytes(start_of(payload, count * RANGE_BYTES))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers[0::2], numbers[1::2]


def join_ranges(ranges: Sequence[tuple[int, int]]) -> bytes:
    """Ranges (offset, length) as they stand in a payload."""
    numbers = array("Q", [number for pair in ranges for number in pair])
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def start_of(payload: Sequence[Buffer], wanted_bytes: int) -> Buffer:
    """The first bytes of a payload in pieces; copied only where they lie in several."""
    have = bytearray()
    for piece in payload:
        part = memoryview(piece).cast("B")[: wanted_bytes - len(have)]
        if part.nbytes == wanted_bytes:
            return part
        have += part
        if len(have) == wanted_bytes:
            break
    return have


def size_of(payload: Sequence[Buffer]) -> int:
    return sum(memoryview(piece).nbytes for piece in payload)


def check_rising(offsets: array[int], lengths: array[int]) -> None:
    """Breach unless the ranges are not empty, rise, do not overlap and stay below 2**63."""
    end = 0
    for offset, length in zip(offsets, lengths, strict=True):
        if length == 0 or offset < end:
            raise Breach(f"the range at byte {offset} is empty, overlaps the one before or stands before it")
        end = offset + length
    if end > limits.MAX_DISK_BYTES:
        raise Breach(f"a range ends at byte {end}, beyond any disk")


def _check_whole_blocks(offsets: array[int], lengths: array[int], end_bytes: int) -> None:
    """Breach unless rising ranges begin and end at multiples of a block; the last may end at `end_bytes` instead."""
    mask = limits.BLOCK_BYTES - 1
    # All numbers at once: one that is no multiple sets a low bit. Only a breach is worth a loop.
    whole = lengths[:-1] if lengths and offsets[-1] + lengths[-1] == end_bytes else lengths
    if (reduce(or_, offsets, 0) | reduce(or_, whole, 0)) & mask:
        wrong = next(
            offset
            for offset, length in zip(offsets, lengths, strict=True)
            if offset & mask or (length & mask and offset + length != end_bytes)
        )
        raise Breach(f"the range at byte {wrong} does not begin and end at multiples of {limits.BLOCK_BYTES}")


def check_inside(message: CompareSpan | TrackedSpan, offsets: array[int], lengths: array[int]) -> None:
    """Breach unless the ranges rise, lie in the span, and begin and end as its ranges may."""
    check_rising(offsets, lengths)
    end = message.offset_bytes + message.length_bytes
    if offsets and not message.offset_bytes <= offsets[0] <= offsets[-1] + lengths[-1] <= end:
        raise Breach(f"ranges reach from byte {offsets[0]} to {offsets[-1] + lengths[-1]}, out of their span")
    _check_whole_blocks(offsets, lengths, end)


def superblock_count(offsets: Sequence[int], lengths: Sequence[int], superblock_bytes: int) -> int:
    """How many superblocks the ranges of a span have: each is what of one range lies between two multiples of its size.

    Args:
        offsets, lengths: of rising ranges, as `CompareSpan` allows them: of whole blocks, but for the end of the last.
        superblock_bytes: a power of two; may be less than a block, as details are.
    """
    if superblock_bytes <= limits.BLOCK_BYTES:
        return -(-sum(lengths) // superblock_bytes)  # all start at a multiple, only the last may end off one
    shift = superblock_bytes.bit_length() - 1
    return sum(
        ((offset + length - 1) >> shift) - (offset >> shift) + 1
        for offset, length in zip(offsets, lengths, strict=True)
    )


def check_between(what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise Breach(f"{what} is {value}; allowed are {least} to {most}")
