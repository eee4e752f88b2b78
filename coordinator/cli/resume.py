"""``failback resume``: go on with an unfinished run."""

from __future__ import annotations

from pathlib import Path

import click

from coordinator.cli.fleet import one_or_plan, plan_option, resume_fleet
from coordinator.cli.parameters import PAIR
from coordinator.cli.service import ServiceFailed, unit_of
from coordinator.cli.session import Session
from coordinator.cli.taking import take_first, take_over_option
from coordinator.cli.verb import verb
from coordinator.cli.working import close, watch_run, work_here
from coordinator.errors import ExitCode, UsageError
from coordinator.events import Outcome
from coordinator.model import Pair, State
from coordinator.runs import Coordinator
from coordinator.states import TABLE, Verb, check_verb


@verb("resume", "Go on with an unfinished run.")
@click.argument("pair", type=PAIR, required=False)
@plan_option
@click.option("--foreground", is_flag=True, help="Work in this process, even where systemd could do it.")
@click.option("--unit", is_flag=True, hidden=True, help="Work here, as the pair's unit: exit code 0 at rest.")
@click.option("--all-unfinished", is_flag=True, hidden=True, help="Every unfinished run; for failback-resume.service.")
@take_over_option
@click.pass_context
def command(
    ctx: click.Context,
    pair: str | None,
    plan_file: Path | None,
    foreground: bool,
    unit: bool,
    all_unfinished: bool,
    take_over: bool,
) -> int:
    """Go on with the unfinished run of PAIR after a crash, a stop or a repaired failure.

    Every step that was begun is probed against reality first; nothing whose outcome is unknown is repeated blindly.
    The options are those the run was started with.

    \b
    Example:
      failback resume web1
      failback resume --plan site.toml      every unfinished run of that plan, in its order
    """
    session: Session = ctx.obj
    if not all_unfinished:
        one_or_plan(ctx, pair, plan_file, alone=("foreground",))
    elif pair is not None or plan_file is not None:
        raise UsageError("--all-unfinished is about every pair: name none beside it")
    if plan_file is not None:
        return resume_fleet(session, plan_file, foreground=foreground)
    if pair is None:
        return _resume_all(session, foreground=foreground)
    take_first(session, pair, Verb.RESUME, take_over=take_over)
    if unit:
        return _work_as_unit(session, pair)
    why_here = "--foreground was given" if foreground else session.why_not_systemd()
    if why_here is None:
        known = session.run(lambda coordinator: coordinator.get_pair(pair))
        check_verb(known, Verb.RESUME)
        session.systemd.start(pair)
        session.output.say(f"The run is handed over to {unit_of(pair)}; Ctrl-C ends the watching, not the run.")
        return watch_run(session, "resume", pair, wanted=_aim(known), more={})
    return close(session, "resume", _resume_one(session, pair))


def _work_as_unit(session: Session, pair: str) -> int:
    """The service manager is told whether there is anything to resume, not whether the failback succeeded: a run that
    rolled back or was cancelled has come to rest, and starting the unit again would only be refused. Whether it
    succeeded is what `start` and `watch` say."""
    outcome = _resume_one(session, pair)
    code = close(session, "resume", outcome)
    return code if TABLE[outcome.state].unfinished else int(ExitCode.DONE)


def _aim(pair: Pair) -> State:
    """Where a resumed run is meant to end."""
    state = pair.operator.before if pair.state is State.NEEDS_OPERATOR and pair.operator is not None else pair.state
    if state is State.COMMITTING:
        return State.READY
    return State.FAILOVER if state in (State.ROLLING_BACK, State.CANCELLING, State.UNDOING) else State.FAILBACK


def _resume_one(session: Session, pair: str) -> Outcome:
    async def resuming(coordinator: Coordinator) -> Outcome:
        return await work_here(
            session, pair, coordinator, lambda observer, stop: coordinator.resume(pair, observer=observer, stop=stop)
        )

    return session.run(resuming)


def _resume_all(session: Session, *, foreground: bool) -> int:
    """Hand every unfinished run to its unit, or do one after the other here; a failed one does not hinder the next."""
    pairs = session.run(lambda coordinator: coordinator.list_pairs())
    names = [pair.name for pair in pairs if TABLE[pair.state].unfinished and pair.state is not State.NEEDS_OPERATOR]
    here = foreground or session.why_not_systemd() is not None
    codes: dict[str, int] = {}
    for name in names:
        if here:
            outcome = _resume_one(session, name)
            session.output.say(outcome.sentence)
            codes[name] = int(outcome.exit_code)
            continue
        try:
            session.systemd.start(name)
            session.output.say(f"{unit_of(name)} goes on with the run of {name}.")
            codes[name] = int(ExitCode.DONE)
        except ServiceFailed as error:
            session.output.warn(error.sentence)
            codes[name] = int(error.exit_code)
    if not names:
        session.output.say("No run is unfinished.")
    session.output.finish({"verb": "resume", "pairs": codes})
    return max(codes.values(), default=int(ExitCode.DONE))
