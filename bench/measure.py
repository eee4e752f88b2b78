"""Rounds, medians, quartiles: what turns seconds into one ratio with its reasons. Pure; no I/O, no clock."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

NOISY_SPREAD = 0.20
"""Quartiles of the limit further apart than this share of its median: the machine was not quiet enough."""

ERROR_CHARACTERS = 500

Better = Literal["lower", "higher"]
Run = dict[str, object]
"""One round's numbers by name, units last (``ours_s``, ``wire_bytes``); plain values for JSON."""


@dataclass(frozen=True, slots=True)
class Quartiles:
    """The three quartiles of one quantity over the rounds, in its own unit."""

    lower: float
    median: float
    upper: float

    @property
    def spread(self) -> float:
        """Distance of the outer quartiles as a share of the median; 0 where the median is 0."""
        return (self.upper - self.lower) / self.median if self.median else 0.0


def quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles of `values` (at least one), the ends included: of one value all three are that value.

    Raises:
        ValueError: there is none.
    """
    if not values:
        raise ValueError("no round was counted: ask for at least one")
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(lower, median, upper)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a ratio must be.

    Attributes:
        value: the bound itself counts as met.
        better: ``lower`` when the ratio may be at most `value`, ``higher`` when it must be at least that.
    """

    value: float
    better: Better = "lower"

    def met_by(self, ratio: float) -> bool:
        """Whether `ratio` meets it."""
        return ratio <= self.value if self.better == "lower" else ratio >= self.value

    def __str__(self) -> str:
        return f"{'≤' if self.better == 'lower' else '≥'} {self.value:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one benchmark found.

    Attributes:
        ratio: the measure: a ratio of medians, or a quantity in `unit`.
        runs: every counted round.
        noisy: whether the limit that was measured beside it moved more than `NOISY_SPREAD`; None without a limit.
        page_cache: its state while measuring: ``warm``, ``cold`` or ``does not matter``, with the how.
        facts: what else the reader must know; plain values for JSON.
    """

    ratio: float
    runs: Sequence[Run]
    page_cache: str
    noisy: bool | None = None
    unit: str = "ratio"
    facts: Mapping[str, object] = field(default_factory=dict)


def column(runs: Sequence[Run], name: str) -> list[float]:
    """The quantity `name` of every round."""
    return [float(str(run[name])) for run in runs]


def median_of(runs: Sequence[Run], name: str) -> float:
    """Median of the quantity `name` over the rounds."""
    return quartiles(column(runs, name)).median


def ratio_of_medians(runs: Sequence[Run], above: str, below: str) -> float:
    """Median of `above` ÷ median of `below`.

    Raises:
        ValueError: there are no rounds, or the divisor's median is 0.
    """
    divisor = median_of(runs, below)
    if divisor == 0:
        raise ValueError(f"the median of {below} is 0: nothing was measured")
    return median_of(runs, above) / divisor


def with_ratios(runs: Sequence[Run], above: str, below: str) -> list[Run]:
    """The rounds, each with its own ``ratio``, so that a reader sees how far they scatter."""
    pairs = zip(runs, column(runs, above), column(runs, below), strict=True)
    return [{**run, "ratio": round(a / b, 4) if b else None} for run, a, b in pairs]


def is_noisy(limit: Sequence[float]) -> bool:
    """Whether the limit, measured in the same rounds, moved too much for its ratio to be believed."""
    return quartiles(limit).spread > NOISY_SPREAD


def failed(name: str, target: Target | None, error: BaseException) -> dict[str, object]:
    """The JSON object of a benchmark that came to no result: no ratio, its target missed, and why."""
    aimed_at = None if target is None else target.value
    found: dict[str, object] = {"name": name, "ratio": None, "target": aimed_at, "met": False, "runs": []}
    return {**found, "error": (str(error) or type(error).__name__)[:ERROR_CHARACTERS]}


def judged(name: str, target: Target | None, result: Result, machine: Mapping[str, object]) -> dict[str, object]:
    """The one JSON object of a benchmark. `target` and `met` are null for a measure that has none."""
    found: dict[str, object] = {
        "name": name,
        "ratio": round(result.ratio, 4),
        "unit": result.unit,
        "target": None if target is None else target.value,
        "better": None if target is None else target.better,
        "met": None if target is None else target.met_by(result.ratio),
        "rounds": len(result.runs),
        "page_cache": result.page_cache,
    }
    if result.noisy is not None:
        found["noisy"] = result.noisy
    return {**found, **result.facts, "runs": list(result.runs), "machine": dict(machine)}
