"""What `plan` and `start` share: the options of a run, and the plan made from what both agents say."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from coordinator.cli.parameters import DURATION_S, RATE, SWITCH_WHEN, WAY_HOME
from coordinator.errors import Refused
from coordinator.model import (
    Destination,
    LateEvidence,
    OnFailure,
    Plan,
    Rate,
    RunLimits,
    RunOptions,
    ShutdownPolicy,
    SwitchPolicy,
)
from coordinator.plan import make_plan
from coordinator.runs import Coordinator
from coordinator.switch_order import check_switch_time
from protocol.messages import Tracking

TRACKING = {"auto": Tracking.BITMAP, "overlay": Tracking.OVERLAY, "none": Tracking.NONE}
_OPTIONS = (
    click.option(
        "--to",
        type=WAY_HOME,
        metavar=WAY_HOME.name,
        default="original",
        show_default=True,
        help="Where to: the original, in place; or a VM restored beforehand elsewhere, whose disks are overwritten and "
        "which becomes the pair's original.",
    ),
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
        "--kill-after",
        "kill_after_s",
        type=DURATION_S,
        default="60s",
        show_default=True,
        help="With force: how long QEMU may take to end gracefully; then it is killed, its dirty bitmaps lost.",
    ),
    click.option(
        "--switch",
        "switch_when",
        type=SWITCH_WHEN,
        metavar=SWITCH_WHEN.name,
        default=SwitchPolicy.AUTO.value,
        show_default=True,
        help="When to switch: as soon as little is left, at a time (2031-01-31T02:00+01:00, or the next 02:00), or "
        "when `failback switch` says so.",
    ),
    click.option(
        "--max-downtime",
        "max_downtime_s",
        type=DURATION_S,
        help="Switch only while the expected downtime is at most this; otherwise go on synchronising.",
    ),
    click.option(
        "--background-interval",
        "background_s",
        type=DURATION_S,
        default="5m",
        show_default=True,
        help="How often a pass keeps what is left small while the run waits to switch.",
    ),
    click.option(
        "--late-evidence",
        type=click.Choice([policy.value for policy in LateEvidence]),
        default=LateEvidence.RETURN.value,
        show_default=True,
        help="If evidence is lost when the replica goes off, and the downtime would be longer than --max-downtime, or "
        "much longer than expected: put it back into service, or go on.",
    ),
    click.option(
        "--on-failure",
        type=click.Choice([policy.value for policy in OnFailure]),
        default=OnFailure.ROLLBACK.value,
        show_default=True,
        help="If the switchover fails after the replica went off and before the original may start: put the replica "
        "back into service, or leave everything off and wait for you to look.",
    ),
    click.option(
        "--track",
        type=click.Choice(sorted(TRACKING)),
        default="auto",
        show_default=True,
        help="How to record what the replica writes between passes. auto: by dirty bitmaps, which qcow2 disks have; "
        "overlay: by live overlays as well, for the other disks; none: not at all, each pass reads the replica whole.",
    ),
    click.option(
        "--freeze-guest", is_flag=True, help="Freeze the guest's file systems for the instant of the first view."
    ),
    click.option(
        "--audit/--no-audit",
        default=True,
        help="After the switchover, read the replica whole and compare it with what the original started from "
        "(default: do so). It costs no downtime.",
    ),
    click.option(
        "--verify",
        type=click.Choice(["written", "full"]),
        default="written",
        show_default=True,
        help="Before the original starts, read back what was written, or both sides whole, which costs downtime.",
    ),
    click.option(
        "--allow-larger-target", is_flag=True, help="Zero what is behind the replica's size on a larger disk."
    ),
    click.option(
        "--apply-config",
        is_flag=True,
        help="Apply what was changed of the replica's definition (memory, vCPUs, added NICs) to the original's.",
    ),
    click.option(
        "--create-missing", is_flag=True, help="Create the original's disks that only the replica has; sparse files."
    ),
    click.option(
        "--protect-original/--no-protect-original",
        default=None,
        help="Keep the original as it is under a working snapshot, so that undo and cancel give it back byte for byte "
        "and commit merges it away; or overwrite its disks in place, the default.",
    ),
    click.option(
        "--discard-divergence",
        is_flag=True,
        help="Go on though the original was written to after the failover; that is lost. --yes does not imply it.",
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
    to: Destination,
    power_on: bool,
    power_off_original: bool,
    shutdown_timeout_s: float,
    shutdown_policy: str,
    kill_after_s: float,
    switch_when: tuple[SwitchPolicy, float | None],
    max_downtime_s: float | None,
    background_s: float,
    late_evidence: str,
    on_failure: str,
    track: str,
    freeze_guest: bool,
    audit: bool,
    verify: str,
    allow_larger_target: bool,
    apply_config: bool,
    create_missing: bool,
    protect_original: bool | None,
    discard_divergence: bool,
    limit_network: Rate | None,
    limit_read: Rate | None,
) -> RunOptions:
    """The options as values; `UsageError` where the time to switch is past."""
    switch, switch_at_s = switch_when
    check_switch_time(switch_at_s, time.time())
    return RunOptions(
        to=to,
        power_on=power_on,
        power_off_original=power_off_original,
        shutdown_timeout_s=shutdown_timeout_s,
        shutdown_policy=ShutdownPolicy(shutdown_policy),
        allow_larger_target=allow_larger_target,
        apply_config=apply_config,
        create_missing=create_missing,
        protect_original=protect_original,
        discard_divergence=discard_divergence,
        limits=RunLimits().changed(limit_network, limit_read),
        kill_after_s=kill_after_s,
        switch=switch,
        switch_at_s=switch_at_s,
        max_downtime_s=max_downtime_s,
        background_s=background_s,
        late_evidence=LateEvidence(late_evidence),
        on_failure=OnFailure(on_failure),
        track=TRACKING[track],
        freeze_guest=freeze_guest,
        verify_full=verify == "full",
        audit=audit,
    )


async def plan_run(coordinator: Coordinator, pair: str, options: RunOptions, *, estimate: bool = True) -> Plan:
    """Ask both agents and make the plan; changes nothing. `estimate`: sample the disks, which takes some seconds."""
    sought = await coordinator.destination(pair, options)
    if sought.pair is None:
        return Plan(pair=pair, refusals=sought.refusals, disks=(), steps=())
    plan = make_plan(sought.pair, await coordinator.findings(pair, sampled=estimate, wanted=sought.pair), options)
    return replace(plan, refusals=(*sought.refusals, *plan.refusals), notes=(*sought.notes, *plan.notes))


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
