"""The target side of a pass over one disk.

Receiving, comparing, writing and verifying overlap; each stage is bounded in bytes by what the welcomes granted.
Nothing is reported verified before it was flushed, read back past the page cache and found equal to what the source
sent. What it wrote is told by `agent.sync.writing`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import trio

from agent.delta.blocks import Ranges, gaps, total_bytes
from agent.disk.seam import Disk
from agent.errors import NoEvidence, SyncError
from agent.sync.buffers import BufferPool
from agent.sync.conversation import Conversation, Lane, Wire, keep_alive, side_by_side
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
    tracked_from_wire,
)
from agent.sync.proven import Proven, Settling, SpanBooks
from agent.sync.rate import Limits
from agent.sync.stall import StallWatch
from agent.sync.writing import Incoming, Writing
from protocol.errors import PeerViolation, ProtocolError
from protocol.messages import (
    BlockData,
    CompareSpan,
    Credit,
    EndOfPass,
    PassVerified,
    SpanAnswer,
    SpansSettled,
    TrackedSpan,
    ZeroRanges,
)

MAX_OPEN_SPANS = 1024
"""Answered spans that changed data may still come for: the books of a pass must not grow with the disk."""
MAX_SPAN_BYTES = 256 << 20
"""Data of one span at most: an answer must not take longer than a source is willing to wait for any sign of life."""
MAX_UNSETTLED_SPANS = 64 << 10
"""Spans of one connection that were told and are not proven, for the same reason: far more than are on their way."""


PROVE_EVERY_S = 1.0
"""How long what is written may wait to be proven where too little comes to make it worth a flush: what is not proven is
done again when the link is cut."""


@dataclass
class LaneBooks:
    """What came on one connection.

    Attributes:
        asked_bytes: data asked about and not answered yet.
    """

    allowed: Allowed
    settling: Settling
    asked_bytes: int = 0
    data_bytes: int = 0
    spoken_bytes: int = 0
    unchanged_bytes: int = 0


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
        since: the view that the disk equals, as the grant says and the caller has proven: what was not written since
            then is unchanged, and everything else is told by tracked spans. None: everything is compared.
        digest_map: what the disk's blocks hold, as far as it is known; of this pass's seed.
        proven: grows by what is proven to equal the view; `resumed`: what the source was told of it beforehand.
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
    since: str | None = None
    digest_map: PassMap | None = None
    proven: Proven = field(default_factory=Proven)
    resumed: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        self._readers = trio.Semaphore(self.disk.readers)
        self._coverage = Coverage(self.source_size_bytes)
        for run in self.resumed:
            self._coverage.claim(*run)
        self.meter.resumed_bytes = self._coverage.covered_bytes
        self._everything_came = trio.Event()
        self._lanes_expected: int | None = None
        self._lanes_ended = 0
        self._asking = 0
        self._writing = Writing(self.disk, self.talk, self.before_first_write, self.meter, self.digest_map)
        self.proven.is_quiet = lambda: not (self._writing.is_busy or self._writing.is_behind)
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
        watch = StallWatch(self.talk.disk_name, "target", self.meter, self.limits, self._waits_for)
        signs = partial(keep_alive, self.talk, self._give_sign_of_life)
        await side_by_side((self._prove_in_time, signs, watch.run))

    def _waits_for(self) -> str:
        return "storage" if self._asking or self._writing.is_busy else "nobody"

    async def _prove_in_time(self) -> None:
        while True:
            await trio.sleep(PROVE_EVERY_S)
            self._writing.prove_now()

    async def _give_sign_of_life(self, lane: Lane) -> None:
        try:
            await self.talk.send(lane, Credit(payload_bytes=0))
        except ProtocolError:
            # Whoever still has something to say notices it as well. But nobody has where a source said its end on
            # each connection that came, spoke of more connections than those, and is gone.
            if self._lanes_ended and not self._everything_came.is_set():
                raise

    # --- receiving ------------------------------------------------------------------------------------------------

    async def _listen(self, lane: Lane) -> None:
        books = LaneBooks(Allowed(self.source_size_bytes), Settling(self.proven))
        while True:
            message, payload = await self.talk.receive(lane)
            match message:
                case CompareSpan():
                    await self._take_question(lane, books, message, payload)
                case TrackedSpan():
                    await self._take_tracked(lane, books, message, payload)
                case ZeroRanges():
                    ranges = ranges_from_wire(payload, message.count)
                    books.allowed.accept(ranges)
                    await self._writing.put(Incoming(lane, ranges, None, payload, _came(books, ranges)))
                case BlockData():
                    await self._take_data(lane, books, message, payload)
                case SpansSettled():
                    books.settling.settle(message.batch)
                case EndOfPass():
                    self._end(books, message)
                    return
                case _:
                    raise PeerViolation(f"a source agent does not say {type(message).__name__} in a pass")

    async def _take_question(self, lane: Lane, books: LaneBooks, message: CompareSpan, payload: memoryview) -> None:
        if self.since is not None:
            # Were anything written outside what changed since then, a pass that fails would leave a disk that no
            # record describes.
            raise PeerViolation(
                f"a span that may change anything, in a pass limited to what changed since {self.since}"
            )
        question = question_from_wire(message, payload, self.source_size_bytes)
        span = self._claim(books, question)
        if message.count:
            self._ask(lane, books, question, span)
        zeroes = gaps(question.data, message.offset_bytes, message.length_bytes)
        await self._put_zeroes(lane, books, span, zeroes)

    async def _put_zeroes(self, lane: Lane, books: LaneBooks, span: SpanBooks, zeroes: Ranges) -> None:
        if len(zeroes):
            span.waiting += 1
            done = partial(books.settling.done, span)
            await self._writing.put(Incoming(lane, zeroes, None, memoryview(b""), done))

    async def _take_tracked(self, lane: Lane, books: LaneBooks, message: TrackedSpan, payload: memoryview) -> None:
        if self.since is None:
            raise NoEvidence(
                f"disk {self.talk.disk_name}: the source tells only what was written since an earlier view, and no "
                "such view was granted: run a pass that compares",
                disk=self.talk.disk_name,
            )
        question, zeroes = tracked_from_wire(message, payload, self.source_size_bytes)
        span = self._claim(books, question)
        unchanged_bytes = message.length_bytes - question.data_bytes - total_bytes(zeroes)
        books.unchanged_bytes += unchanged_bytes
        self.meter.unchanged_bytes += unchanged_bytes
        if message.superblock_bytes and message.data_count:
            self._ask(lane, books, question, span)
        else:
            self._check_open(books)
            books.allowed.owe(message.offset_bytes, question.data)
            span.owed_bytes = question.data_bytes
        await self._put_zeroes(lane, books, span, zeroes)

    def _claim(self, books: LaneBooks, question: Question) -> SpanBooks:
        """Book a span; refuse one that nobody could answer here."""
        message = question.message
        if question.data_bytes > MAX_SPAN_BYTES or message.superblock_bytes > self.buffers.buffer_bytes:
            raise PeerViolation(
                f"a span with {question.data_bytes} bytes of data in superblocks of {message.superblock_bytes} "
                f"at offset {message.offset_bytes}; this agent compares {MAX_SPAN_BYTES} at once, in superblocks of "
                f"{self.buffers.buffer_bytes}"
            )
        self._coverage.claim(message.offset_bytes, message.length_bytes)
        books.spoken_bytes += message.length_bytes
        if books.settling.open_spans > MAX_UNSETTLED_SPANS:
            raise PeerViolation(f"{MAX_UNSETTLED_SPANS} spans were told, and none of them was settled")
        return books.settling.begin(message.offset_bytes, message.length_bytes, message.batch)

    def _ask(self, lane: Lane, books: LaneBooks, question: Question, span: SpanBooks) -> None:
        books.asked_bytes += question.data_bytes
        self._asking += 1
        span.waiting += 1
        self.talk.spawn(partial(self._answer, lane, books, question, span))

    @staticmethod
    def _check_open(books: LaneBooks) -> None:
        if books.allowed.open_spans > MAX_OPEN_SPANS:
            raise PeerViolation(f"{MAX_OPEN_SPANS} spans differ, and nothing was sent for any of them")

    async def _take_data(self, lane: Lane, books: LaneBooks, message: BlockData, payload: memoryview) -> None:
        ranges = ranges_from_wire(payload, message.count)
        books.allowed.accept(ranges)
        if total_bytes(ranges) != message.plain_bytes:
            raise PeerViolation(f"ranges of {total_bytes(ranges)} bytes in all were declared as {message.plain_bytes}")
        books.data_bytes += message.plain_bytes
        await self._writing.put(Incoming(lane, ranges, message, payload, _came(books, ranges)))

    def _end(self, books: LaneBooks, message: EndOfPass) -> None:
        ours = (books.data_bytes, books.unchanged_bytes, books.spoken_bytes)
        spoken_bytes = message.zero_bytes + message.compared_bytes + message.unchanged_bytes
        theirs = (message.data_bytes, message.unchanged_bytes, spoken_bytes)
        if ours != theirs:
            raise PeerViolation(
                f"the books of source and target differ: {theirs} and {ours} (changed, unchanged, total bytes)"
            )
        if books.allowed.owed_bytes:
            raise PeerViolation(
                f"the source ended the pass and owes {books.allowed.owed_bytes} bytes it said would come"
            )
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

    async def _answer(self, lane: Lane, books: LaneBooks, question: Question, span: SpanBooks) -> None:
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
        self._asking -= 1
        self._check_open(books)
        books.allowed.open(question.message.offset_bytes, question.superblocks[told.differs])
        books.settling.done(span)
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
        self.proven.add(0, self.source_size_bytes)
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


def _came(books: LaneBooks, ranges: Ranges) -> Callable[[], None]:
    """Book changes that came for a span; what is returned is to be called when they are proven."""
    span = books.settling.at(int(ranges[0, 0]))
    span.waiting += 1
    span.owed_bytes -= min(span.owed_bytes, total_bytes(ranges))
    return partial(books.settling.done, span)
