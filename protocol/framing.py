"""Frames: a prefix, a header, a payload. Bytes in, frames out; no I/O, no meaning.

::

    +-------------------+--------------------+--------+---------+
    | header length u32 | payload length u32 | header | payload |      both lengths big-endian
    +-------------------+--------------------+--------+---------+

`FrameReader` tells its driver where the next bytes belong, so that a payload of several MiB is received straight into
the buffer it stays in.
"""

from __future__ import annotations

import enum
import struct

from protocol.errors import PeerViolation
from protocol.limits import FrameLimits

PREFIX = struct.Struct(">II")


class Stage(enum.Enum):
    """The part of a frame that is being read."""

    PREFIX = "prefix"  # then HEADER
    HEADER = "header"  # then PAYLOAD, or the next PREFIX when there is none
    PAYLOAD = "payload"  # then the next PREFIX


def frame_prefix(header: bytes, payload_bytes: int) -> bytes:
    """Prefix and header of a frame, ready to be sent before its payload."""
    return PREFIX.pack(len(header), payload_bytes) + header


class FrameReader:
    """Reads frames piece by piece.

    The driver puts bytes where `want` says and reports them with `filled`, which names the stage they completed: after
    HEADER, `header` and `payload_bytes` hold, and if there is a payload `begin_payload` must be called with the buffer
    for it; after PAYLOAD that buffer is full.
    """

    def __init__(self, limits: FrameLimits) -> None:
        self.limits = limits
        self.header = b""
        self.payload_bytes = 0
        self._stage = Stage.PREFIX
        self._prefix = memoryview(bytearray(PREFIX.size))
        self._buffer = self._prefix
        self._have = 0

    @property
    def between_frames(self) -> bool:
        """True when not a byte of the next frame has come."""
        return self._stage is Stage.PREFIX and self._have == 0

    def want(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        return self._buffer[self._have :]

    def filled(self, count: int) -> Stage | None:
        """`count` bytes were put at the start of `want`. Returns the stage this completed, or None.

        Raises PeerViolation when the prefix announces more than `limits` allow, before any of it is awaited.
        """
        self._have += count
        if self._have < len(self._buffer):
            return None
        done = self._stage
        if done is Stage.PREFIX:
            self._begin_header()
        elif done is Stage.HEADER:
            self.header = bytes(self._buffer)
            if self.payload_bytes == 0:
                self._begin_prefix()
        else:
            self._begin_prefix()
        return done

    def begin_payload(self, buffer: memoryview) -> None:
        """The payload announced by the frame's prefix goes into `buffer`, which has exactly its length."""
        assert len(buffer) == self.payload_bytes
        self._next(Stage.PAYLOAD, buffer)

    def _begin_prefix(self) -> None:
        self._next(Stage.PREFIX, self._prefix)

    def _begin_header(self) -> None:
        header_bytes, self.payload_bytes = PREFIX.unpack(self._prefix)
        if not 1 <= header_bytes <= self.limits.header_bytes:
            raise PeerViolation(
                f"a frame announces a header of {header_bytes} bytes; allowed are 1 to {self.limits.header_bytes}"
            )
        if self.payload_bytes > self.limits.payload_bytes:
            raise PeerViolation(
                f"a frame announces a payload of {self.payload_bytes} bytes; allowed are {self.limits.payload_bytes}"
            )
        self._next(Stage.HEADER, memoryview(bytearray(header_bytes)))

    def _next(self, stage: Stage, buffer: memoryview) -> None:
        self._stage = stage
        self._buffer = buffer
        self._have = 0
