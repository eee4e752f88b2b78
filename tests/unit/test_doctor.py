"""`failback doctor` and `failback forget`: each difference is found, with its cure; --clean removes what is ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.differences import Difference, Severity, differences
from coordinator.errors import HostUnreachable
from coordinator.health import Health
from coordinator.model import State
from coordinator.pairlock import lock_file
from coordinator.runs import Coordinator
from protocol.messages import (
    Condition,
    Direction,
    HeldDisk,
    HeldPass,
    Holdings,
    PassKind,
    Power,
    Remnant,
    RemnantKind,
    Request,
    Side,
)
from tests.fakes.agent import FakeFence, World
from tests.unit.cli_house import PAIR, Command

NOW_S = 1_700_000_000.0
DAY_S = 86400.0


@dataclass
class Ward:
    """A healthy pair in Failover, as everybody tells it; tests make one thing wrong."""

    health: Health

    def of(self, host: str) -> Holdings:
        """What that host's agent holds."""
        held = self.health.hosts[host]
        assert isinstance(held, Holdings)
        return held

    def hold(self, host: str, **changes: Any) -> None:
        """Let that agent hold something else."""
        self.health.hosts[host] = replace(self.of(host), **changes)

    def pair(self, **changes: Any) -> None:
        """Change the registry's entry."""
        (known,) = self.health.pairs
        self.health = replace(self.health, pairs=(replace(known, pair=replace(known.pair, **changes)),))

    def vm(self, side: Side, **changes: Any) -> None:
        """Change what libvirt says of that side's VM."""
        (known,) = self.health.pairs
        findings = known.findings
        found = getattr(findings, side.value)
        found = replace(found, vm=replace(found.vm, **changes))
        pairs = (replace(known, findings=replace(findings, **{side.value: found})),)
        self.health = replace(self.health, pairs=pairs)

    def found(self) -> dict[str, Difference]:
        """Every difference, by its code."""
        return {each.code: each for each in differences(self.health)}


@pytest.fixture
def command(tmp_path: Path) -> Command:
    made = Command(tmp_path)
    made.register()
    return made


def ward_of(command: Command) -> Ward:
    """Everything as it is now."""

    async def examine(coordinator: Coordinator) -> Health:
        return await coordinator.doctor().examine()

    return Ward(replace(command.session().run(examine), now_s=NOW_S))


@pytest.fixture
def ward(command: Command) -> Ward:
    return ward_of(command)


def remnant(kind: RemnantKind, *, vm: str = "u-repl", removable: bool = True) -> Remnant:
    return Remnant(kind=kind, vm_uuid=vm, name="n1", recorded=False, in_use=False, removable=removable)


def fence(ward: Ward, host: str, side: Side, **changes: Any) -> None:
    """Let that host's agent hold a fence on its VM."""
    world = World()
    vm = world.original if side is Side.ORIGINAL else world.replica
    vm.fence = FakeFence(side=side, autostart_before=True, pair=PAIR, run="r9", targets=("vda", "vdb"))
    vm.autostart, vm.power = False, Power.OFF
    (held,) = world.holdings(host).fences
    ward.hold(host, fences=(replace(held, **changes),))


def torn(ward: Ward) -> None:
    """The original's agent says that it is torn."""
    world = World()
    world.original.condition = Condition.TORN
    ward.hold("prod", conditions=world.holdings("prod").conditions)


def mapping_of(ward: Ward) -> None:
    """An agent knows a pair that nobody registered."""
    (known,) = ward.of("prod").pairs
    ward.hold("prod", pairs=(known, replace(known, pair="other")))


def epoch_ahead(ward: Ward) -> None:
    (known,) = ward.of("dr").pairs
    ward.hold("dr", pairs=(replace(known, epoch=99),))


def pass_at_work(ward: Ward) -> None:
    held = HeldPass(pair=PAIR, run="r9", epoch=1, kind=PassKind.SYNC, direction=Direction.SEND, running=True)
    ward.hold("dr", passes=(held,))


def old_map(ward: Ward) -> None:
    disk = HeldDisk(vm_uuid="u-gone", pair="", target="vda", equals=None, map_bytes=4096)
    ward.hold("prod", disks=(disk,))


def unknown_fence(ward: Ward) -> None:
    fence(ward, "prod", Side.ORIGINAL, pair="other")


def stale_lock(ward: Ward) -> None:
    ward.health = replace(ward.health, stale_locks=(Path("/x/gone.lock"),))


def expired_own(ward: Ward) -> None:
    ward.health = replace(ward.health, certificate_ends_s=NOW_S - DAY_S)


WRONG: dict[str, Callable[[Ward], object]] = {
    "version": lambda w: w.hold("dr", software="failback 0.0.1"),
    "unseen": lambda w: w.hold("dr", problems=("libvirt does not answer",)),
    "left-off": lambda w: w.hold("dr", left_off=3),
    "room": lambda w: w.hold("dr", state_free_bytes=1 << 20),
    "unknown-pair": mapping_of,
    "unknown-fence": unknown_fence,
    "stale-lock": stale_lock,
    "certificate": expired_own,
    "both-running": lambda w: w.vm(Side.ORIGINAL, power=Power.RUNNING),
    "nobody-serves": lambda w: w.vm(Side.REPLICA, power=Power.OFF),
    "replica-runs": lambda w: w.pair(state=State.READY),
    "uuid-changed": lambda w: w.vm(Side.REPLICA, uuid="another"),
    "epoch-ahead": epoch_ahead,
    "fenced-runs": lambda w: fence(w, "dr", Side.REPLICA, power=Power.RUNNING),
    "not-locked": lambda w: fence(w, "prod", Side.ORIGINAL, unlocked=("vda",)),
    "autostart": lambda w: fence(w, "prod", Side.ORIGINAL, autostart=True),
    "fence-without-run": lambda w: fence(w, "dr", Side.REPLICA),
    "torn-unfenced": torn,
    "fence-missing": lambda w: w.pair(state=State.FAILBACK),
    "orphaned-run": lambda w: w.pair(state=State.SYNCING, run="r1"),
    "pass-without-process": pass_at_work,
    "snapshot": lambda w: w.hold("dr", remnants=(remnant(RemnantKind.SNAPSHOT, removable=False),)),
    "stray-overlay": lambda w: w.hold("dr", remnants=(remnant(RemnantKind.OVERLAY, removable=False),)),
    **{
        f"leftover-{kind.value}": lambda w, kind=kind: w.hold("dr", remnants=(remnant(kind),))  # type: ignore[misc]
        for kind in (
            RemnantKind.VIEW,
            RemnantKind.TRACKING,
            RemnantKind.BITMAP,
            RemnantKind.OVERLAY,
            RemnantKind.SCRATCH,
        )
    },
}


def test_a_healthy_pair_has_no_difference(ward: Ward) -> None:
    assert ward.found() == {}


@pytest.mark.parametrize("code", sorted(WRONG))
def test_what_is_wrong_is_found_with_a_sentence_and_a_cure(ward: Ward, code: str) -> None:
    WRONG[code](ward)
    found = ward.found()[code]
    assert found.severity is not Severity.NOTE
    assert found.sentence
    assert found.cure
    assert "\n" not in found.sentence


@pytest.mark.parametrize("change", [old_map, lambda w: w.hold("dr", remnants=(remnant(RemnantKind.SOCKET, vm=""),))])
def test_what_costs_little_is_a_note(ward: Ward, change: Callable[[Ward], object]) -> None:
    change(ward)
    (found,) = ward.found().values()
    assert found.severity is Severity.NOTE


def test_an_original_that_runs_in_failover_is_a_danger(ward: Ward) -> None:
    ward.vm(Side.ORIGINAL, power=Power.RUNNING)
    ward.vm(Side.REPLICA, power=Power.OFF)
    assert ward.found()["original-runs"].severity is Severity.DANGER


def test_a_certificate_that_ends_soon_is_told_before_it_does(ward: Ward) -> None:
    ward.hold("dr", certificate_ends_s=NOW_S + 5 * DAY_S)
    assert "expires in 5 days" in ward.found()["certificate"].sentence
    ward.hold("dr", certificate_ends_s=NOW_S + 300 * DAY_S)
    assert ward.found() == {}


def test_the_remnants_of_a_run_under_way_are_no_leftovers(ward: Ward) -> None:
    ward.pair(state=State.SYNCING, run="r1")
    (known,) = ward.health.pairs
    ward.health = replace(ward.health, pairs=(replace(known, active=True),))
    ward.hold("dr", remnants=(remnant(RemnantKind.VIEW),))
    assert ward.found() == {}


def test_the_snapshot_that_a_commit_kept_is_a_restore_point_and_no_difference(command: Command) -> None:
    command.fail_back()
    assert command("commit", PAIR, "--yes").exit_code == 0
    told = command.json("doctor", PAIR)
    assert [each["code"] for each in told["differences"]] == ["restore-point"]


def test_doctor_says_so_in_words_and_ends_with_0_or_1(command: Command) -> None:
    fine = command("doctor")
    assert (fine.exit_code, fine.stdout.strip()) == (0, "Everything is as it should be.")
    command.world.original.condition = Condition.TORN
    wrong = command("doctor", PAIR)
    assert wrong.exit_code == 1
    assert "danger: the original web on prod is torn" in wrong.stdout
    assert f"cure: failback start {PAIR}" in wrong.stdout


def test_a_silent_agent_is_a_finding_and_no_error(command: Command) -> None:
    def silent(host: str, _request: Request, moment: str) -> None:
        if host == "prod" and moment == "before":
            raise HostUnreachable("the agent on prod cannot be asked", host=host)

    command.world.fault = silent
    told = command.json("doctor", PAIR, exit_code=1)
    assert "agent-silent" in {each["code"] for each in told["differences"]}


def test_clean_asks_first_then_removes_and_says_what(command: Command) -> None:
    command.world.remnants["dr"] = (remnant(RemnantKind.BITMAP),)
    assert command("doctor", PAIR, "--clean").exit_code == 2
    assert command.world.remnants["dr"]
    told = command("doctor", PAIR, "--clean", "--yes")
    assert told.exit_code == 0, told.output
    assert "dr: removed bitmap n1" in told.stdout
    assert command.world.remnants == {}


def test_clean_is_refused_while_a_run_is_under_way(command: Command) -> None:
    command.begin()
    told = command.json("doctor", PAIR, "--clean", "--yes", exit_code=3)
    assert told["error"]["code"] == "wrong-state"


def test_clean_lifts_the_fence_that_would_keep_a_standby_replica_from_starting(command: Command) -> None:
    command.fail_back()
    assert command("commit", PAIR, "--yes", "--restore-point", "drop").exit_code == 0
    replica = command.world.replica
    replica.fence = FakeFence(side=Side.REPLICA, autostart_before=True, pair=PAIR, run="r1", targets=("vda",))
    replica.autostart = False
    assert command("doctor", PAIR).exit_code == 1
    assert command("doctor", PAIR, "--clean", "--yes").exit_code == 0
    assert replica.fence is None


def test_lock_files_of_pairs_that_are_gone_are_removed(command: Command) -> None:
    stale = lock_file(command.config.state_dir, "gone")
    stale.parent.mkdir(exist_ok=True)
    stale.touch()
    assert command("doctor").exit_code == 1
    assert command("doctor", "--clean", "--yes").exit_code == 0
    assert not stale.exists()


def test_a_forgotten_pair_is_gone_from_registry_and_agents_and_can_be_registered_anew(command: Command) -> None:
    command.fail_back()
    assert command("forget", PAIR, "--yes").exit_code == 3  # not final yet
    assert command("undo", PAIR, "--yes").exit_code == 0
    assert command("forget", PAIR).exit_code == 2  # nobody was asked
    assert command("forget", PAIR, "--yes").exit_code == 0
    assert command.json("pairs")["pairs"] == []
    assert command.world.told == {}
    seen = max(command.world.epochs.values())
    command.register()
    (pair,) = command.json("pairs")["pairs"]
    assert pair["state"] == "Failover"
    assert pair["epoch"] >= seen  # agents keep it: below it nobody is obeyed
    command.fail_back()


def test_a_pair_whose_hosts_are_gone_is_forgotten_offline(command: Command) -> None:
    def silent(host: str, _request: Request, _moment: str) -> None:
        raise HostUnreachable(f"the agent on {host} cannot be asked", host=host)

    command.world.fault = silent
    assert command("forget", PAIR, "--yes").exit_code == 1
    assert command("forget", PAIR, "--yes", "--offline").exit_code == 0
