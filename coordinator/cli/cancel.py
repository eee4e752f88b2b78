"""``failback cancel``: end a run before its switchover."""

from __future__ import annotations

import click

from coordinator.cli.parameters import PAIR
from coordinator.cli.session import Session
from coordinator.cli.taking import take_first, take_over_option
from coordinator.cli.verb import verb
from coordinator.cli.working import close, work_here
from coordinator.events import Outcome
from coordinator.runs import Coordinator
from coordinator.states import Verb


@verb("cancel", "End a run before its switchover.")
@click.argument("pair", type=PAIR)
@take_over_option
@click.pass_obj
def command(session: Session, pair: str, take_over: bool) -> int:
    """End the run of PAIR before the switchover: the replica goes on serving, the pair is in Failover again.

    An original that was written to already is torn: it stays fenced until a run has verified it. The process that works
    on the run is asked to stop; where there is none, the run is taken back here.

    \b
    Example:
      failback cancel web1
    """

    take_first(session, pair, Verb.CANCEL, take_over=take_over)

    async def cancelling(coordinator: Coordinator) -> Outcome:
        return await work_here(
            session, pair, coordinator, lambda observer, _stop: coordinator.cancel(pair, observer=observer)
        )

    return close(session, "cancel", session.run(cancelling))
