"""Unpacking frames that came from elsewhere, and may be anything."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import zstandard
from blake3 import blake3

from agent.delta.blocks import Ranges
from agent.delta.pack import BLAKE3_BYTES, Codec
from agent.errors import DamagedFrame


class Unpacker:
    """Opens frames that came from elsewhere; may be used by several threads at once."""

    def __init__(self) -> None:
        self._threads = threading.local()

    def unpack(self, stored: memoryview, codec: Codec, ranges: Ranges, proofs: memoryview) -> memoryview:
        """The plain bytes of a frame's ranges, one behind the other, each proven by its BLAKE3 digest.

        Args:
            stored: the bytes as they came; a raw frame is returned as it is, not copied.
            codec: how they are stored.
            ranges: shape (n, 2); the caller has checked where they lie and that they are not too many.
            proofs: 32 bytes for each range.

        Raises:
            DamagedFrame: anything is not as declared.
        """
        lengths: list[int] = ranges[:, 1].tolist()
        expected_bytes = sum(lengths)  # in Python's integers: a sum of hostile lengths must not wrap around
        if proofs.nbytes != len(ranges) * BLAKE3_BYTES:
            raise _damaged(ranges, f"{proofs.nbytes} bytes of digests came for {len(ranges)} ranges")
        plain = stored if codec is Codec.RAW else self._decompress(stored, ranges, expected_bytes)
        if plain.nbytes != expected_bytes:
            raise _damaged(ranges, f"{plain.nbytes} bytes came for ranges of {expected_bytes}")
        bounds = np.cumsum([0, *lengths]).tolist()
        made = b"".join([blake3(plain[start:end]).digest() for start, end in pairwise(bounds)])
        if made != proofs:
            wrong = np.frombuffer(made, dtype="V32") != np.frombuffer(proofs, dtype="V32")
            raise _damaged(ranges[wrong], "a range is not the one its digest was made of")
        return plain

    def _decompress(self, stored: memoryview, ranges: Ranges, expected_bytes: int) -> memoryview:
        decompressor: zstandard.ZstdDecompressor | None = getattr(self._threads, "decompressor", None)
        if decompressor is None:
            decompressor = self._threads.decompressor = zstandard.ZstdDecompressor()
        # `max_output_size` is ignored when a frame declares its content size: that is checked before anything else.
        try:
            declared_bytes = zstandard.frame_content_size(stored)
            if declared_bytes != expected_bytes:
                raise _damaged(
                    ranges, f"a compressed frame declares {declared_bytes} bytes instead of {expected_bytes}"
                )
            return memoryview(decompressor.decompress(stored, max_output_size=expected_bytes, allow_extra_data=False))
        except zstandard.ZstdError as error:
            raise _damaged(ranges, f"it cannot be decompressed ({error})") from error


def _damaged(ranges: Ranges, cause: str) -> DamagedFrame:
    offset = int(ranges[0, 0]) if len(ranges) else 0
    return DamagedFrame(
        f"Blocks from offset {offset} on arrived damaged: {cause}; nothing of them was written: "
        "run the pass again, and look at the other host's memory and software if it comes back.",
        offset_bytes=offset,
    )
