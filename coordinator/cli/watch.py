"""``failback watch``: follow a run until it rests."""

from __future__ import annotations

import click

from coordinator.cli.parameters import PAIR
from coordinator.cli.session import Session
from coordinator.cli.verb import verb
from coordinator.cli.working import watch_run


@verb("watch", "Follow a run until it rests.")
@click.argument("pair", type=PAIR)
@click.pass_obj
def command(session: Session, pair: str) -> int:
    """Follow the run of PAIR until it rests; Ctrl-C ends the watching, not the run.

    With --json each event is a JSON object on a line of its own, and the last line says how it ended.

    \b
    Example:
      failback watch web1
    """
    return watch_run(session, "watch", pair, wanted=None, more={})
