"""What both agents say of their VMs beside the disks: asked, put together, and what of it a plan or a run needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from coordinator.agents import QUESTION_TIMEOUT_S, Agent, ask
from coordinator.definitions import Difference, compare
from coordinator.model import DiskPair
from protocol.messages import DescribeMachine, MachineDescription, StateKind, StatePart, VmDescription


async def describe(agent: Agent, vm_uuid: str) -> MachineDescription:
    """What that VM is beside its disks. Raises as `coordinator.agents.ask`."""
    return await ask(agent, DescribeMachine(vm_uuid=vm_uuid), MachineDescription, timeout_s=QUESTION_TIMEOUT_S)


def definition_of(machine: MachineDescription) -> str:
    """Its definition, XML; empty where it was not told."""
    return "".join(machine.definition)


def part_of(machine: MachineDescription, kind: StateKind) -> StatePart | None:
    """Its state of that kind, by its definition."""
    return next((part for part in machine.parts if part.kind is kind), None)


def differences(
    original: MachineDescription, replica: MachineDescription, disks: Sequence[DiskPair], excluded: Sequence[str]
) -> tuple[Difference, ...]:
    """What differs between the two; nothing where a definition was not told."""
    here, there = definition_of(original), definition_of(replica)
    return compare(here, there, disks, excluded) if here and there else ()


def missing_disks(
    disks: Sequence[DiskPair], excluded: Collection[str], original: VmDescription, replica: VmDescription
) -> tuple[DiskPair, ...]:
    """The replica's disks that the original lacks, as they would be mapped: under the same name, where it is free."""
    mapped = {disk.replica for disk in disks}
    known = {disk.target for disk in original.disks}
    return tuple(
        DiskPair(original=disk.target, replica=disk.target)
        for disk in replica.disks
        if disk.target not in mapped and disk.target not in excluded and disk.target not in known
    )


def carries_state(*vms: VmDescription) -> bool:
    """Whether any of these VMs has state that is no disk."""
    return any(vm.firmware != "bios" or vm.has_tpm for vm in vms)
