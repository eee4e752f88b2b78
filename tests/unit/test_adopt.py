"""`failback adopt`: what both agents agree upon is taken in, in the state that is proven; nothing is guessed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from protocol.messages import Condition, Power, Side
from tests.unit.cli_house import PAIR, Command

HOSTS = ("prod", "dr")


def lose_database(command: Command) -> None:
    """The registry and its journal are gone."""
    for file in command.config.state_dir.glob("registry.sqlite*"):
        file.unlink()


@pytest.fixture
def command(tmp_path: Path) -> Command:
    made = Command(tmp_path)
    made.register()
    return made


def adopted(command: Command) -> dict[str, object]:
    """Adopt everything; the one pair that was taken in."""
    (pair,) = command.json("adopt", *HOSTS, "--yes")["adopted"]
    assert isinstance(pair, dict)
    return pair


def refused(command: Command) -> str:
    """Adopt everything; why the one pair was not taken in."""
    answer = command.json("adopt", *HOSTS, "--yes", exit_code=1)
    assert answer["adopted"] == []
    (proposal,) = answer["proposals"]
    return str(proposal["sentence"])


@pytest.mark.parametrize("lost", ["the database", "its folder"])
def test_a_lost_pair_in_failover_comes_back_as_it_was_and_fails_back(command: Command, lost: str) -> None:
    before = command.json("pairs")["pairs"][0]
    if lost == "the database":
        lose_database(command)
    else:  # what is made in its place is another registry to the agents, and takes the pair from the one that is gone
        shutil.rmtree(command.config.state_dir)
    pair = adopted(command)
    assert {key: pair[key] for key in pair if key != "epoch"} == {key: before[key] for key in before if key != "epoch"}
    assert command("doctor").exit_code == 0
    command.fail_back()
    assert command.world.original.power is Power.RUNNING


def test_the_epoch_is_above_every_one_that_was_seen(command: Command) -> None:
    command.fail_back()
    assert command("undo", PAIR, "--yes").exit_code == 0
    seen = max(command.world.epochs.values())
    lose_database(command)
    assert adopted(command)["epoch"] == seen + 1
    assert set(command.world.epochs.values()) == {seen + 1}


def test_a_pair_whose_original_runs_and_replica_is_free_is_ready(command: Command) -> None:
    command.fail_back()
    assert command("commit", PAIR, "--yes", "--restore-point", "drop").exit_code == 0
    lose_database(command)
    pair = adopted(command)
    assert (pair["state"], pair["newest"]) == ("Ready", "original")


def test_a_torn_original_is_adopted_torn(command: Command) -> None:
    command.fail_back()
    assert command("undo", PAIR, "--yes").exit_code == 0
    command.world.original.condition = Condition.TORN
    lose_database(command)
    assert adopted(command)["flag"] == {"condition": "torn", "view": None}


def test_a_failback_is_adopted_with_undo_as_its_way_out(command: Command) -> None:
    command.fail_back()
    content = dict(command.world.replica.disks)
    lose_database(command)
    pair = adopted(command)
    assert pair["state"] == "Needs operator"
    assert command("resume", PAIR).exit_code != 0
    done = command("undo", PAIR, "--yes")
    assert done.exit_code == 0, done.output
    assert command.json("status", PAIR)["state"] == "Failover"
    world = command.world
    assert (world.original.power, world.replica.power) == (Power.OFF, Power.RUNNING)
    assert world.replica.fence is None
    assert world.replica.snapshots == {}
    assert set(world.replica.disks) == set(content)
    command.fail_back()


def test_a_switchover_that_stopped_with_both_off_is_adopted_and_rolled_back(command: Command) -> None:
    command.fail_back()
    command.world.original.power = Power.OFF
    lose_database(command)
    pair = adopted(command)
    assert pair["operator"]["before"] == "Switching"  # type: ignore[index]
    assert command("undo", PAIR, "--yes").exit_code == 0
    assert command.world.replica.power is Power.RUNNING


def test_two_running_vms_are_not_adopted(command: Command) -> None:
    lose_database(command)
    command.world.check = lambda: None  # type: ignore[method-assign]  # the test breaks I1 itself
    command.world.original.power = Power.RUNNING
    assert "both VMs run" in refused(command)


def test_two_vms_that_are_off_are_not_adopted_for_nobody_knows_which_one_served(command: Command) -> None:
    lose_database(command)
    command.world.replica.power = Power.OFF
    assert "both VMs are off" in refused(command)


def test_agents_that_do_not_agree_are_not_believed(command: Command) -> None:
    name, told = command.world.told["dr", Side.REPLICA]
    other = replace(told.mapping, disks=told.mapping.disks[:1])
    command.world.told["dr", Side.REPLICA] = name, replace(told, mapping=other)
    lose_database(command)
    assert "do not agree" in refused(command)


def test_one_host_alone_is_not_enough(command: Command) -> None:
    lose_database(command)
    answer = command.json("adopt", "prod", "--yes", exit_code=1)
    assert "only one side is known" in answer["proposals"][0]["sentence"]


def test_adopt_asks_first(command: Command) -> None:
    lose_database(command)
    assert command("adopt", *HOSTS).exit_code == 2
    assert command.json("pairs")["pairs"] == []


def test_a_run_that_the_registry_knows_to_be_under_way_is_left_to_it(command: Command) -> None:
    command.begin()
    answer = command.json("adopt", *HOSTS, "--yes", exit_code=1)
    assert "failback resume" in answer["failed"][0]


def test_an_old_copy_of_the_database_is_brought_above_what_agents_have_seen(command: Command) -> None:
    command.world.epochs.update(prod=40, dr=40)
    codes = {each["code"] for each in command.json("doctor", exit_code=1)["differences"]}
    assert codes == {"epoch-ahead"}
    assert adopted(command)["epoch"] == 41
    assert command("doctor").exit_code == 0


def test_a_pair_that_agents_know_from_a_lost_registry_is_not_registered_over(command: Command) -> None:
    command.fail_back()
    shutil.rmtree(command.config.state_dir)
    words = ("register", PAIR, "--original", "prod/web", "--replica", "dr/web")
    told = command.json(*words, exit_code=3)
    assert told["error"]["code"] == "known-pair"
    assert "failback adopt dr prod" in told["error"]["sentence"]


def test_a_forgotten_pair_is_not_offered_again(command: Command) -> None:
    command.fail_back()
    assert command("undo", PAIR, "--yes").exit_code == 0
    assert command("forget", PAIR, "--yes").exit_code == 0
    assert command.json("adopt", *HOSTS, "--yes")["proposals"] == []
