"""The invariants I1 to I6, asserted as things happen."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agent.sync.map_file import HEADER_BYTES
from agent.tags import tag_of
from agent.virt.seam import PowerState
from protocol.messages import FenceVm, LiftFence, Reply, Request, TakePair, ViewOpened
from tests.simulation.core import ORDER, REQUEST, Chaos, Violation
from tests.simulation.storage import PAGE

if TYPE_CHECKING:
    from pathlib import Path

    from tests.simulation.machines import SimDomain, SimMachine

PAIR = "web"


@dataclass(eq=False)
class Monitor:
    """Sees everything.

    Attributes:
        original_is_current: the tool has started the original and not the replica since.
        tampered: a bitmap has lied, so that only the audit can know.
        differs: the original was started from something else than the replica's last state, after such a lie.
        acked: the highest epoch each host has acknowledged.
        called_off: a person has said that the original stays off; who starts it all the same does so by hand.
        holds: a switchover of the run that fails is held (``--on-failure hold``).
        forward_only: and what works on it now was not asked to take it back.
        kept: what the original's disks hold under its working snapshot.
        holder: the coordinator that has taken the pair over, by host.
        guarding: hosts whose agent serves, and so has taken the locks of its fences.
        views: the content of every view by name, disk by disk of the replica.
    """

    chaos: Chaos
    original: SimDomain = field(init=False)
    replica: SimDomain = field(init=False)
    original_is_current: bool = False
    tampered: bool = False
    differs: bool = False
    holds: bool = False
    called_off: bool = False
    forward_only: bool = False
    acked: dict[str, int] = field(default_factory=dict)
    fenced: dict[str, bool] = field(default_factory=dict)
    views: dict[str, dict[str, bytes]] = field(default_factory=dict)
    frozen: dict[Path, int] = field(default_factory=dict)
    kept: dict[str, bytes] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    guarding: set[str] = field(default_factory=set)
    _parsed: dict[tuple[str, bytes], Any] = field(default_factory=dict)

    def look(self) -> None:
        """After every event: I3, and I1 as it is."""
        for path, version in self.frozen.items():
            if self.replica.machine.storage.state(path).version != version:
                raise Violation(f"I3: {path.name} of the replica changed while it was off")
        hands = {"hand", "boot"}
        both = self.original.state is not PowerState.OFF and self.replica.state is not PowerState.OFF
        if both and not hands & {self.original.started_by, self.replica.started_by}:
            raise Violation("I1: original and replica run at the same time")

    # --- machines -----------------------------------------------------------------------------------------------------

    def started(self, domain: SimDomain) -> None:
        """A VM has begun to run."""
        self.chaos.say(f"*** {domain.name} of {domain.machine.hostname} runs, started by {domain.started_by}")
        if domain.started_by == "autostart" and not self.fenced.get(domain.uuid, False):
            domain.started_by = "boot"
        fenced = self.fenced.get(domain.uuid, False) and self.durable_fence(domain.machine, domain.uuid)
        if domain.started_by == "hand" and fenced and self.is_guarded(domain):
            raise Violation(f"I1: {domain.name} of {domain.machine.hostname} is fenced, its agent lives, and it starts")
        if domain.started_by == "autostart" and domain is self.original and not self.original_is_current:
            raise Violation("I5: the original was fenced, and its host starts it at boot")
        if domain is self.replica:
            self.frozen.clear()
            self._require_same(domain, self.replica, "I3: the replica is not what it was when it went off")
            if domain.started_by == "tool":
                if self.forward_only:
                    raise Violation("hold: the replica is put back into service, and nobody has said so")
                self.original_is_current = False
            return
        if domain.started_by != "tool" and not self.called_off and self._is_released(domain):
            domain.started_by = "tool"  # the switchover had freed it: somebody was quicker
        if domain.started_by != "tool":
            domain.memory = None if not self.original_is_current else domain.memory
            return
        if self._condition(domain) == "torn":
            raise Violation("I2: a torn original was started")
        if self.original_is_current:
            self._require_same(domain, domain, "I4: the original lost what it had")
            return
        assert self.replica.memory is not None
        try:
            self._require_same(domain, self.replica, "I2: the original does not hold the replica's last state")
        except Violation:
            if not self.tampered:
                raise
            self.differs = True
        domain.memory = self.replica.memory.copy()
        for target, held in domain.memory.expected.items():
            held[:] = domain.machine.storage.content(domain.disks[target].path)
        self.original_is_current = True

    def _is_released(self, original: SimDomain) -> bool:
        fenced = self.durable_fence
        return fenced(self.replica.machine, self.replica.uuid) and not fenced(original.machine, original.uuid)

    def ended(self, domain: SimDomain) -> None:
        """A VM runs no more."""
        self.chaos.say(f"*** {domain.name} of {domain.machine.hostname} is off")
        if domain is self.replica:
            states = domain.machine.storage.state
            self.frozen = {top.path: states(top.path).version for top in domain.disks.values()}

    def lost_power(self, machine: SimMachine) -> None:
        """Its storage has lost what it could: what was acknowledged must still be there."""
        for domain in machine.domains.values():
            sim: Any = domain
            if sim.memory is None or (sim is self.original and not self.original_is_current):
                continue
            for target, top in domain.disks.items():
                sim.memory.after_crash(target, machine.storage.content(top.path))
        files = machine.storage.files
        self.frozen = {path: files[path].version if path in files else was for path, was in self.frozen.items()}
        for record in self.durable(machine, "equals.json").get("disks", ()):
            if record["torn"] or record["view"] not in self.views or self.original_is_current:
                continue
            view = self.views[record["view"]]
            path = self.original.disks[record["target"]].path
            if record["target"] in view and machine.storage.content(path) != view[record["target"]]:
                raise Violation(f"I5: {record['target']} was said to equal {record['view']}, and lost some of it")

    def _require_same(self, domain: SimDomain, like: SimDomain, sentence: str) -> None:
        assert like.memory is not None
        for target, top in domain.disks.items():
            found = domain.machine.storage.content(top.path)
            wanted = bytes(like.memory.expected[target])
            if found != wanted:
                page = next(p for p in range(0, len(found), 4096) if found[p : p + 4096] != wanted[p : p + 4096])
                raise Violation(f"{sentence} ({target}, first at {page})")

    def overlaid(self, domain: Any, name: str) -> None:
        """Overlays of the original came, or are gone: its disks are under its working snapshot, or given back."""
        if domain is not self.original or name not in ("protect", "unprotect", "merge_protection"):
            return
        contents = {
            target: domain.machine.storage.content(image.path)
            for target, top in domain.disks.items()
            for image in list(top.chain())[-1:]
        }
        if name == "unprotect" and self.kept and contents != self.kept:
            raise Violation("undo: the original that was given back is not what it was before the run")
        self.kept = contents if name == "protect" else {}

    # --- agents -------------------------------------------------------------------------------------------------------

    def acts(self, host: str, what: str) -> None:
        """An agent changes something under the order that its task carries out (I6)."""
        order = ORDER.get()
        if order is not None and order.place != self.holder.get(host, order.place):
            raise Violation(f"I6: {host} does {what} for a coordinator from which the pair was taken")
        if order is not None and order.epoch < self.acked.get(host, 0):
            raise Violation(
                f"I6: {host} does {what} under epoch {order.epoch} after it acknowledged {self.acked[host]}"
            )

    def before_target_write(self, machine: SimMachine, vm_uuid: str, target: str) -> None:
        """I5: before the first byte the original is torn, durably, and nothing says that the disk equals a view."""
        self.acts(machine.hostname, "a write")
        if self._condition(self.original) != "torn":
            raise Violation("I5: a write to the original before it is durably torn")
        for record in self.durable(machine, "equals.json").get("disks", ()):
            if (record["vm_uuid"], record["target"]) == (vm_uuid, target) and not record["torn"]:
                raise Violation(f"I5: a write to {target}, which is still said to equal {record['view']}")
        if not self.durable_fence(machine, vm_uuid):
            raise Violation("I1: a write to an original that is not fenced")
        digests = machine.folder / "state" / "maps" / f"{vm_uuid}-{target}.map"
        # One whose file has failed is left behind unused, and proves nothing by its stamp.
        if digests.exists() and "mapping" not in machine.storage.tripped:
            held = machine.storage.state(digests).dirty.get(HEADER_BYTES // PAGE)
            mark = held[:1] if held is not None else digests.read_bytes()[HEADER_BYTES : HEADER_BYTES + 1]
            if mark != b"\xff":
                raise Violation(f"6: a write to {target} whose digest map is not durably marked as unknown there")
        if self.original.state is not PowerState.OFF:
            raise Violation("I1: a write to an original that runs")

    def asked(self, request: Request) -> None:
        """An order is about to be carried out. Whether a fence is lifted is not known until it is answered."""
        if isinstance(request, LiftFence):
            self.fenced[request.vm_uuid] = False

    def answered(self, host: str, request: Request, reply: Reply) -> None:
        """An order was carried out, and that is about to be said."""
        order = getattr(request, "order", None)
        if order is not None:
            self.acked[host] = max(self.acked.get(host, 0), order.epoch)
        if isinstance(request, TakePair):
            self.holder[host] = request.order.place
        if isinstance(request, FenceVm):
            vm = self.original if request.vm_uuid == self.original.uuid else self.replica
            if not self.durable_fence(vm.machine, vm.uuid):
                raise Violation(f"I5: {host} acknowledges a fence that a crash would undo")
            self.fenced[request.vm_uuid] = True
        if isinstance(reply, ViewOpened):
            view = self.replica.view
            if view is not None:
                self.views[reply.view] = dict(view.frozen)
            else:
                assert self.replica.memory is not None
                self.views[reply.view] = {t: bytes(held) for t, held in self.replica.memory.expected.items()}

    def began(self, host: str, epoch: int) -> None:
        """An agent has read its ledger."""
        if epoch < self.acked.get(host, 0):
            raise Violation(f"I5: {host} acknowledged epoch {self.acked[host]} and remembers {epoch}")

    def is_guarded(self, domain: SimDomain) -> bool:
        """Whether the agent beside it lives."""
        return domain.machine.hostname in self.guarding

    def drops(self, machine: SimMachine, tags: set[str]) -> None:
        """Checkpoints go while the replica serves: not those since which the target proves anything (section 6)."""
        if REQUEST.get() != "DropCheckpoints" or self.replica.state is PowerState.OFF:
            return
        for record in self.durable(self.original.machine, "equals.json").get("disks", ()):
            if tag_of(record["view"]) in tags:
                raise Violation(
                    f"6: the checkpoint of {record['view']} is deleted, which is all that the target equals"
                )

    # --- what is durable ----------------------------------------------------------------------------------------------

    def durable(self, machine: SimMachine, name: str) -> Any:
        """A small file of that host's agent, as it would be after a crash now."""
        text = machine.storage.durable_text(machine.folder / "state" / name)
        if text is None:
            return {}
        key = (name, text)
        if key not in self._parsed:
            self._parsed.clear()
            self._parsed[key] = json.loads(text)
        return self._parsed[key]

    def durable_fence(self, machine: SimMachine, vm_uuid: str) -> bool:
        """Whether that VM is durably fenced."""
        return any(fence["vm_uuid"] == vm_uuid for fence in self.durable(machine, "ledger.json").get("fences", ()))

    def _condition(self, domain: SimDomain) -> str:
        found = self.durable(domain.machine, "ledger.json").get("conditions", ())
        return next((record["condition"] for record in found if record["vm_uuid"] == domain.uuid), "intact")
