"""Peers that a test makes up: one side of a pass against a script that keeps no rules."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio
from blake3 import blake3

from agent.delta.blocks import BLOCK_BYTES, split, to_ranges
from agent.delta.compare import Held
from agent.errors import AgentError
from agent.sync.buffers import BufferPool
from agent.sync.meter import Meter
from agent.sync.payloads import ranges_to_wire
from agent.threads import Threads
from protocol.connection import Speaker
from protocol.errors import ConnectionLost, ProtocolError
from protocol.messages import BlockData, BulkMessage, Codec, CompareSpan, EndOfPass, PassFailed
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage
from tests.fakes.pass_bench import SEED, run_pass, source_pass, target_pass
from tests.fakes.wire import FakeWire, ScriptedEnd

B = BLOCK_BYTES
SIZE = 8 * B + 512

Script = Callable[[ScriptedEnd], None]


def storage(seed: int, size: int = SIZE) -> MemoryStorage:
    """A disk full of noise."""
    made = MemoryStorage(size)
    made.allocate(0, size)
    made.content[:] = random.Random(seed).randbytes(size)
    return made


@dataclass
class Ending:
    """How a side ended against a script: what it raised, and what it had said to each of the scripts by then."""

    failure: AgentError | ProtocolError | None = None
    heard: list[BulkMessage] = field(default_factory=list)

    @property
    def farewell(self) -> PassFailed:
        """The last word that the script heard."""
        said = self.heard[-1]
        assert isinstance(said, PassFailed), self.heard
        return said

    @property
    def farewells(self) -> int:
        """How many scripts were told that the pass failed."""
        return sum(isinstance(message, PassFailed) for message in self.heard)


async def _against(
    scripts: tuple[Script, ...], us: Speaker, run: Callable[[list[FakeWire]], Awaitable[None]]
) -> Ending:
    ending = Ending()
    pairs = [FakeWire.with_script(us, window_bytes=2 << 20) for _ in scripts]

    def play(script: Script, end: ScriptedEnd) -> None:
        try:
            script(end)
            while True:
                ending.heard.append(end.hear()[0])
        except ConnectionLost:
            pass

    async def ours() -> None:
        try:
            await run([wire for wire, _ in pairs])
        except (AgentError, ProtocolError) as error:
            ending.failure = error
        finally:
            for wire, _ in pairs:
                wire.shutdown()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for script, (_, end) in zip(scripts, pairs, strict=True):
                nursery.start_soon(trio.to_thread.run_sync, play, script, end)
            nursery.start_soon(ours)
    return ending


async def tracked_target_against(target: MemoryStorage, *scripts: Script, since: str | None = "r1-1") -> Ending:
    """`target_against` in a pass that is limited to what was written since that view."""
    return await target_against(target, *scripts, since=since)


async def target_against(
    target: MemoryStorage, *scripts: Script, source_size: int = SIZE, since: str | None = None
) -> Ending:
    """A target's pass against sources made up, one for each connection; its buffers must all come back, and a real pass
    complete afterwards."""
    pool = BufferPool(2, 1 << 20)

    async def mark() -> None:
        pass

    async def run(wires: list[FakeWire]) -> None:
        disk = MemoryDisk("vda", target)
        meter = Meter("vda", source_size)
        await target_pass(disk, source_size, wires, Threads(), meter, mark, buffers=pool, since=since).run()

    ending = await _against(scripts, Speaker.LISTENER, run)
    assert pool.idle
    return ending


async def source_against(source: MemoryStorage, *scripts: Script) -> Ending:
    """The same for a source and targets made up."""
    pool = BufferPool(4, 2 * B)

    async def run(wires: list[FakeWire]) -> None:
        disk = MemoryDisk("vda", source, writable=False)
        await source_pass(disk, source.size_bytes, wires, Threads(), Meter("vda", SIZE), buffers=pool).run()

    ending = await _against(scripts, Speaker.CALLER, run)
    assert pool.idle
    return ending


async def completes(source: MemoryStorage, target: MemoryStorage) -> None:
    """After whatever happened, the pass can be run again, and makes the target equal."""
    run = await run_pass(source, target)
    assert run.complete
    assert target.content[: source.size_bytes] == source.content


# --- what sources say -------------------------------------------------------------------------------------------------


def ask(
    end: ScriptedEnd,
    content: bytes,
    *,
    batch: int = 0,
    offset: int = 0,
    length: int | None = None,
    data: tuple[tuple[int, int], ...] | None = None,
    superblock_bytes: int = 2 * B,
    detail_bytes: int = 4096,
    seed: int = SEED,
) -> None:
    """Ask about a span of a disk that holds `content`; all of what follows `offset` is data if nothing else is said."""
    length = len(content) - offset if length is None else length
    ranges = to_ranges([(offset, length)] if data is None else data)
    held = Held(ranges, memoryview(b"".join(content[o : o + n] for o, n in ranges.tolist())))
    digests = held.superblocks(superblock_bytes, seed=seed)[1].tobytes() if len(ranges) else b""
    message = CompareSpan(
        batch=batch,
        offset_bytes=offset,
        length_bytes=length,
        superblock_bytes=superblock_bytes,
        detail_bytes=detail_bytes,
        count=len(ranges),
    )
    end.say(message, ranges_to_wire(ranges) + digests)


def give(end: ScriptedEnd, content: bytes, *runs: tuple[int, int], proofs: bytes | None = None) -> None:
    """Send data of those ranges, as it should be but for where it lies."""
    ranges = to_ranges(runs)
    pieces = [content[offset : offset + length].ljust(length, b"\1") for offset, length in runs]
    proofs = b"".join(blake3(piece).digest() for piece in pieces) if proofs is None else proofs
    plain = b"".join(pieces)
    message = BlockData(count=len(runs), codec=Codec.RAW, plain_bytes=len(plain))
    end.say(message, ranges_to_wire(ranges) + proofs + plain)


def end_of_pass(end: ScriptedEnd, *, data: int = 0, zero: int = 0, compared: int = SIZE, lanes: int = 1) -> None:
    """Say that everything was sent, with those books."""
    end.say(EndOfPass(lanes=lanes, data_bytes=data, zero_bytes=zero, compared_bytes=compared))


def superblocks_of(length: int, superblock_bytes: int) -> int:
    """How many superblocks a run from 0 on has."""
    return len(split(to_ranges([(0, length)]), superblock_bytes))
