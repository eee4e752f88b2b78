"""The verbs of a plan of several pairs: `plan`, `start`, `resume` and `status` with ``--plan FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coordinator.cli.bugs import bug_sentence
from coordinator.cli.conduct import Interrupted
from coordinator.cli.fleet_plans import WholePlan, plan_whole, refused_whole, show_whole, whole_object
from coordinator.cli.fleet_view import picture_object, show_picture, summary
from coordinator.cli.fleet_work import explain_error, lead_here
from coordinator.cli.output import error_object
from coordinator.cli.plan_file import load_plan
from coordinator.cli.session import Session
from coordinator.errors import CoordinatorError, ExitCode, UsageError
from coordinator.fleet import FleetPlan, Group, Place
from coordinator.fleet_standing import Looker, Picture
from coordinator.protecting import settled
from coordinator.runs import Coordinator

plan_option = click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Not one pair: every pair of the plan in this file (TOML), in its order.",
)


class Declined(CoordinatorError):
    """The person said no."""

    code = "declined"


def one_or_plan(ctx: click.Context, pair: str | None, plan_file: Path | None, *, alone: tuple[str, ...] = ()) -> None:
    """Raise `UsageError` unless exactly one of pair and plan was named, and with a plan no option of one pair.

    Args:
        alone: names of the parameters that may stand beside ``--plan``.
    """
    verb = ctx.info_name
    if (pair is None) == (plan_file is None):
        wrong = "missing PAIR" if pair is None else "PAIR stands beside --plan"
        raise UsageError(
            f"{wrong}: say either which pair, as in `failback {verb} web1`, or which plan with --plan FILE; "
            f"see `failback {verb} --help`"
        )
    if plan_file is None:
        return
    for param in ctx.command.params:
        name = param.name or ""
        given = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and param.expose_value and name not in ("plan_file", *alone):
            into_file = verb in ("start", "plan")
            cure = "put it into the file, under [defaults] or [pair.NAME]" if into_file else "leave it out"
            raise UsageError(f"{param.opts[-1]} is about one pair and does not go with --plan: {cure}")


def plan_fleet(session: Session, file: Path, *, estimate: bool) -> int:
    """Show what `start --plan` would do, and every reason against it; nothing is touched."""
    plan = load_plan(file, begins=True)
    whole = session.run(lambda coordinator: plan_whole(coordinator, plan, estimate=estimate))
    show_whole(session.output, plan, whole, str(file))
    if whole.refusals:
        return _refuse(session, "plan", whole, file)
    session.output.say()
    if not (whole.begin or whole.go_on):
        session.output.say("There is nothing to do: no pair of it waits to be failed back.")
    else:
        session.output.say(f"Nothing speaks against it: `failback start --plan {file}`.")
    session.output.say("`failback plan PAIR` shows one pair's plan step by step.")
    session.output.finish({"verb": "plan", "file": str(file), **whole_object(whole)})
    return ExitCode.DONE


def _refuse(session: Session, verb: str, whole: WholePlan, file: Path) -> int:
    error = refused_whole(whole, str(file))
    session.output.say()
    session.output.say("Nothing was touched.")
    session.output.finish({"verb": verb, "file": str(file), **error_object(error), **whole_object(whole)})
    return error.exit_code


def start_fleet(session: Session, file: Path, *, foreground: bool, yes: bool) -> int:
    """Begin a run of every pair that is in Failover, go on with those that are unfinished, and lead them all."""
    plan = load_plan(file, begins=True)
    whole = session.run(lambda coordinator: plan_whole(coordinator, plan, estimate=not yes))
    show_whole(session.output, plan, whole, str(file))
    if whole.refusals:
        return _refuse(session, "start", whole, file)
    session.output.say()
    count = len(whole.begin) + len(whole.go_on)
    question = f"Fail {count} pair{'s' if count != 1 else ''} back now?"
    if count and not session.confirm(question, yes=yes, action="start"):
        raise Declined("not started, nothing was touched", file=str(file))

    planned = {one.name: one.plan for one in whole.pairs if one.plan is not None}

    async def begin(coordinator: Coordinator) -> dict[str, str]:
        errors = {}
        for pair in whole.begin:  # the runs are in the journals before any of them works: resume knows them all
            try:
                await coordinator.start_run(pair, settled(plan.options[pair], planned[pair]))
            except CoordinatorError as error:
                errors[pair] = error.sentence
        return errors

    try:
        errors = session.run(begin)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"stopped while runs were being begun: `failback resume --plan {file}` goes on with those, `failback undo "
            f"--plan {file}` cancels them",
            file=str(file),
        ) from error
    for pair, sentence in errors.items():
        session.output.warn(f"{pair} was not started: {sentence}")
    return _lead(session, "start", plan, file, foreground=foreground, errors=errors)


def resume_fleet(session: Session, file: Path, *, foreground: bool) -> int:
    """Go on with every unfinished run of the plan, and give turns again; nothing new begins."""
    return _lead(session, "resume", load_plan(file), file, foreground=foreground, errors={})


def _lead(session: Session, verb: str, plan: FleetPlan, file: Path, *, foreground: bool, errors: dict[str, str]) -> int:
    why_here = "--foreground was given" if foreground else session.why_not_systemd()

    async def leading(coordinator: Coordinator) -> Picture:
        now = await Looker(coordinator, plan).look()
        queued = frozenset(row.standing.pair for row in now.rows if row.standing.place is Place.STOPPED)
        if queued and why_here is not None:
            session.output.say(f"Working in this process ({why_here}): Ctrl-C stops at safe boundaries.")
        elif queued:
            session.output.say("Each run is handed over to its unit; Ctrl-C ends the watching, not the runs.")
        return await lead_here(
            session,
            coordinator,
            plan,
            queued,
            why_here=why_here,
            file=str(file),
            explain=explain_error(session, lambda _pair, error: bug_sentence(session, error)),
        )

    picture = session.run(leading)
    return close_fleet(session, verb, file, picture, errors=errors)


def close_fleet(session: Session, verb: str, file: Path, picture: Picture, *, errors: dict[str, str]) -> int:
    """Show where everything stands at the end; the exit code: every pair at home, or not."""
    output = session.output
    output.say()
    show_picture(output, picture)
    code, sentence = _verdict(picture, file)
    output.say()
    output.say(sentence, style="" if code is ExitCode.DONE else "bold red")
    value: dict[str, Any] = {"verb": verb, "file": str(file), "pairs": picture_object(picture), "exit_code": int(code)}
    value["sentence"] = sentence
    if errors:
        value["not_started"] = errors
    if code is not ExitCode.DONE:
        name = "needs-operator" if code is ExitCode.NEEDS_OPERATOR else "failed"
        value["error"] = {"code": name, "sentence": sentence, "facts": {"file": str(file)}}
    output.finish(value)
    return code


def _verdict(picture: Picture, file: Path) -> tuple[ExitCode, str]:
    home = picture.count(Place.HOME)
    if home == len(picture.rows):
        final = all(row.status.outcome == "committed" for row in picture.rows)
        ways_on = f"`failback commit --plan {file}` makes it final, `failback undo --plan {file}` takes it back"
        return ExitCode.DONE, f"All {home} pairs are home{', and final' if final else f': {ways_on}'}"
    code = ExitCode.NEEDS_OPERATOR if picture.count(Place.NEEDS_OPERATOR) else ExitCode.FAILED
    ways = []
    if picture.count(Place.STOPPED, Place.WAITING, Place.COPYING, Place.QUEUED, Place.SWITCHING):
        ways.append(f"`failback resume --plan {file}` goes on with what is unfinished")
    if picture.count(Place.FAILED, Place.AWAY):
        ways.append(f"`failback start --plan {file}` tries again what failed, once it is mended")
    if picture.count(Place.NEEDS_OPERATOR):
        ways.append("`failback resume PAIR` or what its sentence says, for a pair that needs an operator")
    ways.append(f"`failback undo --plan {file}` takes everything back")
    return code, f"{home} of {len(picture.rows)} pairs are home ({summary(picture)}); {'; '.join(ways)}"


def status_fleet(session: Session, file: Path | None) -> int:
    """Where every pair of the plan stands, or every pair of the registry; no agent is asked."""

    async def look(coordinator: Coordinator) -> Picture:
        return await Looker(coordinator, await chosen(coordinator)).look()

    async def chosen(coordinator: Coordinator) -> FleetPlan:
        if file is not None:
            return load_plan(file)
        names = tuple(pair.name for pair in await coordinator.list_pairs())
        return FleetPlan(groups=(Group(name="", pairs=names),) if names else (), options={})

    picture = session.run(look)
    if picture.rows:
        show_picture(session.output, picture)
        session.output.say()
        session.output.say(summary(picture))
    else:
        session.output.say(
            "No pairs yet: take one in with `failback register PAIR --original HOST/VM --replica HOST/VM`."
        )
    value: dict[str, Any] = {"verb": "status", "pairs": picture_object(picture)}
    session.output.finish(value if file is None else {**value, "file": str(file)})
    return ExitCode.DONE
