"""What background passes cost a guest that writes: QEMU on one processor, both agents on the other."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from bench.benchmark import Settings, describe_image, random_image
from bench.farm import Farm, PairSpec, Shape, Writer, open_farm, say
from bench.measure import Result, Run, median_of
from bench.placement import as_qcow2
from tests.lab import console
from tests.lab.embed import guests

INTERVALS = 10
INTERVAL_S = 6.0
PAIR = "bench"
READY = "Ready to switch"


def guest_impact(settings: Settings) -> Result:
    """A guest's writes per second while passes come every few seconds ÷ without passes, at half its greatest rate."""
    raw = random_image(settings.folder / "disk.raw", settings.size_bytes(2))
    source = as_qcow2(raw, settings.folder / "disk.qcow2")
    ours = source.copy_to(settings.folder / "ours.qcow2")
    raw.path.unlink()
    spec = PairSpec(PAIR, (ours,), (source,))
    with open_farm(settings.folder / "full", [spec], Shape(running=True, writer=Writer("max"))) as farm:
        _pin(farm)
        console.wait_for_writes(_log(farm), "vda", 1)
        greatest = _writes_per_s(farm, INTERVAL_S * 2)
    say(f"the guest writes {greatest:.1f} records a second at most")
    # A pause as long as a write takes makes half of the greatest rate.
    with open_farm(settings.folder / "half", [spec], Shape(running=True, writer=Writer(greatest))) as farm:
        _pin(farm)
        console.wait_for_writes(_log(farm), "vda", 1)
        runs = [_round(farm, settings.folder, number) for number in settings.count()][1:]
    return Result(
        ratio=median_of(runs, "ratio"),
        runs=runs,
        page_cache="as it comes",
        facts={**describe_image(source), "greatest_writes_per_s": greatest, "interval_s": INTERVAL_S},
    )


def _round(farm: Farm, folder: Path, number: int) -> Run:
    seconds = INTERVALS * INTERVAL_S
    without = _writes_per_s(farm, seconds)
    log = folder / f"run{number}.json"
    words = ("--switch", "manual", "--background-interval", f"{INTERVAL_S:.0f}s", "--no-audit", "--no-power-on")
    run = farm.coordinator.spawn("--json", "start", "--yes", "--foreground", *words, PAIR, log=log)
    try:
        while farm.failback("status", PAIR)["state"] != READY:
            if run.poll() is not None:
                raise SystemExit(f"the run ended too soon: {log.read_text()}")
        passes = _passes(farm)
        during = _writes_per_s(farm, seconds)
        passes = _passes(farm) - passes
        farm.failback("cancel", PAIR)
        run.wait(120)
    finally:
        if run.poll() is None:
            run.kill()
            run.wait()
    return {"without_per_s": without, "during_per_s": during, "passes": passes, "ratio": during / without}


def _passes(farm: Farm) -> int:
    """Passes that are complete."""
    entries = farm.failback("history", PAIR)["entries"]
    return sum(entry["kind"] == "done" and "pass" in entry["step"] and entry["phase"] == "do" for entry in entries)


def _writes_per_s(farm: Farm, seconds: float) -> float:
    """Records that the guest made durable in a second, over that time."""
    log = _log(farm)
    first, started = console.wrote(log)["vda"], time.monotonic()
    time.sleep(seconds)
    return (console.wrote(log)["vda"] - first) / (time.monotonic() - started)


def _log(farm: Farm) -> Path:
    return farm.folder / "dr" / f"{PAIR}.console"


def _pin(farm: Farm) -> None:
    """QEMU to one processor, both agents to another."""
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        raise SystemExit("guest-impact needs two processors")
    for pid in guests(farm.folder / "dr"):
        _pin_all(pid, processors[0])
    for agent in (farm.source, farm.target):
        _pin_all(agent.pid, processors[1])


def _pin_all(pid: int, processor: int) -> None:
    subprocess.run(["taskset", "-a", "-c", "-p", str(processor), str(pid)], check=True, capture_output=True)
