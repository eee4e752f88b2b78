"""``python -m bench.report``: run benchmarks one after the other; write a JSON and a Markdown report with plots.

Every benchmark is a process of its own, so that none inherits another's memory or leftovers, and a failure of one is a
line in the report and not its end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench import machine, plots
from bench.catalog import BENCHMARKS
from bench.farm import say

REPOSITORY = Path(__file__).parents[1]
DEFAULT_FOLDER = REPOSITORY / "bench/report"
TAKES_DOWN_WITHIN_S = 60.0
Found = dict[str, object]


def run_one(name: str, options: Sequence[str]) -> Found:
    """One benchmark's JSON object, or one with ``error`` where it failed. Progress goes to standard error."""
    started = time.monotonic()
    words = [sys.executable, "-m", "bench", name, "--json", *options]
    with subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            process.wait(TAKES_DOWN_WITHIN_S)  # it was told too, and has guests and files to take down
            raise
    seconds = round(time.monotonic() - started, 1)
    lines = output.splitlines()
    if not lines:
        return {"name": name, "error": f"ended with exit code {process.returncode}", "took_s": seconds}
    found: Found = json.loads(lines[-1])
    return {**found, "took_s": seconds}


def commit() -> str:
    """What is measured: the commit, and whether files differ from it."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(words, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def markdown(
    results: Sequence[Found], *, what: str, when: str, about: Mapping[str, object], plots: Sequence[str]
) -> str:
    """The report as a page: the table first, then each benchmark's rounds.

    Args:
        results: what `run_one` found. `what`: the commit; `when`: the time. `about`: the machine.
        plots: names of picture files beside the page.
    """
    lines = ["# Benchmarks", "", f"Commit {what}, {when}.", "", "Machine: " + _listed(about) + ".", ""]
    lines += [
        "| name | measured | target | met | noisy | rounds | took |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(found) for found in results]
    lines += ["", *(f"![{Path(name).stem}]({name})" for name in plots)]
    for found in results:
        lines += ["", f"## {found['name']}", "", *_details(found)]
    return "\n".join(lines) + "\n"


def _row(found: Found) -> str:
    if "error" in found:
        return f"| `{found['name']}` | failed, see below | | | | | {found['took_s']} s |"
    sign = {"lower": "≤ ", "higher": "≥ "}.get(str(found["better"]), "")
    met = "" if found["met"] is None else "yes" if found["met"] else "**no**"
    noisy = "" if "noisy" not in found else "yes" if found["noisy"] else "no"
    unit = "" if found["unit"] == "ratio" else f" {found['unit']}"
    target = "" if found["target"] is None else f"{sign}{found['target']}"
    measured = f"{found['ratio']}{unit}"
    return f"| `{found['name']}` | {measured} | {target} | {met} | {noisy} | {found['rounds']} | {found['took_s']} s |"


def _details(found: Found) -> list[str]:
    if "error" in found:
        return ["Failed:", "", "```text", str(found["error"]), "```"]
    shown = {
        "name",
        "ratio",
        "unit",
        "target",
        "better",
        "met",
        "noisy",
        "rounds",
        "took_s",
        "runs",
        "machine",
        "stacks",
    }
    lines = [f"- {key}: {_plain(value)}" for key, value in found.items() if key not in shown]
    runs = found["runs"]
    assert isinstance(runs, list)
    if runs:
        columns = list(dict.fromkeys(key for run in runs for key in run))
        lines += ["", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(_plain(run.get(key, "")) for key in columns) + " |" for run in runs]
    stacks = found.get("stacks")
    if isinstance(stacks, dict):
        for side, tops in stacks.items():
            for kind, rows in tops.items():
                lines += ["", f"{side}, {kind}:", "", "```text", *rows, "```"]
    return lines


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return _listed(value) if isinstance(value, dict) else str(value)


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items())


def main() -> None:
    """Run what was asked for, all of it by default, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which (default: all)")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the report goes")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--size-gib", type=float)
    parser.add_argument("--dense-gib", type=float)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in BENCHMARKS]:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    options: list[str] = []
    for option in ("rounds", "size_gib", "dense_gib"):
        if (value := getattr(arguments, option)) is not None:
            options += [f"--{option.replace('_', '-')}", str(value)]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    what, when = commit(), datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    results: list[Found] = []
    for name in arguments.names or BENCHMARKS:
        say(f"== {name}")
        results.append(run_one(name, options))
        # After each, so that an interrupted run keeps what it has found.
        _write(arguments.folder, results, what, when)
    say(f"report: {arguments.folder / 'report.md'}")
    if any("error" in found for found in results):
        sys.exit(1)


def _write(folder: Path, results: Sequence[Found], what: str, when: str) -> None:
    about = machine.describe()
    whole = {"commit": what, "when": when, "machine": about, "results": list(results)}
    (folder / "report.json").write_text(json.dumps(whole, indent=1) + "\n")
    pictures = plots.draw(results, folder)
    (folder / "report.md").write_text(markdown(results, what=what, when=when, about=about, plots=pictures))


if __name__ == "__main__":
    main()
