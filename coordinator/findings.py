"""What was found out about a pair before a plan: plain values, so that planning stays pure.

Whoever talks to the agents (`coordinator.runs`) fills these; `coordinator.refusals` and `coordinator.plan` read them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from coordinator.model import DiskPair, Pair, RunOptions, VmRef
from protocol.messages import (
    BlockSamples,
    DiskDescription,
    HostDescription,
    MachineDescription,
    Power,
    PowerAnswer,
    Side,
    TargetEvidence,
    VmDescription,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question that got no answer: the stable code and the sentence of the error that came instead."""

    code: str
    sentence: str


NO_VM = "no-such-domain"
"""Code of the problem of an agent that knows no VM of that UUID."""

VERSION = "version"
"""Code of the problem of an agent that speaks no protocol version of ours."""


SIDES = (Side.ORIGINAL, Side.REPLICA)


def held_images(answer: PowerAnswer, targets: Collection[str]) -> tuple[str, ...]:
    """Which of the disks `targets` another process holds. A disk that is left out may be in use elsewhere: a shared
    one often is."""
    return tuple(target for target in answer.holders if target in targets)


def clause(sentence: str) -> str:
    """A sentence fit to stand inside another one."""
    return sentence.strip().rstrip(".")


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFindings:
    """One side. `vm` is None where the host could not be asked; `power` is None where it was not asked; `evidence` is
    what its agent has on record of the disks of an original that it fences; `machine`: what it says of the VM beside
    its disks."""

    host: HostDescription | Problem
    vm: VmDescription | Problem | None
    power: PowerAnswer | None = None
    evidence: tuple[TargetEvidence, ...] = ()
    machine: MachineDescription | Problem | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSample:
    """Samples of one disk, by target names: of the replica's blocks and of the same ones of the original, or why there
    are none. `map_known_bytes`: how much of the original's disk its digest map knows."""

    original: str
    replica: str
    source: BlockSamples | Problem
    target: BlockSamples | Problem
    map_known_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Both sides.

    Attributes:
        failover_since: when the pair entered its present *Failover* (ISO 8601), where that is known; `failover_s` is
            the same in seconds since 1970, by this host's clock.
        original_ahead_s: how far the clock of the original's host is ahead of this one's; None where it does not tell;
            `replica_ahead_s`: the same of the replica's.
        samples: of the disks, where they were asked for.
    """

    original: SideFindings
    replica: SideFindings
    failover_since: str | None = None
    failover_s: float | None = None
    original_ahead_s: float | None = None
    replica_ahead_s: float | None = None
    samples: tuple[DiskSample, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VmCase:
    """One side's VM as a rule sees it: its place in the pair and what inspection found."""

    side: Side
    ref: VmRef
    vm: VmDescription
    power: PowerAnswer | None

    @property
    def title(self) -> str:
        """How sentences name it, for example ``original web1 on prod1``."""
        return f"{self.side.value} {self.ref.name} on {self.ref.host}"

    def disk(self, target: str) -> DiskDescription | None:
        """The disk of that target name, or None."""
        return next((disk for disk in self.vm.disks if disk.target == target), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCase:
    """One disk of the mapping at one side."""

    vm: VmCase
    disk: DiskDescription

    @property
    def title(self) -> str:
        """How sentences name it, for example ``disk vda of original web1``."""
        return f"disk {self.disk.target} of {self.vm.side.value} {self.vm.ref.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything a refusal may look at. `created`: those disks of the pair that the run is to create."""

    pair: Pair
    findings: Findings
    options: RunOptions
    created: tuple[DiskPair, ...] = ()

    def host(self, side: Side) -> HostDescription | Problem:
        """What that side's agent said of its host."""
        return self.found(side).host

    def vm(self, side: Side) -> VmCase | None:
        """That side's VM where it was found and is still the one of the registry."""
        found = self.found(side)
        ref = self.ref(side)
        if not isinstance(found.vm, VmDescription) or found.vm.uuid != ref.uuid:
            return None
        return VmCase(side=side, ref=ref, vm=found.vm, power=found.power)

    def ref(self, side: Side) -> VmRef:
        """The registry's name for that side's VM."""
        return self.pair.original if side is Side.ORIGINAL else self.pair.replica

    def vms(self) -> Iterator[VmCase]:
        """Both VMs, original first, as far as they were found."""
        for side in SIDES:
            vm = self.vm(side)
            if vm is not None:
                yield vm

    def mapped(self, side: Side) -> Iterator[DiskCase]:
        """The disks of that side that take part, as far as they were found."""
        vm = self.vm(side)
        if vm is None:
            return
        for disks in self.pair.disks:
            disk = vm.disk(target_at(disks, side))
            if disk is not None:
                yield DiskCase(vm=vm, disk=disk)

    def all_mapped(self) -> Iterator[DiskCase]:
        """The disks of both sides that take part."""
        yield from self.mapped(Side.ORIGINAL)
        yield from self.mapped(Side.REPLICA)

    def found_pairs(self) -> Iterator[tuple[DiskCase, DiskCase]]:
        """(original, replica) of every mapped disk whose image could be read on both sides."""
        original, replica = self.vm(Side.ORIGINAL), self.vm(Side.REPLICA)
        if original is None or replica is None:
            return
        for disks in self.pair.disks:
            here, there = original.disk(disks.original), replica.disk(disks.replica)
            if here is not None and there is not None and here.chain and there.chain:
                yield DiskCase(vm=original, disk=here), DiskCase(vm=replica, disk=there)

    def found(self, side: Side) -> SideFindings:
        """Everything that side's agent said."""
        return self.findings.original if side is Side.ORIGINAL else self.findings.replica


def target_at(disks: DiskPair, side: Side) -> str:
    """The name a mapped disk has at that side."""
    return disks.original if side is Side.ORIGINAL else disks.replica


def is_on(vm: VmCase) -> bool:
    """Whether the VM executes, or is about to stop executing."""
    return vm.vm.power in (Power.RUNNING, Power.SHUTTING_DOWN)
