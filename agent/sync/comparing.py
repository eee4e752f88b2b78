"""Passes that only compare: an audit against the target's digest map, a verification of both sides' storage.

Both read the view whole, holes included, and tell which blocks differ. What a target has more than the source is read
by a verification as well, and must be zero. Nothing is sent and nothing is written: whoever sends data in such a pass
is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import trio

from agent.delta.blocks import BLOCK_BYTES, Ranges, as_runs, coalesce, to_ranges, total_bytes
from agent.delta.compare import Answer, differing
from agent.delta.digests import block_digests, digests_from_wire, superblock_digests
from agent.delta.granularity import Granularity
from agent.delta.zeroes import is_zero
from agent.disk.seam import Disk, Extent
from agent.errors import SyncError
from agent.sync.buffers import BufferPool
from agent.sync.conversation import Conversation, Lane, Wire, keep_alive
from agent.sync.hashing import STEP_BYTES
from agent.sync.meter import Meter
from agent.sync.pass_map import PassMap
from agent.sync.payloads import Coverage, Question, answer_to_wire, question_from_wire
from agent.sync.rate import Limits
from agent.sync.source import SKIMMED_BYTES, SourcePass
from agent.sync.target import MAX_SPAN_BYTES
from agent.sync.tuning import Tuning
from agent.sync.work import Work
from protocol.errors import PeerViolation, ProtocolError
from protocol.messages import ByteRange, CompareSpan, Credit, EndOfPass, PassVerified, SpanAnswer, SpansSettled

TOLD_STRETCHES = 64
"""Stretches that differ and are named: enough to see where it is, and no flood where everything is."""
TAIL_STEP_BYTES = 64 << 20
"""How much behind the source's end is looked at at once: it takes turns with the questions, and obeys the limit."""

Answering = Callable[[Question, memoryview], tuple[Answer, int]]
"""Answers a question with the help of a buffer; returns what was read for it as well. Blocks."""


def comparing_tuning() -> Tuning:
    """Every block by itself: what differs is told to the block, and nothing needs to be looked at twice."""
    return Tuning(Granularity(BLOCK_BYTES, BLOCK_BYTES))


class Differences:
    """What differs of one disk, whatever the order in which it is found: all of it counted, the first of it named."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def add(self, superblocks: Ranges) -> None:
        """These rising superblocks differ."""
        if not len(superblocks):
            return
        self._meter.differing_bytes += total_bytes(superblocks)
        found = to_ranges((stretch.offset_bytes, stretch.length_bytes) for stretch in self._meter.differing)
        both = np.concatenate((found, coalesce(superblocks)))
        joined = coalesce(both[np.argsort(both[:, 0])])[:TOLD_STRETCHES]
        self._meter.differing[:] = [ByteRange(offset_bytes=o, length_bytes=n) for o, n in joined.tolist()]


# --- the source -------------------------------------------------------------------------------------------------------


@dataclass
class ComparingSource(SourcePass):
    """The source of such a pass: reads everything, whatever the storage says of holes, and sends digests alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._differences = Differences(self.meter)

    def _extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
        return iter([Extent(offset_bytes, length_bytes, zero=False)])

    def _batch_bytes(self) -> int:
        most = min(SKIMMED_BYTES, self.ahead_bytes)
        limit = self.limits.read.bytes_per_s or most
        return max(BLOCK_BYTES, min(most, limit) // BLOCK_BYTES * BLOCK_BYTES)

    async def _settle(self, work: Work) -> None:
        assert work.hashed is not None
        assert work.answer is not None
        self._let_go(work)
        self._differences.add(work.hashed.superblocks[work.answer.differs])
        if work.before is not None:
            await work.before.settled.wait()
            work.before = None


# --- the target -------------------------------------------------------------------------------------------------------


def answer_from_map(
    digest_map: PassMap, disk_name: str, seed: int, question: Question, _: memoryview
) -> tuple[Answer, int]:
    """What the map says about a span; nothing is read.

    Raises:
        SyncError: it does not know all of it.
    """
    entries, known = digest_map.look_up(as_runs(question.data))
    if not known.all():
        why = digest_map.lost or "part of it is damaged"
        raise SyncError(
            f"disk {disk_name} cannot be audited: its digest map does not tell the {question.message.length_bytes} "
            f"bytes at offset {question.message.offset_bytes} ({why}); verify both sides in full instead",
            disk=disk_name,
        )
    return _answered(question, [row.tobytes() for row in entries], seed), 0


def answer_from_storage(disk: Disk, seed: int, question: Question, buffer: memoryview) -> tuple[Answer, int]:
    """What the storage says about a span, past the page cache, holes included.

    Raises:
        DiskError: as the disk says.
    """
    blocks: list[bytes] = []
    step_bytes = min(STEP_BYTES, buffer.nbytes)
    for offset, length in as_runs(question.data):
        for at in range(offset, offset + length, step_bytes):
            part = buffer[: min(step_bytes, offset + length - at)]
            disk.read_back(at, part)
            blocks += block_digests(part, seed=seed)
    return _answered(question, blocks, seed), question.data_bytes


def tail_differences(disk: Disk, offset_bytes: int, length_bytes: int, buffer: memoryview) -> tuple[Ranges, int]:
    """Blocks of a stretch behind the source's end that hold anything but zeroes, and what was read for it. A hole is
    believed: there is nothing to compare it with, and a target may be larger by any amount. Blocks.

    Raises:
        DiskError: as the disk says.
    """
    found: list[tuple[int, int]] = []
    read_bytes = 0
    step_bytes = min(STEP_BYTES, buffer.nbytes)
    for extent in disk.extents(offset_bytes, length_bytes):
        if extent.zero:
            continue
        end = extent.offset_bytes + extent.length_bytes
        for at in range(extent.offset_bytes, end, step_bytes):
            part = buffer[: min(step_bytes, end - at)]
            disk.read_back(at, part)
            read_bytes += part.nbytes
            for start in range(0, part.nbytes, BLOCK_BYTES):
                block = part[start : start + BLOCK_BYTES]
                if not is_zero(block):
                    found.append((at + start, block.nbytes))
    return to_ranges(found), read_bytes


def _answered(question: Question, blocks: list[bytes], seed: int) -> Answer:
    superblock_bytes = question.message.superblock_bytes
    digests = superblock_digests(as_runs(question.data), blocks, superblock_bytes, seed=seed)
    differs = differing(digests_from_wire(b"".join(digests)), question.digests)
    return Answer(differs, np.zeros(len(differs), dtype=bool), digests_from_wire(b""))


@dataclass
class _LaneBooks:
    asked_bytes: int = 0
    spoken_bytes: int = 0


@dataclass
class ComparingTarget:
    """The target of such a pass.

    Attributes:
        size_bytes: of the source's disk, as granted.
        talk: the connections that came so far; more may `join`.
        answering: what knows this side's content.
        readers: how many questions are answered at once.
        reads: whether answering reads the disk, and takes from the limit of reads.
        tail: the disk, where it is larger than the source's: what lies behind that one's end is to be zero.
        past_cache: whether what is read is what the storage holds.
    """

    size_bytes: int
    talk: Conversation
    answering: Answering
    readers: int
    reads: bool
    past_cache: bool
    buffers: BufferPool
    limits: Limits
    meter: Meter
    tail: Disk | None = None

    def __post_init__(self) -> None:
        self._turns = trio.Semaphore(self.readers)
        self._coverage = Coverage(self.size_bytes)
        self._everything_came = trio.Event()
        self._tail_is_read = trio.Event()
        self._lanes_expected: int | None = None
        self._lanes_ended = 0
        self._differences = Differences(self.meter)

    async def run(self) -> None:
        """Carry the pass to its end, whatever differs.

        Raises:
            AgentError, ProtocolError: the pass is not complete.
        """
        listeners = [partial(self._listen, lane) for lane in self.talk.lanes]
        # The tail is read beside the rest, so that nobody waits for it at the end.
        await self.talk.run(*listeners, self._read_tail, self._finish, meanwhile=self._give_signs_of_life)
        self.meter.wire_bytes = self.talk.wire_bytes

    def join(self, wire: Wire) -> None:
        """One more connection of this disk, welcomed already."""
        self.talk.join(wire, self._listen)

    async def _give_signs_of_life(self) -> None:
        await keep_alive(self.talk, self._give_sign_of_life)

    async def _give_sign_of_life(self, lane: Lane) -> None:
        try:
            await self.talk.send(lane, Credit(payload_bytes=0))
        except ProtocolError:
            if self._lanes_ended and not self._everything_came.is_set():
                raise  # of the lanes that are still to come nobody else would notice

    async def _listen(self, lane: Lane) -> None:
        books = _LaneBooks()
        while True:
            message, payload = await self.talk.receive(lane)
            match message:
                case CompareSpan():
                    self._take_question(lane, books, message, payload)
                case SpansSettled():
                    pass  # a sign of life: where something differs, nothing follows
                case EndOfPass():
                    self._end(books, message)
                    return
                case _:
                    raise PeerViolation(f"a source agent does not say {type(message).__name__} in a pass that compares")

    def _take_question(self, lane: Lane, books: _LaneBooks, message: CompareSpan, payload: memoryview) -> None:
        question = question_from_wire(message, payload, self.size_bytes)
        if question.data_bytes != message.length_bytes:
            raise PeerViolation(
                f"a span of {message.length_bytes} bytes at offset {message.offset_bytes} tells digests of "
                f"{question.data_bytes}: a pass that compares believes in no holes"
            )
        if question.data_bytes > MAX_SPAN_BYTES or message.detail_bytes != message.superblock_bytes:
            raise PeerViolation(
                f"a span of {message.length_bytes} bytes at offset {message.offset_bytes} with details of "
                f"{message.detail_bytes}: this agent compares {MAX_SPAN_BYTES} at once, and tells no details"
            )
        self._coverage.claim(message.offset_bytes, message.length_bytes)
        books.spoken_bytes += message.length_bytes
        books.asked_bytes += question.data_bytes
        self.talk.spawn(partial(self._answer, lane, books, question))

    async def _answer(self, lane: Lane, books: _LaneBooks, question: Question) -> None:
        async with self._turns:
            if self.reads:
                await self.limits.read.take(question.data_bytes)
            buffer = await self.buffers.take()
            try:
                told, read_bytes = await self.talk.threads.on_disk(partial(self.answering, question, buffer))
            finally:
                self.buffers.give(buffer)
        self.meter.compared_bytes += read_bytes
        self.meter.settled_bytes += question.data_bytes
        self._differences.add(question.superblocks[told.differs])
        message = SpanAnswer(batch=question.message.batch, read_bytes=read_bytes, details=0)
        await self.talk.send(lane, message, *answer_to_wire(told))
        books.asked_bytes -= question.data_bytes

    def _end(self, books: _LaneBooks, message: EndOfPass) -> None:
        told = (message.data_bytes, message.zero_bytes, message.compared_bytes)
        if told != (0, 0, books.spoken_bytes):
            raise PeerViolation(
                f"the source tells {told} bytes sent, zero and compared, where {books.spoken_bytes} were compared"
            )
        if self._lanes_expected not in (None, message.lanes):
            raise PeerViolation(f"the source speaks of {message.lanes} and of {self._lanes_expected} connections")
        self._lanes_expected = message.lanes
        self._lanes_ended += 1
        if self._lanes_ended == self._lanes_expected:
            if not self._coverage.complete:
                raise PeerViolation(
                    f"the source ended the pass after {self._coverage.covered_bytes} of {self.size_bytes} bytes"
                )
            self._everything_came.set()

    async def _read_tail(self) -> None:
        disk = self.tail
        for at in range(self.size_bytes, disk.size_bytes if disk is not None else 0, TAIL_STEP_BYTES):
            assert disk is not None
            length = min(TAIL_STEP_BYTES, disk.size_bytes - at)
            buffer = await self.buffers.take()
            try:
                look = partial(tail_differences, disk, at, length, buffer)
                found, read_bytes = await self.talk.threads.on_disk(look)
            finally:
                self.buffers.give(buffer)
            await self.limits.read.take(read_bytes)  # only now is it known
            self.meter.compared_bytes += read_bytes
            self._differences.add(found)
        self._tail_is_read.set()

    async def _finish(self) -> None:
        await self._everything_came.wait()
        await self._tail_is_read.wait()
        self.meter.past_cache = self.past_cache
        self.meter.lanes = len(self.talk.lanes)
        verified = PassVerified(
            written_bytes=0,
            zeroed_bytes=0,
            verified_bytes=0,
            compared_bytes=self.meter.compared_bytes,
            past_cache=self.past_cache,
        )
        for lane in self.talk.lanes:
            await self.talk.send(lane, verified)


def comparing_target(
    against: Disk | PassMap | None,
    size_bytes: int,
    talk: Conversation,
    seed: int,
    *,
    buffers: BufferPool,
    limits: Limits,
    meter: Meter,
) -> ComparingTarget:
    """The target's side against a disk, which is read, or against a digest map, and then no disk is."""
    assert against is not None  # opened, or the pass had not begun
    if isinstance(against, PassMap):
        answering: Answering = partial(answer_from_map, against, talk.disk_name, seed)
        readers, past_cache = 1, False
        meter.access = "digest map"
    else:
        answering = partial(answer_from_storage, against, seed)
        readers, past_cache = against.readers, against.reads_back_past_cache
        meter.access = f"{against.access}, read back"
    return ComparingTarget(
        size_bytes=size_bytes,
        talk=talk,
        answering=answering,
        readers=readers,
        reads=not isinstance(against, PassMap),
        past_cache=past_cache,
        buffers=buffers,
        limits=limits,
        meter=meter,
        tail=None if isinstance(against, PassMap) or against.size_bytes <= size_bytes else against,
    )
