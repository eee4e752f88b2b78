"""``python -m tests.simulation --seed N -v``: play one seed, or many."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tests.simulation.story import Result, play


def main() -> int:
    """Play the seeds; 1 where one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="play this one alone")
    parser.add_argument("--seeds", type=int, default=100, help="how many to play")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--faults", type=int, help="how many faults strike; by default as each seed says")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the log of events")
    parser.add_argument("--processes", type=int, default=2)
    words = parser.parse_args()
    if words.seed is not None:
        result = play(words.seed, faults=words.faults, echo=words.verbose)
        return _tell(result)
    seeds = range(words.first, words.first + words.seeds)
    began = time.monotonic()
    failed = 0
    states: dict[str, int] = {}
    with ProcessPoolExecutor(words.processes) as pool:
        for result in pool.map(partial(play, faults=words.faults), seeds, chunksize=8):
            states[result.state] = states.get(result.state, 0) + 1
            if result.violation is not None:
                failed += _tell(result)
    took_s = time.monotonic() - began
    ends = ", ".join(f"{count} {state or 'failed'}" for state, count in sorted(states.items()))
    print(f"{len(seeds)} seeds in {took_s:.0f} s: {ends}")
    return 1 if failed else 0


def _tell(result: Result) -> int:
    if result.violation is None:
        print(f"seed {result.seed}: {result.state} after {result.events} events")
        return 0
    print(f"seed {result.seed}: {result.violation}")
    print(f"    again: python -m tests.simulation --seed {result.seed} -v")
    return 1


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of strings are iterated in the order of their hashes: the same in every process, or no seed replays.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.simulation", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    sys.exit(main())
