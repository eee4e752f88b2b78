"""The source side of a pass over one disk.

The source leads: it reads a span, sends the digests of its superblocks, and holds the bytes until the target has said
what of them differs there. What differs leaves from the buffer it was read into: nothing is read twice, and a pass pays
two round trips of latency, one for the comparison and one for the proof, however many spans it has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import trio

from agent.delta.blocks import Ranges, Span, plan_spans
from agent.delta.compare import Answer, changed_pieces
from agent.delta.compression import Choice
from agent.delta.digests import digests_to_wire
from agent.delta.granularity import Granularity, Seen
from agent.delta.pack import Packed
from agent.disk.seam import Disk
from agent.sync.budget import ByteBudget
from agent.sync.buffers import BufferPool
from agent.sync.conversation import Conversation, Lane
from agent.sync.hashing import Hashed, hash_span
from agent.sync.meter import Meter
from agent.sync.payloads import answer_from_wire, ranges_to_wire
from agent.sync.rate import Limits
from agent.sync.tuning import Tuning
from protocol.errors import PeerViolation
from protocol.messages import BlockData, Codec, CompareSpan, EndOfPass, PassVerified, SpanAnswer, ZeroRanges

PLANNED_AT_ONCE = 8
"""Spans planned in one thread hop: asking for extents is quick, the hop is not."""


@dataclass(eq=False)
class Work:
    """A span on its way: read and hashed, asked about, answered, settled (what differs of it is sent).

    Attributes:
        before: the span before it on its lane: questions and data of a lane keep the order of the disk.
    """

    span: Span
    lane: Lane
    granularity: Granularity
    buffer: memoryview | None
    before: Work | None
    hashed: Hashed | None = None
    answer: Answer | None = None
    asked: trio.Event = field(default_factory=trio.Event)
    answered: trio.Event = field(default_factory=trio.Event)
    settled: trio.Event = field(default_factory=trio.Event)


@dataclass
class LaneBooks:
    """What one connection has carried of the pass, as `EndOfPass` tells it."""

    ahead: ByteBudget
    pending: dict[int, Work] = field(default_factory=dict)
    last: Work | None = None
    data_bytes: int = 0
    zero_bytes: int = 0
    compared_bytes: int = 0


@dataclass
class SourcePass:
    """Send what differs of one disk's view.

    Attributes:
        disk: the view.
        size_bytes: its size as granted.
        talk: the connections, welcomed already; no more join.
        seed: the seed of this pass's digests.
        ahead_bytes: how much may be asked about and not answered on each connection, as the welcomes say.
        buffers: the host's batch buffers.
        limits: what may be sent and read in a second.
        tuning: chooses granularity and compression while the pass runs.
    """

    disk: Disk
    size_bytes: int
    talk: Conversation
    seed: int
    ahead_bytes: int
    buffers: BufferPool
    limits: Limits
    tuning: Tuning
    meter: Meter
    verified: PassVerified | None = None

    def __post_init__(self) -> None:
        self._readers = trio.Semaphore(self.disk.readers)
        self._books = {lane: LaneBooks(ByteBudget(self.ahead_bytes)) for lane in self.talk.lanes}
        self.meter.access = self.disk.access

    async def run(self) -> PassVerified:
        """Carry the pass to its end; returns what the target verified.

        Raises:
            AgentError, ProtocolError: the pass is not complete.
        """
        listeners = [partial(self._listen, lane) for lane in self.talk.lanes]
        await self.talk.run(self._plan, *listeners, meanwhile=self._tune)
        self.meter.wire_bytes = self.talk.wire_bytes
        assert self.verified is not None  # every listener ends only by it or by an error
        return self.verified

    # --- planning -------------------------------------------------------------------------------------------------

    async def _plan(self) -> None:
        plan = plan_spans(
            self.disk.extents(0, self.size_bytes), self.size_bytes, batch_bytes=self.buffers.buffer_bytes
        )
        while spans := await self.talk.threads.on_disk(lambda: list(islice(plan, PLANNED_AT_ONCE))):
            for span in spans:
                await self._begin(span)
        for lane, books in self._books.items():
            if books.last is not None:
                await books.last.settled.wait()
            end = EndOfPass(
                lanes=len(self._books),
                data_bytes=books.data_bytes,
                zero_bytes=books.zero_bytes,
                compared_bytes=books.compared_bytes,
            )
            await self.talk.send(lane, end)

    async def _begin(self, span: Span) -> None:
        """Take what the span needs, in the order of the disk, and let it go its way."""
        lane = self.talk.lanes[span.number % len(self.talk.lanes)]
        books = self._books[lane]
        buffer = None
        if span.data_bytes:
            await books.ahead.take(span.data_bytes)
            await self.limits.read.take(span.data_bytes)
            buffer = await self.buffers.take()
        books.last = Work(span, lane, self.tuning.granularity, buffer, books.last)
        self.talk.spawn(partial(self._carry, books.last))

    async def _carry(self, work: Work) -> None:
        try:
            await self._read(work)
            await self._ask(work)
            frames = await self._choose(work)
            if not frames:
                self._let_go(work)
            if work.before is not None:
                await work.before.settled.wait()
                work.before = None  # a chain of all spans of a disk would never be freed
            for packed in frames:
                await self._send_frame(work, packed)
        finally:
            self._let_go(work)
        self.meter.settled_bytes += work.span.length_bytes
        self.meter.wire_bytes = self.talk.wire_bytes
        work.settled.set()

    def _let_go(self, work: Work) -> None:
        if work.buffer is not None:
            self.buffers.give(work.buffer)
            work.buffer = work.hashed = None

    # --- reading and asking ---------------------------------------------------------------------------------------

    async def _read(self, work: Work) -> None:
        if work.buffer is None:
            return
        call = partial(
            hash_span,
            self.disk,
            work.span.data,
            work.buffer,
            superblock_bytes=work.granularity.superblock_bytes,
            seed=self.seed,
        )
        async with self._readers:
            work.hashed = await self.talk.threads.on_disk(call)
        self.meter.compared_bytes += work.span.data_bytes

    async def _ask(self, work: Work) -> None:
        span, books = work.span, self._books[work.lane]
        message = CompareSpan(
            batch=span.number,
            offset_bytes=span.offset_bytes,
            length_bytes=span.length_bytes,
            superblock_bytes=work.granularity.superblock_bytes,
            detail_bytes=work.granularity.detail_bytes,
            count=len(span.data),
        )
        if work.before is not None:
            await work.before.asked.wait()
        if work.hashed is None:
            await self.talk.send(work.lane, message)
        else:
            books.pending[span.number] = work
            await self.talk.send(
                work.lane, message, ranges_to_wire(span.data) + digests_to_wire(work.hashed.digests)
            )
        work.asked.set()
        books.zero_bytes += span.zero_bytes
        books.compared_bytes += span.data_bytes
        self.meter.zero_bytes += span.zero_bytes

    async def _listen(self, lane: Lane) -> None:
        books = self._books[lane]
        while True:
            message, payload = await self.talk.receive(lane)
            match message:
                case SpanAnswer():
                    self._take_answer(books, message, payload)
                case PassVerified():
                    if self.verified is not None and self.verified != message:
                        raise PeerViolation("the target tells different results on two connections of one disk")
                    self.verified = message
                    return
                case _:
                    raise PeerViolation(f"a target agent does not say {type(message).__name__} in a pass")

    def _take_answer(self, books: LaneBooks, message: SpanAnswer, payload: memoryview) -> None:
        work = books.pending.pop(message.batch, None)
        if work is None or work.hashed is None:
            raise PeerViolation(f"the target answered batch {message.batch}, which waits for no answer")
        work.answer = answer_from_wire(
            payload,
            work.hashed.superblocks,
            superblock_bytes=work.granularity.superblock_bytes,
            detail_bytes=work.granularity.detail_bytes,
        )
        books.ahead.give(work.span.data_bytes)
        work.answered.set()

    # --- sending --------------------------------------------------------------------------------------------------

    async def _choose(self, work: Work) -> list[Packed]:
        """What of the span differs, packed; the tuning learns from it."""
        if work.hashed is None:
            return []
        await work.answered.wait()
        assert work.answer is not None
        if not work.answer.differs.any():
            self.tuning.learn(self._seen(work, work.answer.differs, None, 0))
            return []
        pieces, details, frames, packing_s = await self.talk.threads.on_compute(
            partial(self._pack, work, work.answer, work.hashed, self.tuning.compression)
        )
        self.tuning.learn(self._seen(work, work.answer.differs, pieces, details))
        self.tuning.packed(frames, packing_s)
        return frames

    def _pack(
        self, work: Work, answer: Answer, hashed: Hashed, choice: Choice
    ) -> tuple[Ranges, int, list[Packed], float]:
        started = time.perf_counter()
        pieces, details = changed_pieces(
            hashed.superblocks,
            answer,
            hashed.held,
            superblock_bytes=work.granularity.superblock_bytes,
            detail_bytes=work.granularity.detail_bytes,
            seed=self.seed,
        )
        frames = self.tuning.packer.pack(hashed.held.buffer, pieces, hashed.held.starts(pieces), choice)
        return pieces, details, frames, time.perf_counter() - started

    async def _send_frame(self, work: Work, packed: Packed) -> None:
        head = ranges_to_wire(packed.ranges)
        if packed.zero:
            await self.talk.send(work.lane, ZeroRanges(count=len(packed.ranges)), head)
            return
        message = BlockData(count=len(packed.ranges), codec=Codec(packed.codec.value), plain_bytes=packed.plain_bytes)
        stored_bytes = sum(memoryview(piece).nbytes for piece in packed.pieces)
        await self.limits.network.take(len(head) + len(packed.proofs) + stored_bytes)
        await self.talk.send(work.lane, message, head + packed.proofs, *packed.pieces)
        self._books[work.lane].data_bytes += packed.plain_bytes
        self.meter.add_frame(packed, stored_bytes)
