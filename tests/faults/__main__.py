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
from collections.abc import Sequence
from pathlib import Path

from tests.faults import matrix, report
from tests.faults.cells import Cell, Outcome
from tests.faults.rig import open_rig
from tests.lab import reaper
from tests.lab.leftovers import Leftovers

REPOSITORY = Path(__file__).parents[2]


def work(wanted: Sequence[Cell], results: Path | None) -> bool:
    """Go through them on one rig; append each result as a line to the file. Returns whether all are green."""
    folder = Path(tempfile.mkdtemp(prefix=Leftovers.FOLDER_PREFIX, dir="/tmp"))
    folder.chmod(0o755)
    red = 0

    def tell(outcome: Outcome) -> None:
        nonlocal red
        red += bool(outcome.error)
        mark = "RED  " if outcome.error else "green"
        print(f"{mark} {outcome.seconds:5.1f} s  {outcome.cell.name}: {'; '.join(outcome.happened)}", flush=True)
        if outcome.error:
            print(f"      {outcome.error}\n      saw: {outcome.saw}", flush=True)
        if results is not None:
            with results.open("a") as file:
                file.write(json.dumps(report.line_of(outcome)) + "\n")

    try:
        with open_rig(folder, REPOSITORY / ".lab") as rig:
            matrix.go_through(rig, wanted, tell)
    finally:
        shutil.rmtree(folder)
    return red == 0


def main() -> int:
    """The command; 1: some cell is red or missing."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--short", action="store_true", help="only what `make test` runs")
    parser.add_argument("--jobs", type=int, default=2, help="rigs at once")
    parser.add_argument("--list", action="store_true", help="only name the cells")
    parser.add_argument("--results", type=Path, help="append a line of JSON for each cell")
    parser.add_argument("--part", metavar="I/N", help="only each N-th cell from the I-th on")
    arguments = parser.parse_args()
    wanted = matrix.short() if arguments.short else tuple(matrix.by_name(arguments.words))
    if arguments.part:
        first, _, number = arguments.part.partition("/")
        wanted = wanted[int(first) :: int(number)]
    if arguments.list:
        print(*(cell.name for cell in wanted), f"{len(wanted)} cells", sep="\n")
        return 0
    whole = not (arguments.words or arguments.short or arguments.part)
    if not whole:
        reaper.become_child_of_reaper()
        return 0 if work(wanted, arguments.results) else 1
    return run_all(wanted, arguments.jobs)


def run_all(wanted: Sequence[Cell], jobs: int) -> int:
    """Every cell, on `jobs` rigs at once; writes the document."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.jsonl" for number in range(jobs)]
        words = [sys.executable, "-m", "tests.faults", "--part"]
        rigs = [
            subprocess.Popen([*words, f"{number}/{jobs}", "--results", str(file)], cwd=REPOSITORY)
            for number, file in enumerate(files)
        ]
        codes = [rig.wait() for rig in rigs]
        lines = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
    missing = {cell.name for cell in wanted} - {line["name"] for line in lines}
    report.write(REPOSITORY / "docs/FAULTS.md", lines, wanted)
    if missing:
        print(f"{len(missing)} cells were not come to: {', '.join(sorted(missing)[:5])} …")
    return 1 if any(codes) or missing else 0


if __name__ == "__main__":
    sys.exit(main())
