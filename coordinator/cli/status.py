"""``failback status``: one look at a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coordinator.cli.fleet import one_or_plan, plan_option, status_fleet
from coordinator.cli.output import plain
from coordinator.cli.parameters import PAIR
from coordinator.cli.report_view import next_words, show_status
from coordinator.cli.session import Session
from coordinator.cli.verb import verb
from coordinator.errors import ExitCode, UsageError
from coordinator.states import allowed_verbs
from coordinator.status import PairStatus


@verb("status", "Show a pair's state and what may be done next.")
@click.argument("pair", type=PAIR, required=False)
@plan_option
@click.option("--all", "every", is_flag=True, help="Not one pair: every pair of the registry, in one table.")
@click.pass_context
def command(ctx: click.Context, pair: str | None, plan_file: Path | None, every: bool) -> int:
    """Show the state of PAIR, its newest side, the original's flag, progress, and what may be done next.

    The flag of the original's disks is intact, torn (it must not boot) or the view they equal. No agent is asked.

    \b
    Example:
      failback status web1
      failback status --plan site.toml
    """
    session: Session = ctx.obj
    if not every:
        one_or_plan(ctx, pair, plan_file)
    elif pair is not None or plan_file is not None:
        raise UsageError("--all is about every pair: name neither one nor a plan beside it")
    if every or plan_file is not None:
        return status_fleet(session, plan_file)
    assert pair is not None
    status = session.run(lambda coordinator: coordinator.pair_status(pair))
    show_status(session.output, status)
    allowed = sorted(verb.value for verb in allowed_verbs(status.pair))
    session.output.finish({"verb": "status", **status_object(status), "allowed": allowed, "next": next_words(status)})
    return ExitCode.DONE


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
