"""``failback adopt``: rebuild the registry from what agents know."""

from __future__ import annotations

import click

from coordinator.adoption import Proposal, SideEvidence, adopt, propose
from coordinator.cli.session import Session
from coordinator.cli.verb import verb
from coordinator.errors import CoordinatorError, ExitCode
from coordinator.findings import Problem
from coordinator.model import Pair
from coordinator.runs import Coordinator


@verb("adopt", "Rebuild lost registry entries from what agents know.")
@click.argument("hosts", metavar="HOST...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def command(session: Session, hosts: tuple[str, ...], yes: bool) -> int:
    """Take in the pairs that the agents on these hosts know: for a registry that was lost, or is an old copy.

    Name both hosts of each pair. Only what both agents agree upon is taken in, in the state that their evidence proves,
    and under an epoch above every one they have seen; everything else is told and left alone. No VM is touched.

    \b
    Example:
      failback adopt prod1 dr1
    """

    async def look(coordinator: Coordinator) -> tuple[tuple[Proposal, ...], dict[str, Problem]]:
        return await propose(coordinator.doctor(), hosts)

    proposals, silent = session.run(look, rebuilds=True)
    for problem in silent.values():
        session.output.say(problem.sentence)
    for proposal in proposals:
        _show(session, proposal)
    able = [proposal for proposal in proposals if proposal.pair is not None]
    if not able:
        session.output.say("There is nothing that can be adopted.")
    elif not session.confirm(f"Adopt {', '.join(p.name for p in able)}?", yes=yes, action="adopt"):
        session.output.say("Nothing was changed.")
        able = []

    async def take(coordinator: Coordinator) -> tuple[list[Pair], list[CoordinatorError]]:
        taken: list[Pair] = []
        failed: list[CoordinatorError] = []
        for proposal in able:
            try:
                taken.append(await adopt(coordinator.doctor(), proposal))
            except CoordinatorError as error:
                failed.append(error)
        return taken, failed

    taken, failed = session.run(take, rebuilds=True) if able else ([], [])
    for pair in taken:
        session.output.say(f"Adopted {pair.name}: {pair.state.value}. Next: `failback doctor {pair.name}`.")
    for error in failed:
        session.output.say(f"Not adopted: {error.sentence}")
    session.output.finish(
        {
            "verb": "adopt",
            "proposals": proposals,
            "silent": silent,
            "adopted": taken,
            "failed": [e.sentence for e in failed],
        }
    )
    return ExitCode.DONE if len(taken) == len(proposals) and not silent else ExitCode.FAILED


def _show(session: Session, proposal: Proposal) -> None:
    state = "cannot be adopted" if proposal.pair is None else proposal.pair.state.value
    session.output.say(f"{proposal.name}: {state}: {proposal.sentence}")
    for name, side in (("original", proposal.original), ("replica", proposal.replica)):
        if side is not None:
            session.output.say(f"    {name} on {side.host}: {_words(side)}")


def _words(side: SideEvidence) -> str:
    words = ["not found" if side.power is None else side.power.value]
    if side.fence is not None:
        words.append(f"fenced by run {side.fence.run}")
    if side.condition is not None:
        words.append(side.condition.value)
    words.append(f"epoch {side.epoch}")
    return ", ".join(words)
