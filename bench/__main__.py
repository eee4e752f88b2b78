"""``python -m bench NAME [--json]``: run one benchmark; the last line of output is its JSON object with ``--json``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import images, machine
from bench.farm import open_farm
from tests.lab import reaper
from tests.lab.guest import build_guest

REPOSITORY = Path(__file__).parents[1]
TARGET_OF_COMPARE = 0.20


def compare_vs_rsync(folder: Path, size_bytes: int, rounds: int) -> dict[str, object]:
    """Full comparison of a raw image of which 3% of the data blocks changed ÷ rsync of the same, both flushed.

    The page cache is warm. Rounds are interleaved; before each the same places get new bytes, on both sources.
    """
    ours, theirs = folder / "ours.raw", folder / "rsync.raw"
    source, peer = folder / "source.raw", folder / "rsync-source.raw"
    data_bytes = images.make(source, size_bytes, seed=1)
    for copy in (ours, theirs, peer):
        shutil.copyfile(source, copy)
    runs: list[dict[str, float]] = []
    changed_bytes = 0
    with open_farm(folder / "farm", build_guest(REPOSITORY / ".lab"), ours, source) as farm:
        for number in range(rounds + 1):
            for image in (source, peer):
                changed_bytes = images.change(image, share=0.03, seed=number, data_seed=1)
            os.sync()
            pass_s, report = farm.pass_s()
            started = time.monotonic()
            # --ignore-times: a change within the second of the last run would be skipped by size and time alone.
            words = ["rsync", "--inplace", "--no-whole-file", "--fsync", "--ignore-times", str(peer), str(theirs)]
            subprocess.run(words, check=True)
            rsync_s = time.monotonic() - started
            sent = sum(disk["sent_bytes"] for disk in report["disks"])
            if number:  # the first round warms caches and is not counted
                runs.append({"failback_s": pass_s, "rsync_s": rsync_s, "sent_bytes": sent})
            print(f"round {number}: failback {pass_s:.2f} s, rsync {rsync_s:.2f} s", file=sys.stderr)
    same = subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), str(ours)], check=False)
    if same.returncode:
        raise SystemExit("the target does not equal the source: the numbers mean nothing")
    ratio = statistics.median(run["failback_s"] / run["rsync_s"] for run in runs)
    return {
        "ratio": round(ratio, 3),
        "target": TARGET_OF_COMPARE,
        "met": ratio <= TARGET_OF_COMPARE,
        "size_bytes": size_bytes,
        "data_bytes": data_bytes,
        "changed_bytes": changed_bytes,
        "page_cache": "warm",
        "runs": runs,
    }


BENCHMARKS: dict[str, Callable[[Path, int, int], dict[str, object]]] = {"compare-vs-rsync": compare_vs_rsync}


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, last")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size-gib", type=float, default=8.0)
    arguments = parser.parse_args()
    reaper.become_child_of_reaper()  # libvirt waits long for a QEMU that nobody reaps
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=os.environ.get("TMPDIR")))
    try:
        (folder / "farm").mkdir()
        size_bytes = int(arguments.size_gib * 1024) // 16 * (16 << 20)
        result = BENCHMARKS[arguments.name](folder, size_bytes, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    result = {"name": arguments.name, **result, "machine": machine.describe()}
    if arguments.json:
        print(json.dumps(result))
    else:
        print(
            f"{arguments.name}: {result['ratio']} (target {result['target']}, {'met' if result['met'] else 'missed'})"
        )


if __name__ == "__main__":
    main()
