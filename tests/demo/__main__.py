"""``python -m tests.demo [--undo]``: what `make demo` runs. Exit code 0 only when every proof holds."""

from __future__ import annotations

import argparse
import sys

from tests.demo.folder import REPOSITORY, DemoBusy, RunFolder, open_folder
from tests.demo.story import ProofFailed, shown, tell
from tests.demo.terminal import CommandFailed, Interrupted, interruptible
from tests.lab import reaper
from tests.lab.agent_process import AgentError
from tests.lab.console import ConsoleTimeout
from tests.lab.embed_host import EmbedHostError
from tests.lab.guest import GuestError
from tests.lab.leftovers import Leftovers

FAILURES = (ProofFailed, CommandFailed, ConsoleTimeout, AgentError, EmbedHostError, GuestError, DemoBusy)


def run(*, undo: bool) -> int:
    """The exit code: 0, 1 when something failed, 128 and the signal's number when a signal ended it."""
    before = Leftovers.watch()
    code = 1
    try:
        with interruptible(), open_folder(REPOSITORY / "demo-run") as folder:
            code = _told(folder, undo=undo)
    except DemoBusy as error:
        print(f"demo: {error}", file=sys.stderr)
    left = before.found()
    if left:
        print("demo: left behind:\n  " + "\n  ".join(left), file=sys.stderr)
    return code or (1 if left else 0)


def _told(folder: RunFolder, *, undo: bool) -> int:
    place = shown(folder.real)
    try:
        tell(folder, undo=undo)
    except Interrupted as interrupted:
        folder.tidy()  # before the words: where the terminal is gone, they fail
        print("\ndemo: interrupted; guests and agents are ended", file=sys.stderr)
        return 128 + interrupted.number
    except FAILURES as error:
        folder.remove_sockets()
        print(f"\ndemo: failed: {error}", file=sys.stderr)
        print(f"demo: everything is kept in {place}: consoles, agents' logs, disks, journal", file=sys.stderr)
        return 1
    folder.tidy()
    print(f"\nEvery proof holds. Consoles, logs and report are in {place}; `make clean` removes it.")
    return 0


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description="A real VM fails back to its original.")
    parser.add_argument("--undo", action="store_true", help="end with undo instead of commit")
    undo: bool = parser.parse_args().undo
    reaper.become_child_of_reaper()
    return run(undo=undo)


if __name__ == "__main__":
    sys.exit(main())
