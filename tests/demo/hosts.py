"""A hypervisor host of the demo: an embedded libvirt root with one VM, and, once prepared, the agent that manages it.

An embedded root belongs to one process at a time. While the VMs are prepared that is the lab's; then it is the agent,
which finds the running guest and takes it over, as it would after a restart of its own.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab import console, embed
from tests.lab.agent_process import PROGRAM, AgentError, AgentProcess, Identity
from tests.lab.domain import LabDisk, domain_xml
from tests.lab.embed_host import EmbedHost
from tests.lab.guest import Guest

OWN_SESSION = "setsid"  # util-linux; the terminal's Ctrl-C is then not the agent's


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a console, to wait for what comes after it."""

    characters: int


class DemoHost:
    """One host with one VM.

    Args:
        name: the host's name, as its certificate will say.
        vm: the VM's name.
        folder: the host's folder; made.
        address: where its agent will listen.
        pki: folder of the certificates.
    """

    def __init__(self, name: str, vm: str, folder: Path, address: str, pki: Path) -> None:
        self.name = name
        self.vm = vm
        self.root = folder / "root"
        self.images = folder / "disks"
        self.console = folder / f"{vm}.console"
        self.images.mkdir(parents=True)
        self.agent = AgentProcess(
            name,
            folder,
            Identity(pki / "ca.crt", pki / f"{name}.crt", pki / f"{name}.key"),
            uri=embed.embed_root(self.root),
            listen=address,
            program=(OWN_SESSION, str(PROGRAM)),
        )

    @contextlib.contextmanager
    def by_hand(self) -> Iterator[EmbedHost]:
        """The hypervisor without an agent; guests outlive it."""
        with EmbedHost(self.root, keep_guests=True) as hypervisor:
            yield hypervisor

    def define(self, hypervisor: EmbedHost, disks: Sequence[LabDisk], guest: Guest) -> None:
        """Define the VM: a service that writes to all its disks as long as it runs."""
        hypervisor.define(domain_xml(self.vm, str(uuid.uuid4()), disks, guest, self.console))

    def mark(self) -> Mark:
        """The end of what the guest has said so far."""
        return Mark(len(console.read(self.console)))

    def wait_for_boot(self, since: Mark) -> None:
        """Wait until a guest that boots after `since` has read its disks."""
        console.wait_ready(self.console, after=since.characters)

    def wait_for_work(self, rounds: int) -> None:
        """Wait until the guest has written that often to its last disk."""
        console.wait_for_writes(self.console, "vdb", rounds)

    @property
    def guests(self) -> int:
        """How many QEMU processes this host has, says /proc."""
        return len(embed.guests(self.root))

    def end(self) -> None:
        """End the agent, then pull the plug of what still runs."""
        try:
            if self.agent.running:
                self.agent.stop()
        except AgentError as error:
            print(error)
        finally:
            embed.end_guests(self.root)
