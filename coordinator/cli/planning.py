"""What `plan` and `start` share: the options of a run, and the plan made from what both agents say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from coordinator.cli.parameters import DURATION_S, RATE
from coordinator.errors import Refused
from coordinator.model import Plan, Rate, RunLimits, RunOptions, ShutdownPolicy
from coordinator.plan import make_plan
from coordinator.runs import Coordinator

_OPTIONS = (
    click.option("--power-on/--no-power-on", default=True, help="Power the original on at the end (default: on)."),
    click.option(
        "--power-off-original",
        is_flag=True,
        help="Power the original off if it runs; what it wrote itself is lost. --yes does not imply it.",
    ),
    click.option(
        "--shutdown-timeout",
        "shutdown_timeout_s",
        type=DURATION_S,
        default="15m",
        show_default=True,
        help="How long a guest may take to power off.",
    ),
    click.option(
        "--shutdown-policy",
        type=click.Choice([policy.value for policy in ShutdownPolicy]),
        default=ShutdownPolicy.ABORT.value,
        show_default=True,
        help="When that time is over: leave it running and stop, or power it off by force.",
    ),
    click.option(
        "--allow-larger-target", is_flag=True, help="Zero what is behind the replica's size on a larger disk."
    ),
    click.option(
        "--discard-divergence",
        is_flag=True,
        help="Go on though the original was written to after the failover; that is lost. --yes does not imply it.",
    ),
    click.option(
        "--verify",
        type=click.Choice(["written", "full"]),
        default="written",
        show_default=True,
        help="Before the original may start: read back what was written, or both sides' storage whole.",
    ),
    click.option(
        "--audit/--no-audit",
        default=True,
        help="Read the replica whole after the switchover and compare it with what the original started from.",
    ),
    click.option(
        "--limit-network",
        type=RATE,
        help="Most that is sent over the network: 125MB, 119MiB, 1Gbit (a second), or none, the default.",
    ),
    click.option(
        "--limit-read",
        type=RATE,
        help="Most that each agent reads from its disks; `failback limit` changes both while the run goes on.",
    ),
)


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb the options of a run."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def chosen_options(
    *,
    power_on: bool,
    power_off_original: bool,
    shutdown_timeout_s: float,
    shutdown_policy: str,
    allow_larger_target: bool,
    discard_divergence: bool,
    verify: str,
    audit: bool,
    limit_network: Rate | None,
    limit_read: Rate | None,
) -> RunOptions:
    """The options as values."""
    return RunOptions(
        power_on=power_on,
        power_off_original=power_off_original,
        shutdown_timeout_s=shutdown_timeout_s,
        shutdown_policy=ShutdownPolicy(shutdown_policy),
        allow_larger_target=allow_larger_target,
        discard_divergence=discard_divergence,
        verify_full=verify == "full",
        audit=audit,
        limits=RunLimits().changed(limit_network, limit_read),
    )


async def plan_run(coordinator: Coordinator, pair: str, options: RunOptions, *, estimate: bool = True) -> Plan:
    """Ask both agents and make the plan; changes nothing. `estimate`: sample the disks, which takes some seconds."""
    known = await coordinator.get_pair(pair)
    return make_plan(known, await coordinator.findings(pair, sampled=estimate), options)


def refused(plan: Plan) -> Refused:
    """The error a plan with refusals ends in."""
    count = len(plan.refusals)
    return Refused(
        f"the plan for {plan.pair} has {count} reason{'s' if count != 1 else ''} against starting, nothing was "
        "touched: "
        "see to them and plan again",
        pair=plan.pair,
        refusals=count,
    )
