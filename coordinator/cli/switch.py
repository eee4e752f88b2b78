"""``failback switch``: switch over now, or at another time."""

from __future__ import annotations

import click

from coordinator.cli.parameters import MOMENT, PAIR
from coordinator.cli.session import Session
from coordinator.cli.verb import verb


@verb("switch", "Switch a run over now, or at a time.")
@click.argument("pair", type=PAIR)
@click.option("--at", "at_s", type=MOMENT, help="Not now but then: 2031-01-31T02:00+01:00, or the next local 02:00.")
@click.pass_obj
def command(session: Session, pair: str, at_s: float | None) -> None:
    """Switch the run of PAIR over now, or say when; this goes above what `start --switch` said.

    Now: a pass under way is completed first, then the switchover begins, however long the downtime would be
    (`status` tells). With --at it begins at that time, if the run is ready then or within 15 minutes after it, and
    as --max-downtime allows. Repeated, it changes nothing.

    \b
    Example:
      failback switch web1                                  now
      failback switch web1 --at 02:00                       tonight
      failback switch web1 --at 2031-01-31T02:00+01:00      at that time
    """
    outcome = session.run(lambda coordinator: coordinator.switch(pair, at_s=at_s))
    session.output.say(outcome.sentence[:1].upper() + outcome.sentence[1:] + ".")
    session.output.finish(
        {
            "verb": "switch",
            "pair": pair,
            "run": outcome.run,
            "at_s": outcome.at_s,
            "state": outcome.state,
            "active": outcome.active,
            "taken_up": outcome.taken_up,
        }
    )
