"""A whole site for end-to-end tests: two private hosts with their agents, a coordinator between them, pairs of VMs.

Everything a test does to failback goes through the `failback` command, as an administrator does; what it says about
disks comes from ``qemu-img compare`` and about guests from their own consoles.
"""

from __future__ import annotations

import contextlib
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab import console, disks
from tests.lab.agent_process import BULK_PORT, AgentProcess
from tests.lab.coordinator_process import CoordinatorProcess
from tests.lab.domain import LabDisk, Role, domain_xml
from tests.lab.guest import Guest
from tests.lab.monitor import Monitor
from tests.lab.pki import LabPki
from tests.lab.private_host import PrivateHost, PrivateNetwork

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class LabVm:
    """One VM of a pair, on its host."""

    host: PrivateHost
    name: str
    disks: tuple[LabDisk, ...]
    log: Path

    def is_running(self) -> bool:
        """Whether libvirt says so."""
        return self.host.virsh("domstate", self.name).strip() == "running"

    def monitor(self) -> Monitor:
        """A monitor of ours into its QEMU, which runs."""
        return Monitor(monitor_of(self.disks))

    def has_autostart(self) -> bool:
        """Whether it starts with its host."""
        return "enable" in self.host.virsh("dominfo", self.name).split("Autostart:")[1].split("\n")[0]

    def start(self) -> None:
        """Start it by hand and wait until its guest is up."""
        before = len(console.read(self.log))
        self.host.virsh("start", self.name)
        console.wait_ready(self.log, after=before)

    def sources(self) -> dict[str, Path]:
        """Current image by target, as the domain's definition says."""
        lines = self.host.virsh("domblklist", self.name).splitlines()[2:]
        return {target: Path(path) for target, path in (line.split(None, 1) for line in lines if line.strip())}


def monitor_of(images: Sequence[LabDisk]) -> Path:
    """Where a VM's monitor is: beside its first disk that is a file, in a folder that QEMU's user may write to."""
    return next(image.path for image in images if not image.path.is_block_device()).with_name("monitor")


@dataclass(frozen=True, slots=True)
class LabPair:
    """A registered pair."""

    name: str
    original: LabVm
    replica: LabVm

    def assert_same_disks(self) -> None:
        """The original's disks hold what the replica's bases hold, says ``qemu-img compare``; under a working
        snapshot they are its overlays."""
        tops = self.original.sources()
        for a, b in zip(self.original.disks, self.replica.disks, strict=True):
            top = tops[a.target]
            disks.assert_same(top, a.format if top == a.path else "qcow2", b.path, b.format, locked=True)


@dataclass
class Site:
    """Two hosts, ``prod`` and ``dr``, their agents, and a coordinator. Use `open_site`."""

    folder: Path
    production: PrivateHost
    dr: PrivateHost
    guest: Guest
    agents: dict[str, AgentProcess]
    coordinator: CoordinatorProcess

    def failback(self, *words: str, exit_code: int = 0) -> dict[str, Any]:
        """Run a verb and return its JSON object; the exit code must be `exit_code`, and no traceback be seen."""
        done = self.coordinator.run("--json", *words)
        what = (
            f"`failback {' '.join(words)}` ended with {done.code}:\n{done.output}\n{done.errors}\n{self._agents_said()}"
        )
        assert done.code == exit_code, what
        assert "Traceback" not in done.errors + done.output, what
        answer = done.json()
        assert isinstance(answer, dict), what
        return answer

    def spawn(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a verb in the background; its output goes to ``failback.log`` in the site's folder."""
        return self.coordinator.spawn("--json", *words, log=self.folder / "failback.log")

    @contextlib.contextmanager
    def bulk_stalled(self, after_bytes: int = 10_000) -> Iterator[None]:
        """Inside, a bulk connection that is opened carries `after_bytes` and then nothing arrives: a pass that starts
        here stops in its middle and stays there."""
        rule = ["INPUT", "-p", "tcp", "--dport", str(BULK_PORT), "-m", "connbytes", "--connbytes", f"{after_bytes}:"]
        rule += ["--connbytes-dir", "original", "--connbytes-mode", "bytes", "-j", "DROP"]
        for verb in ("-A", "-D"):
            done = self.production.run(["iptables", verb, *rule])
            assert done.returncode == 0, done.stderr
            if verb == "-A":
                yield

    def wait_for_status(
        self, pair: str, reached: Callable[[dict[str, Any]], bool], run: subprocess.Popen[bytes]
    ) -> dict[str, Any]:
        """Look until the status is as wanted; fails when the run ends before."""
        while run.poll() is None:
            status = self.failback("status", pair)
            if reached(status):
                return status
        said = (self.folder / "failback.log").read_text()
        raise AssertionError(f"the run ended too soon: {said[-1000:]}; the agents said: {self._agents_said()}")

    def _agents_said(self) -> str:
        return "\n".join(f"{a.name}: {a.log.read_text(errors='replace')[-2000:]}" for a in self.agents.values())

    # --- pairs ------------------------------------------------------------------------------------------------------

    def make_pair(
        self,
        name: str,
        *,
        formats: Sequence[disks.Format] = ("qcow2", "raw"),
        size_bytes: int = 48 * MIB,
        original_role: Role = "reader",
        replica_role: Role = "writer",
        ignore_acpi: bool = False,
        seed: int = 1,
        failed_over: bool = True,
    ) -> LabPair:
        """Define an original and its replica, equal at first; register them; with `failed_over`, start the replica
        (whose guest writes from then on), make its bare disks diverge, and record the failover."""
        folders = []
        for host in (self.production, self.dr):
            folder = host.images / name
            folder.mkdir()
            folder.chmod(0o777)
            folders.append(folder)
        original_disks = disks.make_set(folders[0], formats, size_bytes, seed=seed)
        replica_disks = disks.copy_set(original_disks, folders[1])
        original = self.define(self.production, name, original_disks, role=original_role)
        replica = self.define(self.dr, f"{name}-replica", replica_disks, role=replica_role, ignore_acpi=ignore_acpi)
        pair = LabPair(name, original, replica)
        self.failback("register", name, "--original", f"prod/{name}", "--replica", f"dr/{name}-replica")
        if failed_over:
            for disk in replica.disks:
                if disk.contents == "raw":
                    disks.diverge(disk.path, disk.format, seed=seed)
            replica.start()
            for disk in replica.disks if replica_role == "writer" else ():
                console.wait_for_writes(replica.log, disk.target, 2)
            self.failback("failover", name)
        return pair

    def define(
        self, host: PrivateHost, name: str, images: Sequence[LabDisk], *, role: Role, ignore_acpi: bool = False
    ) -> LabVm:
        """Define a VM with these disks, which exist; it is off."""
        log = host.images / f"{name}.console"
        xml = domain_xml(
            name,
            str(uuid.uuid4()),
            images,
            host.adopt(self.guest),
            log,
            role=role,
            ignore_acpi=ignore_acpi,
            monitor=monitor_of(images),
        )
        host.define(xml)
        return LabVm(host, name, tuple(images), log)


@contextlib.contextmanager
def open_site(folder: Path, guest: Guest, cache_dir: Path, *, qemu_user: str | None = None) -> Iterator[Site]:
    """Bring a site up, and take it down whole."""
    pki = LabPki(folder / "pki")
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(PrivateNetwork(folder))
        hosts: dict[str, PrivateHost] = {}
        agents: dict[str, AgentProcess] = {}
        for name, address in (("prod", "10.77.0.1"), ("dr", "10.77.0.2")):
            host = PrivateHost(name, folder / name, address, network, qemu_user=qemu_user, cache_dir=cache_dir)
            hosts[name] = stack.enter_context(host)
        for name, host in hosts.items():
            agent = AgentProcess(
                name, folder / f"{name}-agent", pki.agent(name), listen=host.address, host=host, scratch_dir=host.images
            )
            agents[name] = stack.enter_context(agent)
        coordinator = CoordinatorProcess(
            folder / "coordinator", pki.coordinator(), list(agents.values()), network=network
        )
        yield Site(folder, hosts["prod"], hosts["dr"], guest, agents, coordinator)
