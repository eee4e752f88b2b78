"""The limits of a pass: the average, the order, large requests, and a limit that changes while somebody waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from agent.sync.rate import BURST_S, DEBT_S, Limits, RateLimit

MB = 1_000_000
RATE = 100 * MB
FRAME = 1 << 20


@contextmanager
def taking(seconds: float, *, within: float = 1e-3) -> Iterator[None]:
    """What is done inside takes that long, by the clock of the test."""
    began = trio.current_time()
    yield
    assert trio.current_time() - began == pytest.approx(seconds, abs=within)


async def _take(limit: RateLimit, size_bytes: int, times: int = 1) -> None:
    for _ in range(times):
        await limit.take(size_bytes)


@pytest.mark.parametrize("size_bytes", [1000, 4096, 64 << 10, FRAME, 8 << 20])
async def test_the_average_is_the_limit_whatever_the_size_of_the_requests(
    size_bytes: int, autojump_clock: trio.testing.MockClock
) -> None:
    limit = RateLimit(RATE)
    times = 300 * MB // size_bytes
    with taking((times - 1) * size_bytes / RATE):  # the last one's time is paid by whoever comes next
        await _take(limit, size_bytes, times)
    with taking(size_bytes / RATE):
        await limit.take(1)


async def test_time_spent_on_sending_counts_as_waited(autojump_clock: trio.testing.MockClock) -> None:
    limit = RateLimit(RATE)
    with taking(100 * FRAME / RATE):
        for _ in range(100):
            await limit.take(FRAME)
            await trio.sleep(FRAME / RATE)
    assert limit.waited_s < 1e-3


async def test_a_pause_saves_up_no_more_than_fifty_milliseconds(autojump_clock: trio.testing.MockClock) -> None:
    limit = RateLimit(RATE)
    await limit.take(1)
    await trio.sleep(3600)
    with taking(1.0 - BURST_S - 0.001):
        await _take(limit, RATE // 1000, 1000)


async def test_a_fresh_limit_owes_nothing_and_has_saved_nothing(autojump_clock: trio.testing.MockClock) -> None:
    await trio.sleep(50)
    limit = RateLimit(RATE)
    with taking(0):
        await limit.take(FRAME)
    with taking(FRAME / RATE):
        await limit.take(FRAME)


async def test_a_request_of_many_seconds_is_spread_and_holds_up_the_next_by_one_second_at_most(
    autojump_clock: trio.testing.MockClock,
) -> None:
    limit = RateLimit(MB)
    with taking(9.0):
        await limit.take(10 * MB)
    with taking(DEBT_S):
        await limit.take(1)


async def test_those_who_wait_are_served_in_their_order_large_and_small(
    autojump_clock: trio.testing.MockClock,
) -> None:
    limit = RateLimit(MB)
    served: list[int] = []

    async def one(number: int, size_bytes: int) -> None:
        await limit.take(size_bytes)
        served.append(number)

    async with trio.open_nursery() as nursery:
        for number, size_bytes in enumerate([MB, 1, 5 * MB, 10, 3 * MB, 1]):
            nursery.start_soon(one, number, size_bytes)
            await trio.testing.wait_all_tasks_blocked()
    assert served == sorted(served)


async def test_several_disks_share_one_limit(autojump_clock: trio.testing.MockClock) -> None:
    limit = RateLimit(RATE)
    with taking((8 * 50 - 1) * FRAME / RATE):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(_take, limit, FRAME, 50)


async def test_the_time_waited_counts_once_however_many_wait(autojump_clock: trio.testing.MockClock) -> None:
    limit = RateLimit(MB)
    async with trio.open_nursery() as nursery:
        for _ in range(11):
            nursery.start_soon(limit.take, MB // 10)
    assert limit.waited_s == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("to", "after_s"),
    [
        (None, 0.0),
        (10 * MB, 0.0),  # so much may be owed now
        (4 * MB, 1.25),  # of the six millions beforehand one is paid
        (MB // 2, 17.0),  # of nine and a half one is paid
    ],
)
async def test_another_limit_holds_at_once_for_who_waits(
    to: int | None, after_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    limit = RateLimit(MB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(limit.take, 10 * MB)
        await trio.sleep(1.0)
        limit.set(to)
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(after_s)


async def test_a_lowered_limit_makes_who_waits_wait_longer(autojump_clock: trio.testing.MockClock) -> None:
    limit = RateLimit(10 * MB)
    await limit.take(10 * MB)  # a second is owed

    async def lower() -> None:
        await trio.sleep(0.5)
        limit.set(MB)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lower)
        with taking(1.0):  # what was owed was owed under the old limit
            await limit.take(2)
        with taking(1.0):
            await _take(limit, MB // 10, 11)


async def test_a_raised_limit_lets_what_is_owed_be_paid_faster(autojump_clock: trio.testing.MockClock) -> None:
    limit = RateLimit(MB)
    await limit.take(MB)
    limit.set(10 * MB)
    with taking(0.1):
        await limit.take(1)


async def test_without_a_limit_nobody_waits_but_others_get_their_turn(autojump_clock: trio.testing.MockClock) -> None:
    limit = RateLimit()
    with taking(0), trio.testing.assert_checkpoints():
        await limit.take(1 << 40)
    assert limit.waited_s == 0
    limit.set(MB)
    with taking(0), trio.testing.assert_checkpoints():
        await limit.take(1)


async def test_who_is_cancelled_while_waiting_has_taken_nothing(autojump_clock: trio.testing.MockClock) -> None:
    limit = RateLimit(MB)
    await limit.take(MB)
    with trio.move_on_after(0.25):
        await limit.take(500 * MB)
    assert limit.waited_s == pytest.approx(0.25)
    with taking(0.75):
        await limit.take(1)


@pytest.mark.parametrize("nothing", [0, -1])
async def test_a_limit_that_lets_nothing_through_is_a_mistake(nothing: int) -> None:
    limits = Limits(RateLimit(1), RateLimit(2))
    with pytest.raises(ValueError, match="lets nothing through"):
        limits.set(5, nothing)
    with pytest.raises(ValueError, match="lets nothing through"):
        RateLimit(nothing)
    assert (limits.network.bytes_per_s, limits.read.bytes_per_s) == (1, 2)
    limits.set(None, 7)
    assert (limits.network.bytes_per_s, limits.read.bytes_per_s) == (None, 7)
