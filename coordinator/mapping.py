"""Which disk of the original is which disk of the replica, and what of it may change once a pair is known. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coordinator.errors import UsageError, WrongState
from coordinator.model import DiskPair, Newest, OriginalFlag, Pair, PairRequest, State, VmRef
from coordinator.states import describe
from protocol.messages import Condition, VmDescription

CHANGEABLE = frozenset({State.READY, State.FAILOVER})
"""States without a run: only then may a pair be registered again."""


def map_disks(request: PairRequest, original: VmDescription, replica: VmDescription) -> tuple[DiskPair, ...]:
    """The mapping that was asked for, or that of equal target names.

    Every disk of both VMs is either mapped or left out; a disk that is neither is an error, because its data would
    silently stay behind.

    Raises:
        UsageError: a disk that does not exist, is mapped twice, is mapped and left out, or is neither.
    """
    here = [disk.target for disk in original.disks]
    there = [disk.target for disk in replica.disks]
    pairs = request.disks or tuple(
        DiskPair(original=target, replica=target)
        for target in there
        if target in here and target not in request.excluded
    )
    for pair in pairs:
        if pair.original not in here or pair.replica not in there:
            raise UsageError(
                f"there is no disk {pair.original} at the original or {pair.replica} at the replica: the original "
                f"has {_listed(here)}, the replica {_listed(there)}",
                code="no-such-disk",
            )
    for side in ([pair.original for pair in pairs], [pair.replica for pair in pairs]):
        if len(set(side)) != len(side):
            raise UsageError(
                f"a disk is mapped twice by --disk: {', '.join(sorted(side))}; each is mapped once", code="disk-mapping"
            )
    unmapped_here = [target for target in here if target not in {pair.original for pair in pairs}]
    unmapped_there = [target for target in there if target not in {pair.replica for pair in pairs}]
    devices = {*original.passthrough, *replica.passthrough}
    _check_excluded(request.excluded, {*unmapped_here, *unmapped_there, *devices}, here, there)
    for name, left in ((f"original {original.name}", unmapped_here), (f"replica {replica.name}", unmapped_there)):
        open_ones = [target for target in left if target not in request.excluded]
        if open_ones:
            ways = " ".join(f"--exclude-disk {target}" for target in open_ones)
            raise UsageError(
                f"the disk {', '.join(open_ones)} of the {name} is neither mapped nor left out: map it with --disk "
                f"ORIGINAL=REPLICA, or leave it out with {ways}",
                code="disk-mapping",
            )
    if not pairs:
        raise UsageError(f"the replica {replica.name} has no disk to bring home: map one with --disk", code="no-disks")
    return pairs


def _check_excluded(excluded: Sequence[str], unmapped: set[str], here: Sequence[str], there: Sequence[str]) -> None:
    for name in excluded:
        if name in unmapped:
            continue
        if name in here or name in there:
            raise UsageError(
                f"the disk {name} is mapped by --disk and left out by --exclude-disk: say one of the two",
                code="disk-mapping",
            )
        raise UsageError(
            f"neither VM has a disk or host device {name} to leave out with --exclude-disk: the original has "
            f"{_listed(here)}, the replica {_listed(there)}",
            code="no-such-disk",
        )


def _listed(targets: Sequence[str]) -> str:
    return ", ".join(targets) or "none"


def revised(old: Pair, new: Pair) -> Pair:
    """The known pair `old`, registered again as `new`; its state, history and the truth about its disks stay.

    The side that holds the newest data stays the same VM (by name or UUID: it may have been defined anew); the other
    one may be replaced.

    Raises:
        WrongState: a run is under way or not final.
        UsageError: it would be another pair, or a disk that an earlier run left torn would be forgotten.
    """
    if old.state not in CHANGEABLE:
        raise WrongState(
            f"{old.name} cannot be registered again now: {describe(old)}", pair=old.name, state=old.state.value
        )
    known, said = (old.original, new.original) if old.newest is Newest.ORIGINAL else (old.replica, new.replica)
    if not _same_vm(known, said):
        raise UsageError(
            f"there is a pair {old.name} already, whose {old.newest.value} {known.host}/{known.name} holds the newest "
            f"data: name that VM to change the pair, or choose another name",
            code="pair-exists",
        )
    before, after = {disk.original for disk in old.disks}, {disk.original for disk in new.disks}
    torn = old.flag.condition == Condition.TORN.value
    if torn and not before <= after:
        raise UsageError(
            f"the original's disk {', '.join(sorted(before - after))} is torn (an earlier run wrote to it and did not "
            f"finish) and must stay mapped: fail {old.name} back first, then change the mapping",
            code="disk-torn",
        )
    same_original = old.original.uuid == new.original.uuid
    return replace(
        old,
        original=new.original,
        replica=new.replica,
        disks=new.disks,
        excluded=new.excluded,
        # What is torn stays so whatever it is called; equal to a view is only what was compared with it.
        flag=old.flag if torn or (same_original and old.disks == new.disks) else OriginalFlag(),
        original_autostart=old.original_autostart if same_original else None,
    )


def _same_vm(one: VmRef, other: VmRef) -> bool:
    return one.host == other.host and (one.uuid == other.uuid or one.name == other.name)


def mapping_words(pair: Pair) -> str:
    """The mapping in a line, for the journal."""
    words = "disks " + ", ".join(f"{disk.original}={disk.replica}" for disk in pair.disks)
    return f"{words}; left out {', '.join(pair.excluded)}" if pair.excluded else words
