"""The target side of a pass over one disk.

Receiving, comparing, writing and verifying overlap; each stage is bounded in bytes by what the welcomes granted.
Nothing is reported verified before it was flushed, read back past the page cache and found equal to what the source
sent. What it wrote is told by `agent.sync.writing`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import trio

from agent.delta.blocks import gaps, total_bytes
from agent.disk.seam import Disk
from agent.errors import SyncError
from agent.sync.buffers import BufferPool
from agent.sync.conversation import Conversation, Lane, Wire
from agent.sync.map_answers import answer_with_map
from agent.sync.meter import Meter
from agent.sync.pass_map import PassMap
from agent.sync.payloads import (
    Allowed,
    Coverage,
    Question,
    answer_to_wire,
    question_from_wire,
    ranges_from_wire,
)
from agent.sync.rate import Limits
from agent.sync.writing import Incoming, Writing
from protocol.errors import PeerViolation, ProtocolError
from protocol.messages import BlockData, CompareSpan, Credit, EndOfPass, PassVerified, SpanAnswer, ZeroRanges

MAX_OPEN_SPANS = 1024
"""Answered spans that changed data may still come for: the books of a pass must not grow with the disk."""
MAX_SPAN_BYTES = 256 << 20
"""Data of one span at most: an answer must not take longer than a source is willing to wait for any sign of life."""
SIGN_OF_LIFE_S = 30.0
"""How often the source hears from a target that is busy; it gives up on one that is silent for minutes."""
OWING_TIMEOUT_S = 3600.0
"""How long the source may be silent while it waits for us: it has no way to give a sign of life. A host that is gone is
noticed before, by TCP keepalive."""


@dataclass
class LaneBooks:
    """What came on one connection.

    Attributes:
        asked_bytes: data asked about and not answered yet.
    """

    allowed: Allowed
    asked_bytes: int = 0
    data_bytes: int = 0
    spoken_bytes: int = 0


@dataclass
class TargetPass:
    """Make one disk equal the source's view.

    Attributes:
        disk: the target, opened for writing through its fence.
        source_size_bytes, target_size_bytes: as granted; what the target has more is zeroed.
        talk: the connections that came so far; more may `join`.
        seed: the seed of this pass's digests.
        buffers: the host's for what is received.
        limits: what may be read in a second.
        before_first_write: awaited once before anything is written: marks the original torn.
        digest_map: what the disk's blocks hold, as far as it is known; of this pass's seed.
    """

    disk: Disk
    source_size_bytes: int
    target_size_bytes: int
    talk: Conversation
    seed: int
    buffers: BufferPool
    limits: Limits
    before_first_write: Callable[[], Awaitable[None]]
    meter: Meter
    digest_map: PassMap | None = None

    def __post_init__(self) -> None:
        self._readers = trio.Semaphore(self.disk.readers)
        self._coverage = Coverage(self.source_size_bytes)
        self._everything_came = trio.Event()
        self._lanes_expected: int | None = None
        self._lanes_ended = 0
        self._writing = Writing(self.disk, self.talk, self.before_first_write, self.meter, self.digest_map)
        self.meter.access = self.disk.access

    async def run(self) -> None:
        """Carry the pass to its end: the source has been told that everything is verified.

        Raises:
            AgentError, ProtocolError: the pass is not complete; the disk may be torn.
        """
        listeners = [partial(self._listen, lane) for lane in self.talk.lanes]
        await self.talk.run(*listeners, self._finish, *self._writing.tasks(), meanwhile=self._give_signs_of_life)
        self.meter.wire_bytes = self.talk.wire_bytes

    def join(self, wire: Wire) -> None:
        """One more connection of this disk, welcomed already."""
        self.talk.join(wire, self._listen)

    async def _give_signs_of_life(self) -> None:
        while True:
            await trio.sleep(SIGN_OF_LIFE_S)
            try:
                for lane in self.talk.lanes:
                    await self.talk.send(lane, Credit(payload_bytes=0))
            except ProtocolError:
                # Whoever still has something to say notices it as well. But nobody has where a source said its end on
                # each connection that came, spoke of more connections than those, and is gone.
                if self._lanes_ended and not self._everything_came.is_set():
                    raise

    # --- receiving ------------------------------------------------------------------------------------------------

    async def _listen(self, lane: Lane) -> None:
        books = LaneBooks(Allowed(self.source_size_bytes))
        while True:
            owing = books.asked_bytes or self._writing.waiting_bytes
            message, payload = await self.talk.receive(lane, OWING_TIMEOUT_S if owing else None)
            match message:
                case CompareSpan():
                    await self._take_question(lane, books, message, payload)
                case ZeroRanges():
                    ranges = ranges_from_wire(payload, message.count)
                    books.allowed.accept(ranges)
                    await self._writing.put(Incoming(lane, ranges, None, payload))
                case BlockData():
                    await self._take_data(lane, books, message, payload)
                case EndOfPass():
                    self._end(books, message)
                    return
                case _:
                    raise PeerViolation(f"a source agent does not say {type(message).__name__} in a pass")

    async def _take_question(self, lane: Lane, books: LaneBooks, message: CompareSpan, payload: memoryview) -> None:
        question = question_from_wire(message, payload, self.source_size_bytes)
        if question.data_bytes > MAX_SPAN_BYTES or message.superblock_bytes > self.buffers.buffer_bytes:
            raise PeerViolation(
                f"a span with {question.data_bytes} bytes of data in superblocks of {message.superblock_bytes} "
                f"at offset {message.offset_bytes}; this agent compares {MAX_SPAN_BYTES} at once, in superblocks of "
                f"{self.buffers.buffer_bytes}"
            )
        self._coverage.claim(message.offset_bytes, message.length_bytes)
        books.spoken_bytes += message.length_bytes
        if message.count:
            books.asked_bytes += question.data_bytes
            self.talk.spawn(partial(self._answer, lane, books, question))
        zeroes = gaps(question.data, message.offset_bytes, message.length_bytes)
        if len(zeroes):
            await self._writing.put(Incoming(lane, zeroes, None, payload[:0]))

    async def _take_data(self, lane: Lane, books: LaneBooks, message: BlockData, payload: memoryview) -> None:
        ranges = ranges_from_wire(payload, message.count)
        books.allowed.accept(ranges)
        if total_bytes(ranges) != message.plain_bytes:
            raise PeerViolation(f"ranges of {total_bytes(ranges)} bytes in all were declared as {message.plain_bytes}")
        books.data_bytes += message.plain_bytes
        await self._writing.put(Incoming(lane, ranges, message, payload))

    def _end(self, books: LaneBooks, message: EndOfPass) -> None:
        ours = (books.data_bytes, books.spoken_bytes)
        theirs = (message.data_bytes, message.zero_bytes + message.compared_bytes)
        if ours != theirs:
            raise PeerViolation(f"the books of source and target differ: {theirs} and {ours} (changed, total bytes)")
        if self._lanes_expected not in (None, message.lanes):
            raise PeerViolation(f"the source speaks of {message.lanes} and of {self._lanes_expected} connections")
        self._lanes_expected = message.lanes
        self._lanes_ended += 1
        if self._lanes_ended == self._lanes_expected:
            if not self._coverage.complete:
                raise PeerViolation(
                    f"the source ended the pass after {self._coverage.covered_bytes} of {self.source_size_bytes} bytes"
                )
            self._everything_came.set()

    # --- comparing ------------------------------------------------------------------------------------------------

    async def _answer(self, lane: Lane, books: LaneBooks, question: Question) -> None:
        async with self._readers:
            if self.digest_map is None:
                await self.limits.read.take(question.data_bytes)
            buffer = await self.buffers.take()
            try:
                answered = await self.talk.threads.on_disk(
                    partial(answer_with_map, self.disk, question, buffer, seed=self.seed, digest_map=self.digest_map)
                )
            finally:
                self.buffers.give(buffer)
            if self.digest_map is not None:
                await self.limits.read.take(answered.read_bytes)  # only now is it known
        told = answered.answer
        # A block that the map did not know and whose pages were told was read twice: an answer tells no more than all.
        read_bytes = min(answered.read_bytes, question.data_bytes)
        self.meter.compared_bytes += read_bytes
        self.meter.mapped_bytes += answered.mapped_bytes
        self.meter.unmapped_bytes += question.data_bytes - answered.mapped_bytes
        books.asked_bytes -= question.data_bytes
        if books.allowed.open_spans > MAX_OPEN_SPANS:
            raise PeerViolation(f"{MAX_OPEN_SPANS} answered spans differ, and nothing was sent for any of them")
        books.allowed.open(question.message.offset_bytes, question.superblocks[told.differs])
        message = SpanAnswer(batch=question.message.batch, read_bytes=read_bytes, details=len(told.details))
        await self.talk.send(lane, message, *answer_to_wire(told))

    # --- the end --------------------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        await self._everything_came.wait()
        tail_bytes = self.target_size_bytes - self.source_size_bytes
        if tail_bytes:
            tail = np.array([(self.source_size_bytes, tail_bytes)], dtype=np.uint64)
            await self._writing.put(Incoming(self.talk.lanes[0], tail, None, memoryview(b"")))
        await self._writing.finish()
        if self.meter.verified_bytes != self.meter.written_bytes + self.meter.zeroed_bytes:
            raise SyncError(
                f"disk {self.talk.disk_name}: {self.meter.written_bytes + self.meter.zeroed_bytes} bytes were written "
                f"and {self.meter.verified_bytes} verified; run the pass again"
            )
        self.meter.settled_bytes = self.source_size_bytes
        if self.digest_map is not None:
            self.meter.name_rung(self.digest_map.lost)
        self.meter.past_cache = self.disk.reads_back_past_cache
        self.meter.lanes = len(self.talk.lanes)
        verified = PassVerified(
            written_bytes=self.meter.written_bytes,
            zeroed_bytes=self.meter.zeroed_bytes,
            verified_bytes=self.meter.verified_bytes,
            compared_bytes=self.meter.compared_bytes,
            past_cache=self.meter.past_cache,
        )
        for lane in self.talk.lanes:
            await self.talk.send(lane, verified)
