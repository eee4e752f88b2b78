"""Every verb over in-memory agents: what it does, says, exits with, and gives to programs."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from coordinator.cli.service import ServiceFailed, Systemd
from coordinator.config import Config
from coordinator.errors import ExitCode
from coordinator.runs import Coordinator
from coordinator.status import PairStatus
from protocol.messages import FenceVm, Power, Request, RunPass
from tests.fakes.agent import unreachable
from tests.unit.cli_house import PAIR, Command, UnitInThread, resume_here

START = ("start", PAIR, "--yes", "--foreground")


@pytest.fixture
def failback(memory_folder: Path) -> Command:
    return Command(memory_folder)


@pytest.fixture
def taken_over(failback: Command) -> Command:
    failback.register()
    return failback


class TestTheRegistry:
    def test_register_and_failover_and_pairs(self, failback: Command) -> None:
        made = failback.json("register", PAIR, "--original", "prod/web", "--replica", "dr/web")
        assert made["pair"]["state"] == "Ready"
        assert made["pair"]["disks"] == [{"original": t, "replica": t} for t in ("vda", "vdb")]
        assert failback.json("failover", PAIR)["pair"]["state"] == "Failover"
        assert failback.json("failover", PAIR)["pair"]["newest"] == "replica"
        (pair,) = failback.json("pairs")["pairs"]
        assert (pair["name"], pair["state"]) == (PAIR, "Failover")
        listed = failback("pairs").stdout
        assert re.search(r"web +Failover +replica +prod/web +dr/web +2 +intact", listed)

    def test_failover_is_refused_while_the_original_runs(self, failback: Command) -> None:
        failback.register(in_failover=False)
        failback.world.replica.power = Power.OFF
        failback.world.original.power = Power.RUNNING
        failback.world.last_words = failback.world.original.disks
        value = failback.json("failover", PAIR, exit_code=ExitCode.REFUSED)
        assert "power it off" in value["error"]["sentence"]


class TestPlanAndRefusals:
    def test_plan_shows_steps_disks_and_evidence_and_changes_nothing(self, taken_over: Command) -> None:
        result = taken_over("plan", PAIR)
        assert result.exit_code == 0
        assert "first pass while the replica web on dr serves" in result.stdout
        assert "First pass of vda, vdb: no earlier view of the replica is known to equal the original" in result.stdout
        assert "more passes while each shortens the expected downtime" in result.stdout
        assert "failback start web" in result.stdout
        assert taken_over.world.orders == []
        plan = taken_over.json("plan", PAIR)["plan"]
        assert plan["refusals"] == []
        assert [disk["source_size_bytes"] for disk in plan["disks"]] == [1 << 20, 1 << 20]

    def test_every_refusal_is_told_at_once_by_plan_and_start_and_nothing_is_touched(self, taken_over: Command) -> None:
        taken_over.world.replica.power = Power.PAUSED

        def no_original(host: str, _request: Request, _moment: str) -> None:
            if host == "prod":
                raise unreachable(host)

        taken_over.world.fault = no_original
        for words in (("plan", PAIR), START):
            value = taken_over.json(*words, exit_code=ExitCode.REFUSED)
            assert [refusal["code"] for refusal in value["plan"]["refusals"]] == [
                "host-unreachable",
                "replica-not-serving",
            ]
            assert value["error"]["code"] == "refused"
            text = taken_over(*words)
            assert text.exit_code == ExitCode.REFUSED
            assert "[host-unreachable]" in text.stdout
            assert "[replica-not-serving]" in text.stdout
            assert "virsh resume web" in text.stdout
        assert taken_over.world.orders == []

    def test_yes_does_not_imply_powering_the_original_off(self, taken_over: Command) -> None:
        taken_over.world.original.power = Power.RUNNING
        taken_over.world.check = lambda: None  # type: ignore[method-assign]  # both run: that is the point here
        value = taken_over.json(*START, exit_code=ExitCode.REFUSED)
        assert [refusal["code"] for refusal in value["plan"]["refusals"]] == ["both-running"]
        assert "the replica took over at 20" in value["plan"]["refusals"][0]["sentence"]
        accepted = taken_over("plan", PAIR, "--power-off-original")
        assert accepted.exit_code == 0
        assert "power off the original web on prod" in accepted.stdout

    def test_start_asks_and_without_a_terminal_wants_yes(self, taken_over: Command) -> None:
        value = taken_over.json("start", PAIR, "--foreground", exit_code=ExitCode.USAGE)
        assert "--yes" in value["error"]["sentence"]
        for words in (("commit", PAIR), ("undo", PAIR)):
            assert taken_over(*words).exit_code != 0
        assert taken_over.world.orders == []


class TestARun:
    def test_start_ends_in_failback_with_a_report(self, taken_over: Command) -> None:
        value = taken_over.json(*START)
        assert (value["state"], value["exit_code"], value["run"]) == ("Failback", 0, value["report"]["run"])
        assert "error" not in value
        assert {line["pass_name"] for line in value["report"]["disks"]} == {"pass:1", "pass:2", "last_pass"}
        assert value["plan"]["refusals"] == []
        assert taken_over.world.original.power is Power.RUNNING

    def test_start_in_a_pipe_is_plain_lines_with_a_closing_report(self, taken_over: Command) -> None:
        result = taken_over(*START)
        assert "\x1b" not in result.output
        for words in (
            "... first pass",
            " ok first pass: bring the original",
            "=== Switching",
            "=== Failback",
            "Downtime",
            "Evidence for vda, vdb in pass 1: ",
            " in pass 2 and the last pass: ",
            " for the guest's shutdown; expected were ",
        ):
            assert words in result.stdout, words
        assert "50% of 2.00 MiB" in result.stdout
        assert re.search(r"vda +1 +1.00 MiB +768 KiB +4.00 KiB +0.98 KiB +4.50 KiB", result.stdout)
        assert "full digests (matched, xxh3-128)" in result.stdout

    def test_ctrl_c_in_the_first_pass_stops_there_and_prints_the_line_that_goes_on(self, taken_over: Command) -> None:
        def press(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, RunPass) and moment == "midway":
                signal.raise_signal(signal.SIGINT)

        taken_over.world.pass_hold = trio.Event()
        taken_over.world.fault = press
        result = taken_over(*START)
        assert result.exit_code == ExitCode.FAILED
        assert "SIGINT: stopping at the next safe boundary" in result.stdout
        assert result.stdout.rstrip().endswith("`failback resume web` goes on, `failback cancel web` gives up")
        taken_over.world.pass_hold = None
        taken_over.world.fault = lambda *_: None
        assert taken_over.json("resume", PAIR)["state"] == "Failback"

    def test_no_power_on_leaves_the_original_off(self, taken_over: Command) -> None:
        taken_over.json(*START, "--no-power-on")
        assert taken_over.world.original.power is Power.OFF

    def test_commit_makes_it_final_and_repeated_it_is_harmless(self, taken_over: Command) -> None:
        taken_over.fail_back()
        assert taken_over.json("commit", PAIR, "--yes", "--restore-point", "drop")["state"] == "Ready"
        assert taken_over.json("commit", PAIR, "--yes")["state"] == "Ready"
        assert taken_over.json("undo", PAIR, "--yes", exit_code=ExitCode.REFUSED)["error"]["code"] == "wrong-state"

    def test_undo_says_what_stays_behind_and_gives_the_replica_back(self, taken_over: Command) -> None:
        taken_over.fail_back()
        result = taken_over("undo", PAIR, "--yes")
        assert result.exit_code == 0
        assert "stays behind on its disks" in result.stdout
        assert taken_over.world.replica.power is Power.RUNNING
        assert taken_over.world.original.power is Power.OFF
        assert taken_over.json("status", PAIR)["state"] == "Failover"

    def test_a_failed_switchover_rolls_back_and_exits_with_failed(self, taken_over: Command) -> None:
        taken_over.world.replica.ignores_shutdown = True
        value = taken_over.json(*START, exit_code=ExitCode.FAILED)
        assert (value["state"], value["error"]["code"]) == ("Failover", "failed")
        assert "rolled back" in value["error"]["sentence"]
        watched = taken_over("watch", PAIR)
        assert watched.exit_code == ExitCode.FAILED
        assert "rolled-back" in watched.stdout
        looked = taken_over("status", PAIR).stdout
        assert re.search(r"Last run +r\w+, rolled back", looked)
        assert "web may still power off later" in looked

    def test_an_original_that_does_not_start_needs_an_operator(self, taken_over: Command) -> None:
        taken_over.world.original.fails_to_start = True
        value = taken_over.json(*START, exit_code=ExitCode.NEEDS_OPERATOR)
        assert value["error"]["code"] == "needs-operator"
        status = taken_over.json("status", PAIR)
        assert status["state"] == "Needs operator"
        assert "failback resume web" in taken_over("status", PAIR).stdout
        assert taken_over("watch", PAIR).exit_code == ExitCode.NEEDS_OPERATOR
        taken_over.world.original.fails_to_start = False
        assert taken_over.json("resume", PAIR, "--foreground")["state"] == "Failback"

    def test_a_failure_while_the_replica_serves_is_resumed_or_cancelled(self, taken_over: Command) -> None:
        def no_fence(_host: str, request: Request, moment: str) -> None:
            if isinstance(request, FenceVm) and moment == "before":
                raise unreachable("prod")

        world = taken_over.world
        world.fault = no_fence
        value = taken_over.json(*START, exit_code=ExitCode.FAILED)
        assert value["state"] == "Syncing"
        status = taken_over.json("status", PAIR)
        assert (status["active"], status["step"]) == (False, "fence_original")
        assert set(status["allowed"]) == {"resume", "cancel", "limit", "switch"}
        assert "cannot be asked" in taken_over("status", PAIR).stdout
        taken_over.grace_s = 0.0
        watched = taken_over("watch", PAIR)
        assert watched.exit_code == ExitCode.FAILED
        assert "failback resume web" in watched.stdout
        refused = taken_over.json(*START, exit_code=ExitCode.REFUSED)
        assert "run-unfinished" in [refusal["code"] for refusal in refused["plan"]["refusals"]]
        world.fault = lambda _host, _request, _moment: None
        assert taken_over.json("cancel", PAIR)["state"] == "Failover"
        assert taken_over.json("cancel", PAIR)["state"] == "Failover"

    def test_resume_without_a_run_is_refused_with_what_the_state_allows(self, taken_over: Command) -> None:
        value = taken_over.json("resume", PAIR, "--foreground", exit_code=ExitCode.REFUSED)
        assert value["error"]["code"] == "wrong-state"
        assert "failback start web" in value["error"]["sentence"]


class TestLooking:
    def test_status_names_the_newest_side_and_the_originals_flag(self, taken_over: Command) -> None:
        taken_over.fail_back()
        value = taken_over.json("status", PAIR)
        assert value["pair"] == PAIR
        assert value["newest"] == "original"
        assert value["original"]["flag"]["condition"] == "equals-view"
        assert value["allowed"] == ["commit", "resume", "undo"]
        assert value["next"] == "`failback commit web` or `failback undo web`"
        text = taken_over("status", PAIR).stdout
        assert "original (prod/web)" in text
        assert "disks equal view" in text
        assert "Next: `failback commit web` or `failback undo web`" in text

    def test_history_is_for_a_person_and_for_programs(self, taken_over: Command) -> None:
        taken_over.fail_back()
        text = taken_over("history", PAIR, "--report").stdout
        assert re.search(r"ok +first pass: bring the original up to the view +\d", text)
        assert "=== " in text
        assert "Downtime" in text
        value = taken_over.json("history", PAIR)
        assert {entry["kind"] for entry in value["entries"]} >= {"intent", "done", "state"}
        assert value["report"] is None

    def test_watch_of_a_pair_at_rest_ends_at_once(self, taken_over: Command) -> None:
        taken_over.fail_back()
        result = taken_over("watch", PAIR)
        assert result.exit_code == 0
        assert "failback commit web" in result.stdout


class TestSystemd:
    def test_start_hands_over_and_only_watches(self, taken_over: Command) -> None:
        unit = UnitInThread(lambda pair: resume_here(taken_over, pair))
        taken_over.systemd = unit
        result = taken_over("start", PAIR, "--yes")
        unit.join()
        assert result.exit_code == 0, result.output
        assert "failback@web.service" in result.stdout
        assert "=== Failback" in result.stdout
        assert "failback commit web" in result.stdout

    def test_watching_a_run_as_json_is_lines_and_then_one_ending(self, taken_over: Command) -> None:
        taken_over.world.pass_hold = trio.Event()  # never set: the run waits in its first pass until it is cancelled
        unit = UnitInThread(lambda pair: resume_here(taken_over, pair))
        taken_over.systemd = unit
        cancelled: list[bool] = []

        def cancel_once(status: PairStatus) -> None:
            if status.progress is not None and not cancelled:
                _cancel(taken_over, cancelled)

        watcher = _Meddling(taken_over, cancel_once)

        taken_over.begin()
        unit.start(PAIR)
        result = watcher("--json", "watch", PAIR)
        unit.join()
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert result.exit_code == 0, result.output
        assert {line["event"] for line in lines[:-1]} >= {"state-changed", "step-started", "progressed", "step-done"}
        assert lines[-1]["verb"] == "watch"
        assert lines[-1]["state"] == "Failover"
        assert lines[-1]["report"]["outcome"] == "cancelled"

    def test_ctrl_c_ends_the_watching_and_not_the_run(self, taken_over: Command) -> None:
        taken_over.world.pass_hold = hold = trio.Event()
        unit = UnitInThread(lambda pair: resume_here(taken_over, pair))
        taken_over.systemd = unit

        def press(status: PairStatus) -> None:
            if status.progress is not None:
                signal.raise_signal(signal.SIGINT)

        watcher = _Meddling(taken_over, press)
        result = watcher("start", PAIR, "--yes")
        assert result.exit_code == ExitCode.FAILED
        assert "the run of web goes on: `failback watch web`" in result.stdout
        status = taken_over.json("status", PAIR)
        assert (status["state"], status["active"]) == ("Syncing", True)
        assert not hold.is_set()
        assert taken_over.json("cancel", PAIR)["state"] == "Failover"
        unit.join()

    def test_the_unit_ends_well_when_nothing_is_left_to_resume_and_those_who_watch_are_told(
        self, taken_over: Command
    ) -> None:
        taken_over.world.replica.ignores_shutdown = True
        taken_over.begin()
        unit = taken_over("resume", PAIR, "--unit")
        assert unit.exit_code == ExitCode.DONE, "systemd would start the unit once more"
        assert "rolled back" in unit.stdout
        assert taken_over("watch", PAIR).exit_code == ExitCode.FAILED
        assert taken_over("resume", PAIR, "--unit").exit_code == ExitCode.REFUSED

    def test_the_unit_fails_when_the_run_can_be_resumed(self, taken_over: Command) -> None:
        taken_over.world.fault = lambda host, request, moment: _cut(request)
        assert taken_over(*START).exit_code == ExitCode.FAILED
        assert taken_over("resume", PAIR, "--unit").exit_code == ExitCode.FAILED
        taken_over.world.fault = lambda host, request, moment: None
        taken_over.world.original.fails_to_start = True
        assert taken_over("resume", PAIR, "--unit").exit_code == ExitCode.NEEDS_OPERATOR

    def test_a_unit_that_does_not_start_is_told_with_the_way_on(self, taken_over: Command) -> None:
        class Refusing(UnitInThread):
            def start(self, pair: str) -> None:
                raise ServiceFailed(f"systemd did not start it; `failback resume {pair} --foreground`", unit=pair)

        taken_over.systemd = Refusing(lambda _pair: None)
        result = taken_over("start", PAIR, "--yes")
        assert result.exit_code == ExitCode.FAILED
        assert "failback resume web --foreground" in result.stderr
        taken_over.systemd = Systemd(runtime_dir=Path("/nonexistent"))
        assert taken_over.json("resume", PAIR)["state"] == "Failback"

    def test_all_unfinished_runs_are_handed_to_their_units_after_a_reboot(self, taken_over: Command) -> None:
        started: list[str] = []
        taken_over.systemd = UnitInThread(started.append)
        assert taken_over.json("resume", "--all-unfinished")["pairs"] == {}
        taken_over.world.fault = lambda host, request, moment: _cut(request)
        assert taken_over(*START).exit_code == ExitCode.FAILED
        assert taken_over.json("resume", "--all-unfinished")["pairs"] == {PAIR: 0}
        assert started == [PAIR]


def _cut(request: Request) -> None:
    if isinstance(request, FenceVm):
        raise unreachable("prod")


def _cancel(command: Command, done: list[bool]) -> None:
    """Another person cancels, beside the watching."""
    done.append(True)

    async def cancel() -> None:
        async with command.coordinator() as coordinator:
            await coordinator.cancel(PAIR)

    threading.Thread(target=trio.run, args=(cancel,)).start()


class _Meddling(Command):
    """The same command; something happens each time the watched pair is looked at."""

    def __init__(self, command: Command, meddle: Callable[[PairStatus], None]) -> None:
        self.__dict__.update(command.__dict__)
        self._meddle = meddle

    def coordinator(self, _config: Config | None = None, actor: str = "root@test") -> Coordinator:
        """One whose status is looked at through the meddling."""
        meddle = self._meddle

        class Watched(Coordinator):
            async def pair_status(self, pair: str) -> PairStatus:
                status = await super().pair_status(pair)
                meddle(status)
                return status

        return Watched(self.config, actor=actor, agents=self.world)
