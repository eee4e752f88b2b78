"""``failback limit``: show or change how fast a run may send and read."""

from __future__ import annotations

import click

from coordinator.cli.output import facts
from coordinator.cli.parameters import PAIR, RATE
from coordinator.cli.session import Session
from coordinator.cli.verb import verb
from coordinator.model import Rate, RunLimits


@verb("limit", "Show or change how fast a run may send and read.")
@click.argument("pair", type=PAIR)
@click.option("--network", type=RATE, help="Most that is sent over the network, or none.")
@click.option("--read", type=RATE, help="Most that each agent reads from its disks, or none.")
@click.pass_obj
def command(session: Session, pair: str, network: Rate | None, read: Rate | None) -> None:
    """Show the limits of the unfinished run of PAIR or, with options, change them while it runs.

    RATE is bytes a second, as in 125MB, 119MiB or 250000000, or bits a second, as in 1Gbit or 800Mbit; none lifts the
    limit. What is not named stays as it is. A limit holds for all disks of the pair together; the one for reads holds
    on each side by itself. A pass under way obeys within a second, every later pass of the run from its beginning,
    also after `failback resume`.

    \b
    Example:
      failback limit web1                                   what holds now
      failback limit web1 --network 800Mbit --read 200MB    leave room for others
      failback limit web1 --network none                    as fast as it goes
    """
    if network is None and read is None:
        _show(session, pair, session.run(lambda coordinator: coordinator.limits(pair)))
        return
    outcome = session.run(lambda coordinator: coordinator.set_limits(pair, network=network, read=read))
    session.output.say(outcome.sentence[:1].upper() + outcome.sentence[1:] + ".")
    told = limits_object(outcome.limits, pair, outcome.run)
    session.output.finish({"verb": "limit", **told, "at_work": outcome.at_work})


def _show(session: Session, pair: str, found: tuple[str, RunLimits] | None) -> None:
    if found is None:
        session.output.say(
            f"No run of {pair} is unfinished: `failback start {pair} --limit-network RATE --limit-read RATE` sets the "
            "limits of one from its beginning."
        )
        session.output.finish({"verb": "limit", **limits_object(None, pair, None)})
        return
    run, limits = found
    rows = [
        ("Pair", pair),
        ("Run", run),
        ("Network", Rate(limits.network_bytes_s).words),
        ("Reads", Rate(limits.read_bytes_s).words),
    ]
    session.output.show(facts(rows))
    session.output.finish({"verb": "limit", **limits_object(limits, pair, run)})


def limits_object(limits: RunLimits | None, pair: str, run: str | None) -> dict[str, object]:
    """The JSON form: `limits` is null where no run is unfinished."""
    return {"pair": pair, "run": run, "limits": limits}
