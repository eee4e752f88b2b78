"""The demo from beginning to end: a disaster, a failover, the failback, and how it is made final or taken back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from tests.demo import images, proofs
from tests.demo.closing import closing_table
from tests.demo.folder import HOSTS, RunFolder, free_network
from tests.demo.hosts import DemoHost
from tests.demo.proofs import Proof
from tests.demo.terminal import Terminal
from tests.lab.agent_process import BULK_PORT, CONTROL_PORT, Identity
from tests.lab.console import Record
from tests.lab.coordinator_process import CoordinatorProcess
from tests.lab.domain import LabDisk
from tests.lab.guest import build_guest

PAIR = "web"
BEFORE_DISASTER = 8
AFTER_FAILOVER = 8


class ProofFailed(Exception):
    """A claim does not hold; the demo has failed."""


class Story:
    """Everything between an empty folder and a closing table.

    Args:
        folder: the demo's.
        stack: takes what must be ended, whatever happens.
    """

    def __init__(self, folder: RunFolder, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        pki = folder.path / "pki"
        network = free_network((CONTROL_PORT, BULK_PORT))
        self.original = DemoHost(HOSTS[0], PAIR, folder.path / HOSTS[0], f"{network}.1", pki)
        self.replica = DemoHost(HOSTS[1], f"{PAIR}-replica", folder.path / HOSTS[1], f"{network}.2", pki)
        for host in (self.original, self.replica):
            stack.callback(host.end)
        identity = Identity(pki / "ca.crt", pki / "coordinator.crt", pki / "coordinator.key")
        agents = [self.original.agent, self.replica.agent]
        self.coordinator = CoordinatorProcess(folder.path / "coordinator", identity, agents)
        self.terminal = Terminal({"FAILBACK_CONFIG": str(self.coordinator.config)})
        self.proofs: list[Proof] = []
        self.stale: dict[str, Record] = {}
        self.replica_disks: Sequence[LabDisk] = ()

    # --- the world before ------------------------------------------------------------------------------------------

    def disaster(self) -> None:
        """The original works and is replicated; its host is lost; the replica takes over and work goes on there."""
        say = self.terminal.remark
        say(f"Preparing the lab guest, a Linux of 15 MB; it is kept in {shown(self.folder.cache)}.")
        guest = build_guest(self.folder.cache)
        say(
            f"A VM {self.original.vm} with two disks on the production host {self.original.name}. Its guest writes a "
            "numbered record with a chained checksum to each disk, all the time."
        )
        disks = images.make_original(self.original.images)
        with self.original.by_hand() as hypervisor:
            self.original.define(hypervisor, disks, guest)
            hypervisor.start(self.original.vm)
            self.original.wait_for_work(BEFORE_DISASTER)
            hypervisor.shut_down(self.original.vm)
        self.stale = proofs.left_by(self.original)
        say(
            f"It was replicated to {self.replica.vm} on the DR host {self.replica.name}. Then {self.original.name} was "
            f"lost. The replica was started, and people have worked on it since: files came and went, blocks were "
            "zeroed and discarded, and the guest goes on writing."
        )
        self.replica_disks = images.make_replica(disks, self.replica.images)
        with self.replica.by_hand() as hypervisor:
            self.replica.define(hypervisor, self.replica_disks, guest)
            hypervisor.start(self.replica.vm)
            self.replica.wait_for_work(AFTER_FAILOVER)
        self.prove(proofs.same_history(self.replica, self.stale, "the replica began with what the original had then"))

    def install(self) -> None:
        """Certificates, agents, the coordinator's configuration: what docs/INSTALL.md tells."""
        terminal = self.terminal
        terminal.remark(
            f"{self.original.name} is back, its disks stale. Failback is installed: certificates for both hosts, an "
            "agent on each, and a coordinator that knows where they are."
        )
        terminal.echo(f"export FAILBACK_CONFIG={shown(self.coordinator.config)}")
        terminal.echo("cat $FAILBACK_CONFIG")
        terminal.show(Text(self.coordinator.config.read_text().rstrip()))
        terminal.failback("pki", "init")
        for host in (self.original, self.replica):
            terminal.failback("pki", "issue", host.name)
        for host in (self.original, self.replica):
            terminal.echo(f"failback-agent --config {shown(host.agent.config)} &")
            host.agent.start()

    # --- the main job ----------------------------------------------------------------------------------------------

    def fail_back(self) -> dict[str, Record]:
        """Register, record the failover, plan, start; then the original's own console is asked. Returns what the
        replica left."""
        terminal, original, replica = self.terminal, self.original, self.replica
        terminal.remark("Take the pair into the registry, and record that the replica took over.")
        terminal.failback(
            "register",
            PAIR,
            "--original",
            f"{original.name}/{original.vm}",
            "--replica",
            f"{replica.name}/{replica.vm}",
        )
        terminal.failback("failover", PAIR)
        terminal.remark("What would a failback do? This changes nothing.")
        terminal.failback("plan", PAIR)
        terminal.remark("Do it. The replica serves, and writes, until the switchover.")
        before = original.mark()
        terminal.failback("start", PAIR, "--yes", "--power-on")
        terminal.remark(f"Waiting for {original.vm} to boot and to say on its own console what it finds on its disks.")
        original.wait_for_boot(before)
        left = proofs.left_by(replica)
        self.prove(
            proofs.clean_end(replica, left, self.replica_disks),
            proofs.same_history(original, left, f"{original.vm} found everything, up to that last write"),
            proofs.newer(left, self.stale, original),
            proofs.works(original, left),
            proofs.only_runs(original, replica),
        )
        return left

    def commit(self) -> None:
        """Make it final."""
        self.terminal.remark("The failback may still be undone. Make it final, without keeping a restore point.")
        self.terminal.failback("commit", PAIR, "--restore-point", "drop", "--yes")
        self.prove(
            proofs.on_its_own_disks(self.replica, self.replica_disks),
            proofs.only_runs(self.original, self.replica),
            self.state_is("Ready", "original"),
        )

    def undo(self, left: dict[str, Record]) -> None:
        """Take it back; the replica must run on exactly what it held, whatever the original wrote meanwhile."""
        self.terminal.remark("The original has been writing. Take the failback back nevertheless.")
        before = self.replica.mark()
        self.terminal.failback("undo", PAIR, "--yes")
        self.terminal.remark(f"Waiting for {self.replica.vm} to boot and to say what it finds.")
        self.replica.wait_for_boot(before)
        self.prove(
            proofs.same_history(self.replica, left, f"{self.replica.vm} found exactly its own last write"),
            proofs.works(self.replica, left),
            proofs.on_its_own_disks(self.replica, self.replica_disks),
            proofs.only_runs(self.replica, self.original),
            self.state_is("Failover", "replica"),
        )

    def close(self) -> None:
        """The books: status, journal, and the closing table from the product's own report."""
        terminal = self.terminal
        terminal.remark("Where the pair stands, and what the journal says.")
        terminal.failback("status", PAIR)
        terminal.failback("history", PAIR)
        answer = terminal.ask("history", PAIR, "--report")
        (self.folder.real / "report.json").write_text(json.dumps(answer, indent=2) + "\n")
        terminal.remark("In sum, from `failback --json history web --report` and from the proofs above.")
        terminal.show(closing_table(answer["report"], self.proofs))

    # --- proofs ----------------------------------------------------------------------------------------------------

    def state_is(self, state: str, newest: str) -> Proof:
        """What the registry says; everything else is proven without it."""
        status = self.terminal.ask("status", PAIR)
        holds = (status["state"], status["newest"]) == (state, newest)
        seen = f"{status['state']}, {status['newest']}"
        return Proof(f"the pair is in {state}, its newest side the {newest}", holds, seen)

    def prove(self, *found: Proof) -> None:
        """Show each; raise `ProofFailed` if one does not hold."""
        self.proofs += found
        for proof in found:
            line = Table.grid(padding=(0, 1))
            word = Text("proof", style="bold green") if proof.holds else Text("FAILS", style="bold red")
            line.add_row(word, f"{proof.claim}: {proof.seen}")
            self.terminal.show(line)
        failed = [proof for proof in found if not proof.holds]
        if failed:
            raise ProofFailed("; ".join(f"{proof.claim}: {proof.seen}" for proof in failed))


def shown(path: Path) -> str:
    """The path as a person would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def tell(folder: RunFolder, *, undo: bool) -> None:
    """Tell the whole story.

    Raises:
        ProofFailed, tests.demo.terminal.CommandFailed, tests.lab.console.ConsoleTimeout: it did not go as it must.
    """
    with contextlib.ExitStack() as stack:
        story = Story(folder, stack)
        story.disaster()
        story.install()
        left = story.fail_back()
        if undo:
            story.undo(left)
        else:
            story.commit()
        story.close()
        story.terminal.remark(f"That took {story.terminal.elapsed_s:.0f} s.")
