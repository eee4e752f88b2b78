"""``failback status``: one look at a pair."""

from __future__ import annotations

from typing import Any

import click

from coordinator.cli.output import plain
from coordinator.cli.parameters import PAIR
from coordinator.cli.report_view import next_words, show_status
from coordinator.cli.session import Session
from coordinator.cli.verb import verb
from coordinator.states import allowed_verbs
from coordinator.status import PairStatus


@verb("status", "Show a pair's state and what may be done next.")
@click.argument("pair", type=PAIR)
@click.pass_obj
def command(session: Session, pair: str) -> None:
    """Show the state of PAIR, its newest side, the original's flag, progress, and what may be done next.

    The flag of the original's disks is intact, torn (it must not boot) or the view they equal. No agent is asked.

    \b
    Example:
      failback status web1
    """
    status = session.run(lambda coordinator: coordinator.pair_status(pair))
    show_status(session.output, status)
    allowed = sorted(verb.value for verb in allowed_verbs(status.pair))
    session.output.finish({"verb": "status", **status_object(status), "allowed": allowed, "next": next_words(status)})


def status_object(status: PairStatus) -> dict[str, Any]:
    """The JSON form: the pair by name, its original with the flag of its disks, and everything of this moment."""
    value: dict[str, Any] = plain(status)
    pair = status.pair
    value["pair"] = pair.name
    value["original"] = {**plain(pair.original), "flag": value.pop("flag")}
    value["replica"] = plain(pair.replica)
    value["disks"] = plain(pair.disks)
    value["excluded"] = plain(pair.excluded)
    value["epoch"] = pair.epoch
    return value
