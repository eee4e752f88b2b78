"""``failback failover``: record that the replica took over."""

from __future__ import annotations

import click

from coordinator.cli.parameters import PAIR
from coordinator.cli.session import Session
from coordinator.cli.verb import verb


@verb("failover", "Record that the replica took over.")
@click.argument("pair", type=PAIR)
@click.pass_obj
def command(session: Session, pair: str) -> None:
    """Record that the replica of PAIR took over, after proving the original off and the replica on.

    Nothing is started or stopped: that has happened already. Repeated, it changes nothing.

    \b
    Example:
      failback failover web1
    """
    made = session.run(lambda coordinator: coordinator.record_failover(pair))
    session.output.say(
        f"{made.name} is in {made.state.value}; the {made.newest.value} holds the newest data. "
        f"Next: `failback plan {made.name}`."
    )
    session.output.finish({"verb": "failover", "pair": made})
