"""Two embedded hosts with their agents and pairs of VMs: whole passes through the command, timed by its own journal."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.network import Link
from bench.placement import Image
from bench.ports import free_ports
from tests.lab import console
from tests.lab.agent_process import PROGRAM as AGENT
from tests.lab.agent_process import AgentProcess
from tests.lab.coordinator_process import PROGRAM as FAILBACK
from tests.lab.coordinator_process import CoordinatorProcess
from tests.lab.domain import LabDisk, domain_xml
from tests.lab.embed import embed_root, end_guests, share_capabilities
from tests.lab.embed_host import EmbedHost
from tests.lab.guest import Guest, build_guest
from tests.lab.monitor import Monitor
from tests.lab.pki import LabPki

REPOSITORY = Path(__file__).parents[1]
CONTROL_PORT, BULK_PORT = 9860, 9861
"""Of an agent that has a network of its own; on loopback any that are free."""
HOSTS = ("prod", "dr")
VERB_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class PairSpec:
    """A pair to be set up: its name, the original's and the replica's images, disk by disk."""

    name: str
    originals: tuple[Image, ...]
    replicas: tuple[Image, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass as the closing report tells it.

    Attributes:
        seconds: from the order to the proof that everything is flushed and read back.
        disks: the report's lines of this pass, see `coordinator.reports.DiskLine`.
    """

    seconds: float
    disks: tuple[Mapping[str, Any], ...]

    def total(self, name: str) -> int:
        """Sum over the disks of one of their quantities; 0 for one that this version does not report."""
        return sum(int(disk.get(name, 0)) for disk in self.disks)

    @property
    def rungs(self) -> str:
        """What it rested on, as reported; the rungs of several disks are joined by commas."""
        return ", ".join(sorted({str(disk["rung"]) for disk in self.disks}))

    @property
    def wire_bytes(self) -> int:
        """Payload on the wire, as reported."""
        return self.total("wire_bytes") or self.total("sent_bytes")


@dataclass(frozen=True, slots=True)
class Writer:
    """A guest that writes all the time, to the bare disks of its replica.

    Attributes:
        rate: rounds of writes per second, as far as they take no time; ``max`` for as many as it can.
    """

    rate: float | Literal["max"]


@dataclass(frozen=True, slots=True)
class Shape:
    """How a farm is made.

    Attributes:
        running: the replicas run, and the pass of their view over NBD is what is timed; else they are off.
        link: the agents are at its two ends, the coordinator beside it; on this machine's loopback when None.
        bulk_endpoint: address and port by which the source reaches the target's bulk port, where not directly.
        agents: what to run as the agent (words before ``--config``) by host; the installed agent when it is missing.
        writer: what the replicas' guests do; None: nothing.
    """

    running: bool = False
    link: Link | None = None
    bulk_endpoint: tuple[str, int] | None = None
    agents: Mapping[str, Sequence[str]] = field(default_factory=dict)
    writer: Writer | None = None


@dataclass(frozen=True, slots=True)
class Farm:
    """Pairs that are in Failover. Use `open_farm`."""

    coordinator: CoordinatorProcess
    agents: Mapping[str, AgentProcess]
    shape: Shape
    folder: Path

    def monitor(self, pair: str) -> Monitor:
        """A monitor of the replica, which runs."""
        return Monitor(self.folder / "dr" / f"{pair}.monitor")

    def failback(self, *words: str) -> dict[str, Any]:
        """Run a verb that must succeed; its JSON object."""
        answer: dict[str, Any] = json.loads(self.coordinator.must("--json", *words, timeout_s=VERB_TIMEOUT_S).output)
        return answer

    def run_pass(self, pair: str, *options: str) -> Pass:
        """Fail the pair back and take it back. The pass that is timed is the first, of the running replica's view, or
        the only one where the replica is off."""
        report = self.failback("start", "--yes", "--foreground", "--no-power-on", *options, pair)["report"]
        self.failback("undo", "--yes", pair)
        step = "pass:1" if self.shape.running else "last_pass"
        seconds = next(line["elapsed_s"] for line in report["steps"] if line["step"] == step and not line["undone"])
        return Pass(float(seconds), tuple(disk for disk in report["disks"] if disk["pass_name"] == step))

    def forget_maps(self) -> None:
        """Remove the target's digest maps: its next pass reads both sides."""
        for path in (self.folder / "prod-agent/state/maps").glob("*.map"):
            path.unlink()

    @property
    def source(self) -> AgentProcess:
        """The agent beside the replicas."""
        return self.agents["dr"]

    @property
    def target(self) -> AgentProcess:
        """The agent beside the originals."""
        return self.agents["prod"]


@contextlib.contextmanager
def open_farm(folder: Path, pairs: Sequence[PairSpec], shape: Shape | None = None) -> Iterator[Farm]:
    """Bring the hosts up around the images, and take everything down.

    Args:
        folder: made; short, for there will be sockets in it.
        pairs: each becomes a VM on either host, registered and in Failover.
        shape: see `Shape`.
    """
    shape = shape or Shape()
    folder.mkdir()
    guest = build_guest(REPOSITORY / ".lab")
    pki = LabPki(folder / "pki")
    with contextlib.ExitStack() as stack:
        agents: dict[str, AgentProcess] = {}
        for name in HOSTS:
            root = _root(folder / name)
            stack.callback(end_guests, root)
            _define(root, name, pairs, guest, shape)
            agents[name] = stack.enter_context(_agent(folder, name, pki, root, shape))
        for root in (folder / name for name in HOSTS):
            _remember_capabilities(root)
        endpoints = {"prod": shape.bulk_endpoint} if shape.bulk_endpoint else {}
        coordinator = CoordinatorProcess(
            folder / "coordinator",
            pki.coordinator(),
            list(agents.values()),
            program=[*(shape.link.beside() if shape.link else ()), str(FAILBACK)],
            bulk_endpoints=endpoints,
        )
        farm = Farm(coordinator, agents, shape, folder)
        for pair in pairs:
            farm.failback("register", pair.name, "--original", f"prod/{pair.name}", "--replica", f"dr/{pair.name}")
            farm.failback("failover", pair.name)
        if not shape.running:
            end_guests(folder / "dr")
        yield farm


def _root(root: Path) -> Path:
    root.mkdir()
    embed_root(root)
    share_capabilities(REPOSITORY / ".lab/bench-root", root)
    return root


def _remember_capabilities(root: Path) -> None:
    """What libvirt learned about QEMU, for the farms to come; a race with another benchmark does no harm."""
    known = REPOSITORY / ".lab/bench-root"
    if not known.exists():
        with contextlib.suppress(OSError, shutil.Error):
            share_capabilities(root, known)


def _define(root: Path, host_name: str, pairs: Sequence[PairSpec], guest: Guest, shape: Shape) -> None:
    is_dr = host_name == "dr"
    writer = shape.writer if is_dr else None
    with EmbedHost(root, keep_guests=True) as host:
        for pair in pairs:
            images = pair.replicas if is_dr else pair.originals
            disks = [
                LabDisk(f"vd{'abcdefgh'[number]}", image.path, image.format, "none" if writer is None else "raw")
                for number, image in enumerate(images)
            ]
            log = root / f"{pair.name}.console"
            xml = domain_xml(
                pair.name,
                str(uuid.uuid4()),
                disks,
                guest,
                log,
                role="idle" if writer is None else "writer",
                rate=1 if writer is None else writer.rate,
                monitor=root / f"{pair.name}.monitor" if is_dr else None,
            )
            host.define(xml)
            if is_dr:
                host.start(pair.name)  # a failover is recorded only of a replica that runs
                if shape.running:
                    console.wait_ready(log)


def _agent(folder: Path, name: str, pki: LabPki, root: Path, shape: Shape) -> AgentProcess:
    program = list(shape.agents.get(name, (str(AGENT),)))
    listen = "127.0.0.1"
    if shape.link is None:
        control_port, bulk_port = free_ports(2)
    else:
        end = shape.link.target if name == "prod" else shape.link.source
        program, listen = [*end.inside(), *program], end.address
        control_port, bulk_port = CONTROL_PORT, BULK_PORT
    return AgentProcess(
        name,
        folder / f"{name}-agent",
        pki.agent(name),
        uri=f"qemu:///embed?root={root}",
        listen=listen,
        control_port=control_port,
        bulk_port=bulk_port,
        program=program,
        environment={"PYTHONPATH": str(REPOSITORY)},
    )


def say(words: str) -> None:
    """Tell whoever watches how far it is; standard output is for the result alone."""
    print(words, file=sys.stderr, flush=True)
