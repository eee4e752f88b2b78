"""Runs of a batch: what is wrong with them, and how they are joined."""

from __future__ import annotations

import pytest

from agent.disk.runs import joined, problem_of


def test_a_batch_that_rises_and_fits_is_fine() -> None:
    assert problem_of([(0, 10), (10, 0), (10, 5), (100, 28)], 128, 43) is None
    assert problem_of([], 0, 0) is None


@pytest.mark.parametrize(
    ("runs", "buffer_bytes", "about"),
    [([(0, 1), (128, 1)], 2, (128, 1)), ([(5, 5), (9, 1)], 6, (9, 1)), ([(0, 4)], 3, (0, 4)), ([(-1, 1)], 1, (-1, 1))],
)
def test_the_run_that_is_wrong_is_named(runs: list[tuple[int, int]], buffer_bytes: int, about: tuple[int, int]) -> None:
    found = problem_of(runs, 128, buffer_bytes)
    assert found is not None
    assert found[1] == about


def test_adjoining_runs_become_one_and_empty_ones_disappear() -> None:
    assert list(joined([(0, 4), (4, 0), (4, 4), (9, 1), (10, 0), (20, 0), (30, 2)])) == [(0, 8), (9, 1), (30, 2)]
    assert list(joined([(0, 0)])) == []
    assert list(joined([])) == []
