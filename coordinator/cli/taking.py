"""``--take-over``: the pair is taken from whichever coordinator holds it on the agents, before the verb works."""

from __future__ import annotations

import click

from coordinator.cli.session import Session
from coordinator.errors import WrongState
from coordinator.runs import Coordinator
from coordinator.states import Verb, check_verb

take_over_option = click.option(
    "--take-over",
    is_flag=True,
    help="Take the pair from the coordinator that holds it on the agents, which is gone for good, or from what a "
    "registry put back from a backup does not know. Whatever that one had running ends.",
)


def take_first(session: Session, pair: str, verb: Verb, *, take_over: bool) -> None:
    """Take the pair over if that was asked for and the verb is possible; else the verb itself says why it is not."""
    if not take_over:
        return

    async def taking(coordinator: Coordinator) -> str:
        try:
            check_verb(await coordinator.get_pair(pair), verb)
        except WrongState:
            return ""
        return await coordinator.take_pair(pair)

    sentence = session.run(taking)
    if sentence:
        session.output.say(f"{sentence[:1].upper()}{sentence[1:]}.")
