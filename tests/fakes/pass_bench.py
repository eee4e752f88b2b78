"""One pass over one disk, both sides in this process: what the unit and property tests of `agent.sync` run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio
from trio.testing import wait_all_tasks_blocked

from agent.delta.granularity import Granularity
from agent.disk.seam import Disk
from agent.errors import AgentError
from agent.sync.buffers import BufferPool
from agent.sync.conversation import Conversation, Lane, Wire
from agent.sync.meter import Meter
from agent.sync.rate import Limits
from agent.sync.source import SourcePass
from agent.sync.target import TargetPass
from agent.sync.tuning import Tuning
from agent.threads import Threads
from protocol.errors import ProtocolError
from protocol.messages import BlockData, BulkMessage, CompareSpan, TrackedSpan, ZeroRanges
from tests.fakes.memory_dirty import MemoryDirtyRanges
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage
from tests.fakes.wire import FakeWire

T = TypeVar("T")

SEED = 7
DEADLINE_S = 60.0


@dataclass
class CountingThreads(Threads):
    """Threads that count their calls.

    Attributes:
        hops: calls of each kind so far.
        under_way: calls that have not returned.
    """

    hops: dict[str, int] = field(default_factory=dict)
    under_way: int = 0

    async def on_disk(self, call: Callable[[], T]) -> T:
        return await self._counted("disk", lambda: Threads.on_disk(self, call))

    async def on_compute(self, call: Callable[[], T]) -> T:
        return await self._counted("compute", lambda: Threads.on_compute(self, call))

    async def on_wire(self, call: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        return await self._counted("wire", lambda: Threads.on_wire(self, call, limiter))

    async def _counted(self, kind: str, hop: Callable[[], Awaitable[T]]) -> T:
        self.hops[kind] = self.hops.get(kind, 0) + 1
        self.under_way += 1
        try:
            return await hop()
        finally:
            self.under_way -= 1

    async def quiet(self, wires: Sequence[FakeWire]) -> None:
        """Wait until every task waits, and every thread for something that the other end of a wire must say."""
        while True:
            await wait_all_tasks_blocked()
            if self.under_way == sum(wire.waiting for wire in wires) and not any(wire.arrived for wire in wires):
                return


@dataclass
class PassRun:
    """How a pass went: the failure of each side (None when it is complete), the books, and what went over the wire."""

    source: Meter
    target: Meter
    source_failure: AgentError | ProtocolError | None
    target_failure: AgentError | ProtocolError | None
    marked: int
    wires: list[FakeWire]
    far: list[FakeWire] = field(default_factory=list)

    def sent(self, kind: type) -> int:
        """How many messages of that kind the source sent."""
        return sum(isinstance(message, kind) for message, _ in self.said)

    @property
    def said(self) -> list[tuple[BulkMessage, bytes]]:
        """What the source sent, lane after lane."""
        return [said for wire in self.wires for said in wire.sent]

    @property
    def answered(self) -> list[tuple[BulkMessage, bytes]]:
        """What the target sent, lane after lane."""
        return [said for wire in self.far for said in wire.sent]

    @property
    def wire_bytes(self) -> int:
        """What crossed the wires both ways, frames whole."""
        return sum(wire.bytes_sent for wire in (*self.wires, *self.far))

    @property
    def complete(self) -> bool:
        """Whether both sides say so."""
        return self.source_failure is None and self.target_failure is None

    @property
    def quiet(self) -> bool:
        """Whether neither data nor zeroes for compared blocks were sent."""
        return not any(isinstance(message, BlockData | ZeroRanges) for message, _ in self.said)

    @property
    def asked(self) -> int:
        """Spans that the target was told of."""
        return self.sent(CompareSpan) + self.sent(TrackedSpan)


def source_pass(
    disk: Disk, size_bytes: int, wires: Sequence[Wire], threads: Threads, meter: Meter, **others: Any
) -> SourcePass:
    """The source's side over those wires; `others` replace what a small test would not say."""
    values: dict[str, Any] = {
        "seed": SEED,
        "ahead_bytes": 1 << 30,
        "buffers": BufferPool(4, 1 << 20),
        "limits": Limits(),
        "tuning": Tuning(),
    }
    talk = Conversation("vda", threads, [Lane(wire) for wire in wires])
    return SourcePass(disk=disk, size_bytes=size_bytes, talk=talk, meter=meter, **(values | others))


def target_pass(
    disk: Disk,
    source_size_bytes: int,
    wires: Sequence[Wire],
    threads: Threads,
    meter: Meter,
    before_first_write: Callable[[], Awaitable[None]],
    **others: Any,
) -> TargetPass:
    """The target's side over those wires."""
    values: dict[str, Any] = {"seed": SEED, "buffers": BufferPool(4, 4 << 20), "limits": Limits()}
    return TargetPass(
        disk=disk,
        source_size_bytes=source_size_bytes,
        target_size_bytes=disk.size_bytes,
        talk=Conversation("vda", threads, [Lane(wire) for wire in wires]),
        before_first_write=before_first_write,
        meter=meter,
        **(values | others),
    )


async def run_pass(
    source: MemoryStorage,
    target: MemoryStorage,
    *,
    batch_bytes: int = 1 << 20,
    granularity: Granularity | None = None,
    lanes: int = 1,
    written: Iterable[tuple[int, int]] | None = None,
    link_is_scarce: bool = False,
) -> PassRun:
    """Make `target` equal `source`; failures are returned, not raised. `written`: what was, since the view that the
    target is said to equal: the pass is limited to that. On a scarce link it compares even that."""
    wires = [FakeWire.pair() for _ in range(lanes)]
    return await run_disks(
        MemoryDisk("vda", source, writable=False),
        MemoryDisk("vda", target),
        wires=wires,
        source_others={
            "buffers": BufferPool(4, batch_bytes),
            "tuning": Tuning(granularity, link_is_scarce=link_is_scarce),
            "dirty": None if written is None else MemoryDirtyRanges(source.size_bytes, written),
        },
        target_others={"since": None if written is None else "an earlier view"},
    )


async def run_disks(
    source: Disk,
    target: Disk,
    *,
    wires: Sequence[tuple[FakeWire, FakeWire]] | None = None,
    threads: Threads | None = None,
    size_bytes: int | None = None,
    source_others: dict[str, Any] | None = None,
    target_others: dict[str, Any] | None = None,
) -> PassRun:
    """The same on opened disks; what is not given is made small. `size_bytes`: the source's size as granted."""
    pairs = [FakeWire.pair()] if wires is None else wires
    threads = threads or Threads()
    granted = source.size_bytes if size_bytes is None else size_bytes
    near, far = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    run = PassRun(Meter("vda", granted), Meter("vda", granted), None, None, 0, near, far)

    async def mark() -> None:
        run.marked += 1

    async def send() -> None:
        try:
            await source_pass(source, granted, near, threads, run.source, **(source_others or {})).run()
        except (AgentError, ProtocolError) as error:
            run.source_failure = error
        finally:
            for wire in near:
                wire.shutdown()

    async def receive() -> None:
        try:
            await target_pass(target, granted, far, threads, run.target, mark, **(target_others or {})).run()
        except (AgentError, ProtocolError) as error:
            run.target_failure = error

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(receive)
    return run
