"""``failback restore-points``: what was kept of earlier failbacks, and how it goes."""

from __future__ import annotations

import click

from coordinator.cli import human
from coordinator.cli.fleet import Declined
from coordinator.cli.output import table
from coordinator.cli.parameters import PAIR
from coordinator.cli.session import Session
from coordinator.cli.verb import verb
from coordinator.restore_points import RestorePointFacts
from coordinator.runs import Coordinator


@verb("restore-points", "List or prune the restore points of a pair.")
@click.argument("pair", type=PAIR)
@click.option("--prune", is_flag=True, help="Merge the oldest away until --keep of them are left.")
@click.option("--keep", type=click.IntRange(min=0), default=1, show_default=True, help="How many stay with --prune.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def command(session: Session, pair: str, prune: bool, keep: int, yes: bool) -> None:
    """List the restore points of PAIR: what the replica held when a failback was committed with `--restore-point keep`.

    `--prune` merges the oldest into its base, which the replica goes on with; its data stays, that moment is gone. The
    pair must be in Ready and the replica off; it is fenced meanwhile. Cut short, the same command goes on.

    \b
    Example:
      failback restore-points web1 --prune --keep 2
    """
    gone: tuple[str, ...] = ()
    if prune:
        question = f"Merge the restore points of {pair} but for the {keep} newest? They cannot be had back."
        if not session.confirm(question, yes=yes, action="restore-points"):
            raise Declined("not pruned, nothing was touched", pair=pair)

        async def pruning(coordinator: Coordinator) -> tuple[str, ...]:
            return await coordinator.prune_restore_points(pair, keep=keep)

        gone = session.run(pruning)
        for name in gone:
            session.output.say(f"Merged into its base: {name}.")
    points = session.run(lambda coordinator: coordinator.restore_points(pair))
    _show(session, points)
    session.output.finish({"verb": "restore-points", "pair": pair, "restore_points": points, "pruned": gone})


def _show(session: Session, points: tuple[RestorePointFacts, ...]) -> None:
    if not points:
        session.output.say("No restore point is kept.")
        return
    rows = table("Name", "Run", "Kept", "Disk", "Size", "Holds it", right=("Size",))
    for point in points:
        for number, disk in enumerate(point.disks):
            first = (point.name, point.run, human.moment(point.kept_s)) if number == 0 else ("", "", "")
            rows.add_row(*first, disk.target, human.size(disk.allocated_bytes), disk.path)
    session.output.show(rows)
    for point in points:
        if point.half_pruned:
            session.output.say(f"{point.name} is half merged away: repeat with --prune.")
