"""How many connections one disk gets, by values."""

from __future__ import annotations

import pytest

from protocol.lanes import lanes_wanted


@pytest.mark.parametrize(("cores", "lanes"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (64, 4)])
def test_on_a_short_link_the_cores_decide(cores: int, lanes: int) -> None:
    assert lanes_wanted(0.0002, cores, most=16) == lanes


@pytest.mark.parametrize(("rtt_s", "lanes"), [(0.0, 1), (0.02, 1), (0.04, 2), (0.1, 5), (0.2, 9)])
def test_on_a_long_link_it_takes_more_to_have_a_gigabit_on_its_way(rtt_s: float, lanes: int) -> None:
    assert lanes_wanted(rtt_s, cores=2, most=16) == lanes


def test_distance_and_cores_do_not_add_up() -> None:
    assert lanes_wanted(0.04, cores=8, most=16) == 4
    assert lanes_wanted(0.1, cores=8, most=16) == 5


def test_the_budget_is_kept_and_one_is_always_given() -> None:
    assert lanes_wanted(0.3, cores=64, most=3) == 3
    assert lanes_wanted(0.3, cores=64, most=1) == 1
    assert lanes_wanted(0.0, cores=1, most=1) == 1
