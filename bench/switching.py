"""The switchover: how long a tracked last pass takes, how long nobody is served, and how well that was foretold."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import images
from bench.benchmark import SEED, Settings, describe_image, make_image
from bench.farm import Farm, PairSpec, Shape, open_farm
from bench.measure import Result, Run, median_of, ratio_of_medians, with_ratios
from bench.network import GIGABIT, open_link
from bench.placement import Image, as_qcow2, stretched

RUN_BYTES = 1 << 20
LAST_MINUTE_BYTES = 64 << 20
LARGE_DELTA_BYTES = 1 << 30
HUGE_BYTES, SMALL_BYTES = 1 << 40, 8 << 30
SPARSE_DATA_GIB = 0.5
READY = "Ready to switch"
RUN_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Switchover:
    """One switchover as the journal tells it, in seconds.

    Attributes:
        last_pass_s: the last pass alone.
        downtime_s: from the replica off to the original on: without the guest's shutdown and its boot.
        predicted_s: that same time as it was foretold when the switchover began.
        rungs: evidence used for each disk in the last pass.
    """

    last_pass_s: float
    downtime_s: float
    predicted_s: float
    rungs: tuple[str, ...]


def switch_after(farm: Farm, pair: str, change: Callable[[], None], folder: Path) -> Switchover:
    """Bring a pair to *Ready to switch*, let `change` write to the replica, switch, and take it all back."""
    log = folder / "run.json"
    log.unlink(missing_ok=True)
    words = ("--switch", "manual", "--background-interval", "1h", "--no-audit", "--power-on")
    run = farm.coordinator.spawn("--json", "start", "--yes", "--foreground", *words, pair, log=log)
    try:
        _wait_until_ready(farm, pair, run, log)
        change()
        farm.failback("switch", pair)
        run.wait(RUN_TIMEOUT_S)
    finally:
        if run.poll() is None:
            run.kill()
            run.wait()
    if run.returncode:
        raise SystemExit(f"the run ended with {run.returncode}: {log.read_text()}")
    found = _switchover(farm.failback("history", pair, "--report"))
    farm.failback("undo", "--yes", pair)
    return found


def _wait_until_ready(farm: Farm, pair: str, run: subprocess.Popen[bytes], log: Path) -> None:
    while run.poll() is None:
        if farm.failback("status", pair)["state"] == READY:
            return
    raise SystemExit(f"the run ended too soon: {log.read_text()}")


def _switchover(history: dict[str, Any]) -> Switchover:
    entries, report = history["entries"], history["report"]
    done = {entry["step"]: entry for entry in entries if entry["kind"] == "done" and entry["phase"] == "do"}
    foretold = [json.loads(e["result"]) for e in entries if e["kind"] == "note" and e["step"] == "predicted"]
    return Switchover(
        last_pass_s=float(done["last_pass"]["elapsed_s"]),
        downtime_s=done["original_on"]["at_s"] - done["replica_off"]["at_s"],
        predicted_s=float(foretold[-1]["fixed_s"]) + float(foretold[-1]["pass_s"]),
        rungs=tuple(disk["rung"] for disk in report["disks"] if disk["pass_name"] == "last_pass"),
    )


def _scattered(farm: Farm, pair: str, disks: list[int], total_bytes: int) -> None:
    """Write runs of 1 MiB that do not shrink at even distances over each disk (sizes in bytes), `total_bytes` in
    all, as a guest would."""
    count = total_bytes // RUN_BYTES // len(disks)
    content = farm.folder / "written"
    with farm.monitor(pair) as monitor:
        for number, size in enumerate(disks):
            stride = size // count // RUN_BYTES * RUN_BYTES
            for run in range(count):
                content.write_bytes(os.urandom(RUN_BYTES))
                monitor.write_file(number, run * stride, RUN_BYTES, content)


def tracked_scale(settings: Settings) -> Result:
    """A tracked last pass, 64 MiB changed in runs of 1 MiB: on a sparse disk of 1 TiB ÷ on one of 8 GiB."""
    plan = images.layout(settings.size_bytes(SPARSE_DATA_GIB), seed=SEED, free_share=0.0)
    specs: list[PairSpec] = []
    sizes = {"huge": HUGE_BYTES, "small": SMALL_BYTES}
    for name, size in sizes.items():
        raw = stretched(settings.folder / f"{name}.raw", size, plan)
        source = as_qcow2(raw, settings.folder / f"{name}.qcow2")
        raw.path.unlink()
        specs.append(PairSpec(name, (source.copy_to(settings.folder / f"{name}-ours.qcow2"),), (source,)))
    runs: list[Run] = []
    with open_farm(settings.folder / "farm", specs, Shape(running=True)) as farm:
        for number in settings.count():
            run: Run = {}
            for name, size in sizes.items():
                change = partial(_scattered, farm, name, [size], LAST_MINUTE_BYTES)
                found = switch_after(farm, name, change, settings.folder)
                run[f"{name}_s"], run[f"{name}_rung"] = found.last_pass_s, ", ".join(found.rungs)
            if number:
                runs.append(run)
    return Result(
        ratio=ratio_of_medians(runs, "huge_s", "small_s"),
        runs=with_ratios(runs, "huge_s", "small_s"),
        page_cache="as it comes: what the guest just wrote is cached",
        facts={"huge_bytes": HUGE_BYTES, "small_bytes": SMALL_BYTES, "changed_bytes": LAST_MINUTE_BYTES},
    )


def _two_disks(settings: Settings) -> tuple[PairSpec, list[Image]]:
    sources, targets = [], []
    for number in range(2):
        raw = make_image(settings.folder / f"disk{number}.raw", settings.size_bytes(8))
        sources.append(as_qcow2(raw, settings.folder / f"disk{number}.qcow2"))
        raw.path.unlink()
        targets.append(sources[-1].copy_to(settings.folder / f"ours{number}.qcow2"))
    return PairSpec("bench", tuple(targets), tuple(sources)), sources


def _rounds(settings: Settings, farm: Farm, spec: PairSpec, changed_bytes: int) -> list[Run]:
    sizes = [image.plan.size_bytes for image in spec.replicas]
    runs: list[Run] = []
    for number in settings.count():
        found = switch_after(
            farm, spec.name, lambda: _scattered(farm, spec.name, sizes, changed_bytes), settings.folder
        )
        if number:
            runs.append(
                {
                    "downtime_s": found.downtime_s,
                    "predicted_s": found.predicted_s,
                    "last_pass_s": found.last_pass_s,
                    "rungs": ", ".join(found.rungs),
                    "changed_bytes": changed_bytes,
                }
            )
    return runs


def downtime(settings: Settings) -> Result:
    """Seconds from the replica off to the original on: two qcow2 disks, 64 MiB of last-minute changes."""
    spec, sources = _two_disks(settings)
    with open_farm(settings.folder / "farm", [spec], Shape(running=True)) as farm:
        runs = _rounds(settings, farm, spec, LAST_MINUTE_BYTES)
    return Result(
        ratio=median_of(runs, "downtime_s"),
        runs=runs,
        unit="s",
        page_cache="as it comes: what the guest just wrote is cached",
        facts={**describe_image(sources[0]), "disks": len(sources)},
    )


def prediction(settings: Settings) -> Result:
    """The downtime that was foretold ÷ the one that came: 64 MiB at once, and 1 GiB over a link of 1 Gbit/s.

    What counts is the worst round: its distance from the truth as a share of it; 0 where that is within half a second.
    """
    spec, sources = _two_disks(settings)
    with open_farm(settings.folder / "near", [spec], Shape(running=True)) as farm:
        runs = _rounds(settings, farm, spec, LAST_MINUTE_BYTES)
    with (
        open_link(GIGABIT) as link,
        open_farm(settings.folder / "far", [spec], Shape(running=True, link=link)) as farm,
    ):
        runs += _rounds(settings, farm, spec, LARGE_DELTA_BYTES)
    for run in runs:
        run["error_share"] = round(off_by(float(str(run["predicted_s"])), float(str(run["downtime_s"]))), 4)
    return Result(
        ratio=max(float(str(run["error_share"])) for run in runs),
        runs=runs,
        unit="share",
        page_cache="as it comes: what the guest just wrote is cached",
        facts={**describe_image(sources[0]), "disks": len(sources), "counted": "the worst round"},
    )


TOLERATED_S = 0.5


def off_by(predicted_s: float, measured_s: float) -> float:
    """How far a prediction was off, as a share of what came; 0 where it was off by half a second at most."""
    error_s = abs(predicted_s - measured_s)
    return 0.0 if error_s <= TOLERATED_S else error_s / measured_s
