"""The state table: what it lists is possible, everything else is refused with a sentence that helps."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, update

from coordinator import schema
from coordinator.database import Database
from coordinator.errors import ExitCode, WrongState
from coordinator.model import (
    DiskPair,
    Newest,
    OperatorCall,
    OriginalFlag,
    Pair,
    Rate,
    RestorePoint,
    RunOptions,
    State,
    VmRef,
)
from coordinator.states import IN_PASSING, TABLE, Verb, allowed_verbs, check_move, check_verb, describe
from tests.unit.coordinator_house import PAIR, House

WAITING = OperatorCall(sentence="prod is gone", exits=("resume",), before=State.SWITCHING)


def pair_in(state: State, operator: OperatorCall | None = None) -> Pair:
    return Pair(
        name="web",
        original=VmRef(host="prod", name="web", uuid="u1"),
        replica=VmRef(host="dr", name="web", uuid="u2"),
        disks=(DiskPair(original="vda", replica="vda"),),
        excluded=(),
        state=state,
        newest=Newest.REPLICA,
        flag=OriginalFlag(),
        epoch=1,
        run="r1",
        operator=operator,
    )


def test_every_state_has_its_row_and_a_way_out() -> None:
    assert set(TABLE) == set(State)
    assert all(row.follows and row.verbs and row.means for row in TABLE.values())


def test_every_state_is_reached_from_ready() -> None:
    reached, border = {State.READY}, [State.READY]
    while border:
        border = [after for state in border for after in TABLE[state].follows if after not in reached]
        reached.update(border)
    assert reached == set(State)


@pytest.mark.parametrize(("state", "to"), list(itertools.product(State, State)))
def test_a_move_is_possible_exactly_if_the_table_lists_it(state: State, to: State) -> None:
    if to in TABLE[state].follows:
        check_move(pair_in(state), to)
        return
    with pytest.raises(WrongState, match=r"only .* may follow"):
        check_move(pair_in(state), to)


@pytest.mark.parametrize(("state", "verb"), list(itertools.product(State, Verb)))
def test_a_verb_in_the_wrong_state_is_refused_and_told_what_is_allowed(state: State, verb: Verb) -> None:
    pair = pair_in(state)
    if verb in TABLE[state].verbs:
        check_verb(pair, verb)
        return
    with pytest.raises(WrongState) as caught:
        check_verb(pair, verb)
    told = TABLE[state].verbs - (set() if TABLE[state].unfinished else {Verb.RESUME})
    for allowed in told:
        assert f"`failback {allowed.value} web`" in caught.value.sentence
    assert caught.value.exit_code is ExitCode.REFUSED


def test_unfinished_states_other_than_syncing_are_left_by_nothing_but_resume() -> None:
    for state in (State.ROLLING_BACK, State.CANCELLING, State.UNDOING, State.COMMITTING, State.SWITCHING):
        assert TABLE[state].verbs - IN_PASSING == {Verb.RESUME}


def test_limits_may_change_as_long_as_a_pass_may_come() -> None:
    allowing = {state for state in State if Verb.LIMIT in TABLE[state].verbs}
    assert allowing == {State.SYNCING, State.READY_TO_SWITCH, State.SWITCHING, State.NEEDS_OPERATOR}
    undone = replace(WAITING, before=State.UNDOING)
    assert allowed_verbs(pair_in(State.NEEDS_OPERATOR, undone)) == {Verb.RESUME}


def test_needs_operator_allows_only_the_exits_it_names() -> None:
    pair = pair_in(State.NEEDS_OPERATOR, WAITING)
    assert allowed_verbs(pair) - IN_PASSING == {Verb.RESUME}
    assert "prod is gone" in describe(pair)
    undoable = replace(pair, operator=replace(WAITING, exits=("resume", "undo")))
    assert allowed_verbs(undoable) - IN_PASSING == {Verb.RESUME, Verb.UNDO}


@pytest.mark.parametrize("state", list(State))
async def test_every_verb_in_every_state_through_the_front_door(tmp_path: Path, state: State) -> None:
    """No verb that the table forbids reaches an agent or changes the pair."""
    house = House(tmp_path)
    await house.register()
    async with house.process() as coordinator:
        await coordinator.start_run(PAIR, RunOptions())

    def put(connection: Connection) -> None:
        connection.execute(update(schema.pairs).values(state=state.value))

    database = Database.open(house.config.database)
    with database.transaction() as connection:
        put(connection)
    database.close()
    async with house.process() as coordinator:
        doors: dict[Verb, Callable[[], Awaitable[object]]] = {
            Verb.FAILOVER: lambda: coordinator.record_failover(PAIR),
            Verb.START: lambda: coordinator.start_run(PAIR, RunOptions()),
            Verb.CANCEL: lambda: coordinator.cancel(PAIR),
            Verb.COMMIT: lambda: coordinator.commit(PAIR, RestorePoint.DROP),
            Verb.UNDO: lambda: coordinator.undo(PAIR),
            Verb.RESUME: lambda: coordinator.resume(PAIR),
            Verb.LIMIT: lambda: coordinator.set_limits(PAIR, network=Rate(None)),
        }
        before = await coordinator.get_pair(PAIR)
        for verb, door in doors.items():
            if verb in allowed_verbs(before):
                continue
            if (verb, state) in {(Verb.FAILOVER, State.FAILOVER), (Verb.CANCEL, State.CANCELLING)}:
                continue  # repeated: no-op, or what an earlier process began
            with pytest.raises(WrongState):
                await door()
            assert await coordinator.get_pair(PAIR) == before
        assert not house.world.orders
