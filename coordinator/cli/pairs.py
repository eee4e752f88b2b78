"""``failback pairs``: every pair in a line."""

from __future__ import annotations

import click

from coordinator.cli.report_view import show_pairs
from coordinator.cli.session import Session
from coordinator.cli.verb import verb


@verb("pairs", "List every pair.")
@click.pass_obj
def command(session: Session) -> None:
    """List every pair with its state, its newest side and the original's flag.

    \b
    Example:
      failback pairs
    """
    pairs = session.run(lambda coordinator: coordinator.list_pairs())
    owed, excluded = session.run(lambda coordinator: coordinator.left_behind())
    show_pairs(session.output, pairs)
    for sentence in (*(duty.sentence for duty in owed), *(vm.sentence for vm in excluded)):
        session.output.say(f"Note: {sentence}.")
    session.output.finish({"verb": "pairs", "pairs": pairs, "owed": owed, "excluded": excluded})
