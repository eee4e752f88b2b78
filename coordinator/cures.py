"""The command that cures a refusal, whole, ready to be pasted."""

from __future__ import annotations

import shlex

from coordinator.findings import SIDES, Case
from coordinator.model import DiskPair
from protocol.messages import VmDescription


def register_again(case: Case, *, leave_out: str | None = None, unmap: DiskPair | None = None) -> str:
    """``failback register …`` for the same pair, with one more thing left out.

    Args:
        leave_out: a disk (by target name) or host device that the pair does not map.
        unmap: a mapped disk to be left out at both sides.
    """
    pair = case.pair
    disks = [disk for disk in pair.disks if disk != unmap]
    wanted = [*pair.excluded, *([] if leave_out is None else [leave_out])]
    if unmap is not None:
        wanted += [unmap.original, unmap.replica]
    there_are = _names(case)
    words = ["failback", "register", pair.name]
    words += ["--original", f"{pair.original.host}/{pair.original.name}"]
    words += ["--replica", f"{pair.replica.host}/{pair.replica.name}"]
    if any(disk.original != disk.replica for disk in disks):
        for disk in disks:
            words += ["--disk", f"{disk.original}={disk.replica}"]
    for name in dict.fromkeys(wanted):
        if there_are is None or name in there_are:  # what is gone need not be left out any more
            words += ["--exclude-disk", name]
    return shlex.join(words)


def _names(case: Case) -> set[str] | None:
    """Every disk and host device of both VMs; None where one of them was not found."""
    names: set[str] = set()
    for side in SIDES:
        vm = case.found(side).vm
        if not isinstance(vm, VmDescription):
            return None
        names.update(vm.passthrough)
        names.update(disk.target for disk in vm.disks)
    return names
