"""The target side of a pass over one disk.

Receiving, hashing, writing and verifying overlap; each stage is bounded in bytes by what the welcome granted. Nothing
is reported verified before it was flushed, read back past the page cache and found equal to what the source sent.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import trio

from agent.delta.blocks import BLOCK_BYTES, Ranges, coalesce
from agent.delta.digests import digests_to_wire
from agent.delta.pack import BLAKE3_BYTES, Codec, Unpacker
from agent.disk.seam import Disk
from agent.errors import SyncError
from agent.sync.budget import ByteBudget
from agent.sync.conversation import Conversation
from agent.sync.hashing import hash_ranges
from agent.sync.meter import Meter
from agent.sync.payloads import RANGE_BYTES, RisingRanges, ranges_from_wire, total_bytes
from agent.sync.verification import Written, verify
from protocol.errors import PeerViolation, ProtocolError
from protocol.messages import (
    BlockData,
    CompareRanges,
    Credit,
    EndOfPass,
    PassVerified,
    RangeDigests,
    ZeroRanges,
)

HASHERS = 2
"""Batches hashed at the same time: one waits for storage while the other is hashed."""
VERIFY_EVERY_BYTES = 64 << 20
"""How much is written between two flushes: a flush costs a fixed time, the digests waiting for it cost memory."""
MAX_UNSETTLED_BATCHES = 1024
"""Answered batches that changed blocks may still come for: the books of a pass must not grow with the disk."""
QUEUE_BYTES = 64 << 20
"""What may wait to be written: more than the window grants, so that only zero ranges ever make the receiver wait."""
ITEM_BYTES = 1024
"""What an item of that queue is counted for besides its payload."""
SIGN_OF_LIFE_S = 30.0
"""How often the source hears from a target that is busy; it gives up on one that is silent for minutes."""
OWING_TIMEOUT_S = 3600.0
"""How long the source may be silent while it waits for us: it has no way to give a sign of life. A host that is gone is
noticed before, by TCP keepalive."""
TAIL_STEP_BYTES = 1 << 30
"""Zero ranges are worked on in steps of this size, so that a cancelled pass ends in bounded time."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A batch to hash and answer."""

    number: int
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Incoming:
    """Blocks (with their payload) or zeroes to write."""

    ranges: Ranges
    data: BlockData | None
    payload: memoryview


@dataclass
class TargetPass:
    """Make one disk equal the source's view.

    Attributes:
        disk: the target, opened for writing through its fence.
        source_size_bytes, target_size_bytes: as granted; what the target has more is zeroed.
        seed: the seed of this pass's digests.
        ahead_bytes: how much may be asked for and not answered.
        before_first_write: awaited once before anything is written: marks the original torn.
    """

    disk: Disk
    source_size_bytes: int
    target_size_bytes: int
    talk: Conversation
    seed: int
    ahead_bytes: int
    before_first_write: Callable[[], Awaitable[None]]
    meter: Meter

    def __post_init__(self) -> None:
        size = self.source_size_bytes
        self._data_cursor = RisingRanges("ranges to compare", size, BLOCK_BYTES)
        self._zero_cursor = RisingRanges("zero ranges", size, BLOCK_BYTES)
        self._write_cursor = RisingRanges("changed blocks", size, BLOCK_BYTES)
        self._asked_bytes = 0
        self._answered: deque[Ranges] = deque()
        self._announced_bytes = 0
        self._data_bytes = 0
        self._to_hash = trio.open_memory_channel[Compared](float("inf"))  # bounded by ahead_bytes, checked on receipt
        self._to_write = trio.open_memory_channel[Incoming](float("inf"))  # bounded by the queue's budget
        self._queue = ByteBudget(QUEUE_BYTES)
        self._to_verify = trio.open_memory_channel[Written](1)
        self._unpacker = Unpacker()
        self._wrote = False

    async def run(self) -> None:
        """Carry the pass to its end: the source has been told that everything is verified.

        Raises:
            AgentError, ProtocolError: the pass is not complete; the disk may be torn.
        """
        hashers = [self._hash] * HASHERS
        await self.talk.run(self._listen, *hashers, self._write, self._verify, meanwhile=self._give_signs_of_life)

    async def _give_signs_of_life(self) -> None:
        # A connection that is over is noticed by those who have something to say.
        with contextlib.suppress(ProtocolError):
            while True:
                await trio.sleep(SIGN_OF_LIFE_S)
                await self.talk.send(Credit(payload_bytes=0))

    # --- receiving ------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            owing = self._asked_bytes or self._queue.taken_bytes
            message, payload = await self.talk.receive(OWING_TIMEOUT_S if owing else None)
            match message:
                case CompareRanges():
                    self._accept_compare(message, payload)
                case ZeroRanges():
                    await self._accept_zeroes(message, payload)
                case BlockData():
                    await self._accept_data(message, payload)
                case EndOfPass():
                    self._check_books(message)
                    break
                case _:
                    raise PeerViolation(f"a source agent does not say {type(message).__name__} in a pass")
        # Closed only here, where the source has ended the pass: after a failure the end must not look like one.
        self._to_hash[0].close()
        self._to_write[0].close()

    def _accept_compare(self, message: CompareRanges, payload: memoryview) -> None:
        if message.block_bytes != BLOCK_BYTES:
            raise PeerViolation(
                f"blocks of {message.block_bytes} bytes were asked for, this agent hashes {BLOCK_BYTES}"
            )
        ranges = ranges_from_wire(payload, message.count)
        self._data_cursor.accept(ranges)
        size = total_bytes(ranges)
        if self._asked_bytes and self._asked_bytes + size > self.ahead_bytes:
            raise PeerViolation(f"more than the {self.ahead_bytes} bytes granted were asked for ahead of their answers")
        self._asked_bytes += size
        self._announced_bytes += size
        self._to_hash[0].send_nowait(Compared(message.batch, ranges))

    async def _accept_zeroes(self, message: ZeroRanges, payload: memoryview) -> None:
        ranges = ranges_from_wire(payload, message.count)
        if message.compared:
            self._accept_changed(ranges)
        else:
            self._zero_cursor.accept(ranges)
            self._announced_bytes += total_bytes(ranges)
        await self._enqueue(Incoming(ranges, None, payload))

    async def _accept_data(self, message: BlockData, payload: memoryview) -> None:
        ranges = ranges_from_wire(payload, message.count)
        self._accept_changed(ranges)
        if total_bytes(ranges) != message.plain_bytes:
            raise PeerViolation(f"blocks of {total_bytes(ranges)} bytes in all were declared as {message.plain_bytes}")
        self._data_bytes += message.plain_bytes
        await self._enqueue(Incoming(ranges, message, payload))

    async def _enqueue(self, item: Incoming) -> None:
        await self._queue.take(item.payload.nbytes + ITEM_BYTES)
        self._to_write[0].send_nowait(item)

    def _accept_changed(self, ranges: Ranges) -> None:
        """Changed blocks may only lie where a comparison was answered: anything else was never announced."""
        self._write_cursor.accept(ranges)
        first, last = int(ranges[0, 0]), int(ranges[-1, 0] + ranges[-1, 1])
        while self._answered and int(self._answered[0][-1].sum()) <= first:
            self._answered.popleft()
        for compared in self._answered:
            if int(compared[0, 0]) <= first and last <= int(compared[-1].sum()):
                return
        raise PeerViolation(f"changed blocks from offset {first} to {last} are not part of one answered comparison")

    def _check_books(self, books: EndOfPass) -> None:
        if self._announced_bytes != self.source_size_bytes or self._asked_bytes:
            raise PeerViolation(
                f"the source ended the pass after {self._announced_bytes} of {self.source_size_bytes} bytes"
            )
        ours = (self._data_bytes, self._announced_bytes)
        theirs = (books.data_bytes, books.zero_bytes + books.compared_bytes)
        if ours != theirs:
            raise PeerViolation(f"the books of source and target differ: {theirs} and {ours} (changed, total bytes)")

    # --- hashing --------------------------------------------------------------------------------------------------

    async def _hash(self) -> None:
        async for work in self._to_hash[1]:
            digests, read_bytes = await self.talk.threads.on_disk(
                partial(hash_ranges, self.disk, work.ranges, seed=self.seed)
            )
            self.meter.compared_bytes += read_bytes
            self._asked_bytes -= total_bytes(work.ranges)
            self._remember(work.ranges)
            await self.talk.send(RangeDigests(batch=work.number, read_bytes=read_bytes), digests_to_wire(digests))

    def _remember(self, ranges: Ranges) -> None:
        """Keep answered batches in rising order, though two hashers may end out of turn."""
        position = len(self._answered)
        while position and int(self._answered[position - 1][0, 0]) > int(ranges[0, 0]):
            position -= 1
        self._answered.insert(position, ranges)
        if len(self._answered) > MAX_UNSETTLED_BATCHES:
            self._answered.popleft()

    # --- writing and verifying ------------------------------------------------------------------------------------

    async def _write(self) -> None:
        written = Written()
        async for item in self._to_write[1]:
            if item.data is None:
                await self._write_zeroes(item.ranges, written)
            else:
                await self._write_blocks(item, item.data, written)
                await self.talk.send(Credit(payload_bytes=item.payload.nbytes))
            self._queue.give(item.payload.nbytes + ITEM_BYTES)
            if written.size_bytes >= VERIFY_EVERY_BYTES:
                await self._to_verify[0].send(written)
                written = Written()
        if self.target_size_bytes > self.source_size_bytes:
            tail = (self.source_size_bytes, self.target_size_bytes - self.source_size_bytes)
            await self._write_zeroes(np.array([tail], dtype=np.uint64), written)
        if written.size_bytes:
            await self._to_verify[0].send(written)
        self._to_verify[0].close()

    async def _mark(self) -> None:
        if not self._wrote:
            await self.before_first_write()
            self._wrote = True

    async def _write_blocks(self, item: Incoming, data: BlockData, written: Written) -> None:
        head = len(item.ranges) * RANGE_BYTES
        body = head + len(item.ranges) * BLAKE3_BYTES
        digests, stored = item.payload[head:body], item.payload[body:]
        plain = await self.talk.threads.on_compute(
            lambda: self._unpacker.unpack(stored, Codec(data.codec.value), item.ranges, digests)
        )
        await self._mark()
        await self.talk.threads.on_disk(lambda: self._write_runs(item.ranges, plain))
        written.add_blocks(item.ranges, bytes(digests))
        self.meter.written_bytes += data.plain_bytes

    def _write_runs(self, ranges: Ranges, plain: memoryview) -> None:
        """Write blocks, adjoining ones in one request."""
        done = 0
        for offset, length in coalesce(ranges).tolist():
            self.disk.write(offset, plain[done : done + length])
            done += length

    async def _write_zeroes(self, ranges: Ranges, written: Written) -> None:
        for offset, length in ranges.tolist():
            end = offset + length
            while offset < end:
                step = min(TAIL_STEP_BYTES, end - offset)
                found = await self.talk.threads.on_disk(partial(self._not_zero, offset, step))
                if found:
                    await self._mark()
                    await self.talk.threads.on_disk(partial(self._zero_all, found))
                    written.add_zeroes(found)
                    self.meter.zeroed_bytes += sum(size for _, size in found)
                offset += step

    def _not_zero(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(e.offset_bytes, e.length_bytes) for e in self.disk.extents(offset, length) if not e.zero]

    def _zero_all(self, runs: list[tuple[int, int]]) -> None:
        for offset, length in runs:
            self.disk.write_zeroes(offset, length)

    async def _verify(self) -> None:
        async for written in self._to_verify[1]:
            self.meter.verified_bytes += await self.talk.threads.on_disk(partial(verify, self.disk, written))
        if self.meter.verified_bytes != self.meter.written_bytes + self.meter.zeroed_bytes:
            raise SyncError(
                f"disk {self.talk.disk_name}: {self.meter.written_bytes + self.meter.zeroed_bytes} bytes were written "
                f"and {self.meter.verified_bytes} verified; run the pass again"
            )
        self.meter.settled_bytes = self.source_size_bytes
        self.meter.past_cache = self.disk.reads_back_past_cache
        await self.talk.send(
            PassVerified(
                written_bytes=self.meter.written_bytes,
                zeroed_bytes=self.meter.zeroed_bytes,
                verified_bytes=self.meter.verified_bytes,
                compared_bytes=self.meter.compared_bytes,
                past_cache=self.meter.past_cache,
            )
        )
