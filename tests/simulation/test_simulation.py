"""Whole failbacks in one process, under faults, by seed. More of them: ``make soak SEEDS=n``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from coordinator.model import State
from tests.simulation.story import play

FEW = 24
"""Seeds that run with all other tests; CI plays 500 by ``make soak``."""


def test_without_faults_every_run_ends_as_it_was_meant_to() -> None:
    for seed in range(6):
        result = play(seed, faults=0)
        assert result.violation is None
        assert not any(" refuses: " in line for line in result.log), (
            "an agent refused something though nothing went wrong"
        )
        assert result.state in (State.READY.value, State.FAILOVER.value)


@pytest.mark.parametrize("first", range(0, FEW, 8))
def test_whatever_dies_the_pair_comes_to_rest_and_nothing_is_lost(first: int) -> None:
    for seed in range(first, first + 8):
        assert play(seed).violation is None, f"python -m tests.simulation --seed {seed} -v"


def test_a_seed_plays_the_same_in_every_process() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seed", "3", "-v"]
    logs = [
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "TZ": zone}).stdout
        for zone in ("UTC", "Asia/Tokyo")
    ]
    assert logs[0] == logs[1]
    assert b"!!!" in logs[0], "a seed without a fault shows little"


def test_another_seed_is_another_story() -> None:
    assert play(1).log != play(2).log
