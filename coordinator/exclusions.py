"""The exclusion list: VMs that a run to another place left behind, and that no pair may take in by mistake.

A former original holds old data under the name of the VM that serves elsewhere by now; a destination that was
overwritten by a run that was taken back holds half of nothing anybody asked for. Entries outlive their pair.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection, delete, insert, select

from coordinator import duties, schema
from coordinator.errors import Refused, UsageError, WrongState
from coordinator.model import Refusal, VmRef
from coordinator.plain import from_json, one_of, to_json

EXCLUDED = "excluded"
"""Code of the refusal of a VM on the list."""


class Why(enum.Enum):
    """Why a VM is on the list."""

    FORMER = "former"  # a committed run took the pair away from it
    OVERWRITTEN = "overwritten"  # a run to it was taken back after it had written to its disks


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusion:
    """A VM on the list. `targets`: its disks; `pair`, `run`: by which it came there; `since_s`: wall time."""

    vm: VmRef
    targets: tuple[str, ...]
    why: Why
    pair: str
    run: str
    since_s: float

    @property
    def sentence(self) -> str:
        """What it is, and how it comes off the list."""
        since = datetime.fromtimestamp(self.since_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        place = f"{self.vm.host}/{self.vm.name}"
        if self.why is Why.FORMER:
            return (
                f"the VM {self.vm.name} on {self.vm.host} is the former original of {self.pair}, left behind by the "
                f"run {self.run} at {since}: its data is old, and the VM that took its place may be in use; if it is "
                f"to be used all the same, `failback readmit {place}` first"
            )
        return (
            f"the VM {self.vm.name} on {self.vm.host} was overwritten by the run {self.run} of {self.pair}, which was "
            f"taken back at {since}: run `failback start {self.pair} --to vm {self.vm.host}:{self.vm.name}` to "
            f"complete it, or restore it and `failback readmit {place}`"
        )


def add(connection: Connection, exclusion: Exclusion) -> None:
    """Put it on the list; whatever was said of that VM before is replaced."""
    remove(connection, exclusion.vm)
    connection.execute(
        insert(schema.exclusions).values(
            vm=to_json(exclusion.vm),
            targets=to_json(exclusion.targets),
            reason=exclusion.why.value,
            pair=exclusion.pair,
            run=exclusion.run,
            since_s=exclusion.since_s,
        )
    )


def listed(connection: Connection) -> tuple[Exclusion, ...]:
    """The whole list, oldest first."""
    table = schema.exclusions
    return tuple(
        Exclusion(
            vm=from_json(row.vm, VmRef),
            targets=from_json(row.targets, tuple[str, ...]),
            why=one_of(Why, row.reason),
            pair=row.pair,
            run=row.run,
            since_s=row.since_s,
        )
        for row in connection.execute(select(table).order_by(table.c.id))
    )


def find(connection: Connection, vm: VmRef) -> Exclusion | None:
    """What the list says of that VM, by host and UUID."""
    found = (each for each in listed(connection) if (each.vm.host, each.vm.uuid) == (vm.host, vm.uuid))
    return next(found, None)


def remove(connection: Connection, vm: VmRef) -> bool:
    """Take that VM off the list; whether it was on it."""
    table = schema.exclusions
    found = find(connection, vm)
    if found is None:
        return False
    connection.execute(delete(table).where(table.c.vm == to_json(found.vm)))
    return True


def readmit(connection: Connection, host: str, vm: str) -> Exclusion:
    """Take the VM of that name or UUID off the list.

    Raises:
        UsageError: it is not on the list, or more than one of that name is; `WrongState`: its fence is pending.
    """
    found = [each for each in listed(connection) if each.vm.host == host and vm in (each.vm.name, each.vm.uuid)]
    if len(found) != 1:
        how = "more than once" if found else "not"
        raise UsageError(
            f"{host}/{vm} is {how} on the exclusion list: `failback pairs` shows it; name the VM by its UUID where a "
            "name is there twice",
            code="not-excluded",
        )
    if any(duty.vm == found[0].vm for duty in duties.owed(connection)):
        raise WrongState(
            f"{vm} on {host} cannot be readmitted while its fence is pending: bring {host} back, and `failback doctor` "
            "places it",
            code="fence-pending",
        )
    remove(connection, found[0].vm)
    return found[0]


def check(connection: Connection, *vms: VmRef, allowed: frozenset[Why] = frozenset()) -> None:
    """Raise `Refused` where one of them is on the list for another reason than those `allowed`."""
    for refusal in refusals(connection, *vms, allowed=allowed):
        raise Refused(refusal.sentence, code=refusal.code)


def refusals(connection: Connection, *vms: VmRef, allowed: frozenset[Why] = frozenset()) -> tuple[Refusal, ...]:
    """The same as refusals of a plan."""
    found = [find(connection, vm) for vm in vms]
    return tuple(
        Refusal(code=EXCLUDED, about=each.vm.name, sentence=f"{each.sentence[:1].upper()}{each.sentence[1:]}.")
        for each in found
        if each is not None and each.why not in allowed
    )
