"""The benchmarks' arithmetic: what a ratio, a noisy limit and a met target are."""

from __future__ import annotations

import json

import pytest

from bench.measure import (
    Quartiles,
    Result,
    Run,
    Target,
    failed,
    is_noisy,
    judged,
    quartiles,
    ratio_of_medians,
    with_ratios,
)


def test_quartiles_include_the_ends() -> None:
    assert quartiles([5, 1, 3, 2, 4]) == Quartiles(2, 3, 4)


def test_one_round_is_its_own_quartiles() -> None:
    assert quartiles([2.5]) == Quartiles(2.5, 2.5, 2.5)


def test_no_round_is_refused() -> None:
    with pytest.raises(ValueError, match="no round was counted"):
        quartiles([])


def test_ratio_is_of_medians_and_not_the_median_of_ratios() -> None:
    runs: list[Run] = [{"ours_s": 1, "peer_s": 10}, {"ours_s": 2, "peer_s": 2}, {"ours_s": 3, "peer_s": 4}]
    assert ratio_of_medians(runs, "ours_s", "peer_s") == 0.5
    assert [run["ratio"] for run in with_ratios(runs, "ours_s", "peer_s")] == [0.1, 1.0, 0.75]


def test_divisor_without_a_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="limit_s is 0"):
        ratio_of_medians([{"ours_s": 1, "limit_s": 0}], "ours_s", "limit_s")


def test_limit_is_noisy_when_its_quartiles_are_more_than_a_fifth_apart() -> None:
    assert not is_noisy([0.9, 0.95, 1.0, 1.05, 1.1])
    assert is_noisy([0.5, 0.8, 1.0, 1.2, 1.5])


@pytest.mark.parametrize(
    ("target", "ratio", "met"),
    [
        (Target(value=0.2), 0.2, True),
        (Target(value=0.2), 0.201, False),
        (Target(value=0.9, better="higher"), 0.9, True),
        (Target(value=0.9, better="higher"), 0.899, False),
    ],
)
def test_target_is_met_up_to_its_bound(target: Target, ratio: float, met: bool) -> None:
    assert target.met_by(ratio) is met


def test_object_of_a_benchmark_is_json_and_holds_what_is_promised() -> None:
    result = Result(ratio=0.123456, runs=[{"ours_s": 1.0}], page_cache="warm", noisy=False, facts={"size_bytes": 1})
    found = json.loads(json.dumps(judged("name", Target(value=0.2), result, {"cores": 2})))
    assert {key: found[key] for key in ("name", "ratio", "target", "met", "noisy", "page_cache", "size_bytes")} == {
        "name": "name",
        "ratio": 0.1235,
        "target": 0.2,
        "met": True,
        "noisy": False,
        "page_cache": "warm",
        "size_bytes": 1,
    }
    assert found["runs"] == [{"ours_s": 1.0}]
    assert found["machine"] == {"cores": 2}


def test_measure_without_target_is_neither_met_nor_missed() -> None:
    found = judged("name", None, Result(ratio=3, runs=[], page_cache="cold"), {})
    assert found["target"] is None
    assert found["met"] is None
    assert "noisy" not in found


def test_failure_is_a_missed_target_with_its_reason() -> None:
    found = failed("name", Target(value=0.2), SystemExit("the target does not equal the source"))
    assert found["met"] is False
    assert found["ratio"] is None
    assert found["error"] == "the target does not equal the source"
