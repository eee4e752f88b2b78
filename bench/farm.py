"""Two embedded hosts with their agents and a pair of VMs that are off: whole passes, and nothing to boot."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.agent_process import AgentProcess
from tests.lab.coordinator_process import CoordinatorProcess
from tests.lab.domain import LabDisk, domain_xml
from tests.lab.embed import embed_root, end_guests
from tests.lab.embed_host import EmbedHost
from tests.lab.guest import Guest
from tests.lab.pki import LabPki

PAIR = "bench"


@dataclass
class Farm:
    """A pair whose replica is off: `failback` is one pass, from its images to the original's."""

    coordinator: CoordinatorProcess

    def failback(self, *words: str) -> dict[str, Any]:
        """Run a verb that must succeed."""
        answer: dict[str, Any] = json.loads(self.coordinator.must("--json", *words).output)
        return answer

    def pass_s(self) -> tuple[float, dict[str, Any]]:
        """Run the pass, take it back; returns the seconds of the pass (from its order to the proof that everything is
        flushed and read back) and the closing report."""
        report = self.failback("start", "--yes", "--foreground", "--no-power-on", PAIR)["report"]
        self.failback("undo", "--yes", PAIR)
        seconds = next(step["elapsed_s"] for step in report["steps"] if step["step"] == "last_pass")
        return float(seconds), report


@contextlib.contextmanager
def open_farm(folder: Path, guest: Guest, original: Path, replica: Path) -> Iterator[Farm]:
    """Bring the hosts up around two raw images, and take them down."""
    pki = LabPki(folder / "pki")
    with contextlib.ExitStack() as stack:
        agents = []
        for number, (name, image) in enumerate((("prod", original), ("dr", replica))):
            root = folder / name
            root.mkdir()
            embed_root(root)
            disk = LabDisk("vda", image, "raw", "none")
            with EmbedHost(root, keep_guests=True) as host:
                host.define(domain_xml(PAIR, str(uuid.uuid4()), [disk], guest, root / "console", role="idle"))
                if name == "dr":
                    host.start(PAIR)  # a failover is recorded only of a replica that runs
            agent = AgentProcess(
                name,
                folder / f"{name}-agent",
                pki.agent(name),
                uri=f"qemu:///embed?root={root}",
                control_port=9870 + 10 * number,
                bulk_port=9871 + 10 * number,
            )
            agents.append(stack.enter_context(agent))
        farm = Farm(CoordinatorProcess(folder / "coordinator", pki.coordinator(), agents))
        farm.failback("register", PAIR, "--original", f"prod/{PAIR}", "--replica", f"dr/{PAIR}")
        farm.failback("failover", PAIR)
        end_guests(folder / "dr")
        yield farm
