"""``failback history``: the journal for a person."""

from __future__ import annotations

import click

from coordinator.cli.parameters import PAIR
from coordinator.cli.report_view import show_history, show_report
from coordinator.cli.session import Session
from coordinator.cli.verb import verb
from coordinator.entries import JournalEntry
from coordinator.reports import ClosingReport
from coordinator.runs import Coordinator


@verb("history", "Read the journal of a pair.")
@click.argument("pair", type=PAIR)
@click.option("--run", metavar="RUN", help="Only that run.")
@click.option(
    "--report", "with_report", is_flag=True, help="Show the closing report of the run (the last one) as well."
)
@click.pass_obj
def command(session: Session, pair: str, run: str | None, with_report: bool) -> None:
    """Read the journal of PAIR: what was done, by whom, when, how long it took and how it ended.

    \b
    Example:
      failback history web1 --report
    """

    async def read(coordinator: Coordinator) -> tuple[tuple[JournalEntry, ...], ClosingReport | None]:
        await coordinator.get_pair(pair)
        entries = await coordinator.history(pair, run)
        return entries, await coordinator.report(pair, run) if with_report else None

    entries, report = session.run(read)
    show_history(session.output, entries)
    if report is not None:
        show_report(session.output, report)
    session.output.finish({"verb": "history", "pair": pair, "entries": entries, "report": report})
