"""``failback plan``: what a run would do, refuse and rest on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coordinator.cli.fleet import one_or_plan, plan_fleet, plan_option
from coordinator.cli.output import error_object
from coordinator.cli.parameters import PAIR
from coordinator.cli.planning import chosen_options, plan_run, refused, run_options, write_draft
from coordinator.cli.report_view import show_plan
from coordinator.cli.session import Session
from coordinator.cli.verb import verb
from coordinator.errors import ExitCode


@verb("plan", "Show what a failback would do, and every reason against it.")
@click.argument("pair", type=PAIR, required=False)
@plan_option
@run_options
@click.option(
    "--estimate/--no-estimate",
    default=True,
    help="Sample the disks to tell bytes, seconds and downtime (default; takes some seconds), or not.",
)
@click.option(
    "--write-mapping",
    "draft_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --to host: write a draft of the mapping there, for you to complete and to give back by --mapping.",
)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    pair: str | None,
    plan_file: Path | None,
    estimate: bool,
    draft_file: Path | None,
    **chosen: Any,
) -> int:
    """Show what a failback of PAIR would do, on what evidence, and every reason against it.

    Both agents are asked, and read some blocks of the disks to tell what a run would cost; nothing is changed. The
    options are those of `start`. Exit code 3 means that `start` would
    refuse; each reason comes with its cure.

    \b
    Example:
      failback plan web1 --no-power-on
      failback plan web1 --to host prod2 --write-mapping web1.toml
      failback plan --plan site.toml      every pair of that plan
    """
    session: Session = ctx.obj
    one_or_plan(ctx, pair, plan_file, alone=("estimate", "draft_file"))
    if plan_file is not None:
        return plan_fleet(session, plan_file, estimate=estimate)
    assert pair is not None
    options = chosen_options(**chosen)
    if draft_file is not None:
        write_draft(draft_file, session.run(lambda coordinator: coordinator.destination(pair, options)))
        session.output.say(f"A draft of the mapping is in {draft_file}: complete it, then --mapping {draft_file}.")
    plan = session.run(lambda coordinator: plan_run(coordinator, pair, options, estimate=estimate))
    show_plan(session.output, plan)
    if plan.refusals:
        error = refused(plan)
        session.output.finish({"verb": "plan", **error_object(error), "plan": plan})
        return error.exit_code
    session.output.say()
    session.output.say(f"Nothing speaks against it: `failback start {pair}`.")
    session.output.finish({"verb": "plan", "plan": plan})
    return ExitCode.DONE
