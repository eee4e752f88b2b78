"""The refusals that concern what of a VM is no disk: firmware variables, TPM state, the definition, missing disks;
listed in the table of `coordinator.refusals`. And what the plan says of the differences between the two definitions."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.definitions import BadDefinition, Difference, targets
from coordinator.findings import SIDES, Case, Problem, clause
from coordinator.machine import definition_of, differences, part_of
from coordinator.model import PlannedDifference
from coordinator.refusals_disk import FORMATS, place_of
from protocol.messages import MachineDescription, Side, StateKind, StatePart

Objection = tuple[str, str]
WORDS = {StateKind.NVRAM: "firmware variables", StateKind.TPM: "TPM state"}


def machine_of(case: Case, side: Side) -> MachineDescription | None:
    """What that side's agent said of its VM beside the disks, if it did."""
    told = case.found(side).machine
    return told if isinstance(told, MachineDescription) else None


def found_differences(case: Case) -> tuple[Difference, ...]:
    """How the two definitions differ, as far as both were told."""
    original, replica = machine_of(case, Side.ORIGINAL), machine_of(case, Side.REPLICA)
    if original is None or replica is None:
        return ()
    try:
        return differences(original, replica, case.pair.disks, case.pair.excluded)
    except BadDefinition:
        return ()  # told by `machine_not_told`, where anything depends on it


def planned_differences(case: Case) -> Iterator[PlannedDifference]:
    """The same, with what becomes of each."""
    created = {f"disk {disk.original}" for disk in case.created}
    for found in found_differences(case):
        if found.what in created:
            action = "created (--create-missing)"
        elif found.elements:
            action = "applied (--apply-config)" if case.options.apply_config else "stays; --apply-config applies it"
        else:
            action = "stays; change it by hand if it matters"
        yield PlannedDifference(what=found.what, original=found.original, replica=found.replica, action=action)


# --- state --------------------------------------------------------------------------------------------------------


def machine_not_told(case: Case) -> Iterator[Objection]:
    """Only where anything depends on it."""
    needed = case.options.apply_config or case.options.create_missing
    for side in SIDES:
        vm, told = case.vm(side), case.found(side).machine
        if vm is None or not (needed or any(v.vm.firmware != "bios" or v.vm.has_tpm for v in case.vms())):
            continue
        problem = ""
        if isinstance(told, Problem):
            problem = clause(told.sentence)
        elif told is None:
            problem = "its agent was not asked"
        elif needed:
            problem = told.problem or _unreadable(told)
        if problem:
            yield (
                vm.ref.name,
                f"What the {vm.title} is beside its disks is not known: {problem}; install the same failback release "
                "on every host, then plan again.",
            )


def _unreadable(machine: MachineDescription) -> str:
    try:
        targets(definition_of(machine))
    except BadDefinition as error:
        return clause(error.sentence)
    return ""


def firmware_differs(case: Case) -> Iterator[Objection]:
    original, replica = case.vm(Side.ORIGINAL), case.vm(Side.REPLICA)
    if original is None or replica is None:
        return
    if original.vm.firmware != replica.vm.firmware:
        yield (
            original.ref.name,
            f"The {original.title} boots with {original.vm.firmware.upper()} firmware, the {replica.title} with "
            f"{replica.vm.firmware.upper()}, so the guest would not find its boot loader; give the original the "
            f"replica's firmware with `virsh edit {original.ref.name}`.",
        )
        return
    here, there = _parts(case, StateKind.NVRAM)
    if here is None or there is None:
        return
    sizes = here.size_bytes, there.size_bytes
    if here.format != there.format or (here.present and there.present and sizes[0] != sizes[1]):
        yield (
            original.ref.name,
            f"The firmware variables of the {original.title} are {sizes[0]} bytes of {here.format}, those of the "
            f"{replica.title} {sizes[1]} of {there.format}: another build of the firmware, which could not read them; "
            f"give the original the same build (<loader>) with `virsh edit {original.ref.name}`.",
        )


def tpm_differs(case: Case) -> Iterator[Objection]:
    original, replica = case.vm(Side.ORIGINAL), case.vm(Side.REPLICA)
    if original is None or replica is None:
        return
    if original.vm.has_tpm != replica.vm.has_tpm:
        has, lacks = (original, replica) if original.vm.has_tpm else (replica, original)
        yield (
            lacks.ref.name,
            f"The {has.title} has a TPM, the {lacks.title} has none, so what the guest has sealed with it could not be "
            f"opened; add one with `virsh edit {lacks.ref.name}`, or take it out of {has.ref.name}.",
        )
        return
    here, there = _parts(case, StateKind.TPM)
    if here is not None and there is not None and here.format != there.format:
        yield (
            original.ref.name,
            f"The TPM of the {original.title} is of version {here.format}, that of the {replica.title} of "
            f"{there.format}; give both the same with `virsh edit {original.ref.name}`.",
        )


def state_not_carried(case: Case) -> Iterator[Objection]:
    for side in SIDES:
        vm, machine = case.vm(side), machine_of(case, side)
        for part in () if vm is None or machine is None else machine.parts:
            if vm is not None and part.problem:
                yield (
                    vm.ref.name,
                    f"The {WORDS[part.kind]} of the {vm.title} cannot be carried: {clause(part.problem)}; mend that "
                    f"with `virsh edit {vm.ref.name}` there, or take it out of both VMs.",
                )


def machine_tool_missing(case: Case) -> Iterator[Objection]:
    for side in SIDES:
        vm, machine = case.vm(side), machine_of(case, side)
        for tool in () if vm is None or machine is None else machine.missing_tools:
            if vm is not None:
                yield (
                    vm.ref.host,
                    f"Host {vm.ref.host} lacks {tool}, which the TPM of the {vm.title} needs; install the package "
                    "named in brackets there.",
                )


def _parts(case: Case, kind: StateKind) -> tuple[StatePart | None, StatePart | None]:
    here, there = machine_of(case, Side.ORIGINAL), machine_of(case, Side.REPLICA)
    return (
        None if here is None else part_of(here, kind),
        None if there is None else part_of(there, kind),
    )


# --- what is to be created or applied -------------------------------------------------------------------------------


def network_missing(case: Case) -> Iterator[Objection]:
    original, machine = case.vm(Side.ORIGINAL), machine_of(case, Side.ORIGINAL)
    if not case.options.apply_config or original is None or machine is None:
        return
    for found in found_differences(case):
        if found.elements and found.network and found.network not in machine.networks:
            has = ", ".join(name.replace(":", " ", 1) for name in machine.networks) or "none"
            yield (
                original.ref.name,
                f"The {found.what} of the replica is on {found.network.replace(':', ' ', 1)}, which host "
                f"{original.ref.host} does not have (it has: {has}); make it there, or leave --apply-config out and "
                "add the NIC by hand.",
            )


def cannot_create_disk(case: Case) -> Iterator[Objection]:
    original, replica, machine = case.vm(Side.ORIGINAL), case.vm(Side.REPLICA), machine_of(case, Side.ORIGINAL)
    if original is None or replica is None or not case.created:
        return
    beside = next((disk for disk in original.vm.disks if disk.kind == "file" and disk.chain), None)
    taken = frozenset() if machine is None or _unreadable(machine) else targets(definition_of(machine))
    needed = 0
    for disk in case.created:
        about, theirs = f"{original.ref.name} {disk.original}", replica.disk(disk.replica)
        if theirs is None or not theirs.chain:
            continue  # that it cannot be read is said already
        needed += sum(image.allocated_bytes for image in theirs.chain)
        if beside is None:
            yield (
                about,
                f"The {original.title} has no disk that is a file, so there is no folder for the missing disk "
                f"{disk.original}; create it by hand, attach it, and register the pair again.",
            )
        elif disk.original in taken:
            yield (
                about,
                f"The {original.title} has another drive {disk.original}, so the replica's disk of that name cannot be "
                f"created there; rename one of them with `virsh edit`, then plan again.",
            )
        elif theirs.chain[0].format not in FORMATS:
            yield (
                about,
                f"Disk {disk.replica} of the {replica.title} is in format {theirs.chain[0].format}, in which none can "
                "be created; create one by hand, attach it, and register the pair again.",
            )
    if beside is not None and needed > beside.free_bytes:
        yield (
            original.ref.name,
            f"The missing disks hold {needed} bytes but {place_of(beside)} on {original.ref.host} has "
            f"{beside.free_bytes} bytes free; make room there.",
        )
