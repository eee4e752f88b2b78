"""One pass over one disk, both sides in this process: what the unit and property tests of `agent.sync` run."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from agent.errors import AgentError
from agent.sync.conversation import Conversation
from agent.sync.meter import Meter
from agent.sync.source import SourcePass
from agent.sync.target import TargetPass
from agent.threads import Threads
from protocol.errors import ProtocolError
from protocol.messages import BlockData, CompareRanges, ZeroRanges
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
    wire: FakeWire

    def sent(self, kind: type) -> int:
        """How many messages of that kind the source sent."""
        return sum(isinstance(message, kind) for message, _ in self.wire.sent)

    @property
    def quiet(self) -> bool:
        """Whether neither data nor zeroes for compared blocks were sent."""
        return not any(
            isinstance(message, BlockData) or (isinstance(message, ZeroRanges) and message.compared)
            for message, _ in self.wire.sent
        )

    @property
    def asked(self) -> int:
        """Batches announced."""
        return self.sent(CompareRanges)


async def run_pass(
    source: MemoryStorage, target: MemoryStorage, *, batch_bytes: int = 1 << 20, ahead_bytes: int = 8 << 20
) -> PassRun:
    """Make `target` equal `source`; failures are returned, not raised."""
    threads = Threads()
    near, far = FakeWire.pair()
    books = Meter("vda", source.size_bytes), Meter("vda", source.size_bytes)
    run = PassRun(books[0], books[1], None, None, 0, near)

    async def mark() -> None:
        run.marked += 1

    async def send() -> None:
        talk = Conversation("vda", near, threads)
        disk = MemoryDisk("vda", source, writable=False)
        try:
            await SourcePass(disk, source.size_bytes, talk, SEED, ahead_bytes, batch_bytes, books[0]).run()
        except (AgentError, ProtocolError) as error:
            run.source_failure = error
        finally:
            near.shutdown()

    async def receive() -> None:
        talk = Conversation("vda", far, threads)
        disk = MemoryDisk("vda", target)
        size = target.size_bytes
        try:
            await TargetPass(disk, source.size_bytes, size, talk, SEED, ahead_bytes, mark, books[1]).run()
        except (AgentError, ProtocolError) as error:
            run.target_failure = error

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(receive)
    return run
