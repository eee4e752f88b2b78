"""One pass over one disk, both sides in this process: what the unit and property tests of `agent.sync` run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from agent.delta.granularity import Granularity
from agent.disk.seam import Disk
from agent.errors import AgentError
from agent.sync.buffers import BufferPool
from agent.sync.conversation import Conversation, Lane
from agent.sync.meter import Meter
from agent.sync.rate import Limits
from agent.sync.source import SourcePass
from agent.sync.target import TargetPass
from agent.sync.tuning import Tuning
from agent.threads import Threads
from protocol.errors import ProtocolError
from protocol.messages import BlockData, CompareSpan, ZeroRanges
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage
from tests.fakes.wire import FakeWire

SEED = 7
DEADLINE_S = 60.0


@dataclass
class PassRun:
    """How a pass went: the failure of each side (None when it is complete), the books, and what went over the wire."""

    source: Meter
    target: Meter
    source_failure: AgentError | ProtocolError | None
    target_failure: AgentError | ProtocolError | None
    marked: int
    wires: list[FakeWire]

    def sent(self, kind: type) -> int:
        """How many messages of that kind the source sent."""
        return sum(isinstance(message, kind) for wire in self.wires for message, _ in wire.sent)

    @property
    def quiet(self) -> bool:
        """Whether neither data nor zeroes for compared blocks were sent."""
        return not any(isinstance(message, BlockData | ZeroRanges) for wire in self.wires for message, _ in wire.sent)

    @property
    def asked(self) -> int:
        """Spans that the target was told of."""
        return self.sent(CompareSpan)


def source_pass(
    disk: Disk, size_bytes: int, wires: Sequence[FakeWire], threads: Threads, meter: Meter, **others: Any
) -> SourcePass:
    """The source's side over those wires; `others` replace what a small test would not say."""
    values: dict[str, Any] = {
        "seed": SEED,
        "ahead_bytes": 8 << 20,
        "buffers": BufferPool(4, 1 << 20),
        "limits": Limits(),
        "tuning": Tuning(),
    }
    talk = Conversation("vda", threads, [Lane(wire) for wire in wires])
    return SourcePass(disk=disk, size_bytes=size_bytes, talk=talk, meter=meter, **(values | others))


def target_pass(
    disk: Disk,
    source_size_bytes: int,
    wires: Sequence[FakeWire],
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
) -> PassRun:
    """Make `target` equal `source`; failures are returned, not raised."""
    threads = Threads()
    wires = [FakeWire.pair() for _ in range(lanes)]
    near, far = [pair[0] for pair in wires], [pair[1] for pair in wires]
    books = Meter("vda", source.size_bytes), Meter("vda", source.size_bytes)
    run = PassRun(books[0], books[1], None, None, 0, near)

    async def mark() -> None:
        run.marked += 1

    async def send() -> None:
        disk = MemoryDisk("vda", source, writable=False)
        others = {"buffers": BufferPool(4, batch_bytes), "tuning": Tuning(granularity)}
        try:
            await source_pass(disk, source.size_bytes, near, threads, books[0], **others).run()
        except (AgentError, ProtocolError) as error:
            run.source_failure = error
        finally:
            for wire in near:
                wire.shutdown()

    async def receive() -> None:
        disk = MemoryDisk("vda", target)
        try:
            await target_pass(disk, source.size_bytes, far, threads, books[1], mark).run()
        except (AgentError, ProtocolError) as error:
            run.target_failure = error

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(receive)
    return run
