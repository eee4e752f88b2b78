"""``failback commit``: make a failback final."""

from __future__ import annotations

from pathlib import Path

import click

from coordinator.cli.fleet import Declined, one_or_plan, plan_option
from coordinator.cli.fleet_ends import commit_fleet
from coordinator.cli.parameters import PAIR
from coordinator.cli.session import Session
from coordinator.cli.taking import take_first, take_over_option
from coordinator.cli.verb import verb
from coordinator.cli.working import close, work_here
from coordinator.events import Outcome
from coordinator.model import RestorePoint
from coordinator.runs import Coordinator
from coordinator.states import Verb


@verb("commit", "Make a failback final.")
@click.argument("pair", type=PAIR, required=False)
@plan_option
@click.option(
    "--restore-point",
    type=click.Choice([choice.value for choice in RestorePoint]),
    default=RestorePoint.KEEP.value,
    show_default=True,
    help="Keep the protective snapshot of the replica as a restore point, or drop it.",
)
@click.option(
    "--wait-audit/--no-wait-audit",
    default=True,
    help="Have the audit's result first (default), or commit without it. A difference forbids the commit either way.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@take_over_option
@click.pass_context
def command(
    ctx: click.Context,
    pair: str | None,
    plan_file: Path | None,
    restore_point: str,
    wait_audit: bool,
    yes: bool,
    take_over: bool,
) -> int:
    """Make the failback of PAIR final: it cannot be undone any more, the replica stands by again.

    Waits for the audit of the run, and does it where no process works on it. An audit that found a difference forbids
    the commit (exit code 3): `failback undo PAIR` puts the replica back into service.

    \b
    Example:
      failback commit web1 --restore-point drop
      failback commit --plan site.toml      every pair of that plan
    """
    session: Session = ctx.obj
    one_or_plan(ctx, pair, plan_file, alone=("restore_point", "wait_audit", "yes"))
    if plan_file is not None:
        return commit_fleet(
            session, plan_file, restore_point=RestorePoint(restore_point), wait_audit=wait_audit, yes=yes
        )
    assert pair is not None
    if not session.confirm(f"Make the failback of {pair} final? It cannot be undone then.", yes=yes, action="commit"):
        raise Declined("not committed, nothing was touched", pair=pair)

    take_first(session, pair, Verb.COMMIT, take_over=take_over)

    async def committing(coordinator: Coordinator) -> Outcome:
        return await work_here(
            session,
            pair,
            coordinator,
            lambda observer, stop: coordinator.commit(
                pair, RestorePoint(restore_point), observer=observer, stop=stop, wait_audit=wait_audit
            ),
        )

    return close(session, "commit", session.run(committing))
