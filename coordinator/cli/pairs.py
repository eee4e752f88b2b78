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
    show_pairs(session.output, pairs)
    session.output.finish({"verb": "pairs", "pairs": pairs})
