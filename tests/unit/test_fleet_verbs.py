"""The verbs over a plan of several pairs, with in-memory agents: order, failures, stops, what is said."""

from __future__ import annotations

import itertools
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.cli.bugs import BUG_LOG
from coordinator.cli.fleet_plans import PairPlan, no_room_together
from coordinator.errors import AgentRefused, ExitCode
from coordinator.model import Plan, Room, RunOptions, State, SwitchPolicy
from coordinator.runs import Coordinator
from protocol.messages import Condition, InspectVm, Power, PowerOff, Request, RunPass
from tests.fakes.agent import unreachable
from tests.unit.cli_house import UnitInThread, resume_here
from tests.unit.fleet_house import Fleet

PAIRS = ("db1", "db2", "app1")
TEXT = """
[[group]]
name = "databases"
pairs = ["db1", "db2"]

[[group]]
name = "applications"
pairs = ["app1"]
"""


@pytest.fixture
def fleet(memory_folder: Path) -> Fleet:
    return Fleet(memory_folder, *PAIRS)


def start(fleet: Fleet, file: str, exit_code: int = 0) -> dict[str, str]:
    """`start --plan`; where each pair stands at the end."""
    answer = fleet.json("start", "--plan", file, "--yes", "--foreground", exit_code=exit_code)
    return {row["pair"]: row["place"] for row in answer["pairs"]}


def journalled_s(fleet: Fleet, pair: str, state: State) -> float:
    """When the pair last came into that state."""
    entries = fleet.json("history", pair)["entries"]
    return float([e["at_s"] for e in entries if e["kind"] == "state" and e["step"] == state.value][-1])


def fails_at(kind: type[Request], side: str) -> Callable[[str, Request, str], None]:
    """A fault: that side's host is gone whenever it is to be asked for this."""

    def fault(host: str, request: Request, moment: str) -> None:
        if host.startswith(side) and isinstance(request, kind) and moment == "before":
            raise unreachable(host)

    return fault


class TestTheWhole:
    def test_groups_come_home_in_their_order_and_are_committed(self, fleet: Fleet) -> None:
        file = fleet.plan(TEXT)
        assert start(fleet, file) == dict.fromkeys(PAIRS, "home")
        home = max(journalled_s(fleet, pair, State.FAILBACK) for pair in ("db1", "db2"))
        assert journalled_s(fleet, "app1", State.SWITCHING) >= home
        assert set(fleet.states().values()) == {"Failback"}
        answer = fleet.json("commit", "--plan", file, "--yes", "--restore-point", "drop")
        assert answer["sentence"] == "3 of 3 pairs are final"
        assert set(fleet.states().values()) == {"Ready"}
        assert fleet.json("commit", "--plan", file, "--yes")["errors"] == {}

    def test_undo_takes_the_whole_back_the_last_group_first(self, fleet: Fleet) -> None:
        file = fleet.plan(TEXT)
        start(fleet, file)
        fleet.json("undo", "--plan", file, "--yes")
        assert set(fleet.states().values()) == {"Failover"}
        undone = {pair: journalled_s(fleet, pair, State.FAILOVER) for pair in PAIRS}
        begun = {pair: journalled_s(fleet, pair, State.UNDOING) for pair in PAIRS}
        assert undone["app1"] <= min(begun["db1"], begun["db2"])
        assert all(not fleet.worlds[pair].replica.is_off for pair in PAIRS)

    def test_a_failed_pair_holds_back_who_comes_behind_it_and_nobody_else(self, fleet: Fleet) -> None:
        fleet.worlds["db1"].fault = fails_at(PowerOff, "dr")
        file = fleet.plan(TEXT)
        places = start(fleet, file, exit_code=ExitCode.FAILED)
        assert places["db2"] == "home"
        assert places["app1"] == "stopped"
        assert fleet.states()["app1"] == "Ready to switch"
        assert not fleet.worlds["app1"].replica.is_off
        said = fleet("status", "--plan", file).stdout
        assert re.search(r"app1: .*held back: db1 of group databases, which comes before", said)

    def test_mended_and_started_again_what_was_held_back_comes_home(self, fleet: Fleet) -> None:
        fleet.worlds["db1"].fault = fails_at(RunPass, "prod")
        file = fleet.plan(TEXT)
        start(fleet, file, exit_code=ExitCode.FAILED)
        fleet.worlds["db1"].fault = lambda _host, _request, _moment: None
        assert start(fleet, file) == dict.fromkeys(PAIRS, "home")
        assert fleet.json("start", "--plan", file, "--yes", "--foreground")["exit_code"] == 0

    def test_each_pair_is_protected_where_its_own_plan_says_that_it_can_be(self, fleet: Fleet) -> None:
        def cut(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, RunPass) and moment == "midway":
                raise AgentRefused("the link was cut", code="link")

        fleet.worlds["db1"].fault = cut
        start(fleet, fleet.plan(TEXT), exit_code=ExitCode.FAILED)
        assert fleet.worlds["db1"].original.condition is Condition.TORN  # what no snapshot gives back
        fleet.json("undo", "--plan", fleet.plan(TEXT), "--yes")
        fleet.worlds["db1"].fault = lambda _host, _request, _moment: None
        assert start(fleet, fleet.plan("[defaults]\nprotect-original = true\n" + TEXT)) == dict.fromkeys(PAIRS, "home")
        protected = {pair: bool(fleet.worlds[pair].original.snapshots) for pair in PAIRS}
        assert protected == {"db1": False, "db2": True, "app1": True}

    def test_a_group_that_goes_on_switches_without_the_failed_pair(self, fleet: Fleet) -> None:
        fleet.worlds["db1"].fault = fails_at(PowerOff, "dr")
        places = start(fleet, fleet.plan(TEXT + 'on-failed = "go-on"\n'), exit_code=ExitCode.FAILED)
        assert (places["db2"], places["app1"]) == ("home", "home")

    def test_undo_cancels_what_is_held_back_and_tries_every_pair(self, fleet: Fleet) -> None:
        fleet.worlds["db1"].fault = fails_at(RunPass, "prod")
        file = fleet.plan(TEXT)
        start(fleet, file, exit_code=ExitCode.FAILED)
        fleet.worlds["db1"].fault = lambda _host, _request, _moment: None
        fleet.json("undo", "--plan", file, "--yes")
        assert set(fleet.states().values()) == {"Failover"}

    def test_commit_of_a_plan_says_which_pair_is_not_final_and_commits_the_others(self, fleet: Fleet) -> None:
        file = fleet.plan(TEXT)
        start(fleet, file)
        fleet("undo", "db2", "--yes")
        answer = fleet.json("commit", "--plan", file, "--yes", exit_code=ExitCode.FAILED)
        assert list(answer["errors"]) == ["db2"]
        assert answer["sentence"] == "2 of 3 pairs are final"
        assert fleet.states() == {"app1": "Ready", "db1": "Ready", "db2": "Failover"}

    def test_an_error_nobody_foresaw_in_one_run_ends_no_other(self, fleet: Fleet) -> None:
        def bug(host: str, request: Request, moment: str) -> None:
            if isinstance(request, RunPass) and moment == "before":
                raise ZeroDivisionError

        fleet.worlds["db1"].fault = bug
        places = start(fleet, fleet.plan(TEXT), exit_code=ExitCode.FAILED)
        assert (places["db1"], places["db2"]) == ("stopped", "home")
        assert "ZeroDivisionError" in (fleet.config.state_dir / BUG_LOG).read_text()


class TestParallelism:
    def test_no_more_first_passes_run_at_once_than_the_plan_allows(self, fleet: Fleet) -> None:
        assert start(fleet, fleet.plan("parallel = 1\n" + TEXT)) == dict.fromkeys(PAIRS, "home")

        def at_s(pair: str, kind: str, step: str) -> float:
            entries = fleet.json("history", pair)["entries"]
            return next(float(e["at_s"]) for e in entries if (e["kind"], e["step"]) == (kind, step))

        for earlier, later in itertools.pairwise(PAIRS):
            assert at_s(later, "intent", "open_view:1") >= at_s(earlier, "done", "pass:1")


class TestThePlan:
    def test_every_refusal_of_every_pair_is_told_at_once_and_nothing_is_touched(self, fleet: Fleet) -> None:
        fleet.worlds["db1"].replica.power = Power.PAUSED
        fleet.worlds["app1"].fault = fails_at(InspectVm, "prod")
        file = fleet.plan(TEXT)
        for words in (("plan", "--plan", file), ("start", "--plan", file, "--yes", "--foreground")):
            answer = fleet.json(*words, exit_code=ExitCode.REFUSED)
            assert {"db1", "app1"} <= {refusal["pair"] for refusal in answer["refusals"]}
        assert set(fleet.states().values()) == {"Failover"}
        assert all(fleet.worlds[pair].orders == [] for pair in PAIRS)

    def test_a_pair_that_is_not_registered_is_a_refusal_beside_the_others(self, fleet: Fleet) -> None:
        file = fleet.plan(TEXT.replace('"app1"', '"app1", "app2"'))
        answer = fleet.json("plan", "--plan", file, exit_code=ExitCode.REFUSED)
        assert [refusal["pair"] for refusal in answer["refusals"]] == ["app2"]

    def test_the_plan_shows_order_costs_and_each_note_once(self, fleet: Fleet) -> None:
        file = fleet.plan(TEXT + 'delay = "2m"\n')
        said = fleet("plan", "--plan", file).stdout
        assert "switched when all of databases are home, 2 min 00 s later" in said
        assert said.count("are overwritten in place") == 1
        assert "db1, db2, app1: The disks of the original are overwritten" in said

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("start",), "say either which pair"),
            (("start", "db1", "--plan", "F"), "say either which pair"),
            (("start", "--plan", "F", "--no-power-on"), "put it into the file"),
            (("plan", "--plan", "F", "--switch", "manual"), "put it into the file"),
            (("undo", "--plan", "F", "--original-is-off", "prod"), "leave it out"),
            (("status", "--plan", "F", "--all"), "--all is about every pair"),
            (("resume", "--plan", "F", "--take-over"), "leave it out"),
        ],
    )
    def test_what_is_about_one_pair_does_not_go_with_a_plan(
        self, fleet: Fleet, words: tuple[str, ...], said: str
    ) -> None:
        file = fleet.plan(TEXT)
        result = fleet(*(file if word == "F" else word for word in words))
        assert result.exit_code == ExitCode.USAGE
        assert said in result.stderr

    def test_room_that_each_pair_has_and_all_of_them_have_not_is_refused(self) -> None:
        def planned(name: str, needed_bytes: int, free_bytes: int | None = 100, host: str = "dr1") -> PairPlan:
            room = Room(host=host, place="/images", purpose="", needed_bytes=needed_bytes, free_bytes=free_bytes)
            plan = Plan(pair=name, refusals=(), disks=(), steps=(), rooms=(room,))
            return PairPlan(pair=None, name=name, group="g", plan=plan)

        (refusal,) = no_room_together([planned("a", 60), planned("b", 50), planned("c", 90, host="dr2")])
        assert refusal.sentence.startswith("Host dr1 has 100 bytes free in /images, but a, b need 110 there together")
        assert not list(no_room_together([planned("a", 60), planned("b", 40)]))
        assert not list(no_room_together([planned("a", 60), planned("b", 50, None), planned("c", 200)]))


class TestStopping:
    def test_the_first_signal_stops_every_run_at_a_safe_boundary_and_resume_goes_on(self, fleet: Fleet) -> None:
        file = fleet.plan(TEXT)

        def interrupt(host: str, request: Request, moment: str) -> None:
            if isinstance(request, RunPass) and moment == "before" and host.startswith("dr"):
                fleet.worlds["db1"].fault = lambda _host, _request, _moment: None
                signal.raise_signal(signal.SIGINT)

        fleet.worlds["db1"].fault = interrupt
        places = start(fleet, file, exit_code=ExitCode.FAILED)
        assert "stopped" in places.values()
        assert "switching" not in places.values()
        assert not fleet.worlds["app1"].replica.is_off
        answer = fleet.json("resume", "--plan", file, "--foreground")
        assert {row["place"] for row in answer["pairs"]} == {"home"}

    def test_resume_begins_nothing_new(self, fleet: Fleet) -> None:
        file = fleet.plan(TEXT)
        answer = fleet.json("resume", "--plan", file, "--foreground", exit_code=ExitCode.FAILED)
        assert {row["place"] for row in answer["pairs"]} == {"failed over"}
        assert all(fleet.worlds[pair].orders == [] for pair in PAIRS)


class TestUnits:
    def test_each_run_is_handed_to_its_own_unit_and_turns_are_given_from_here(
        self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.geteuid", lambda: 0)
        lock = threading.Lock()
        given: list[str] = []

        def unit(pair: str) -> None:
            with lock:
                given.append(pair)
            resume_here(fleet, pair)

        units = UnitInThread(unit)
        fleet.systemd = units
        file = fleet.plan(TEXT)
        answer = fleet.json("start", "--plan", file, "--yes")
        units.join()
        assert {row["place"] for row in answer["pairs"]} == {"home"}
        assert sorted(given) == sorted(PAIRS)
        home = max(journalled_s(fleet, pair, State.FAILBACK) for pair in ("db1", "db2"))
        assert journalled_s(fleet, "app1", State.SWITCHING) >= home


async def test_a_turn_is_given_once_and_a_persons_word_goes_above_it(fleet: Fleet) -> None:
    async with Coordinator(fleet.config, actor="root@test", agents=fleet.worlds) as coordinator:
        await coordinator.start_run("db1", RunOptions(switch=SwitchPolicy.TURN))
        assert await coordinator.give_turn("db1")
        assert not await coordinator.give_turn("db1")
        await coordinator.start_run("db2", RunOptions(switch=SwitchPolicy.TURN))
        await coordinator.switch("db2", wait_s=0.0)
        assert not await coordinator.give_turn("db2")
        assert not await coordinator.give_turn("app1")  # it has no run at all
