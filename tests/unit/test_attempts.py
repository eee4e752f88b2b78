"""Passes over connections that are lost: who may come again, and when both sides give up."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock

from agent import reconnect
from agent.delta.blocks import BLOCK_BYTES
from agent.errors import DiskError
from agent.reconnect import DEADLINE_S, Reconnecting
from agent.sync import source as source_side
from agent.sync import writing
from agent.sync.conversation import PeerFailed
from agent.sync.proven import Proven, Settling, check_runs, missing
from protocol.errors import ConnectionLost, PeerViolation
from tests.fakes.cut_link import CutLinks, run_cut
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage

B = BLOCK_BYTES
LOST = ConnectionLost("the link is gone")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnect, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(source_side, "TELL_EVERY_BYTES", 1)
    monkeypatch.setattr(writing, "VERIFY_WHEN_IDLE_BYTES", 1)


def _storage(blocks: int, seed: int | None) -> MemoryStorage:
    storage = MemoryStorage(blocks * B)
    if seed is not None:
        storage.allocate(0, storage.size_bytes)
        storage.content[:] = random.Random(seed).randbytes(storage.size_bytes)
    return storage


def _source(storage: MemoryStorage) -> MemoryDisk:
    return MemoryDisk("vda", storage, writable=False)


async def test_after_a_cut_what_is_proven_is_not_read_again() -> None:
    ours, theirs = _storage(160, 1), _storage(160, 2)
    links = CutLinks([200])
    run = await run_cut(_source(ours), MemoryDisk("vda", theirs), links)
    assert run.failures == []
    assert theirs.content == ours.content
    assert run.source.reconnects == run.target.reconnects == 1
    assert 0 < run.source.resumed_bytes == run.target.resumed_bytes < ours.size_bytes
    assert run.source.compared_bytes == ours.size_bytes - run.source.resumed_bytes
    assert run.target.verified_bytes == run.target.written_bytes == run.source.changed_bytes
    assert [hello.attempt for hello in links.hellos] == [1, 2]
    assert len({hello.digest_seed for hello in links.hellos}) == 1


async def test_what_either_side_says_is_no_reason_to_come_again() -> None:
    class Broken(MemoryDisk):
        def write_runs(self, runs: object, data: memoryview) -> None:
            raise DiskError("the storage is gone", disk="vda")

    links = CutLinks([])
    run = await run_cut(_source(_storage(4, 1)), Broken("vda", _storage(4, 2)), links)
    assert isinstance(run.failures[0], DiskError | PeerFailed)
    assert len(links.hellos) == 1


@pytest.mark.parametrize(
    "runs", [[(1, B)], [(0, B + 1)], [(0, 5 * B)], [(4 * B, B)]], ids=["off", "odd end", "too long", "behind"]
)
async def test_a_target_that_calls_proven_what_cannot_be_is_refused(runs: list[tuple[int, int]]) -> None:
    with pytest.raises(PeerViolation, match="proven"):
        check_runs(runs, 4 * B)
    links = CutLinks([])
    ours = _storage(4, 1)
    run = await run_cut(_source(ours), MemoryDisk("vda", _storage(4, 2)), links, proven=Proven(runs))
    assert any(isinstance(error, PeerViolation) for error in run.failures)


async def test_what_was_proven_before_is_left_alone_and_the_rest_is_made_equal() -> None:
    ours, theirs = _storage(8, 1), _storage(8, 2)
    before = bytes(theirs.content[2 * B : 4 * B])
    run = await run_cut(_source(ours), MemoryDisk("vda", theirs), CutLinks([]), proven=Proven([(2 * B, 2 * B)]))
    assert run.failures == []
    assert theirs.content[: 2 * B] == ours.content[: 2 * B]
    assert theirs.content[4 * B :] == ours.content[4 * B :]
    assert theirs.content[2 * B : 4 * B] == before
    assert run.source.resumed_bytes == 2 * B


# --- giving up --------------------------------------------------------------------------------------------------------


async def _gives_up_after(retry: Reconnecting) -> float:
    began = trio.current_time()

    async def forever() -> None:
        while True:
            await retry.pause(LOST)

    with pytest.raises(ConnectionLost, match="could not be made again for"):
        await forever()
    return trio.current_time() - began


async def test_a_source_gives_up_at_its_deadline_and_not_before(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnect, "FIRST_PAUSE_S", 0.5)
    retry = Reconnecting("vda", jitter=lambda: 1.0)
    retry.connected(0)
    assert DEADLINE_S - 10 <= await _gives_up_after(retry) <= DEADLINE_S
    assert 12 < retry.attempt < 25  # pauses grow to ten seconds


async def test_more_that_is_proven_counts_the_deadline_anew(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnect, "FIRST_PAUSE_S", 5.0)
    retry = Reconnecting("vda", jitter=lambda: 1.0)
    began = trio.current_time()
    for proven_bytes in range(100):
        retry.connected(proven_bytes)
        await retry.pause(LOST)
    assert trio.current_time() - began > 2 * DEADLINE_S
    for _ in range(5):  # and without more of it
        retry.connected(99)
        await retry.pause(LOST)
    assert await _gives_up_after(retry) < DEADLINE_S


async def test_connections_that_held_for_long_are_progress(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnect, "FIRST_PAUSE_S", 1.0)
    retry = Reconnecting("vda", jitter=lambda: 1.0)
    for _ in range(20):
        retry.connected(0)
        await trio.sleep(reconnect.LASTING_S)
        await retry.pause(LOST)
    assert retry.attempt == 21


# --- what is proven ---------------------------------------------------------------------------------------------------


def test_stretches_are_joined_and_what_is_missing_is_the_rest() -> None:
    proven = Proven([(2 * B, B), (0, B)])
    assert missing(proven.runs(), 4 * B) == [(B, 2 * B), (3 * B, 4 * B)]
    proven.add(B, B)
    assert proven.runs() == ((0, 3 * B),)
    proven.add(B, 3 * B)
    assert proven.runs() == ((0, 4 * B),)
    assert missing(proven.runs(), 4 * B) == []


def test_a_span_is_proven_when_it_is_settled_and_everything_of_it_is() -> None:
    settling = Settling(Proven())
    span = settling.begin(0, B, 0)
    span.waiting = 2
    settling.done(span)
    settling.settle(0)
    assert settling.proven.runs() == ()
    settling.done(span)
    assert settling.proven.runs() == ((0, B),)


def test_a_source_that_settles_what_it_owes_is_refused_and_so_is_data_of_a_settled_span() -> None:
    settling = Settling(Proven())
    settling.begin(0, B, 0).owed_bytes = 1
    with pytest.raises(PeerViolation, match="owes 1 bytes"):
        settling.settle(0)
    settling = Settling(Proven())
    settling.begin(0, B, 0).waiting = 1
    settling.settle(0)
    with pytest.raises(PeerViolation, match="not settled"):
        settling.at(0)
