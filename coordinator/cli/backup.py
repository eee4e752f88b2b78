"""``failback backup``: a copy of the registry and journal."""

from __future__ import annotations

from pathlib import Path

import click

from coordinator.cli.session import Session
from coordinator.cli.verb import verb
from coordinator.runs import Coordinator


@verb("backup", "Copy the registry and journal to a file.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.pass_obj
def command(session: Session, file: Path) -> None:
    """Write a copy of the registry and journal, as they are at this instant, to FILE, while runs go on.

    The copy is whole or not there at all, and never takes the place of an older one. docs/JOURNAL.md says how it is
    put back, and what the pairs must be asked then.

    \b
    Example:
      failback backup /srv/backup/failback-$(date +%F).sqlite
    """
    target = file.absolute()

    async def copy(coordinator: Coordinator) -> int:
        await coordinator.backup(target)
        return len(await coordinator.list_pairs())

    pairs = session.run(copy)
    size_bytes = target.stat().st_size
    session.output.say(f"{target}: {pairs} pair{'s' if pairs != 1 else ''} with their journal, {size_bytes} bytes.")
    session.output.finish({"verb": "backup", "file": target, "pairs": pairs, "size_bytes": size_bytes})
