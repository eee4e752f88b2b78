"""Agents that differ from the product's in one thing, for measures that must leave that thing out. Never installed.

As a command it is the agent itself: ``python -m bench.variants unproven|generated -- --config FILE``.

- ``unproven``: what was written is flushed and not read back, as the peers do it.
- ``generated``: disks whose images are named ``generated*.raw`` are made up as they are read, and not stored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.generated import GeneratedDisk

PREFIX = "generated"


def program(variant: str) -> tuple[str, ...]:
    """What to start instead of the installed agent, up to its own options."""
    return (sys.executable, "-m", "bench.variants", variant, "--")


def _replace_everywhere(module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
    """Replace a function where it is defined and wherever modules of the agent have imported it by name."""
    original = getattr(module, name)
    places = [module, *(m for key, m in list(sys.modules.items()) if key.startswith("agent."))]
    for place in places:
        if getattr(place, name, None) is original:
            setattr(place, name, replacement)


def leave_proof_out() -> None:
    """After this no pass of this process reads back what it wrote; everything is flushed as before."""
    from agent.sync import verification

    def believe(_disk: Any, written: Any, _rehash: Any = None) -> int:
        # What the pass books as proven must add up, or the pass would not be complete.
        return int(written.size_bytes)

    _replace_everywhere(verification, "read_back", believe)


def make_disks_up() -> None:
    """After this, images named `PREFIX`\\ ``*.raw`` are opened as `GeneratedDisk`, of the size of their file."""
    from agent.disk import open as opening

    open_source, open_target = opening.open_source, opening.open_target

    def source(name: str, image: Path, image_format: str, socket_dir: Path, **options: bool) -> Any:
        if image.name.startswith(PREFIX):
            return GeneratedDisk(name, image.stat().st_size, differs=False)
        return open_source(name, image, image_format, socket_dir, **options)

    def target(name: str, held: Any, image_format: str, socket_dir: Path, **options: bool) -> Any:
        if held.path.name.startswith(PREFIX):
            return GeneratedDisk(name, held.path.stat().st_size, differs=True)
        return open_target(name, held, image_format, socket_dir, **options)

    _replace_everywhere(opening, "open_source", source)
    _replace_everywhere(opening, "open_target", target)


def main() -> None:
    """Change one thing, then be the agent."""
    from agent import daemon

    variant, separator, *words = sys.argv[1:]
    if separator != "--":
        raise SystemExit("usage: python -m bench.variants VARIANT -- AGENT-OPTION …")
    {"unproven": leave_proof_out, "generated": make_disks_up}[variant]()
    sys.argv = ["failback-agent", *words]
    daemon.main()


if __name__ == "__main__":
    main()
