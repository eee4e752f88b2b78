"""Writing what came, and proving it: unpack → write → flush → read back, overlapping, each bounded in bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import trio

from agent.delta.blocks import Ranges, as_runs, coalesce, to_ranges
from agent.delta.pack import Codec
from agent.delta.unpack import Unpacker
from agent.disk.seam import Disk, Extent
from agent.sync.budget import ByteBudget
from agent.sync.conversation import Conversation, Lane, side_by_side
from agent.sync.meter import Meter
from agent.sync.pass_map import PassMap
from agent.sync.payloads import PROOF_BYTES, RANGE_BYTES
from agent.sync.rehash import Rehash
from agent.sync.verification import Written, read_back, shares
from protocol.messages import BlockData, Credit

WRITERS = 2
"""Frames of one disk that are unpacked and written at the same time: one waits for storage, the other is proven."""
READ_BACKS = 2
"""Threads that read back side by side: one waits for storage while the other compares."""
VERIFY_EVERY_BYTES = 64 << 20
"""How much is written between two flushes at most: the digests that wait for one cost memory."""
VERIFY_WHEN_IDLE_BYTES = 8 << 20
"""How much must have been written for a flush while nothing is being verified: so that little is left for the end, and
not every frame costs one."""
VERIFY_EVERY_RANGES = 64 << 10
"""The same in ranges (48 bytes of books for each)."""
QUEUE_BYTES = 64 << 20
"""What may wait to be written: more than the windows grant, so that only zero ranges ever make a receiver wait."""
ITEM_BYTES = 1024
"""What an item of that queue is counted for besides its payload."""
EXTENTS_AT_ONCE = 4096
"""Extents looked at in one thread hop, so that a cancelled pass ends in bounded time."""
ASKED_ONE_BY_ONE = 8
"""Fewer ranges than this are asked about each by itself."""
ZERO_STEP_BYTES = 1 << 30
"""Zeroed in one thread hop at most, for the same reason."""


@dataclass(frozen=True, slots=True, eq=False)
class Incoming:
    """Data (with its payload) or zeroes to write, as they came on a lane. `proven` is called when that is done, flushed
    and read back."""

    lane: Lane
    ranges: Ranges
    data: BlockData | None
    payload: memoryview
    proven: Callable[[], None] | None = None


class Writing:
    """The writing half of a target's pass over one disk.

    Args:
        disk: the target.
        talk: whose tasks run the work, and where credit is given.
        before_first_write: awaited once before anything is written.
        meter: the pass's books.
        digest_map: told of everything that is written; None: the disk has none.
    """

    def __init__(
        self,
        disk: Disk,
        talk: Conversation,
        before_first_write: Callable[[], Awaitable[None]],
        meter: Meter,
        digest_map: PassMap | None = None,
    ) -> None:
        self._disk = disk
        self._map = digest_map
        self._talk = talk
        self._before_first_write = before_first_write
        self._meter = meter
        self._queue = ByteBudget(QUEUE_BYTES)
        self._to_write = trio.open_memory_channel[Incoming](float("inf"))  # bounded by the queue's budget
        self._to_verify = trio.open_memory_channel[Written](1)
        self._unpacker = Unpacker()
        self._written = Written()
        self._marking = trio.Lock()
        self._marked = False
        self._idle = True  # nothing is being verified
        self._writers = WRITERS
        self._verified = trio.Event()

    def tasks(self) -> list[Callable[[], Awaitable[None]]]:
        """What must run while things are put."""
        return [*[self._write] * WRITERS, self._verify]

    @property
    def is_busy(self) -> bool:
        """Whether something that was put is not written yet, or is being verified."""
        return bool(self._queue.taken_bytes) or not self._idle

    @property
    def is_behind(self) -> bool:
        """Whether something is written and not proven."""
        return bool(self._written.count)

    async def put(self, item: Incoming) -> None:
        """Queue an item; waits for room."""
        await self._queue.take(item.payload.nbytes + ITEM_BYTES)
        self._to_write[0].send_nowait(item)

    async def finish(self) -> None:
        """Nothing more comes: wait until everything is written, flushed, read back and equal."""
        self._to_write[0].close()
        await self._verified.wait()

    # --- writing --------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        async for item in self._to_write[1]:
            if item.data is None:
                if await self._write_zeroes(item.ranges):
                    self._prove_later(item)
                elif item.proven is not None:
                    item.proven()  # what was unflushed before the pass has been flushed since
            else:
                await self._write_data(item, item.data)
            self._queue.give(item.payload.nbytes + ITEM_BYTES)
            if self._verification_due:
                await self._hand_over()
        self._writers -= 1
        if not self._writers:
            await self._hand_over()
            self._to_verify[0].close()

    @property
    def _verification_due(self) -> bool:
        written = self._written
        if self._idle and written.size_bytes >= VERIFY_WHEN_IDLE_BYTES:
            return True
        return written.size_bytes >= VERIFY_EVERY_BYTES or written.count >= VERIFY_EVERY_RANGES

    async def _hand_over(self) -> None:
        """What is written by now is to be verified; what another writer is about to write, next time."""
        written, self._written = self._written, Written()
        if written.size_bytes or written.when_proven:
            self._idle = False
            await self._to_verify[0].send(written)

    def prove_now(self) -> None:
        """What is written is flushed and read back at once, however little it is, unless something is already."""
        if self._writers and self._idle and self._written.count:
            written, self._written = self._written, Written()
            self._idle = False
            self._to_verify[0].send_nowait(written)  # while nothing is being verified, nothing waits to be

    async def _mark(self) -> None:
        async with self._marking:
            if not self._marked:
                await self._before_first_write()
                self._marked = True

    async def _write_data(self, item: Incoming, data: BlockData) -> None:
        await self._mark()
        head = len(item.ranges) * RANGE_BYTES
        body = head + len(item.ranges) * PROOF_BYTES
        proofs, stored = item.payload[head:body], item.payload[body:]
        await self._talk.threads.on_disk(partial(self._unpack_and_write, item.ranges, proofs, stored, data))
        self._written.add_data(item.ranges, bytes(proofs))
        self._meter.written_bytes += data.plain_bytes
        self._prove_later(item)
        await self._talk.send(item.lane, Credit(payload_bytes=item.payload.nbytes))

    def _prove_later(self, item: Incoming) -> None:
        """With what is flushed and read back next: batches are proven in turn, so every part of it is by then."""
        if item.proven is not None:
            self._written.when_proven.append(item.proven)

    def _unpack_and_write(self, ranges: Ranges, proofs: memoryview, stored: memoryview, data: BlockData) -> None:
        plain = self._unpacker.unpack(stored, Codec(data.codec.value), ranges, proofs)
        if self._map is not None:
            self._map.about_to_write(ranges)
        self._disk.write_runs(as_runs(ranges), plain)

    async def _write_zeroes(self, ranges: Ranges) -> bool:
        """Only what is not zero yet is zeroed, however long the ranges are. Returns whether anything was."""
        wrote = False
        extents = self._extents(coalesce(ranges))
        zeroes: list[tuple[int, int]] = []
        while found := await self._talk.threads.on_disk(lambda: list(islice(extents, EXTENTS_AT_ONCE))):
            runs = [(e.offset_bytes, e.length_bytes) for e in found if not e.zero]
            zeroes = await self._enter_zeroes([*zeroes, *((e.offset_bytes, e.length_bytes) for e in found if e.zero)])
            if runs:
                wrote = True
                await self._mark()
            for offset, length in runs:
                for start in range(offset, offset + length, ZERO_STEP_BYTES):
                    step = min(ZERO_STEP_BYTES, offset + length - start)
                    await self._talk.threads.on_disk(partial(self._zero, start, step))
                    self._written.add_zeroes(start, step)
                    self._meter.zeroed_bytes += step
        await self._enter_zeroes(zeroes, keep=0)
        return wrote

    async def _enter_zeroes(self, runs: list[tuple[int, int]], *, keep: int = 1) -> list[tuple[int, int]]:
        """Tell the map of runs that were zero before, but for the last, which may go on: a block that is known in two
        parts is not known. Returns that."""
        if self._map is None or len(runs) <= keep:
            return runs if self._map is not None else []
        joined = as_runs(to_ranges(runs))
        told, kept = joined[: len(joined) - keep], joined[len(joined) - keep :]
        await self._talk.threads.on_disk(partial(self._map.enter_zeroes, told))
        return kept

    def _zero(self, offset: int, length: int) -> None:
        if self._map is not None:
            self._map.about_to_write(to_ranges([(offset, length)]))
        self._disk.write_zeroes(offset, length)

    def _extents(self, ranges: Ranges) -> Iterator[Extent]:
        """Of rising ranges. Those of one item are the gaps of one span: storage is asked about all of it at once, since
        a question costs more than an answer."""
        if len(ranges) < ASKED_ONE_BY_ONE:
            for offset, length in ranges.tolist():
                yield from self._disk.extents(offset, length)
            return
        first, end = int(ranges[0, 0]), int(ranges[-1].sum())
        yield from within(self._disk.extents(first, end - first), ranges)

    # --- verifying ------------------------------------------------------------------------------------------------

    async def _verify(self) -> None:
        async for written in self._to_verify[1]:
            await self._talk.threads.on_disk(self._disk.flush)
            parts = [(share, self._rehash()) for share in shares(written, READ_BACKS)]
            await side_by_side(partial(self._read_back, *part) for part in parts)
            if self._map is not None:
                hashed = [rehash for _, rehash in parts if rehash is not None]
                await self._talk.threads.on_disk(partial(_enter, self._map, written, hashed))
            for proven in written.when_proven:
                proven()
            self._idle = self._to_verify[1].statistics().current_buffer_used == 0
        self._verified.set()

    def _rehash(self) -> Rehash | None:
        return None if self._map is None else Rehash(self._map.shape)

    async def _read_back(self, share: Written, rehash: Rehash | None) -> None:
        proven_bytes = await self._talk.threads.on_disk(partial(read_back, self._disk, share, rehash))
        self._meter.verified_bytes += proven_bytes  # not in one line: others count there while this one waits


def within(extents: Iterable[Extent], ranges: Ranges) -> Iterator[Extent]:
    """What of rising extents lies in rising ranges (shape (n, 2), all of it covered by the extents)."""
    wanted = iter(ranges.tolist())
    first_range = next(wanted, None)
    if first_range is None:
        return
    start, length = first_range
    for extent in extents:
        end = extent.offset_bytes + extent.length_bytes
        while start < end:
            first, behind = max(start, extent.offset_bytes), min(start + length, end)
            yield Extent(first, behind - first, extent.zero)
            if behind < start + length:
                start, length = behind, start + length - behind  # the next extent has the rest of the range
                break
            following = next(wanted, None)
            if following is None:
                return
            start, length = following


def _enter(digest_map: PassMap, written: Written, hashed: list[Rehash]) -> None:
    """What was written is proven: the map may know it."""
    blocks = np.array([block for rehash in hashed for block in rehash.blocks], dtype=np.int64)
    digest_map.proven(written.firsts, blocks, [digest for rehash in hashed for digest in rehash.digests])
    digest_map.enter_zeroes(written.zeroes)
