"""``failback limit`` and the limits of ``start``: how a rate is written, what is shown, what is refused."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from coordinator.cli.parameters import RATE
from coordinator.errors import ExitCode
from coordinator.model import Rate
from tests.unit.cli_house import PAIR, Command


@pytest.fixture
def taken_over(memory_folder: Path) -> Command:
    command = Command(memory_folder)
    command.register()
    return command


@pytest.mark.parametrize(
    ("text", "bytes_s"),
    [
        ("125MB", 125_000_000),
        ("125MB/s", 125_000_000),
        ("125 MB/s", 125_000_000),
        ("119MiB", 119 << 20),
        ("1Gbit", 125_000_000),
        ("800Mbit/s", 100_000_000),
        ("2.5Gbit", 312_500_000),
        ("250000000", 250_000_000),
        ("250000000B", 250_000_000),
        ("1000000bit", 125_000),
        ("512kB", 512_000),
        ("512KiB", 512 << 10),
        ("1TB", 10**12),
        ("0.1MB", 100_000),
        ("none", None),
        ("None", None),
    ],
)
def test_a_rate_is_bytes_or_bits_a_second(text: str, bytes_s: int | None) -> None:
    assert RATE.convert(text, None, None) == Rate(bytes_s)


@pytest.mark.parametrize(
    "text",
    ["", "fast", "-5MB", "125Mb", "125mb", "1Gb", "125 000 000", "1e9", "MB", "5iB", "1.MB", "1Gbps", "٣MB", "9" * 40],
)
def test_what_is_no_rate_is_refused_with_what_is_accepted(text: str) -> None:
    with pytest.raises(click.BadParameter, match="125MB, 119MiB or 250000000, bits a second, as in 1Gbit") as caught:
        RATE.convert(text, None, None)
    assert repr(text) in caught.value.message


@pytest.mark.parametrize("text", ["0", "0MB", "0.0Gbit", "1", "125", "99999", "2TB", "999999999TB"])
def test_a_rate_of_nothing_next_to_nothing_or_beyond_all_networks_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="at least 100kB/s and at most 1TB/s"):
        RATE.convert(text, None, None)


def test_a_bad_rate_ends_in_one_sentence_before_anything_is_touched(taken_over: Command) -> None:
    for words in (("start", PAIR, "--yes", "--limit-read", "fast"), ("limit", PAIR, "--network", "0")):
        result = taken_over(*words)
        assert result.exit_code == ExitCode.USAGE
        assert result.stderr.count("\n") == 1
    assert taken_over.world.orders == []


def test_the_plan_shows_the_limits_and_how_to_lift_them(taken_over: Command) -> None:
    said = taken_over("plan", PAIR, "--limit-network", "1Gbit").stdout
    assert "Limits: network 119.2 MiB/s, reads none" in said
    assert "`failback limit web`" in said
    assert "Limits:" not in taken_over("plan", PAIR).stdout
    assert "Limits:" not in taken_over("plan", PAIR, "--limit-network", "none").stdout


def test_start_hands_the_limits_to_both_agents(taken_over: Command) -> None:
    taken_over.json("start", PAIR, "--yes", "--foreground", "--limit-network", "1Gbit", "--limit-read", "200MB")
    assert taken_over.world.limits == dict.fromkeys(("dr", "prod"), (125_000_000, 200_000_000))


def test_limit_without_options_shows_what_holds(taken_over: Command) -> None:
    assert taken_over.json("limit", PAIR) == {"verb": "limit", "pair": PAIR, "run": None, "limits": None}
    assert "No run of web is unfinished: `failback start web --limit-network" in taken_over("limit", PAIR).stdout
    taken_over.begin()
    value = taken_over.json("limit", PAIR)
    assert value["run"]
    assert value["limits"] == {"network_bytes_s": None, "read_bytes_s": None}


def test_limit_changes_what_is_named_and_status_and_history_tell(taken_over: Command) -> None:
    taken_over.begin()
    said = taken_over("limit", PAIR, "--network", "1Gbit").stdout
    assert said == (
        "The limits of web are: network 119.2 MiB/s, reads none; kept for every pass of this run that is still to "
        "come.\n"
    )
    value = taken_over.json("limit", PAIR, "--read", "200MB/s")
    assert value["limits"] == {"network_bytes_s": 125_000_000, "read_bytes_s": 200_000_000}
    assert value["at_work"] is False
    status = taken_over.json("status", PAIR)
    assert status["limits"] == value["limits"]
    assert "limit" in status["allowed"]
    assert "limit" not in status["next"]
    shown = taken_over("status", PAIR).stdout
    assert "network 119.2 MiB/s, reads 190.7 MiB/s" in shown
    assert "limits: network 119.2 MiB/s, reads 190.7 MiB/s" in taken_over("history", PAIR).stdout
    assert taken_over.json("limit", PAIR, "--network", "none")["limits"]["network_bytes_s"] is None


def test_status_speaks_of_limits_only_where_there_are_some(taken_over: Command) -> None:
    taken_over.begin()
    assert "Limits" not in taken_over("status", PAIR).stdout


def test_limit_in_the_wrong_state_is_refused_with_what_that_state_allows(taken_over: Command) -> None:
    value = taken_over.json("limit", PAIR, "--network", "none", exit_code=ExitCode.REFUSED)
    assert value["error"]["code"] == "wrong-state"
    assert "`failback start web`" in value["error"]["sentence"]


def test_the_help_of_limit_says_how_a_rate_is_written(taken_over: Command) -> None:
    said = taken_over("limit", "--help").stdout
    for words in ("125MB", "119MiB", "1Gbit", "none", "--network RATE", "--read RATE"):
        assert words in said
