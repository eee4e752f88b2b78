"""Choosing what of a batch to send and how; on the other side, unpacking what may be anything.

A *frame* is a run of changed blocks in rising order: either known to be all zeroes, which needs no bytes, or data with
a BLAKE3 digest of each block, compressed with zstd where that pays.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import zstandard
from blake3 import blake3
from numpy.typing import NDArray

from agent.delta.blocks import Ranges, coalesce
from agent.delta.zeroes import is_zero
from agent.errors import DamagedFrame

FRAME_BYTES = 1024 * 1024
"""Plain bytes in one frame: large enough for zstd to find what repeats, small enough to flow."""

BLAKE3_BYTES = 32

_SAMPLES = 4
_SAMPLE_BYTES = 4 * 1024


class Codec(enum.Enum):
    """How the bytes of a frame are stored; the values are those of the protocol."""

    RAW = "raw"
    ZSTD = "zstd"


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A frame, ready to send.

    Attributes:
        zero: the ranges hold only zeroes; nothing but `ranges` counts then.
        ranges: one for each block, or, for zeroes, adjoining blocks joined.
        blake3: digest of each block's plain bytes, 32 bytes each.
        codec: how `payload` is stored.
        plain_bytes: length of the blocks before that.
        payload: the blocks' bytes, one behind the other. Its own memory: the buffer it came from may be reused.
    """

    zero: bool
    ranges: Ranges
    blake3: bytes
    codec: Codec
    plain_bytes: int
    payload: bytes


class Packer:
    """Makes frames. Holds a compressor, so it is used by one thread at a time.

    Args:
        level: zstd level; 1 keeps up with a gigabit link on one core, negative ones are faster and save less.
        frame_bytes: plain bytes in one frame at most (one block at least).
        min_saving: the share of its bytes that compressing must save, or the frame is sent as it is.
    """

    def __init__(self, *, level: int = 1, frame_bytes: int = FRAME_BYTES, min_saving: float = 0.05) -> None:
        # One-shot compression declares the content size in the frame, which the receiver checks first.
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=False)
        self._frame_bytes = frame_bytes
        self._min_saving = min_saving

    def pack(self, buffer: memoryview, blocks: Ranges, chosen: NDArray[np.bool_]) -> Iterator[Packed]:
        """Frames of the chosen blocks, lazily, in rising order.

        Args:
            buffer: the bytes of all `blocks`, one behind the other; unchanged until the iterator ends.
            blocks: the blocks of a batch, shape (n, 2).
            chosen: which of them to send, shape (n,).
        """
        ends = np.cumsum(blocks[:, 1])
        starts = ends - blocks[:, 1]
        frame: list[int] = []
        views: list[memoryview] = []
        size, frame_is_zero = 0, False
        for index in np.flatnonzero(chosen).tolist():
            view = buffer[int(starts[index]) : int(ends[index])]
            zero = is_zero(view)
            full = not zero and size + view.nbytes > self._frame_bytes
            if frame and (full or zero != frame_is_zero):
                yield self._frame(blocks[frame], views, zero=frame_is_zero)
                frame, views, size = [], [], 0
            frame.append(index)
            views.append(view)
            size, frame_is_zero = size + view.nbytes, zero
        if frame:
            yield self._frame(blocks[frame], views, zero=frame_is_zero)

    def _frame(self, blocks: Ranges, views: list[memoryview], *, zero: bool) -> Packed:
        if zero:
            return Packed(True, coalesce(blocks), b"", Codec.RAW, 0, b"")
        digests = b"".join([blake3(view).digest() for view in views])
        plain = b"".join(views)
        stored = self._compress(plain)
        codec = Codec.RAW if stored is None else Codec.ZSTD
        return Packed(False, blocks, digests, codec, len(plain), plain if stored is None else stored)

    def _compress(self, plain: bytes) -> bytes | None:
        """The compressed frame, or None where it does not pay. A sample is asked first: data that is compressed or
        encrypted already should not cost a whole compression to find out."""
        most = 1 - self._min_saving
        if len(plain) > 2 * _SAMPLES * _SAMPLE_BYTES:
            step = len(plain) // _SAMPLES
            sample = b"".join([plain[start : start + _SAMPLE_BYTES] for start in range(0, step * _SAMPLES, step)])
            if len(self._compressor.compress(sample)) > len(sample) * most:
                return None
        stored: bytes = self._compressor.compress(plain)
        return stored if len(stored) <= len(plain) * most else None


class Unpacker:
    """Opens frames that came from elsewhere. Holds a decompressor, so it is used by one thread at a time."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor()

    def unpack(self, stored: memoryview, codec: Codec, ranges: Ranges, digests: memoryview) -> memoryview:
        """The plain bytes of a frame's blocks, one behind the other, each proven by its BLAKE3 digest.

        Args:
            stored: the blocks as they came.
            codec: how they are stored.
            ranges: the blocks, shape (n, 2); the caller has checked where they lie and that they are not too many.
            digests: 32 bytes for each block.

        Raises:
            DamagedFrame: anything is not as declared.
        """
        expected_bytes = sum(ranges[:, 1].tolist())
        if digests.nbytes != len(ranges) * BLAKE3_BYTES:
            raise _damaged(ranges, f"{digests.nbytes} bytes of digests came for {len(ranges)} blocks")
        plain = stored if codec is Codec.RAW else self._decompress(stored, ranges, expected_bytes)
        if plain.nbytes != expected_bytes:
            raise _damaged(ranges, f"{plain.nbytes} bytes came for blocks of {expected_bytes}")
        at = 0
        for number, length in enumerate(ranges[:, 1].tolist()):
            proof = digests[number * BLAKE3_BYTES : (number + 1) * BLAKE3_BYTES]
            if blake3(plain[at : at + length]).digest() != proof:
                raise _damaged(ranges[number:], "a block is not the one its digest was made of")
            at += length
        return plain

    def _decompress(self, stored: memoryview, ranges: Ranges, expected_bytes: int) -> memoryview:
        # `max_output_size` is ignored when a frame declares its content size: that is checked before anything else.
        try:
            declared_bytes = zstandard.frame_content_size(stored)
            if declared_bytes != expected_bytes:
                raise _damaged(
                    ranges, f"a compressed frame declares {declared_bytes} bytes instead of {expected_bytes}"
                )
            return memoryview(
                self._decompressor.decompress(stored, max_output_size=expected_bytes, allow_extra_data=False)
            )
        except zstandard.ZstdError as error:
            raise _damaged(ranges, f"it cannot be decompressed ({error})") from error


def _damaged(ranges: Ranges, cause: str) -> DamagedFrame:
    offset = int(ranges[0, 0]) if len(ranges) else 0
    return DamagedFrame(
        f"Blocks from offset {offset} on arrived damaged: {cause}; nothing of them was written: "
        "run the pass again, and look at the other host's memory and software if it comes back.",
        offset_bytes=offset,
    )
