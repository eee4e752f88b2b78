"""The memory of passes: page-aligned buffers, in one pool for everything the host sends and one for what it receives.

Two, because a source holds what it read until the target has answered: were both out of one pool, two hosts that send
to each other could each wait for the other's answer with no buffer left to give one.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import numpy as np
import trio
from numpy.typing import NDArray

from agent.delta.blocks import BATCH_BYTES
from protocol import limits

SOURCE_BUFFERS = 5
"""Batches of a host that are sent, in memory at once. At 16 MiB each: two being read, one asked about, one packed, one
sent; or what 100 ms of round trip hold back at 800 MB/s. The rest of an agent's 256 MiB is for what is on the wire."""

TARGET_BUFFERS = 4
TARGET_BUFFER_BYTES = 8 << 20
"""What a target reads to compare is never held for longer than that takes: enough for the readers of one NBD disk."""


class BufferPool:
    """Buffers that are lent and come back. The one that came back last is lent first: it is still in the caches.

    Args:
        buffers: how many there are; each is made when it is first needed.
        buffer_bytes: size of each, a multiple of the page size; they begin at pages, as O_DIRECT wants it.
    """

    def __init__(self, buffers: int = SOURCE_BUFFERS, buffer_bytes: int = BATCH_BYTES) -> None:
        self.buffer_bytes = buffer_bytes
        self._free: list[memoryview] = []
        self._room = trio.Semaphore(buffers, max_value=buffers)

    async def take(self) -> memoryview:
        """Wait for a buffer; whoever waits longest is first."""
        await self._room.acquire()
        return self._free.pop() if self._free else memoryview(mmap.mmap(-1, self.buffer_bytes))

    def give(self, buffer: memoryview) -> None:
        """Give a buffer back; nobody may use it any more."""
        self._free.append(buffer)
        self._room.release()

    @property
    def idle(self) -> bool:
        """Whether nothing is lent."""
        return self._room.value == self._room.max_value


RECEIVED_BYTES = 64 << 20
"""Block data that may be on its way to this host, or wait to be written, on all its connections together."""
MOST_WINDOW_BYTES = 32 << 20
"""One connection's share at most: fills a 25 Gbit/s link over 10 ms."""
LEAST_WINDOW_BYTES = 2 << 20
"""What even the last of many connections gets: two frames, so that one is written while the next one comes."""


class Windows:
    """What connections may have on their way to this host: the first get more, each some.

    Nobody waits for a window: a source that is not welcomed soon gives up. So many connections together may take more
    than `limit_bytes`, by the least window each.
    """

    def __init__(self, limit_bytes: int = RECEIVED_BYTES) -> None:
        self._free_bytes = limit_bytes

    def lease(self) -> int:
        """The window of one more connection, in bytes."""
        window = max(LEAST_WINDOW_BYTES, min(MOST_WINDOW_BYTES, self._free_bytes // 2))
        self._free_bytes -= window
        return window

    def give_back(self, window_bytes: int) -> None:
        """The connection is over."""
        self._free_bytes += window_bytes


KEPT_PIECES = 6
"""Idle pieces of memory that are kept: what two writers hold, what is received, and some that wait to be written. One
that once held the largest payload has that much resident, so 54 MiB at most lie idle."""
LEAST_REUSED_BYTES = 256 << 10
"""What is smaller comes from the allocator, which keeps such memory by itself."""


class ReusedMemory:
    """Memory for large payloads that is used again: fresh memory costs more than what is received into it.

    Nobody gives anything back: memory is free again when the last view of it is gone, on whatever path. So it may be
    held for as long as one likes, and from any thread.

    Args:
        piece_bytes: the largest request that is served with memory that is used again.
        kept: how many pieces may lie idle.
    """

    def __init__(self, piece_bytes: int = limits.BULK.payload_bytes, kept: int = KEPT_PIECES) -> None:
        self._piece_bytes = piece_bytes
        self._idle: deque[NDArray[np.uint8]] = deque(maxlen=kept)  # whose append and pop need no lock

    @property
    def idle(self) -> int:
        """How many pieces wait to be used again."""
        return len(self._idle)

    def allocate(self, size_bytes: int) -> memoryview:
        """Writable memory of that many bytes, whatever they are."""
        if not LEAST_REUSED_BYTES <= size_bytes <= self._piece_bytes:
            return memoryview(bytearray(size_bytes))
        try:
            piece = self._idle.pop()  # the last one is still in the caches
        except IndexError:
            piece = np.frombuffer(mmap.mmap(-1, self._piece_bytes), dtype=np.uint8)
        lent = piece[:size_bytes]
        # Each memoryview and array made of it refers to it, so it dies with the last of them.
        weakref.finalize(lent, self._idle.append, piece).atexit = False
        return lent.data


received_memory = ReusedMemory()
"""The host's, for block data as it arrives."""
