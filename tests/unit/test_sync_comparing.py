"""Passes that only compare: what an audit and a verification catch, what they cost, and whom they refuse."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
import trio

from agent.delta.blocks import BLOCK_BYTES
from agent.disk.seam import Disk
from agent.errors import AgentError, DiskError, SyncError
from agent.sync.buffers import TARGET_BUFFER_BYTES, BufferPool
from agent.sync.comparing import TOLD_STRETCHES, ComparingSource, comparing_target, comparing_tuning
from agent.sync.conversation import Conversation, Lane, PeerFailed
from agent.sync.map_file import Header, MapFile
from agent.sync.meter import Meter
from agent.sync.pass_map import PassMap
from agent.sync.rate import Limits
from agent.threads import Threads
from protocol.connection import Speaker
from protocol.errors import PeerViolation, ProtocolError
from protocol.messages import ByteRange, CompareSpan, SpanAnswer, ZeroRanges
from tests.fakes.memory_disk import MemoryDisk
from tests.fakes.pass_bench import SEED, run_disks
from tests.fakes.sparse_disk import SparseDisk, SparseStorage
from tests.fakes.wire import FakeWire, ScriptedEnd
from tests.unit.sync_scripts import SIZE, Script, _against, ask, end_of_pass, give, storage

B, MIB = BLOCK_BYTES, 1 << 20


@dataclass
class Comparison:
    """How it went on either side."""

    source: Meter
    target: Meter
    source_failure: AgentError | ProtocolError | None = None
    target_failure: AgentError | ProtocolError | None = None
    sent: tuple[object, ...] = ()

    @property
    def complete(self) -> bool:
        """On both sides."""
        return self.source_failure is None and self.target_failure is None

    @property
    def differing(self) -> tuple[ByteRange, ...]:
        """What differs, as both sides tell it."""
        assert self.source.differing == self.target.differing
        assert self.source.differing_bytes == self.target.differing_bytes
        return self.source.report().differing


async def compare(source: Disk, against: Disk | PassMap, *, lanes: int = 1, limits: Limits | None = None) -> Comparison:
    """A pass that only compares; failures are returned."""
    size = source.size_bytes
    pairs = [FakeWire.pair() for _ in range(lanes)]
    made = Comparison(Meter("vda", size), Meter("vda", size))

    def talk(end: int) -> Conversation:
        return Conversation("vda", Threads(), [Lane(pair[end]) for pair in pairs])

    async def send() -> None:
        try:
            await ComparingSource(
                disk=source,
                size_bytes=size,
                talk=talk(0),
                seed=SEED,
                ahead_bytes=1 << 30,
                buffers=BufferPool(2, MIB),
                limits=limits or Limits(),
                tuning=comparing_tuning(),
                meter=made.source,
            ).run()
        except (AgentError, ProtocolError) as error:
            made.source_failure = error
        finally:
            for near, _ in pairs:
                near.shutdown()

    async def receive() -> None:
        pool = BufferPool(2, TARGET_BUFFER_BYTES)
        target = comparing_target(
            against, size, talk(1), SEED, buffers=pool, limits=limits or Limits(), meter=made.target
        )
        try:
            await target.run()
        except (AgentError, ProtocolError) as error:
            made.target_failure = error

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(receive)
    made.sent = tuple(message for near, _ in pairs for message, _ in near.sent)
    return made


async def mapped(path: Path, source: Disk, target: Disk) -> None:
    """Make the target equal with a map, and put that away."""
    digest_map = PassMap(MapFile.create(path, Header(seed=SEED, size_bytes=source.size_bytes, image="vda")))
    run = await run_disks(source, target, target_others={"digest_map": digest_map})
    assert run.complete, (run.source_failure, run.target_failure)
    assert digest_map.settle("r1-2", None)


def opened(path: Path) -> PassMap:
    """That map, for an audit."""
    return PassMap(MapFile.open(path, writable=False))


# --- what is caught ---------------------------------------------------------------------------------------------------


async def test_an_audit_of_what_is_equal_reads_the_replica_whole_and_the_original_not_at_all(tmp_path: Path) -> None:
    size = 150 * MIB + 512
    blocks = {number: random.Random(number).randbytes(B) for number in range(0, 2400, 5)}
    source = SparseDisk("vda", SparseStorage(size, blocks), writable=False)
    target = SparseDisk("vda", SparseStorage(size))
    await mapped(tmp_path / "a.map", source, target)
    frozen = (tmp_path / "a.map").read_bytes()
    audited = SparseDisk("vda", source.storage, writable=False)
    digest_map = opened(tmp_path / "a.map")
    told = await compare(audited, digest_map, lanes=2)
    digest_map.close()
    assert told.complete
    assert audited.read_bytes == size  # holes included
    assert set(audited.requests) == {"reading"}  # and nobody asked where they are
    assert told.source.compared_bytes == size
    assert told.differing == ()
    assert (tmp_path / "a.map").read_bytes() == frozen
    assert told.target.settled_bytes == told.source.settled_bytes == size


async def test_an_audit_catches_what_a_bitmap_missed(tmp_path: Path) -> None:
    source, target = storage(1), storage(1)
    await mapped(tmp_path / "a.map", MemoryDisk("vda", source), MemoryDisk("vda", target))
    source.content[5 * B + 77] ^= 1  # written by the guest; no pass was told of it
    source.content[6 * B] ^= 1
    source.content[SIZE - 1] ^= 1
    digest_map = opened(tmp_path / "a.map")
    told = await compare(MemoryDisk("vda", source), digest_map)
    digest_map.close()
    assert told.complete
    expected = ByteRange(offset_bytes=5 * B, length_bytes=2 * B), ByteRange(offset_bytes=8 * B, length_bytes=512)
    assert told.differing == expected
    assert told.target.report().differing_bytes == 2 * B + 512


async def test_an_audit_believes_in_no_hole_of_the_replica(tmp_path: Path) -> None:
    source, target = SparseStorage(4 * MIB), SparseStorage(4 * MIB)
    await mapped(tmp_path / "a.map", SparseDisk("vda", source), SparseDisk("vda", target))

    class Lying(SparseDisk):
        """Says that all of it is a hole."""

        def extents(self, offset_bytes: int, length_bytes: int) -> NoReturn:
            raise AssertionError("asked for extents")

    source.write(3 * B, b"data in a hole")
    digest_map = opened(tmp_path / "a.map")
    told = await compare(Lying("vda", source), digest_map)
    digest_map.close()
    assert told.complete
    assert told.differing == (ByteRange(offset_bytes=3 * B, length_bytes=B),)


async def test_a_bit_flipped_at_rest_is_caught_by_a_verification_and_not_by_an_audit(tmp_path: Path) -> None:
    source, target = storage(1), storage(2)
    await mapped(tmp_path / "a.map", MemoryDisk("vda", source), MemoryDisk("vda", target))
    target.rot(2 * B + 3)
    digest_map = opened(tmp_path / "a.map")
    audit = await compare(MemoryDisk("vda", source), digest_map)
    digest_map.close()
    assert audit.differing == ()
    verification = await compare(MemoryDisk("vda", source), MemoryDisk("vda", target, writable=False), lanes=2)
    assert verification.complete
    assert verification.differing == (ByteRange(offset_bytes=2 * B, length_bytes=B),)
    assert verification.target.compared_bytes == verification.source.compared_bytes == SIZE
    assert verification.target.past_cache
    assert target.rotten  # nothing was written


async def test_a_bit_flipped_in_the_replica_is_caught_by_both(tmp_path: Path) -> None:
    source, target = storage(1), storage(2)
    await mapped(tmp_path / "a.map", MemoryDisk("vda", source), MemoryDisk("vda", target))
    source.content[4 * B] ^= 128
    digest_map = opened(tmp_path / "a.map")
    for against in (digest_map, MemoryDisk("vda", target, writable=False)):
        told = await compare(MemoryDisk("vda", source, writable=False), against)
        assert told.differing == (ByteRange(offset_bytes=4 * B, length_bytes=B),)
    digest_map.close()


async def test_a_verification_reads_what_a_larger_target_has_behind_the_end_of_the_replica() -> None:
    size = 100 * MIB + 512
    source = SparseDisk("vda", SparseStorage(size), writable=False)
    clean = SparseStorage(size + 200 * MIB, {2500: bytes(B)})  # written zeroes are read, and are zeroes
    target = SparseDisk("vda", clean, writable=False)
    told = await compare(source, target)
    assert told.complete
    assert told.target.differing_bytes == 0
    assert told.target.compared_bytes == size + B  # what is a hole there need not be
    clean.write(size, b"!")
    clean.write(size + 150 * MIB, b"!")
    told = await compare(source, SparseDisk("vda", clean, writable=False))
    assert told.complete
    assert [stretch.offset_bytes for stretch in told.target.differing] == [size, size + 150 * MIB - 512]
    assert told.source.differing_bytes == 0  # the replica has nothing there: the target alone can tell


async def test_a_tail_that_cannot_be_read_ends_the_verification() -> None:
    storage = SparseStorage(2 * MIB, {20: b"x" * B})
    storage.fail_from["reading back"] = (MIB, OSError(5, "Input/output error"))
    told = await compare(SparseDisk("vda", SparseStorage(MIB)), SparseDisk("vda", storage, writable=False))
    assert isinstance(told.target_failure, DiskError)
    assert isinstance(told.source_failure, PeerFailed)


async def test_where_everything_differs_it_is_all_counted_and_64_stretches_are_named() -> None:
    size = 40 * MIB
    source = SparseStorage(size, dict.fromkeys(range(0, size // B, 2), b"x" * B))
    told = await compare(SparseDisk("vda", source), SparseDisk("vda", SparseStorage(size)))
    assert told.complete
    assert told.source.differing_bytes == told.target.differing_bytes == size // 2
    expected = [ByteRange(offset_bytes=2 * i * B, length_bytes=B) for i in range(TOLD_STRETCHES)]
    assert list(told.differing) == expected


async def test_a_damaged_window_ends_an_audit_and_accuses_nobody(tmp_path: Path) -> None:
    source, target = storage(1), storage(1)
    path = tmp_path / "a.map"
    await mapped(path, MemoryDisk("vda", source), MemoryDisk("vda", target))
    with path.open("r+b") as file:
        file.seek(-1000 * 16, 2)
        file.write(b"?")
    digest_map = opened(path)
    told = await compare(MemoryDisk("vda", source), digest_map)
    digest_map.close()
    assert isinstance(told.target_failure, SyncError)
    assert "cannot be audited" in told.target_failure.sentence
    assert isinstance(told.source_failure, PeerFailed)
    assert told.target.differing_bytes == 0


# --- lies -------------------------------------------------------------------------------------------------------------

CONTENT = bytes(storage(1).content)


async def refused(script: Script, match: str) -> None:
    """A verification refuses that source; nothing is written."""
    target = storage(1)
    before = bytes(target.content)

    async def run(wires: list[FakeWire]) -> None:
        await comparing_target(
            MemoryDisk("vda", target),
            SIZE,
            Conversation("vda", Threads(), [Lane(wire) for wire in wires]),
            SEED,
            buffers=BufferPool(2, MIB),
            limits=Limits(),
            meter=Meter("vda", SIZE),
        ).run()

    ending = await _against((script,), Speaker.LISTENER, run)
    assert isinstance(ending.failure, PeerViolation), ending
    assert match in ending.failure.sentence
    assert bytes(target.content) == before


def whole(end: ScriptedEnd, then: Callable[[ScriptedEnd], None]) -> None:
    """Ask as an honest source would, and go on."""
    ask(end, CONTENT, superblock_bytes=B, detail_bytes=B)
    assert isinstance(end.hear()[0], SpanAnswer)
    then(end)


@pytest.mark.parametrize(
    ("script", "match"),
    [
        (lambda end: whole(end, lambda e: give(e, CONTENT, (B, 4096))), "BlockData"),
        (
            lambda end: whole(end, lambda e: e.say(ZeroRanges(count=1), bytes(8) + B.to_bytes(8, "little"))),
            "ZeroRanges",
        ),
        (lambda end: ask(end, CONTENT, data=((0, B),), superblock_bytes=B, detail_bytes=B), "believes in no holes"),
        (lambda end: ask(end, CONTENT, data=(), superblock_bytes=B, detail_bytes=B), "believes in no holes"),
        (lambda end: ask(end, CONTENT, superblock_bytes=B, detail_bytes=4096), "tells no details"),
        (lambda end: whole(end, lambda e: end_of_pass(e, data=4096)), "the source tells"),
        (lambda end: whole(end, lambda e: end_of_pass(e, compared=B)), "the source tells"),
        (lambda end: end_of_pass(end, compared=0), "ended the pass after 0"),
    ],
    ids=["data", "zeroes", "a hole", "all a hole", "details", "books of data", "books", "nothing"],
)
async def test_a_source_that_does_more_than_compare_or_less_is_refused(script: Script, match: str) -> None:
    await refused(script, match)


async def test_such_a_source_sends_nothing_but_questions() -> None:
    told = await compare(MemoryDisk("vda", storage(1)), MemoryDisk("vda", storage(2)))
    assert told.source.differing_bytes == SIZE
    assert {type(message) for message in told.sent[:-1]} == {CompareSpan}
    assert told.source.report().changed_bytes == 0


async def test_both_sides_obey_the_limit_of_reads() -> None:
    limits = Limits()
    limits.set(None, 1 << 40)
    taken: list[int] = []
    real = limits.read.take

    async def take(size_bytes: int) -> None:
        taken.append(size_bytes)
        await real(size_bytes)

    limits.read.take = take  # type: ignore[method-assign]
    told = await compare(MemoryDisk("vda", storage(1)), MemoryDisk("vda", storage(1)), limits=limits)
    assert told.complete
    assert sum(taken) == 2 * SIZE
