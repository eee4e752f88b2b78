"""A pass under stress: more disks than threads, defects, cancellation at any moment, peers that fall silent."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Sequence

import pytest
import trio

from agent.delta.blocks import BLOCK_BYTES
from agent.disk.seam import Disk
from agent.errors import DamagedFrame, DiskError
from agent.sync import conversation
from agent.sync.conversation import Conversation, PeerFailed, Unforeseen
from agent.sync.meter import Meter
from agent.threads import Threads
from protocol.errors import PeerViolation
from protocol.messages import Credit
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage
from tests.fakes.pass_bench import source_pass, target_pass
from tests.fakes.wire import FakeWire

SIZE = 24 * BLOCK_BYTES + 512


def _storage(seed: int, size: int = SIZE) -> MemoryStorage:
    storage = MemoryStorage(size)
    storage.allocate(0, size)
    storage.content[:] = random.Random(seed).randbytes(size)
    return storage


async def _pass(
    source: Disk,
    target: Disk,
    threads: Threads,
    mark: Callable[[], None] = lambda: None,
    wires: tuple[FakeWire, FakeWire] | None = None,
) -> list[Exception]:
    """Both sides of one disk; returns what they raised."""
    near, far = wires or FakeWire.pair()
    raised: list[Exception] = []

    async def before_first_write() -> None:
        mark()

    async def guarded(run: Callable[[], Awaitable[object]], wire: FakeWire) -> None:
        try:
            await run()
        except Exception as error:  # noqa: BLE001 - kept for the test to look at
            raised.append(error)
        finally:
            wire.shutdown()

    sending = source_pass(source, SIZE, [near], threads, Meter("vda", SIZE))
    receiving = target_pass(target, SIZE, [far], threads, Meter("vda", SIZE), before_first_write)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guarded, sending.run, near)
        nursery.start_soon(guarded, receiving.run, far)
    return raised


async def test_more_disks_than_threads_of_any_kind_do_not_wait_for_each_other_for_ever() -> None:
    few = Threads(
        disk=trio.CapacityLimiter(2),
        compute=trio.CapacityLimiter(1),
        network=trio.CapacityLimiter(2),
        libvirt=trio.CapacityLimiter(1),
    )
    storages = [(_storage(2 * number), _storage(2 * number + 1)) for number in range(12)]

    async def one(source: MemoryStorage, target: MemoryStorage) -> None:
        raised = await _pass(MemoryDisk("vda", source, writable=False), MemoryDisk("vda", target), few)
        assert raised == []

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for source, target in storages:
                nursery.start_soon(one, source, target)
    assert all(source.content == target.content for source, target in storages)


class Broken(MemoryDisk):
    """A disk with a defect: it raises what no disk may raise."""

    def __init__(self, storage: MemoryStorage, error: Exception, method: str) -> None:
        super().__init__("vda", storage)

        def fail(*_: object) -> None:
            raise error

        setattr(self, method, fail)


@pytest.mark.parametrize("error", [OSError(5, "odd"), ValueError("odd"), AssertionError("odd"), MemoryError("odd")])
@pytest.mark.parametrize("method", ["read_runs", "write_runs", "flush", "read_back_runs", "extents"])
async def test_a_defect_at_the_target_ends_both_sides_with_a_reason(error: Exception, method: str) -> None:
    with trio.fail_after(20):
        source = MemoryDisk("vda", _storage(1), writable=False)
        raised = await _pass(source, Broken(_storage(2), error, method), Threads())
    ours = next(found for found in raised if isinstance(found, Unforeseen))
    theirs = next(found for found in raised if isinstance(found, PeerFailed))
    assert ours.__cause__ is error
    assert type(error).__name__ in ours.sentence
    assert theirs.facts["peer_code"] == "internal"


@pytest.mark.parametrize("method", ["read_runs", "extents"])
async def test_a_defect_at_the_source_ends_both_sides_with_a_reason(method: str) -> None:
    with trio.fail_after(20):
        raised = await _pass(Broken(_storage(1), ValueError("odd"), method), MemoryDisk("vda", _storage(2)), Threads())
    assert {type(error) for error in raised} == {Unforeseen, PeerFailed}


class Watching(MemoryDisk):
    """A disk that notes what is done to it."""

    def __init__(self, storage: MemoryStorage, events: list[str]) -> None:
        super().__init__("vda", storage)
        self._events = events

    def write_runs(self, runs: Sequence[tuple[int, int]], data: memoryview) -> None:
        self._events.append("write_runs")
        super().write_runs(runs, data)

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        self._events.append("write_zeroes")
        super().write_zeroes(offset_bytes, length_bytes)


@pytest.mark.parametrize("first", ["write_runs", "write_zeroes", "tail"])
async def test_the_torn_mark_comes_before_anything_is_written(first: str) -> None:
    events: list[str] = []
    source = MemoryStorage(SIZE) if first == "write_zeroes" else _storage(1)
    target = _storage(1 if first == "tail" else 2, SIZE + 4096 if first == "tail" else SIZE)
    if first == "tail":
        target.content[:SIZE] = source.content
    disk = Watching(target, events)
    assert await _pass(MemoryDisk("vda", source, writable=False), disk, Threads(), lambda: events.append("torn")) == []
    assert events[0] == "torn"
    assert events.count("torn") == 1
    assert ("write_runs" if first == "write_runs" else "write_zeroes") in events
    assert target.content == source.content + bytes(target.size_bytes - SIZE)


async def test_a_mark_that_cannot_be_made_durable_lets_nothing_be_written() -> None:
    target = _storage(2)
    before = bytes(target.content)

    def full() -> None:
        raise DiskError("the ledger cannot be written")

    raised = await _pass(MemoryDisk("vda", _storage(1), writable=False), MemoryDisk("vda", target), Threads(), full)
    assert any("ledger" in str(error) for error in raised)
    assert bytes(target.content) == before


async def test_a_busy_target_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "SIGN_OF_LIFE_S", 0.02)
    wires = FakeWire.pair()

    def signs() -> int:
        return sum(message == Credit(payload_bytes=0) for message, _ in wires[1].sent)

    class Slow(MemoryDisk):
        def flush(self) -> None:
            deadline = time.monotonic() + 20
            while signs() < 3 and time.monotonic() < deadline:
                time.sleep(0.005)
            super().flush()

    source = MemoryDisk("vda", _storage(1), writable=False)
    with trio.fail_after(30):
        assert await _pass(source, Slow("vda", _storage(2)), Threads(), wires=wires) == []
    assert signs() >= 3


async def test_cancelled_at_any_moment_a_pass_leaves_nobody_inside_of_a_disk() -> None:
    dice = random.Random(4)
    for _ in range(30):
        threads = Threads()
        source, target = MemoryDisk("vda", _storage(1), writable=False), MemoryDisk("vda", _storage(2))
        with trio.fail_after(20):
            with trio.move_on_after(dice.random() * 0.05):
                assert await _pass(source, target, threads) == []
            assert (threads.disk.borrowed_tokens, threads.compute.borrowed_tokens) == (0, 0)
            source.close()
            target.close()


async def test_what_a_peer_did_wrong_is_told_with_the_disk_on_this_side_too() -> None:
    async def notice() -> None:
        raise PeerViolation("a span was spoken of before")

    async def receive() -> None:
        raise DamagedFrame("it is damaged", offset_bytes=7)

    with pytest.raises(PeerViolation, match=r"^disk vda: a span was spoken of before$"):
        await Conversation("vda", Threads(), []).run(notice)
    with pytest.raises(DamagedFrame, match=r"^disk vda: it is damaged$") as damaged:
        await Conversation("vda", Threads(), []).run(receive)
    assert damaged.value.facts == {"disk": "vda", "offset_bytes": 7}
