"""The limits of a pass at the agent: given with the order that runs it, changed while it runs, forgotten with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from agent.errors import StaleEpoch
from agent.passes import BadLimit, PassEnded, Session
from agent.service import failure_of
from protocol.messages import Done, SetLimits
from tests.unit.agent_house import AgentHouse, Outcome, open_house, order, until

Pair = tuple[int | None, int | None]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[AgentHouse]:
    with open_house(tmp_path) as opened:
        yield opened


def _set(network: int | None, read: int | None, *, epoch: int = 1) -> SetLimits:
    return SetLimits(order=order(epoch), limit_network=network, limit_read=read)


def _claimed(house: AgentHouse, monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """The sessions that are claimed from here on."""
    sessions: list[Session] = []
    claim = house.service.passes.claim

    def claiming(*arguments: object) -> Session:
        sessions.append(claim(*arguments))  # type: ignore[arg-type]
        return sessions[-1]

    monkeypatch.setattr(house.service.passes, "claim", claiming)
    return sessions


async def _run(house: AgentHouse, nursery: trio.Nursery, limits: Pair) -> Outcome:
    """A receiving pass that waits for the source to connect."""
    request = dataclasses.replace(house.run_pass(), limit_network=limits[0], limit_read=limits[1])
    outcome = Outcome()
    nursery.start_soon(outcome.watch, partial(house.ask, request))
    await until(lambda: house.service.passes.is_running("web") or outcome.over)
    return outcome


def _in_force(session: Session) -> Pair:
    return session.limits.network.bytes_per_s, session.limits.read.bytes_per_s


async def test_the_pass_begins_with_the_limits_of_its_order(house: AgentHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = _claimed(house, monkeypatch)
    await house.fence()
    await house.allow()
    async with trio.open_nursery() as nursery:
        await _run(house, nursery, (5000, None))
        assert _in_force(sessions[0]) == (5000, None)
        await house.service.passes.end_all()


async def test_limits_change_while_the_pass_runs_and_it_runs_on(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = _claimed(house, monkeypatch)
    await house.fence()
    await house.allow()
    async with trio.open_nursery() as nursery:
        outcome = await _run(house, nursery, (5000, None))
        assert await house.ask(_set(None, 7000)) == Done()
        assert _in_force(sessions[0]) == (None, 7000)
        assert not outcome.over
        await house.service.passes.end_all()
    assert isinstance(outcome.error, PassEnded)


async def test_a_change_that_overtakes_the_order_to_run_stands(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = _claimed(house, monkeypatch)
    await house.fence()
    await house.allow()
    await house.ask(_set(9000, None))
    async with trio.open_nursery() as nursery:
        await _run(house, nursery, (5000, 6000))
        assert _in_force(sessions[0]) == (9000, None)
        await house.service.passes.end_all()


async def test_without_a_pass_a_change_is_harmless_and_forgotten(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = _claimed(house, monkeypatch)
    assert await house.ask(_set(9000, 9000)) == Done()
    await house.fence()
    await house.allow()
    async with trio.open_nursery() as nursery:
        await _run(house, nursery, (None, None))
        assert _in_force(sessions[0]) == (None, None)
        await house.service.passes.end_all()


async def test_limits_of_a_coordinator_that_was_superseded_are_refused(house: AgentHouse) -> None:
    await house.fence(epoch=2)
    with pytest.raises(StaleEpoch):
        await house.ask(_set(1, 1, epoch=1))


@pytest.mark.parametrize("limits", [(0, None), (None, -1)])
async def test_a_limit_of_nothing_is_refused_and_changes_nothing(
    limits: Pair, house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = _claimed(house, monkeypatch)
    await house.fence()
    await house.allow()
    async with trio.open_nursery() as nursery:
        await _run(house, nursery, (5000, 6000))
        with pytest.raises(BadLimit) as caught:
            await house.ask(_set(*limits))
        failure = failure_of(caught.value)
        assert failure is not None
        assert failure.code == "bad-limit"
        assert _in_force(sessions[0]) == (5000, 6000)
        await house.service.passes.end_all()


async def test_a_pass_ordered_with_a_limit_of_nothing_does_not_begin(house: AgentHouse) -> None:
    await house.fence()
    await house.allow()
    async with trio.open_nursery() as nursery:
        outcome = await _run(house, nursery, (0, None))
    assert isinstance(outcome.error, BadLimit)
    assert not house.service.passes.is_running("web")
