"""``failback undo``: take a failback back."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path

import click

from coordinator.cli.fleet import Declined, one_or_plan, plan_option
from coordinator.cli.fleet_ends import undo_fleet
from coordinator.cli.parameters import PAIR
from coordinator.cli.session import Session
from coordinator.cli.taking import take_first, take_over_option
from coordinator.cli.verb import verb
from coordinator.cli.working import close, work_here
from coordinator.events import Observer, Outcome
from coordinator.runs import Coordinator
from coordinator.states import Verb


@verb("undo", "Take a failback back.")
@click.argument("pair", type=PAIR, required=False)
@plan_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--original-is-off",
    metavar="HOST",
    help="You made sure yourself that the original is off, and stays off: its host, named here, cannot be asked.",
)
@take_over_option
@click.pass_context
def command(
    ctx: click.Context,
    pair: str | None,
    plan_file: Path | None,
    yes: bool,
    original_is_off: str | None,
    take_over: bool,
) -> int:
    """Take the failback of PAIR back: the original goes off, the replica serves again with exactly its own data.

    Says how long the original ran; what it wrote since then stays behind on its disks, or, where the run protected the
    original (--protect-original), is dropped. Then asks.

    Where the production host is gone, nobody can prove that the original is off, and the replica stays off too. Only
    you can say so then, with --original-is-off and that host's name: the journal keeps your word, and the original is
    powered off and fenced at the first contact with its host.

    \b
    Example:
      failback undo web1
      failback undo web1 --original-is-off prod1
      failback undo --plan site.toml      every pair of that plan
    """
    session: Session = ctx.obj
    one_or_plan(ctx, pair, plan_file, alone=("yes",))
    if plan_file is not None:
        return undo_fleet(session, plan_file, yes=yes)
    assert pair is not None
    forecast = session.run(lambda coordinator: coordinator.forecast_undo(pair))
    session.output.say(f"{forecast.sentence[:1].upper()}{forecast.sentence[1:]}.")
    if original_is_off is not None:
        session.output.say(
            f"Nobody but you proves that the original is off: if it runs on {original_is_off}, both VMs will be in use."
        )
    if not session.confirm(f"Undo the failback of {pair}?", yes=yes, action="undo"):
        raise Declined("not undone, nothing was touched", pair=pair)

    take_first(session, pair, Verb.UNDO, take_over=take_over)

    def _undo(coordinator: Coordinator, observer: Observer) -> Awaitable[Outcome]:
        return coordinator.undo(pair, observer=observer, original_is_off=original_is_off)

    async def undoing(coordinator: Coordinator) -> Outcome:
        return await work_here(session, pair, coordinator, lambda observer, _stop: _undo(coordinator, observer))

    return close(session, "undo", session.run(undoing), forecast=forecast)
