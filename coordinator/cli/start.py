"""``failback start``: begin a run, after showing its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coordinator.cli.fleet import Declined, one_or_plan, plan_option, start_fleet
from coordinator.cli.output import error_object
from coordinator.cli.parameters import PAIR
from coordinator.cli.planning import chosen_options, plan_run, refused, run_options
from coordinator.cli.report_view import show_plan
from coordinator.cli.service import unit_of
from coordinator.cli.session import Session
from coordinator.cli.taking import take_first, take_over_option
from coordinator.cli.verb import verb
from coordinator.cli.working import close, watch_run, work_here
from coordinator.errors import ExitCode
from coordinator.events import Outcome
from coordinator.model import Plan, RunOptions, State
from coordinator.protecting import settled
from coordinator.runs import Coordinator
from coordinator.states import Verb


@verb("start", "Fail a pair back: copy, switch over, verify.")
@click.argument("pair", type=PAIR, required=False)
@plan_option
@run_options
@click.option("--foreground", is_flag=True, help="Work in this process, even where systemd could do it.")
@click.option("--yes", is_flag=True, help="Do not ask after showing the plan.")
@take_over_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    pair: str | None,
    plan_file: Path | None,
    foreground: bool,
    yes: bool,
    take_over: bool,
    **chosen: Any,
) -> int:
    """Fail PAIR back: copy what differs while the replica serves, switch over, verify, start the original.

    Shows the plan and asks. Whatever speaks against it is listed whole, and nothing is touched (exit code 3). Where
    systemd runs, the unit failback@PAIR.service does the work and this command only watches: Ctrl-C or a lost
    terminal ends the watching, not the run. In the foreground Ctrl-C stops at the next safe boundary; `failback
    resume PAIR` goes on from there. Until `failback commit`, everything can be undone.

    Passes go on while each shortens the expected downtime. Then the run is Ready to switch, and switches when --switch
    and --max-downtime let it; `failback status PAIR` tells what it waits for.

    \b
    Example:
      failback start web1 --shutdown-timeout 10m --shutdown-policy force
      failback start web1 --switch at 02:00 --max-downtime 30s
      failback start web1 --limit-network 800Mbit --limit-read 200MB
      failback start --plan site.toml      many pairs, in their order
    """
    session: Session = ctx.obj
    one_or_plan(ctx, pair, plan_file, alone=("foreground", "yes"))
    if plan_file is not None:
        return start_fleet(session, plan_file, foreground=foreground, yes=yes)
    assert pair is not None
    options = chosen_options(**chosen)
    plan = session.run(lambda coordinator: plan_run(coordinator, pair, options, estimate=not yes))
    show_plan(session.output, plan)
    if plan.refusals:
        return _refuse(session, plan)
    options = settled(options, plan)
    session.output.say()
    if not session.confirm(f"Fail {pair} back now?", yes=yes, action="start"):
        raise Declined("not started, nothing was touched", pair=pair)
    take_first(session, pair, Verb.START, take_over=take_over)
    why_here = "--foreground was given" if foreground else session.why_not_systemd()
    if why_here is None:
        run = session.run(lambda coordinator: coordinator.start_run(pair, options))
        session.systemd.start(pair)
        session.output.say(f"Run {run} is handed over to {unit_of(pair)}; Ctrl-C ends the watching, not the run.")
        return watch_run(session, "start", pair, wanted=State.FAILBACK, more={"plan": plan})
    session.output.say(f"Working in this process ({why_here}): Ctrl-C stops at the next safe boundary.")
    return close(session, "start", session.run(lambda known: _start_here(session, known, pair, options)), plan=plan)


def _refuse(session: Session, plan: Plan) -> int:
    error = refused(plan)
    session.output.finish({"verb": "start", **error_object(error), "plan": plan})
    session.output.say(f"Nothing was touched; see to {'it' if len(plan.refusals) == 1 else 'them'} and start again.")
    return ExitCode.REFUSED


async def _start_here(session: Session, coordinator: Coordinator, pair: str, options: RunOptions) -> Outcome:
    await coordinator.start_run(pair, options)
    return await work_here(
        session,
        pair,
        coordinator,
        lambda observer, stop: coordinator.execute_run(pair, observer=observer, stop=stop),
    )
