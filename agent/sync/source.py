"""The source side of a pass over one disk.

The target leads, the source follows: ranges of data are announced well ahead of the reading, the target hashes its own
blocks and answers with their digests, and when the source has read and hashed the same batch the answer is usually
there. Differing blocks leave from the buffer they were read into: nothing is read twice, and a round trip is paid once
in a pass, not once in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import trio

from agent.delta.blocks import Batch, ZeroRun, plan_batches
from agent.delta.compare import differing
from agent.delta.digests import DIGEST_BYTES, Digests, block_digests, digests_from_wire
from agent.delta.pack import Packed, Packer
from agent.disk.seam import Disk
from agent.sync.budget import ByteBudget
from agent.sync.conversation import Conversation
from agent.sync.meter import Meter
from agent.sync.payloads import ranges_to_wire
from protocol.errors import PeerViolation
from protocol.messages import (
    BlockData,
    Codec,
    CompareRanges,
    EndOfPass,
    PassVerified,
    RangeDigests,
    ZeroRanges,
)

READERS = 2
"""Batches that are read and hashed at the same time: one waits for storage while the other is hashed."""
BUFFERS = 4
"""Batch buffers of one disk: what the readers fill plus what is being packed and sent."""
ANNOUNCED_BATCHES = 256
"""How many batches may be announced and not settled, whatever their size: bounds the books of a scattered disk."""


@dataclass
class Work:
    """A batch on its way through the source: announced, read and hashed, answered, settled."""

    batch: Batch
    buffer: memoryview | None = None
    ours: Digests | None = None
    theirs: Digests | None = None
    read: trio.Event = field(default_factory=trio.Event)
    answered: trio.Event = field(default_factory=trio.Event)


@dataclass
class SourcePass:
    """Send what differs of one disk's view.

    Attributes:
        disk: the view.
        size_bytes: its size as granted.
        talk: the connection, welcomed already.
        seed: the seed of this pass's digests.
        ahead_bytes: how much may be asked for and not answered, as the target's welcome says.
        batch_bytes: how much data one batch holds at most.
    """

    disk: Disk
    size_bytes: int
    talk: Conversation
    seed: int
    ahead_bytes: int
    batch_bytes: int
    meter: Meter
    verified: PassVerified | None = None

    def __post_init__(self) -> None:
        self._ahead = ByteBudget(self.ahead_bytes)
        self._pending: dict[int, Work] = {}
        self._to_read = trio.open_memory_channel[Work](ANNOUNCED_BATCHES)
        self._to_settle = trio.open_memory_channel[Work](ANNOUNCED_BATCHES)
        self._buffers = trio.open_memory_channel[memoryview](BUFFERS)
        self._packer = Packer()
        for _ in range(BUFFERS):
            self._buffers[0].send_nowait(memoryview(bytearray(self.batch_bytes)))

    async def run(self) -> PassVerified:
        """Carry the pass to its end; returns what the target verified.

        Raises:
            AgentError, ProtocolError: the pass is not complete.
        """
        await self.talk.run(self._announce, *[self._read] * READERS, self._settle, self._listen)
        assert self.verified is not None  # _listen ends only by it or by an error
        return self.verified

    async def _announce(self) -> None:
        plan: Iterator[Batch | ZeroRun] = plan_batches(
            self.disk.extents(0, self.size_bytes), self.size_bytes, batch_bytes=self.batch_bytes
        )
        while (item := await self.talk.threads.on_disk(lambda: next(plan, None))) is not None:
            if isinstance(item, Batch):
                await self._announce_batch(item)
                continue
            self.meter.zero_bytes += item.zero_bytes
            self.meter.settled_bytes += item.zero_bytes
            message = ZeroRanges(count=len(item.ranges), compared=False)
            await self.talk.send(message, ranges_to_wire(item.ranges))
        # Closed only here, where everything is announced: after a failure the end must not look like one.
        self._to_read[0].close()
        self._to_settle[0].close()

    async def _announce_batch(self, batch: Batch) -> None:
        work = Work(batch)
        await self._ahead.take(batch.data_bytes)
        self._pending[batch.number] = work
        message = CompareRanges(batch=batch.number, block_bytes=batch.block_bytes, count=len(batch.ranges))
        await self.talk.send(message, ranges_to_wire(batch.ranges))
        await self._to_settle[0].send(work)
        await self._to_read[0].send(work)

    async def _read(self) -> None:
        # The buffer comes first: whoever then takes the oldest batch can always finish it.
        while True:
            buffer = await self._buffers[1].receive()
            try:
                work = await self._to_read[1].receive()
            except trio.EndOfChannel:
                return
            work.buffer = buffer
            work.ours = await self.talk.threads.on_disk(partial(self._read_and_hash, work.batch, buffer))
            self.meter.compared_bytes += work.batch.data_bytes
            work.read.set()

    def _read_and_hash(self, batch: Batch, buffer: memoryview) -> Digests:
        filled = 0
        for offset, length in batch.ranges.tolist():
            self.disk.read_into(offset, buffer[filled : filled + length])
            filled += length
        return block_digests(buffer[:filled], batch.block_lengths(), seed=self.seed)

    async def _settle(self) -> None:
        async for work in self._to_settle[1]:
            await work.read.wait()
            await work.answered.wait()
            assert work.ours is not None
            assert work.theirs is not None
            assert work.buffer is not None
            chosen = differing(work.ours, work.theirs)
            if chosen.any():
                await self._send_blocks(work.batch, work.buffer, chosen)
            self.meter.settled_bytes += work.batch.data_bytes
            self._buffers[0].send_nowait(work.buffer)
        books = EndOfPass(
            data_bytes=self.meter.changed_bytes,
            zero_bytes=self.meter.zero_bytes,
            compared_bytes=self.meter.compared_bytes,
        )
        await self.talk.send(books)

    async def _send_blocks(self, batch: Batch, buffer: memoryview, chosen: np.ndarray) -> None:
        frames = self._packer.pack(buffer, batch.blocks(), chosen)
        while (packed := await self.talk.threads.on_compute(lambda: next(frames, None))) is not None:
            if packed.zero:
                await self.talk.send(ZeroRanges(count=len(packed.ranges), compared=True), ranges_to_wire(packed.ranges))
                continue
            await self._send_data(packed)

    async def _send_data(self, packed: Packed) -> None:
        message = BlockData(count=len(packed.ranges), codec=Codec(packed.codec.value), plain_bytes=packed.plain_bytes)
        head = ranges_to_wire(packed.ranges) + packed.blake3
        self.meter.changed_bytes += packed.plain_bytes
        self.meter.wire_bytes += len(head) + len(packed.payload)
        await self.talk.send(message, head, packed.payload)

    async def _listen(self) -> None:
        while self.verified is None:
            message, payload = await self.talk.receive()
            match message:
                case RangeDigests():
                    self._answer(message, payload)
                case PassVerified():
                    self.verified = message
                case _:
                    raise PeerViolation(f"a target agent does not say {type(message).__name__} in a pass")

    def _answer(self, message: RangeDigests, payload: memoryview) -> None:
        work = self._pending.pop(message.batch, None)
        if work is None:
            raise PeerViolation(f"the target answered batch {message.batch}, which waits for no answer")
        blocks = len(work.batch.block_lengths())
        if payload.nbytes != blocks * DIGEST_BYTES:
            raise PeerViolation(
                f"the target answered batch {message.batch} with {payload.nbytes} bytes of digests "
                f"instead of {blocks * DIGEST_BYTES}"
            )
        work.theirs = digests_from_wire(payload)
        self._ahead.give(work.batch.data_bytes)
        work.answered.set()
