"""What root does with `failback-agent` on the host itself: fences by hand, and the check of the host."""

from __future__ import annotations

import os
import pwd
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import click

from agent import checkup, fence_install, hand, local
from agent.config import Config, load
from agent.errors import AgentError, ConfigError
from agent.hand import ListedFence, Listing
from agent.ledger import LedgerBusy
from agent.lift_record import LiftRecord
from protocol.messages import HookState

T = TypeVar("T")
EXIT_FAILED = 1
EXIT_USAGE = 2
AGENT_COMES_OR_GOES_S = 30.0
"""An agent that starts or ends has the ledger and does not listen."""
POLL_S = 0.1


@click.group()
def fence() -> None:
    """Fences: what keeps VMs from starting on this host. Works without coordinator and network."""


@fence.command("list", short_help="Show what is fenced on this host, and why.")
@click.pass_obj
def list_command(path: Path) -> None:
    """Show what is fenced on this host: why, since when, for which pair and run."""
    _end(path, lambda config: _show(_listing(config), config))


@fence.command("lift", short_help="Lift every fence of a VM by hand.")
@click.argument("vm")
@click.option("--reason", required=True, help="Why; kept in the agent's ledger and shown to later runs.")
@click.pass_obj
def lift_command(path: Path, vm: str, reason: str) -> None:
    """Lift every fence of VM (its name or UUID): image locks, hook, autostart as it was before.

    Works whether the agent runs or not. A run that counts on the fence stops; disks that are torn stay called torn, and
    are yours to judge.

    \b
    Example:
      failback-agent fence lift web1 --reason "the DR site is gone, this is the only copy"
    """

    def lift(config: Config) -> None:
        if not reason.strip():
            raise click.UsageError("say why, as in --reason TEXT")
        _tell_lifted(_lift(config, vm, by=_person(), reason=reason.strip()))

    _end(path, lift)


@fence.command("install", short_help="Put libvirt's hook into place and prove it.")
@click.pass_obj
def install_command(path: Path) -> None:
    """Put libvirt's hook into place, which refuses fenced VMs also where no agent runs, and prove that it works."""

    def put(config: Config) -> None:
        proof = fence_install.install(config)
        click.echo(f"the fence hook is {fence_install.hook_path(config)}; proven: {proof}")

    _end(path, put)


@fence.command("remove")
@click.pass_obj
def remove_command(path: Path) -> None:
    """Take libvirt's hook away; autostart and image locks stay."""

    def take(config: Config) -> None:
        gone = fence_install.remove(config)
        click.echo(f"the fence hook {fence_install.hook_path(config)} {'is removed' if gone else 'was not there'}")

    _end(path, take)


@click.command(short_help="Check this host, and which fences are in place.")
@click.pass_obj
def check(path: Path) -> None:
    """Check this host: libvirt, tools, certificates, state folder, and which fences are in place.

    One line each, with its cure. Exit code 1 where something is wrong.
    """

    def look(config: Config) -> None:
        results = checkup.check_host(config)
        for result in results:
            click.echo(f"{'ok   ' if result.well else 'WRONG'} {result.what}")
        if not all(result.well for result in results):
            sys.exit(EXIT_FAILED)

    _end(path, look)


def _end(path: Path, work: Callable[[Config], None]) -> None:
    """Do it; what a person can get wrong ends in one sentence."""
    try:
        work(load(path))
    except ConfigError as error:
        click.echo(f"failback-agent: {error.sentence}", err=True)
        sys.exit(EXIT_USAGE)
    except AgentError as error:
        click.echo(f"failback-agent: {error.sentence}", err=True)
        sys.exit(EXIT_FAILED)


def with_agent_or_without(online: Callable[[], T], offline: Callable[[], T]) -> T:
    """Ask the agent that runs; where none does, do it here, which keeps one from starting meanwhile.

    Raises:
        AgentError: of either; one that neither answers nor lets go of its ledger.
    """
    deadline = time.monotonic() + AGENT_COMES_OR_GOES_S
    while True:
        try:
            return online()
        except local.NoAgent:
            pass
        try:
            return offline()
        except LedgerBusy:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def _listing(config: Config) -> Listing:
    def offline() -> Listing:
        with hand.without_agent(config) as (keeper, _):
            return hand.listing(keeper, agent_runs=False)

    return with_agent_or_without(lambda: local.asked_listing(config.runtime_dir), offline)


def _lift(config: Config, vm: str, *, by: str, reason: str) -> LiftRecord:
    def offline() -> LiftRecord:
        with hand.without_agent(config) as (keeper, evidence):
            return hand.lift(keeper, evidence, vm, by=by, reason=reason)

    return with_agent_or_without(lambda: local.asked_lift(config.runtime_dir, vm, by=by, reason=reason), offline)


def _person() -> str:
    """Who sits at this terminal, as far as the system knows."""
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"uid {uid}"
    behind = os.environ.get("SUDO_USER", "")
    return f"{behind} (as {name})" if behind and behind != name else name


def _tell_lifted(record: LiftRecord) -> None:
    vm = record.vm_name or record.vm_uuid
    click.echo(f"the VM {vm} is not fenced any more (it was, for the pair {record.pair} as its {record.side})")
    if record.autostart_due:
        click.echo(
            "libvirt does not answer, so that its autostart could not be given back: the agent does that as soon as "
            f"both run, or you with `virsh autostart {vm}`",
            err=True,
        )
    if record.condition == "torn":
        click.echo(
            f"its disks are torn: written in part by the run {record.run} and not verified; do not boot them unless "
            "you know what they hold",
            err=True,
        )


def _show(listing: Listing, config: Config) -> None:
    for listed in listing.fences:
        click.echo(_fence_words(listed, listing, config))
    for lifted in listing.lifts:
        click.echo(
            f"{lifted.vm_name or lifted.vm_uuid}: not fenced; {lifted.by} lifted the fence of the pair {lifted.pair} "
            f"at {_moment(lifted.at_s)} ({lifted.reason})"
            + ("; its autostart is given back when libvirt answers" if lifted.autostart_due else "")
        )
    if not listing.fences:
        click.echo("no VM is fenced on this host")
    elif not listing.agent_runs:
        click.echo("no agent runs, so that no image is locked: `systemctl start failback-agent`", err=True)


def _fence_words(listed: ListedFence, listing: Listing, config: Config) -> str:
    held = "autostart off"
    if fence_install.hook_state(config) is HookState.INSTALLED:
        held += ", hook"
    if listing.agent_runs:
        held += ", images locked" if not listed.unlocked else f", NOT locked: {', '.join(listed.unlocked)}"
    condition = f", disks {listed.condition}" if listed.side == "original" else ""
    since = f" since {_moment(listed.since_s)}" if listed.since_s else ""
    return (
        f"{listed.vm_name or listed.vm_uuid}: fenced for the pair {listed.pair} as its {listed.side}, run {listed.run}"
        f"{since}{condition} ({held})"
    )


def _moment(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
