"""A pair is changed by registering it again: every refusal that says so prints a command that cures it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.cures import register_again
from coordinator.errors import AgentRefused, ExitCode, UsageError, WrongState
from coordinator.findings import Problem
from coordinator.mapping import map_disks, revised
from coordinator.model import DiskPair, Newest, OriginalFlag, Pair, PairRequest, State
from protocol.messages import Condition, Power, Request, RunPass, Side
from tests.fakes.agent import World
from tests.unit import plan_cases
from tests.unit.cli_house import PAIR, Command

START = ("start", PAIR, "--yes", "--foreground")


@pytest.fixture
def failback(memory_folder: Path) -> Command:
    command = Command(memory_folder)
    command.register()
    return command


def attached_to_original(world: World) -> None:
    world.original.disks["vdc"] = b"new here"


def attached_to_replica(world: World) -> None:
    world.replica.disks["vdc"] = b"new there"


def attached_to_both(world: World) -> None:
    attached_to_original(world)
    attached_to_replica(world)


def device_passed_through(world: World) -> None:
    world.replica.passthrough = ("pci 0000:01:00.0",)


def now_shared(world: World) -> None:
    world.replica.shareable = world.original.shareable = ("vdb",)
    world.original.held = ("vdb",)  # another VM has it open: that must not stand in the way


def now_network(world: World) -> None:
    world.original.kinds["vdb"] = "network"


def detached(world: World) -> None:
    del world.original.disks["vdb"]


def defined_anew(world: World) -> None:
    world.original.uuid = "u-defined-anew"


CURES: list[tuple[Callable[[World], None], str]] = [
    (attached_to_original, "disk-not-mapped"),
    (attached_to_replica, "disk-not-mapped"),
    (attached_to_both, "disk-not-mapped"),
    (device_passed_through, "passthrough"),
    (now_shared, "disk-shareable"),
    (now_network, "disk-kind"),
    (detached, "disk-missing"),
    (defined_anew, "vm-redefined"),
]


def cure_of(command: Command, code: str) -> list[str]:
    """The words of the command that the first refusal of that code prints."""
    refusals = command.json("plan", PAIR, exit_code=ExitCode.REFUSED)["plan"]["refusals"]
    sentence = next(refusal["sentence"] for refusal in refusals if refusal["code"] == code)
    found = re.search(r"`failback (register [^`]*)`", sentence)
    assert found is not None, sentence
    return shlex.split(found[1])


@pytest.mark.parametrize(("spoil", "code"), CURES, ids=[spoil.__name__ for spoil, _ in CURES])
def test_the_printed_command_cures_the_refusal(failback: Command, spoil: Callable[[World], None], code: str) -> None:
    spoil(failback.world)
    assert failback.json(*cure_of(failback, code))["changed"] is True
    assert failback.json("plan", PAIR)["plan"]["refusals"] == []
    assert failback.json(*START)["state"] == "Failback"
    assert failback.json("commit", PAIR, "--yes")["state"] == "Ready"


def test_disks_of_different_names_are_left_out_by_both(failback: Command) -> None:
    for target in ("sda", "sdb"):
        failback.world.original.disks[target] = failback.world.original.disks.pop(f"vd{target[-1]}")
    words = ("register", PAIR, "--original", "prod/web", "--replica", "dr/web")
    failback.json(*words, "--disk", "sda=vda", "--disk", "sdb=vdb")
    failback.world.replica.kinds["vdb"] = "network"
    cure = cure_of(failback, "disk-kind")
    assert cure[-6:] == ["--disk", "sda=vda", "--exclude-disk", "sdb", "--exclude-disk", "vdb"]
    failback.json(*cure)
    assert failback.json(*START)["state"] == "Failback"
    assert failback.world.original.disks["sdb"] == b"old-vdb"


def test_a_pair_is_changed_in_ready_too_and_keeps_its_history(failback: Command) -> None:
    failback.fail_back()
    failback.json("commit", PAIR, "--yes")
    failback.world.original.disks["vdc"] = b"new"
    changed = failback.json("register", PAIR, "--original", "prod/web", "--replica", "dr/web", "--exclude-disk", "vdc")
    assert (changed["pair"]["state"], changed["pair"]["excluded"]) == ("Ready", ["vdc"])
    history = failback("history", PAIR).stdout
    assert "registered again: disks vda=vda, vdb=vdb; left out vdc" in history
    assert "Ready" in history


def test_while_a_run_is_not_final_a_pair_is_not_changed(failback: Command) -> None:
    failback.fail_back()
    value = failback.json("register", PAIR, "--original", "prod/web", "--replica", "dr/web", exit_code=ExitCode.REFUSED)
    assert value["error"]["code"] == "wrong-state"
    assert "`failback commit web` or `failback undo web`" in value["error"]["sentence"]


@pytest.mark.parametrize("mapped", [True, False])
def test_a_torn_disk_cannot_be_forgotten_but_a_new_one_can_be_mapped_or_left_out(
    failback: Command, mapped: bool
) -> None:
    world = failback.world

    def broken(_host: str, request: Request, moment: str) -> None:
        if isinstance(request, RunPass) and moment == "midway":
            raise AgentRefused("the link was cut; resume", code="sync")

    world.fault = broken
    assert failback(*START).exit_code == ExitCode.FAILED
    world.fault = lambda *_: None
    failback.json("cancel", PAIR)
    assert world.original.condition is Condition.TORN
    words = ("register", PAIR, "--original", "prod/web", "--replica", "dr/web")
    value = failback.json(*words, "--exclude-disk", "vdb", exit_code=ExitCode.USAGE)
    assert value["error"]["code"] == "disk-torn"
    attached_to_both(world)
    if mapped:
        failback.json(*words)
    else:
        failback.json(*cure_of(failback, "disk-not-mapped"))
    assert failback.json("status", PAIR)["original"]["flag"]["condition"] == "torn"
    assert failback.json(*START)["state"] == "Failback"
    assert world.original.power is Power.RUNNING


# --- by values ------------------------------------------------------------------------------------------------------

REQUEST = PairRequest(name="web1", original_host="prod1", original_vm="web1", replica_host="dr1", replica_vm="r")


def mapped(original: str, replica: str, **changes: object) -> tuple[DiskPair, ...]:
    sides = [
        plan_cases.vm(side, disks=tuple(plan_cases.disk(target, f"/{side.value}/{target}") for target in names.split()))
        for side, names in ((Side.ORIGINAL, original), (Side.REPLICA, replica))
    ]
    return map_disks(replace(REQUEST, **changes), *sides)  # type: ignore[arg-type]


def disks(*pairs: str) -> tuple[DiskPair, ...]:
    return tuple(DiskPair(original=pair.split("=")[0], replica=pair.split("=")[1]) for pair in pairs)


def test_disks_are_mapped_by_equal_names_or_as_said() -> None:
    assert mapped("vda vdb", "vdb vda") == disks("vdb=vdb", "vda=vda")
    assert mapped("vda vdb vdc", "vda vdx", excluded=("vdb", "vdc", "vdx")) == disks("vda=vda")
    # The names may cross: what is left out is then the disk that is not mapped.
    assert mapped("vda vdb", "vdb", disks=disks("vda=vdb"), excluded=("vdb",)) == disks("vda=vdb")


@pytest.mark.parametrize(
    ("original", "replica", "changes", "words"),
    [
        ("vda vdb", "vda", {}, "vdb of the original web1 is neither .* --exclude-disk vdb"),
        ("vda", "vda vdb", {}, "vdb of the replica web1-replica is neither .* --exclude-disk vdb"),
        ("vda", "vda", {"excluded": ("vdz",)}, "neither VM has a disk or host device vdz .* the original has vda"),
        ("vda", "vda", {"disks": disks("vda=vda"), "excluded": ("vda",)}, "say one of the two"),
        ("vda vdb", "vda vdb", {"disks": disks("vda=vda", "vda=vdb")}, "mapped twice"),
        ("vda", "vda", {"disks": disks("vda=vdq")}, "no disk vda at the original or vdq at the replica"),
        ("vda", "vda", {"excluded": ("vda",)}, "no disk to bring home"),
    ],
)
def test_a_mapping_that_leaves_something_open_is_refused(
    original: str, replica: str, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        mapped(original, replica, **changes)


def test_the_newest_side_stays_the_same_vm_and_the_other_may_be_replaced() -> None:
    old = plan_cases.PAIR
    other = replace(old, original=replace(old.original, name="web1-restored", uuid="another"))
    assert revised(old, other).original.uuid == "another"
    with pytest.raises(UsageError, match="whose replica dr1/web1-replica holds the newest data"):
        revised(old, replace(old, replica=replace(old.replica, name="x", uuid="y")))
    ready = replace(old, state=State.READY, newest=Newest.ORIGINAL)
    with pytest.raises(UsageError, match="whose original prod1/web1 holds the newest data"):
        revised(ready, other)


@pytest.mark.parametrize("state", [state for state in State if state not in (State.READY, State.FAILOVER)])
def test_no_pair_is_changed_in_another_state(state: State) -> None:
    with pytest.raises(WrongState, match="cannot be registered again now"):
        revised(replace(plan_cases.PAIR, state=state), plan_cases.PAIR)


def test_what_equals_a_view_does_so_only_in_the_mapping_that_was_compared() -> None:
    flag = OriginalFlag(condition="equals-view", view="r1-2")
    old: Pair = replace(plan_cases.PAIR, flag=flag, original_autostart=True)
    assert revised(old, plan_cases.PAIR).flag == flag
    assert revised(old, replace(plan_cases.PAIR, disks=disks("vda=vdb"))).flag.condition == "intact"
    anew = revised(old, replace(plan_cases.PAIR, original=replace(old.original, uuid="anew")))
    assert (anew.flag.condition, anew.original_autostart) == ("intact", None)
    torn = replace(old, flag=OriginalFlag(condition="torn"))
    assert revised(torn, replace(plan_cases.PAIR, original=replace(old.original, uuid="anew"))) == replace(
        torn, original=replace(old.original, uuid="anew"), original_autostart=None
    )


def test_the_printed_command_drops_what_is_gone_and_keeps_what_cannot_be_seen() -> None:
    pair = replace(plan_cases.PAIR, excluded=("vdx",))
    assert "--exclude-disk" not in register_again(plan_cases.case(pair=pair))
    hidden = plan_cases.side(Side.ORIGINAL, problem=Problem(code="x", sentence="y"))
    assert register_again(plan_cases.case(pair=pair, original=hidden)).endswith("--exclude-disk vdx")
