"""Pictures of a report: how far each measure is from its target, how the rounds scatter, throughput by share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]
GOOD, BAD = "#2a7f62", "#b3402a"


def draw(results: Sequence[Found], folder: Path) -> list[str]:
    """Write PNG files into `folder`; returns their names: none where matplotlib is missing."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return []
    names: list[str] = []
    pictures: tuple[tuple[str, Callable[[Any, Sequence[Found]], bool]], ...] = (
        ("targets.png", _targets),
        ("rounds.png", _rounds),
        ("throughput.png", _throughput),
    )
    for name, picture in pictures:
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        if picture(axes, results):
            with warnings.catch_warnings(action="ignore"):  # a font without some sign is no reason to fail
                figure.savefig(folder / name, dpi=120)
            names.append(name)
        pyplot.close(figure)
    return names


def share_of_target(found: Found) -> float | None:
    """The measure as a share of its target, turned so that up to 1 is good; None without a target or a measure."""
    if "error" in found or found.get("target") is None:
        return None
    ratio, target = float(found["ratio"]), float(found["target"])
    if found["better"] == "higher":
        return target / ratio if ratio else None
    return ratio / target


def _targets(axes: Any, results: Sequence[Found]) -> bool:
    shares = {str(found["name"]): share for found in results if (share := share_of_target(found)) is not None}
    if not shares:
        return False
    names = list(reversed(shares))
    values = [shares[name] for name in names]
    axes.barh(names, values, color=[GOOD if value <= 1 else BAD for value in values])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("measure as a share of its target (up to 1: met)")
    return True


def _rounds(axes: Any, results: Sequence[Found]) -> bool:
    rows: dict[str, list[float]] = {}
    for found in results:
        if "error" in found or not found.get("ratio"):
            continue
        ratios = [float(run["ratio"]) / float(found["ratio"]) for run in found["runs"] if run.get("ratio")]
        if ratios:
            rows[str(found["name"])] = ratios
    if not rows:
        return False
    for name in reversed(rows):
        axes.plot(rows[name], [name] * len(rows[name]), "o", color="#31589c", alpha=0.6)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("each round's ratio ÷ the ratio of medians")
    return True


def _throughput(axes: Any, results: Sequence[Found]) -> bool:
    found = next((found for found in results if found.get("gb_per_s_by_share")), None)
    if found is None:
        return False
    by_share = {float(share) * 100: float(rate) for share, rate in found["gb_per_s_by_share"].items()}
    axes.plot(list(by_share), list(by_share.values()), "o-", color=GOOD)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(list(by_share), [f"{share:g}" for share in by_share])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("blocks changed, %")
    axes.set_ylabel("GB of disk per second")
    return True
