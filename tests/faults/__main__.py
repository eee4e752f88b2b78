"""``python -m tests.faults [WORD …]``: the matrix, or the cells whose name has each of those words.

Without words everything is run, on several rigs at once, and docs/FAULTS.md is written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults import matrix, report
from tests.faults.cells import Cell, Outcome
from tests.faults.rig import open_rig
from tests.lab import reaper
from tests.lab.leftovers import Leftovers

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / ".lab/faults.jsonl"
"""A line of JSON for each cell of the latest run of everything."""


def work(wanted: Sequence[Cell], results: Path | None, until_s: float) -> bool:
    """Go through them on one rig; append each result as a line to the file. Returns whether all are green.

    No cell begins after `until_s` (monotonic time).
    """
    folder = Path(tempfile.mkdtemp(prefix=Leftovers.FOLDER_PREFIX, dir="/tmp"))
    folder.chmod(0o755)
    red = 0

    def tell(outcome: Outcome) -> bool:
        nonlocal red
        red += bool(outcome.error)
        mark = "RED  " if outcome.error else "green"
        print(f"{mark} {outcome.seconds:5.1f} s  {outcome.cell.name}: {'; '.join(outcome.happened)}", flush=True)
        if outcome.error:
            print(f"      {outcome.error}\n      saw: {outcome.saw}", flush=True)
        if results is not None:
            with results.open("a") as file:
                file.write(json.dumps(report.line_of(outcome)) + "\n")
        return time.monotonic() < until_s

    try:
        with open_rig(folder, REPOSITORY / ".lab") as rig:
            matrix.go_through(rig, wanted, tell)
    finally:
        shutil.rmtree(folder)
    return red == 0


def main() -> int:
    """The command; 1: some cell is red or was not come to."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=2, help="rigs at once")
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="no cell begins later")
    parser.add_argument("--list", action="store_true", help="only name the cells")
    parser.add_argument("--go-on", action="store_true", help="keep what was green in the run before")
    parser.add_argument("--part", metavar="I/N", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wanted = tuple(matrix.by_name(arguments.words))
    if arguments.list:
        print(*(cell.name for cell in wanted), f"{len(wanted)} cells", sep="\n")
        return 0
    until_s = time.monotonic() + 60.0 * arguments.minutes
    if arguments.part:
        first, _, number = arguments.part.partition("/")
        done = {line["name"] for line in _results()}
        mine = [cell for cell in matrix.mixed(wanted)[int(first) :: int(number)] if cell.name not in done]
        reaper.become_child_of_reaper()
        return 0 if work(mine, RESULTS, until_s) else 1
    if arguments.words:
        reaper.become_child_of_reaper()
        return 0 if work(wanted, None, until_s) else 1
    kept = [line for line in _results() if not line["error"]] if arguments.go_on else []
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return run_all(wanted, arguments.jobs, arguments.minutes)


def _results() -> list[dict[str, Any]]:
    """What is kept of the latest run of everything."""
    return whole_lines(RESULTS.read_text()) if RESULTS.exists() else []


def whole_lines(text: str) -> list[dict[str, Any]]:
    """The results in a file of them. A run that was killed may leave half a line at the end: that cell is run again.

    Raises:
        ValueError: another line is not JSON.
    """
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run_all(wanted: Sequence[Cell], jobs: int, minutes: float) -> int:
    """Every cell, on `jobs` rigs at once; writes the document."""
    words = [sys.executable, "-m", "tests.faults", "--minutes", str(minutes), "--part"]
    rigs = [subprocess.Popen([*words, f"{number}/{jobs}"], cwd=REPOSITORY) for number in range(jobs)]
    codes = [rig.wait() for rig in rigs]
    lines = _results()
    missing = {cell.name for cell in wanted} - {line["name"] for line in lines}
    report.write(REPOSITORY / "docs/FAULTS.md", lines, wanted)
    if missing:
        print(f"{len(missing)} cells were not come to: {', '.join(sorted(missing)[:5])} …")
    return 1 if any(codes) or missing or any(line["error"] for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
