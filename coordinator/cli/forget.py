"""``failback forget``: take a pair out of the registry."""

from __future__ import annotations

import click

from coordinator.cli.doctor import show_cleaned
from coordinator.cli.parameters import PAIR
from coordinator.cli.session import Session
from coordinator.cli.verb import verb


@verb("forget", "Take a pair out of the registry.")
@click.argument("pair", type=PAIR)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--offline", is_flag=True, help="Do not ask the agents: their hosts are gone.")
@click.pass_obj
def command(session: Session, pair: str, yes: bool, offline: bool) -> None:
    """Take PAIR and its history out of the registry, and what was kept for it (digest maps, records) off its hosts.

    Its VMs and their disks stay as they are. Refused during a run, and while one of its VMs is fenced or torn.

    \b
    Example:
      failback forget web1
    """
    question = f"Forget the pair {pair} and its whole history?"
    if not session.confirm(question, yes=yes, action="forget"):
        session.output.say("Nothing was changed.")
        session.output.finish({"verb": "forget", "pair": pair, "forgotten": False, "cleaned": ()})
        return
    cleaned = session.run(lambda coordinator: coordinator.doctor().forget(pair, offline=offline))
    show_cleaned(session, cleaned)
    session.output.say(f"{pair} is forgotten; its VMs and their disks are as they were.")
    session.output.finish({"verb": "forget", "pair": pair, "forgotten": True, "cleaned": cleaned})
