"""Plans of several pairs, by values: whose turn it is, and whose copying may begin."""

from __future__ import annotations

import pytest

from coordinator.errors import UsageError
from coordinator.fleet import FleetPlan, Group, OnFailed, Place, Standing, Turn, TurnKind, may_begin, turns

CHAIN = FleetPlan(
    groups=(
        Group(name="db", pairs=("db1", "db2")),
        Group(name="app", pairs=("app1",), after=("db",), delay_s=60.0),
        Group(name="web", pairs=("web1",), after=("app",)),
    ),
    options={},
)


def standing(pair: str, place: Place, home_s: float | None = None, hosts: tuple[str, ...] = ()) -> Standing:
    return Standing(pair=pair, place=place, home_s=home_s, hosts=hosts)


def whose(plan: FleetPlan, now_s: float = 1000.0, **places: Place | tuple[Place, float]) -> dict[str, Turn]:
    """The turns; a pair is a place, or a place with the time it came home."""
    found = {}
    for pair in plan.pairs:
        given = places.get(pair, Place.WAITING)
        found[pair] = standing(pair, *given) if isinstance(given, tuple) else standing(pair, given)
    return turns(plan, found, now_s)


class TestTurns:
    def test_the_first_group_never_waits(self) -> None:
        assert whose(CHAIN)["db"].kind is TurnKind.COME

    def test_a_group_waits_for_every_pair_before_it(self) -> None:
        turn = whose(CHAIN, db1=(Place.HOME, 0.0), db2=Place.SWITCHING)["app"]
        assert (turn.kind, turn.sentence) == (TurnKind.WAITS, "waits for db2")

    @pytest.mark.parametrize(
        ("now_s", "kind", "left_s"),
        [(1030.0, TurnKind.DELAYED, 30.0), (1060.0, TurnKind.COME, 0.0), (5.0, TurnKind.DELAYED, 60.0)],
        ids=["in the delay", "after it", "the clock was set back"],
    )
    def test_the_delay_begins_when_the_last_pair_came_home(self, now_s: float, kind: TurnKind, left_s: float) -> None:
        turn = whose(CHAIN, now_s, db1=(Place.HOME, 900.0), db2=(Place.HOME, 1000.0))["app"]
        assert (turn.kind, turn.left_s) == (kind, left_s)

    def test_a_pair_that_is_final_already_delays_nobody(self) -> None:
        assert whose(CHAIN, db1=Place.HOME, db2=Place.HOME)["app"].kind is TurnKind.COME

    @pytest.mark.parametrize("place", [Place.FAILED, Place.STOPPED, Place.NEEDS_OPERATOR, Place.AWAY])
    def test_a_pair_that_does_not_come_home_holds_back_all_that_follow(self, place: Place) -> None:
        found = whose(CHAIN, db1=(Place.HOME, 0.0), db2=place)
        assert found["app"].kind is TurnKind.HELD
        assert "db2 of group db" in found["app"].sentence
        assert found["web"].kind is TurnKind.HELD
        assert "app1 of group app" in found["web"].sentence

    def test_a_group_told_to_go_on_switches_without_the_failed_pair_but_waits_for_the_others(self) -> None:
        plan = FleetPlan(
            groups=(CHAIN.groups[0], Group(name="app", pairs=("app1",), after=("db",), on_failed=OnFailed.GO_ON)),
            options={},
        )
        assert whose(plan, db1=Place.COPYING, db2=Place.FAILED)["app"].kind is TurnKind.WAITS
        assert whose(plan, db1=(Place.HOME, 0.0), db2=Place.FAILED)["app"].kind is TurnKind.COME

    def test_groups_that_wait_for_nobody_do_not_care_about_a_failed_one(self) -> None:
        plan = FleetPlan(groups=(CHAIN.groups[0], Group(name="other", pairs=("x",))), options={})
        assert whose(plan, db1=Place.FAILED)["other"].kind is TurnKind.COME

    def test_groups_in_a_circle_are_refused_by_name(self) -> None:
        plan = FleetPlan(
            groups=(Group(name="a", pairs=("x",), after=("b",)), Group(name="b", pairs=("y",), after=("a",))),
            options={},
        )
        with pytest.raises(UsageError, match="group a waits for b waits for a"):
            plan.in_order()

    def test_a_group_stands_behind_those_it_waits_for_wherever_the_file_has_it(self) -> None:
        plan = FleetPlan(
            groups=(Group(name="late", pairs=("x",), after=("early",)), Group(name="early", pairs=("y",))), options={}
        )
        assert plan.pairs == ("y", "x")


class TestBeginning:
    def begins(self, *, copying: tuple[str, ...] = (), parallel: int = 2, per_host: int = 1) -> tuple[str, ...]:
        hosts = {"db1": ("prod1", "dr1"), "db2": ("prod1", "dr2"), "app1": ("prod2", "dr3"), "web1": ("prod3", "dr4")}
        plan = FleetPlan(groups=CHAIN.groups, options={}, parallel=parallel, parallel_per_host=per_host)
        found = {
            pair: standing(pair, Place.COPYING if pair in copying else Place.QUEUED, hosts=at)
            for pair, at in hosts.items()
        }
        return may_begin(plan, found, frozenset(copying))

    def test_so_many_begin_as_the_plan_allows_in_its_order(self) -> None:
        assert self.begins(per_host=9) == ("db1", "db2")
        assert self.begins(per_host=9, copying=("db1",)) == ("db2",)
        assert self.begins(per_host=9, copying=("db1", "db2")) == ()

    def test_a_busy_host_is_left_alone_and_others_are_not_kept_from_beginning(self) -> None:
        assert self.begins() == ("db1", "app1")
        assert self.begins(parallel=9) == ("db1", "app1", "web1")
        assert self.begins(parallel=9, per_host=2) == ("db1", "db2", "app1", "web1")
