"""``failback doctor``: what is not as it should be, and how it is cured."""

from __future__ import annotations

import click

from coordinator.cli.parameters import PAIR
from coordinator.cli.session import Session
from coordinator.cli.verb import verb
from coordinator.differences import Difference, Severity, differences
from coordinator.errors import ExitCode
from coordinator.health import CleanedHost
from coordinator.runs import Coordinator


@verb("doctor", "Compare registry, agents and libvirt.")
@click.argument("pair", type=PAIR, required=False)
@click.option("--clean", is_flag=True, help="Remove what runs that are over left behind; asks first.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def command(session: Session, pair: str | None, clean: bool, yes: bool) -> int:
    """Compare the registry, both agents and libvirt, of PAIR or of everything, and list every difference with its cure.

    With --clean, what provably belongs to no run is removed first: views, records of writes, scratch files, digest maps
    of VMs that are gone; of a pair in Ready, its fences. What others made stays. Ends with 1 if anything is left that
    is more than a note.

    \b
    Example:
      failback doctor web1
      failback doctor web1 --clean
    """
    whose = pair or "every pair"
    question = f"Remove what runs that are over left of {whose}?"
    if clean and not session.confirm(question, yes=yes, action="doctor --clean"):
        session.output.say("Nothing was removed.")
        clean = False

    async def work(coordinator: Coordinator) -> tuple[tuple[CleanedHost, ...], tuple[str, ...], tuple[Difference, ...]]:
        doctor = coordinator.doctor()
        cleaned: tuple[CleanedHost, ...] = ()
        locks: tuple[str, ...] = ()
        if clean and pair is not None:
            cleaned = await doctor.clean(pair)
        elif clean:
            locks = tuple(str(path) for path in await doctor.remove_stale_locks())
        return cleaned, locks, differences(await doctor.examine(pair))

    cleaned, locks, found = session.run(work)
    show_cleaned(session, cleaned)
    for lock in locks:
        session.output.say(f"Removed the lock file {lock}")
    if clean and not locks and not any(host.cleaned.removed for host in cleaned):
        session.output.say("There was nothing to remove.")
    for each in found:
        session.output.say(f"{each.severity.value}: {each.sentence}")
        session.output.say(f"    cure: {each.cure}")
    counted = [each for each in found if each.severity is not Severity.NOTE]
    session.output.say(f"{len(counted)} differences." if counted else "Everything is as it should be.")
    session.output.finish({"verb": "doctor", "differences": found, "cleaned": cleaned, "locks": locks})
    return ExitCode.FAILED if counted else ExitCode.DONE


def show_cleaned(session: Session, cleaned: tuple[CleanedHost, ...]) -> None:
    """What agents removed and left."""
    for host in cleaned:
        for what in host.cleaned.removed:
            session.output.say(f"{host.host}: removed {what}")
        for what in host.cleaned.kept:
            session.output.say(f"{host.host}: left {what}")
