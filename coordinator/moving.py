"""A run to another place: what becomes of the pair at its start, when it is taken back, and when it is final.

From the start of the run on the destination *is* the pair's original, so that every step works on it as on any other;
what was the original before is `Pair.former` until then. Plain functions of a connection, and pure ones.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from sqlalchemy import Connection

from coordinator import duties, exclusions, registry
from coordinator.context import CREATE_HOME
from coordinator.exclusions import Exclusion, Why
from coordinator.model import DiskPair, FormerOriginal, OriginalFlag, Pair, VmRef
from coordinator.rounds import is_pass
from coordinator.runlog import RunLog


def map_destination(pair: Pair, targets: Collection[str]) -> tuple[DiskPair, ...] | None:
    """Which disk of a destination with those target names is which of the replica; None: they do not map.

    A VM restored from a backup of the original has the original's names, one made from the replica the replica's.
    """
    if all(disk.original in targets for disk in pair.disks):
        return pair.disks
    if all(disk.replica in targets for disk in pair.disks):
        return tuple(DiskPair(original=disk.replica, replica=disk.replica) for disk in pair.disks)
    return None


def moved(pair: Pair, vm: VmRef, disks: tuple[DiskPair, ...]) -> Pair:
    """The pair with that VM as its original."""
    former = FormerOriginal(vm=pair.original, disks=pair.disks, flag=pair.flag, autostart=pair.original_autostart)
    return replace(pair, original=vm, disks=disks, flag=OriginalFlag(), original_autostart=None, former=former)


def is_overwritten(log: RunLog) -> bool:
    """Whether the run may have written to the original's disks."""
    return any(is_pass(entry.step) for entry in log.entries)


def removed(log: RunLog) -> bool:
    """Whether the destination was made by the run, so that it is gone when the run is taken back; or, where its host
    could not be asked to remove it, is on the exclusion list already."""
    return log.intended(CREATE_HOME)


def repoint(connection: Connection, wanted: Pair) -> None:
    """Make the destination the pair's original, in the transaction that begins the run.

    Raises:
        UsageError: it belongs to another pair; `Refused`: it is on the exclusion list.
    """
    exclusions.check(connection, wanted.original, allowed=frozenset({Why.OVERWRITTEN}))
    known = registry.get_pair(connection, wanted.name)
    registry.change_pair(
        connection,
        replace(
            known,
            original=wanted.original,
            disks=wanted.disks,
            flag=wanted.flag,
            original_autostart=wanted.original_autostart,
            former=wanted.former,
        ),
    )


def give_back(connection: Connection, name: str, run: str, log: RunLog, at_s: float) -> None:
    """The run is taken back: the former original is the pair's again, with everything that was known of it.

    A destination that was written to is on the exclusion list from here on, as *overwritten*; where nothing was
    written, nothing is said of it.
    """
    pair = registry.get_pair(connection, name)
    former = pair.former
    if former is None:
        return
    if is_overwritten(log) and not removed(log):
        targets = tuple(disk.original for disk in pair.disks)
        entry = Exclusion(vm=pair.original, targets=targets, why=Why.OVERWRITTEN, pair=name, run=run, since_s=at_s)
        exclusions.add(connection, entry)
    duties.drop(connection, former.vm, run)
    registry.change_pair(
        connection,
        replace(
            pair,
            original=former.vm,
            disks=former.disks,
            flag=former.flag,
            original_autostart=former.autostart,
            former=None,
        ),
    )


def leave_behind(connection: Connection, name: str, run: str, at_s: float) -> None:
    """The run is final: the former original goes to the exclusion list; a fence it still needs stays owed."""
    pair = registry.get_pair(connection, name)
    former = pair.former
    exclusions.remove(connection, pair.original)  # overwritten by an earlier run, whole by this one
    if former is None:
        return
    targets = tuple(disk.original for disk in former.disks)
    entry = Exclusion(vm=former.vm, targets=targets, why=Why.FORMER, pair=name, run=run, since_s=at_s)
    exclusions.add(connection, entry)
    registry.change_pair(connection, replace(pair, former=None))
