"""``profile``: where a comparison's time goes, in both agents: processor seconds, and a sampling profiler's stacks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench import pagecache
from bench.benchmark import TARGET_SHARE, Settings, describe_image
from bench.comparing import PAIR, raw_pair
from bench.farm import Farm, open_farm, say
from bench.measure import Result, Run, median_of
from bench.placement import assert_same
from bench.resident import tree

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SAMPLES_PER_S = 200
TOP = 25
OURS = ("agent/", "protocol/", "bench/")
IDLE = (
    "WorkerThread._work ",
    "EpollIOManager.get_events ",
    "virEventRunDefaultImpl ",
    "_worker (concurrent/futures/thread.py",
    "TlsSocket._wait ",
)
"""Innermost frames of threads that have nothing to do. py-spy takes them for busy where it may not see system calls."""


def profile(settings: Settings) -> Result:
    """Processor seconds of both agents for each GB of disk, in a comparison with 3% changed, warm."""
    pair = raw_pair(settings, 8)
    size_gb = pair.source.plan.size_bytes / 1e9
    runs: list[Run] = []
    with open_farm(settings.folder / "farm", [pair.spec]) as farm, contextlib.ExitStack() as profilers:
        stacks: dict[str, Path] = {}
        for number in settings.count():
            pair.source.change(share=TARGET_SHARE, seed=number + 100)
            os.sync()
            pagecache.warm(pair.paths)
            before = _processor_s(farm)
            seconds = farm.run_pass(PAIR).seconds
            spent = {key: round(value - before[key], 3) for key, value in _processor_s(farm).items()}
            run: Run = {"pass_s": seconds, **spent, "processor_s_per_gb": sum(spent.values()) / size_gb}
            if number:
                runs.append(run)
            else:
                stacks = {side: settings.folder / f"{side}.stacks" for side in ("source", "target")}
                for side, path in stacks.items():
                    pid = (farm.source if side == "source" else farm.target).pid
                    profilers.enter_context(_recorded(pid, path))
        profilers.close()
        tops = {side: top_of(path.read_text().splitlines()) for side, path in stacks.items() if path.exists()}
    assert_same(pair.source, pair.ours)
    return Result(
        ratio=median_of(runs, "processor_s_per_gb"),
        runs=runs,
        unit="processor seconds per GB of disk",
        page_cache="warm: both images were read just before",
        facts={
            **describe_image(pair.source),
            "stacks_of": "samples from the order of each run to its undo, threads that had nothing to do left out",
            "stacks": tops,
        },
    )


def _processor_s(farm: Farm) -> dict[str, float]:
    """User and system seconds of either agent with its children, so far."""
    found: dict[str, float] = {}
    for side, agent in (("source", farm.source), ("target", farm.target)):
        user = system = 0
        for pid in tree(agent.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # proc_pid_stat(5): after the name, utime is the twelfth field, stime the thirteenth.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                user, system = user + int(fields[11]), system + int(fields[12])
        found[f"{side}_user_s"] = user / TICKS_PER_S
        found[f"{side}_system_s"] = system / TICKS_PER_S
    return found


@contextlib.contextmanager
def _recorded(pid: int, path: Path) -> Iterator[None]:
    """py-spy on a process, its collapsed stacks in `path` at the end; nothing happens where py-spy is missing."""
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        say("py-spy is not installed (pip install '.[bench]'): processor seconds only")
        yield
        return
    words = [program, "record", "--pid", str(pid), "--format", "raw", "--output", str(path)]
    words += ["--rate", str(SAMPLES_PER_S), "--duration", "unlimited", "--threads"]
    recorder = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        recorder.send_signal(signal.SIGINT)
        recorder.wait(60)


def top_of(lines: Iterable[str]) -> dict[str, list[str]]:
    """The most frequent of collapsed stacks (``frame;frame;frame count``), as shares.

    Returns:
        Stacks of threads with nothing to do are left out first.
        ``self``: innermost frames, whatever they belong to. ``ours``: the innermost frame of ours of each stack, so
        that the time of what a line calls is that line's. Frames without a share of 0.5% are left out.
    """
    innermost: Counter[str] = Counter()
    ours: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        if frames[-1].startswith(IDLE):
            continue
        innermost[frames[-1]] += int(count)
        own = (frame for frame in reversed(frames) if any(f"({place}" in frame for place in OURS))
        ours[next(own, "(outside)")] += int(count)
    total = sum(innermost.values())
    return {
        name: [f"{share:5.1%} {frame}" for frame, n in counts.most_common(TOP) if (share := n / total) >= 0.005]
        for name, counts in (("self", innermost), ("ours", ours))
    }
