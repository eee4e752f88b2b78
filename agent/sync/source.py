"""The source side of a pass over one disk.

The source leads: it reads a span, sends the digests of its superblocks, and holds the bytes until the target has said
what of them differs there. What differs leaves from the buffer it was read into: nothing is read twice, and a pass pays
two round trips of latency, one for the comparison and one for the proof, however many spans it has.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import trio

from agent.delta.blocks import BLOCK_BYTES, Span, plan_spans, total_bytes
from agent.delta.compare import Held, Portion, portions
from agent.delta.granularity import Seen
from agent.delta.pack import Packed
from agent.delta.tracked import plan_tracked, whole_blocks
from agent.disk.dirty import DirtyRanges
from agent.disk.seam import Disk, Extent
from agent.sync.budget import ByteBudget
from agent.sync.buffers import BufferPool
from agent.sync.conversation import Conversation, Lane, keep_alive, side_by_side
from agent.sync.hashing import hash_span, read_data, read_span
from agent.sync.meter import Meter
from agent.sync.payloads import answer_from_wire, ranges_to_wire
from agent.sync.processor import ProcessorTime
from agent.sync.proven import check_runs, missing
from agent.sync.rate import Limits
from agent.sync.stall import StallWatch
from agent.sync.tuning import INTERVAL_S, Tuning
from agent.sync.work import Found, LaneBooks, Work, chosen, packed_whole, timed
from protocol.errors import PeerViolation
from protocol.messages import BlockData, Codec, EndOfPass, PassVerified, SpanAnswer, SpansSettled, ZeroRanges

PLANNED_AT_ONCE = 4
"""Spans planned in one thread hop: asking for extents is quick, the hop is not."""
COUNTED_AT_ONCE = 1 << 16
"""Ranges of what was written that are counted in one thread hop."""
SKIMMED_BYTES = 128 << 20
"""Data of a span where next to nothing differs: it is read through one buffer, and what differs is read once more."""
SKIMMED_AT_ONCE = 4
"""Such spans that are asked about and not settled: what may be read once more when a disk turns out to differ."""
TELL_EVERY_BYTES = 64 << 20
"""Data of spans on one connection between two words of how far it is settled: what a cut link may cost."""
PORTION_BYTES = 4 << 20
"""How much of a skimmed span is read once more at a time; a superblock at least."""


@dataclass
class SourcePass:
    """Send what differs of one disk's view.

    Attributes:
        disk: the view.
        size_bytes: its size as granted.
        talk: the connections, welcomed already; no more join.
        seed: the seed of this pass's digests.
        ahead_bytes: how much may be asked about and not answered on each connection, as the welcomes say.
        buffers: the host's for what is sent, a batch each.
        limits: what may be sent and read in a second.
        tuning: chooses granularity and compression while the pass runs.
        dirty: what was written since the view that the target is granted to equal; None: nothing of that is known, and
            everything is compared.
        proven: what the target says equals the view already, as rising runs; not looked at.
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
    dirty: DirtyRanges | None = None
    proven: tuple[tuple[int, int], ...] = ()
    verified: PassVerified | None = None

    def __post_init__(self) -> None:
        self._readers = trio.Semaphore(self.disk.readers)
        self._skimmed = trio.Semaphore(SKIMMED_AT_ONCE)
        self._second_look = trio.Lock()
        self._spare: memoryview | None = None
        self._reading = 0
        self._begun_bytes = 0
        self._books = {lane: LaneBooks(ByteBudget(self.ahead_bytes)) for lane in self.talk.lanes}
        self.meter.access = self.disk.access
        check_runs(self.proven, self.size_bytes)
        self.meter.resumed_bytes = sum(length for _, length in self.proven)
        if self.dirty is None:
            self.meter.settled_bytes = self.meter.resumed_bytes

    async def run(self) -> PassVerified:
        """Carry the pass to its end; returns what the target verified.

        Raises:
            AgentError, ProtocolError: the pass is not complete.
        """
        listeners = [partial(self._listen, lane) for lane in self.talk.lanes]
        await self.talk.run(self._plan, *listeners, meanwhile=self._accompany)
        self.meter.wire_bytes = self.talk.wire_bytes
        self.meter.superblock_bytes = self.tuning.granularity.superblock_bytes
        self.meter.detail_bytes = self.tuning.granularity.detail_bytes
        assert self.verified is not None  # every listener ends only by it or by an error
        return self.verified

    # --- planning -------------------------------------------------------------------------------------------------

    async def _plan(self) -> None:
        plan = await self._spans()
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
                unchanged_bytes=books.unchanged_bytes,
            )
            async with books.turn:
                books.ended = True
                await self.talk.send(lane, end)

    async def _spans(self) -> Iterator[Span]:
        stretches = missing(self.proven, self.size_bytes)
        if self.dirty is not None:
            # Counted beforehand, so that progress has an end; a bitmap is read in no time.
            self.meter.work_bytes = 0
            for start, end in stretches:
                counting = whole_blocks(self.dirty.ranges(start, end - start), end)
                while runs := await self.talk.threads.on_disk(partial(_first_of, counting)):
                    self.meter.work_bytes += sum(behind - first for first, behind in runs)
        return self._planned(stretches)

    def _planned(self, stretches: Iterable[tuple[int, int]]) -> Iterator[Span]:
        """The spans of stretches (start, end) that are not proven, numbered through."""
        number = 0
        for start, end in stretches:
            for span in self._plan_stretch(start, end, number):
                yield span
                number = span.number + 1

    def _plan_stretch(self, start: int, end: int, number: int) -> Iterator[Span]:
        if self.dirty is None:
            extents = self._extents(start, end - start)
            return plan_spans(extents, end, batch_bytes=self._batch_bytes, start_bytes=start, first_number=number)
        written = self.dirty.ranges(start, end - start)
        return plan_tracked(
            written, self.disk.extents, end, batch_bytes=self._batch_bytes, start_bytes=start, first_number=number
        )

    def _extents(self, offset_bytes: int, length_bytes: int) -> Iterator[Extent]:
        return self.disk.extents(offset_bytes, length_bytes)

    def _batch_bytes(self) -> int:
        """Data of the next span: no more than may be asked about at once. Under a limit about what may be read in a
        second, so that a slow pass is not silent for so long that the target gives it up."""
        skims = self.tuning.quiet and self.dirty is None  # of what was written since, much differs
        most = min(self._skimmed_bytes() if skims else self.buffers.buffer_bytes, self.ahead_bytes)
        limit = self.limits.read.bytes_per_s or most
        return max(BLOCK_BYTES, min(most, limit) // BLOCK_BYTES * BLOCK_BYTES)

    def _skimmed_bytes(self) -> int:
        """Less at either end of the disk: the target begins when the first span was read, and is done when it has
        compared the last one."""
        begun, left = self._begun_bytes, self.size_bytes - self._begun_bytes
        return min(SKIMMED_BYTES, max(self.buffers.buffer_bytes, min(begun, left // (2 * PLANNED_AT_ONCE))))

    async def _begin(self, span: Span) -> None:
        """Take what the span needs, in the order of the disk, and let it go its way."""
        lane = self.talk.lanes[span.number % len(self.talk.lanes)]
        books = self._books[lane]
        buffer, skimmed = None, False
        unasked = self.dirty is not None and not self.tuning.link_is_dear
        if span.data_bytes:
            if not unasked:
                await books.ahead.take(span.data_bytes)
            await self.limits.read.take(span.data_bytes)
            skimmed = span.data_bytes > self.buffers.buffer_bytes
            if skimmed:
                await self._skimmed.acquire()
            buffer = await self.buffers.take()
        self._begun_bytes = span.offset_bytes + span.length_bytes
        books.last = Work(span, lane, self.tuning.granularity, buffer, books.last, skimmed, unasked)
        self.talk.spawn(partial(self._carry, books.last))

    async def _carry(self, work: Work) -> None:
        try:
            await self._read(work)
            await self._ask(work)
            if work.hashed is not None and not work.unasked:
                await work.answered.wait()
            await self._settle(work)
        finally:
            self._let_go(work)
            if work.skimmed:
                self._skimmed.release()
        self.meter.settled_bytes += work.span.length_bytes - work.span.unchanged_bytes
        self.meter.wire_bytes = self.talk.wire_bytes
        await self._tell_settled(work)
        work.settled.set()

    async def _tell_settled(self, work: Work) -> None:
        """What is not told now is told by the next sign of life, or was told by the end."""
        books = self._books[work.lane]
        books.settled_batch = work.span.number
        books.untold_bytes += work.span.data_bytes
        if books.untold_bytes >= TELL_EVERY_BYTES:
            books.untold_bytes = 0
            await self._say_how_far(work.lane)

    async def _say_how_far(self, lane: Lane) -> None:
        """Whatever was settled on that connection, or, if that is known already, that we are alive."""
        books = self._books[lane]
        async with books.turn:
            if not books.ended:
                await self.talk.send(lane, SpansSettled(batch=books.settled_batch))

    def _let_go(self, work: Work) -> None:
        if work.buffer is not None:
            self.buffers.give(work.buffer)
            work.buffer = None

    # --- reading and asking ---------------------------------------------------------------------------------------

    async def _read(self, work: Work) -> None:
        if work.buffer is None:
            return
        call = partial(read_span, self.disk, work.span.data, work.buffer)
        if not work.unasked:
            call = partial(
                hash_span,
                self.disk,
                work.span.data,
                work.buffer,
                superblock_bytes=work.granularity.superblock_bytes,
                seed=self.seed,
            )
        async with self._readers:
            self._reading += 1
            hashed, seconds = await self.talk.threads.on_disk(partial(timed, call))
            self._reading -= 1
        if not work.unasked:
            self.tuning.read(work.span.data_bytes, seconds)
        work.hashed = hashed
        if hashed.held is None:
            self._let_go(work)
        self.meter.compared_bytes += work.span.data_bytes

    async def _ask(self, work: Work) -> None:
        span, books = work.span, self._books[work.lane]
        message, payload = work.question()
        if work.before is not None:
            await work.before.asked.wait()
        if work.hashed is not None and not work.unasked:
            books.pending[span.number] = work
        await self.talk.send(work.lane, message, payload)
        work.asked.set()
        books.zero_bytes += span.zero_bytes
        books.compared_bytes += span.data_bytes
        books.unchanged_bytes += span.unchanged_bytes
        self.meter.zero_bytes += span.zero_bytes
        self.meter.unchanged_bytes += span.unchanged_bytes

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

    async def _settle(self, work: Work) -> None:
        """Send what of the span differs, when it is its turn."""
        differs = work.answer is not None and bool(work.answer.differs.any())
        frames: list[Packed] = []
        if work.unasked and work.hashed is not None:
            frames = await self._packed(partial(packed_whole, work.held, self.tuning.packer, self.tuning.compression))
        elif work.answer is not None and not (differs and work.skimmed):
            found = Found()
            if differs:
                for portion in self._portions(work):
                    frames += await self._pack(portion, work.held, found)
            else:
                self._let_go(work)
            self._learn(work, found)
        if work.before is not None:
            await work.before.settled.wait()
            work.before = None  # a chain of all spans of a disk would never be freed
        for packed in frames:
            await self._send_frame(work, packed)
        if differs and work.skimmed:
            await self._send_skimmed(work)

    async def _send_skimmed(self, work: Work) -> None:
        """What differs of a span whose bytes are gone is read once more."""
        found = Found()
        async with self._second_look:
            if self._spare is None:
                self._spare = memoryview(mmap.mmap(-1, PORTION_BYTES))
            for portion in self._portions(work):
                await self.limits.read.take(total_bytes(portion.superblocks))
                held = await self.talk.threads.on_disk(partial(read_data, self.disk, portion.superblocks, self._spare))
                for packed in await self._pack(portion, held, found):
                    await self._send_frame(work, packed)
        self._learn(work, found)

    def _portions(self, work: Work) -> Iterator[Portion]:
        assert work.hashed is not None
        assert work.answer is not None
        return portions(
            work.hashed.superblocks,
            work.answer,
            superblock_bytes=work.granularity.superblock_bytes,
            detail_bytes=work.granularity.detail_bytes,
            most_bytes=PORTION_BYTES if work.skimmed else self.buffers.buffer_bytes,
        )

    async def _pack(self, portion: Portion, held: Held, found: Found) -> list[Packed]:
        choose = partial(chosen, portion, held, self.tuning.packer, self.tuning.compression, self.seed)
        (changed, frames), packing_s = await self.talk.threads.on_compute(partial(timed, choose))
        found.add(portion, changed)
        self.tuning.packed(frames, packing_s)
        return frames

    async def _packed(self, pack: Callable[[], list[Packed]]) -> list[Packed]:
        frames, packing_s = await self.talk.threads.on_compute(partial(timed, pack))
        self.tuning.packed(frames, packing_s)
        return frames

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

    # --- tuning ---------------------------------------------------------------------------------------------------

    def _learn(self, work: Work, found: Found) -> None:
        assert work.hashed is not None
        assert work.answer is not None
        told = ~work.answer.empty
        seen = Seen(
            compared_bytes=total_bytes(work.hashed.superblocks[told]),
            superblock_bytes=work.granularity.superblock_bytes,
            detail_bytes=work.granularity.detail_bytes,
            superblocks=int(told.sum()),
            differing_superblocks=int((work.answer.differs & told).sum()),
            details=found.details,
            differing_details=found.differing_details,
            differing_blocks=found.differing_blocks,
        )
        differing_bytes = total_bytes(work.hashed.superblocks[work.answer.differs])
        self.tuning.learn(seen, compared_bytes=work.span.data_bytes, differing_bytes=differing_bytes)

    async def _accompany(self) -> None:
        watch = StallWatch(self.talk.disk_name, "source", self.meter, self.limits, self._waits_for)
        await side_by_side((self._tune, partial(keep_alive, self.talk, self._say_how_far), watch.run))

    def _waits_for(self) -> str:
        return "storage" if self._reading else "peer"

    async def _tune(self) -> None:
        """Look at what the links were waited for, again and again."""
        before, processors = self._waits(), ProcessorTime()
        while True:
            await trio.sleep(INTERVAL_S)
            now = self._waits()
            wall_s, link_s, receiver_s = (after - earlier for after, earlier in zip(now, before, strict=True))
            self.tuning.observe(
                wall_s=wall_s,
                link_limited_s=link_s,
                receiver_limited_s=receiver_s,
                packers=self.talk.threads.packers,
                idle_share=processors.idle_share(),
            )
            before = now

    def _waits(self) -> tuple[float, float, float]:
        """Now; how long a lane was held up by the link (or our own limit of it), and how long by the receiver."""
        link_s, receiver_s = self.limits.network.waited_s, 0.0
        for lane in self.talk.lanes:
            kernel_s = lane.wire.link().receiver_limited_s or 0.0
            link_s += max(0.0, lane.wire.waited_for_link_s - kernel_s) / len(self.talk.lanes)
            receiver_s += (lane.wire.waited_for_window_s + kernel_s) / len(self.talk.lanes)
        return trio.current_time(), link_s, receiver_s


def _first_of(runs: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    return list(islice(runs, COUNTED_AT_ONCE))
