"""``python -m bench NAME [--json]``: run one benchmark; with ``--json`` the last line of output is its JSON object."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import machine
from bench.benchmark import Settings
from bench.catalog import BENCHMARKS
from bench.farm import say
from bench.measure import failed, judged
from tests.lab import reaper


def main() -> None:
    """Parse the command line, run, print."""
    arguments = _parser().parse_args()
    if arguments.list:
        for benchmark in BENCHMARKS.values():
            print(f"{benchmark.name:20} {benchmark.target or '-'!s:8} {benchmark.summary}")
        return
    benchmark = BENCHMARKS[arguments.name]
    if benchmark.needs_root and os.geteuid():
        raise SystemExit(f"{benchmark.name} makes network namespaces: run it as root")
    # libvirt waits long for a QEMU that nobody reaps; the reaper also ends whatever is left behind.
    reaper.become_child_of_reaper()
    signal.signal(signal.SIGTERM, _interrupt)
    with own_folder() as folder:
        settings = Settings(folder, arguments.size_gib, arguments.rounds, arguments.dense_gib)
        try:
            result = benchmark.run(settings)
        except (Exception, SystemExit) as error:
            if arguments.json:
                print(json.dumps(failed(benchmark.name, benchmark.target, error)))
            raise
    found = judged(benchmark.name, benchmark.target, result, machine.describe())
    if arguments.json:
        print(json.dumps(found))
        return
    verdict = "" if benchmark.target is None else f" (target {benchmark.target}, {'met' if found['met'] else 'missed'})"
    print(f"{benchmark.name}: {found['ratio']} {result.unit}{verdict}{', noisy' if result.noisy else ''}")


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A folder in ``$TMPDIR`` that goes away whatever happens in it."""
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=os.environ.get("TMPDIR")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            say(f"{folder} could not be removed whole: remove it by hand")


def _interrupt(number: int, _frame: object) -> None:
    """SIGTERM ends a benchmark as Ctrl-C does: everything is taken down on the way out."""
    raise KeyboardInterrupt(f"signal {number}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(BENCHMARKS), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names, their targets and what they measure")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, last")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default 7)")
    parser.add_argument("--size-gib", type=float, help="size of the disks instead of the benchmark's own choice")
    parser.add_argument("--dense-gib", type=float, default=1024.0, help="memory: size of the dense synthetic disk")
    return parser


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
