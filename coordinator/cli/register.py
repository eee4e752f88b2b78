"""``failback register``: take a pair into the registry."""

from __future__ import annotations

import click

from coordinator.cli.parameters import DISK_MAPPING, PAIR, VM_PLACE
from coordinator.cli.report_view import show_pair
from coordinator.cli.session import Session
from coordinator.cli.verb import verb
from coordinator.model import DiskPair, Pair, PairRequest, Replication
from coordinator.runs import Coordinator
from coordinator.states import allowed_verbs


@verb("register", "Take a VM and its replica into the registry.")
@click.argument("pair", type=PAIR)
@click.option("--original", required=True, type=VM_PLACE, help="The VM on its production host, by name or UUID.")
@click.option("--replica", required=True, type=VM_PLACE, help="Its replica on the DR host.")
@click.option(
    "--disk",
    "disks",
    multiple=True,
    type=DISK_MAPPING,
    help="A disk by its target name at each side; if given, for every disk.",
)
@click.option(
    "--exclude-disk",
    "excluded",
    multiple=True,
    metavar="TARGET",
    help="Leave this disk of either VM, or host device, out; what it holds stays as it is. May be repeated.",
)
@click.option(
    "--replication",
    type=click.Choice([kind.value for kind in Replication], case_sensitive=False),
    help="How the replica is kept up to date: `path`, by a tool that writes its images at their paths (no restore "
    "point is kept then), or `domain`, by one that asks libvirt where they are.",
)
@click.option(
    "--in-failover", is_flag=True, help="The replica has taken over already (proven: original off, replica on)."
)
@click.pass_obj
def command(
    session: Session,
    pair: str,
    original: tuple[str, str],
    replica: tuple[str, str],
    disks: tuple[DiskPair, ...],
    excluded: tuple[str, ...],
    replication: str | None,
    in_failover: bool,
) -> None:
    """Take a VM and its replica into the registry as PAIR.

    Both agents are asked for their VM; its UUID is remembered, so that another VM of the same name is never taken for
    it. Disks are matched by equal target names unless --disk says otherwise; a disk of either VM that is not matched
    must be left out by --exclude-disk.

    A pair without a run is changed by registering it again under the same name: its mapping, what is left out, or a VM
    that was defined anew.

    \b
    Example:
      failback register web1 --original prod1/web1 --replica dr1/web1-replica \\
          --disk vda=sda --disk vdb=sdb --exclude-disk vdc
    """
    request = PairRequest(
        name=pair,
        original_host=original[0],
        original_vm=original[1],
        replica_host=replica[0],
        replica_vm=replica[1],
        disks=disks,
        excluded=excluded,
        in_failover=in_failover,
        replication=None if replication is None else Replication(replication),
    )

    async def registering(coordinator: Coordinator) -> tuple[bool, Pair]:
        known = {known.name for known in await coordinator.list_pairs()}
        return pair in known, await coordinator.register_pair(request)

    changed, made = session.run(registering)
    show_pair(session.output, made)
    verbs = sorted(verb.value for verb in allowed_verbs(made))
    ways = " or ".join(f"`failback {name} {pair}`" for name in (["plan", *verbs] if "start" in verbs else verbs))
    session.output.say(f"{'Changed' if changed else 'Taken into the registry'}. Next: {ways}.")
    session.output.finish({"verb": "register", "pair": made, "changed": changed})
