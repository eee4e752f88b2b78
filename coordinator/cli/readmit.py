"""``failback readmit``: take a VM off the exclusion list."""

from __future__ import annotations

import click

from coordinator.cli.fleet import Declined
from coordinator.cli.parameters import VM_PLACE
from coordinator.cli.session import Session
from coordinator.cli.verb import verb


@verb("readmit", "Take a VM that a move left behind off the exclusion list.")
@click.argument("vm", type=VM_PLACE)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def command(session: Session, vm: tuple[str, str], yes: bool) -> None:
    """Take VM (HOST/NAME or HOST/UUID) off the exclusion list, so that `register` and `start` take it again.

    Its data stays what it was when it was left behind. A fence on it stays too: lift that on its host with
    `failback-agent fence lift NAME --reason TEXT` once nothing runs in its place.

    \b
    Example:
      failback readmit prod1/web1
    """
    host, name = vm
    question = f"Take {name} on {host} off the exclusion list? What it holds is old or incomplete."
    if not session.confirm(question, yes=yes, action="readmit"):
        raise Declined("not readmitted, nothing was changed")
    gone = session.run(lambda coordinator: coordinator.readmit(host, name))
    session.output.say(f"{gone.vm.name} on {gone.vm.host} is off the exclusion list; a fence on it stays.")
    session.output.finish({"verb": "readmit", "vm": gone.vm})
