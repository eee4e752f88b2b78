"""A pass in which nothing moves, and who is said to be the reason."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from agent.sync.meter import Meter
from agent.sync.rate import Limits
from agent.sync.stall import STALLED_AFTER_S, PassStalled, StallWatch


async def _stalls_after(
    waits_for: str, *, side: str = "target", limits: Limits | None = None, moves_until_s: float = 0.0
) -> tuple[float, str]:
    """When the watch gives up, in seconds of a clock that only waits, and what it says."""
    meter = Meter("vda", 1 << 30)

    async def move() -> None:
        while trio.current_time() < began + moves_until_s:
            await trio.sleep(7)
            meter.verified_bytes += 1

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(move)
        with pytest.raises(PassStalled) as raised:
            await StallWatch("vda", side, meter, limits or Limits(), lambda: waits_for).run()
    return trio.current_time() - began, raised.value.sentence


async def test_storage_that_answers_nothing_is_named_with_its_side(autojump_clock: MockClock) -> None:
    after_s, sentence = await _stalls_after("storage")
    assert STALLED_AFTER_S <= after_s <= STALLED_AFTER_S + 5
    assert sentence.startswith("disk vda: its storage on the target's host has answered nothing for 300 s")


async def test_a_peer_is_given_longer_than_its_own_storage(autojump_clock: MockClock) -> None:
    after_s, sentence = await _stalls_after("peer", side="source")
    assert 2 * STALLED_AFTER_S <= after_s <= 2 * STALLED_AFTER_S + 5
    assert "the target agent has got nowhere" in sentence


async def test_time_counts_from_the_last_movement(autojump_clock: MockClock) -> None:
    after_s, _ = await _stalls_after("storage", moves_until_s=1000)
    assert 1000 + STALLED_AFTER_S <= after_s <= 1020 + STALLED_AFTER_S


async def test_what_is_limited_may_take_its_time(autojump_clock: MockClock) -> None:
    limits = Limits()
    limits.set(1 << 20, None)
    after_s, _ = await _stalls_after("storage", limits=limits)
    assert after_s >= STALLED_AFTER_S + 128


async def test_who_waits_for_the_other_side_says_nothing(autojump_clock: MockClock) -> None:
    watch = StallWatch("vda", "target", Meter("vda", 1), Limits(), lambda: "nobody")
    with trio.move_on_after(10 * STALLED_AFTER_S) as scope:
        await watch.run()
    assert scope.cancelled_caught
