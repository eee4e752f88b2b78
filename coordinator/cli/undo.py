"""``failback undo``: take a failback back."""

from __future__ import annotations

import click

from coordinator.cli.parameters import PAIR
from coordinator.cli.session import Session
from coordinator.cli.start import Declined
from coordinator.cli.taking import take_first, take_over_option
from coordinator.cli.verb import verb
from coordinator.cli.working import close, work_here
from coordinator.events import Outcome
from coordinator.runs import Coordinator
from coordinator.states import Verb


@verb("undo", "Take a failback back.")
@click.argument("pair", type=PAIR)
@click.option("--yes", is_flag=True, help="Do not ask.")
@take_over_option
@click.pass_obj
def command(session: Session, pair: str, yes: bool, take_over: bool) -> int:
    """Take the failback of PAIR back: the original goes off, the replica serves again with exactly its own data.

    Says how long the original ran; what it wrote since then stays behind on its disks. Then asks.

    \b
    Example:
      failback undo web1
    """
    forecast = session.run(lambda coordinator: coordinator.forecast_undo(pair))
    session.output.say(f"{forecast.sentence[:1].upper()}{forecast.sentence[1:]}.")
    if not session.confirm(f"Undo the failback of {pair}?", yes=yes, action="undo"):
        raise Declined("not undone, nothing was touched", pair=pair)

    take_first(session, pair, Verb.UNDO, take_over=take_over)

    async def undoing(coordinator: Coordinator) -> Outcome:
        return await work_here(
            session, pair, coordinator, lambda observer, _stop: coordinator.undo(pair, observer=observer)
        )

    return close(session, "undo", session.run(undoing), forecast=forecast)
