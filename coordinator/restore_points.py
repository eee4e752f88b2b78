"""Restore points of a pair: which there are, by journal and replica, and how the oldest are merged away.

A restore point is known by its run: the journal says what was kept and when, the replica's own snapshots whether it
still stands. Pruning is journalled outside any run: the intent before, the result after, and a fence on the replica in
between, which makes every other start of it fail. Cut short anywhere, it is done again from where reality stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection

from coordinator import journal, registry, takeover
from coordinator.agents import QUESTION_TIMEOUT_S, Agent, AgentDirectory, ask
from coordinator.entries import EntryKind, JournalEntry
from coordinator.errors import Refused, UsageError, WrongState
from coordinator.model import Pair, Replication, State
from coordinator.plain import from_json
from coordinator.records import KeptRecord, ReplicationRecord
from coordinator.steps_commit import MakeRestorePoint
from coordinator.store import Store
from coordinator.takeover import Author
from protocol.messages import (
    Done,
    FenceDescription,
    FenceVm,
    InspectVm,
    LiftFence,
    MergeRestorePoint,
    Order,
    Power,
    Side,
    VmDescription,
)

PRUNE_STEP = "prune_restore_point"
REPLICATION = "replication"
"""Name of the note that says how the pair is replicated."""
MERGE_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePointDisk:
    """One disk of a restore point: `path` holds its state, in that format, and takes so many bytes of its storage."""

    target: str
    path: str
    format: str
    allocated_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePointFacts:
    """A restore point that stands. `kept_s`: when it was kept, wall time; `half_pruned`: a prune was cut short."""

    name: str
    run: str
    kept_s: float
    disks: tuple[RestorePointDisk, ...]
    half_pruned: bool = False

    @property
    def allocated_bytes(self) -> int:
        """What its bases take of their storage; shared with nothing but what lies above them."""
        return sum(disk.allocated_bytes for disk in self.disks)


def check_keep(connection: Connection, pair: Pair) -> None:
    """Raise `Refused` where the replica's disks must stay at their paths, for a tool writes to them there."""
    if replication_of(connection, pair.name) is Replication.PATH:
        raise Refused(
            f"{pair.name} cannot keep a restore point: a tool writes the replica's images by their paths (said at "
            "`register --replication path`), and would ruin the base and every layer on it; commit with "
            f"`failback commit {pair.name} --restore-point drop`",
            code="restore-point-path",
        )


def replication_of(connection: Connection, pair: str) -> Replication:
    """How the pair is replicated, as a person said last."""
    said = [e for e in journal.entries_of_step(connection, pair, REPLICATION) if e.result is not None]
    return from_json(said[-1].result or "", ReplicationRecord).replication if said else Replication.UNKNOWN


def say_replication(connection: Connection, pair: Pair, author: Author, replication: Replication) -> None:
    """Write down how the pair is replicated."""
    if replication is replication_of(connection, pair.name):
        return
    takeover.note(
        connection,
        pair,
        author,
        EntryKind.NOTE,
        REPLICATION,
        run="",
        sentence=f"replication: {replication.value}",
        record=ReplicationRecord(replication=replication),
    )


async def list_restore_points(agents: AgentDirectory, store: Store, pair: Pair) -> tuple[RestorePointFacts, ...]:
    """Those that stand, the oldest first; asks the replica's agent."""
    entries = await store.read(lambda connection: journal.entries(connection, pair.name))
    vm = await ask(
        agents.agent(pair.replica.host), InspectVm(vm=pair.replica.uuid), VmDescription, timeout_s=QUESTION_TIMEOUT_S
    )
    standing = {snapshot.name for snapshot in vm.snapshots if snapshot.ours}
    images = {image.path: image for disk in vm.disks for image in disk.chain}
    open_prunes = _open_prunes(entries)
    found: list[RestorePointFacts] = []
    for entry in entries:
        if entry.step != MakeRestorePoint.name or entry.kind is not EntryKind.DONE or entry.result is None:
            continue
        kept = from_json(entry.result, KeptRecord)
        if kept.snapshot not in standing and kept.snapshot not in open_prunes:
            continue
        disks = _disks_now(kept, vm, found)
        facts = tuple(
            RestorePointDisk(
                target=target,
                path=path,
                format=images[path].format if path in images else "",
                allocated_bytes=images[path].allocated_bytes if path in images else 0,
            )
            for target, path in disks
        )
        found.append(
            RestorePointFacts(
                name=kept.snapshot,
                run=entry.run,
                kept_s=entry.at_s,
                disks=facts,
                half_pruned=kept.snapshot in open_prunes,
            )
        )
    return tuple(found)


def _disks_now(kept: KeptRecord, vm: VmDescription, older: Sequence[RestorePointFacts]) -> tuple[tuple[str, str], ...]:
    """Target and path of each base: what lies right below the overlay now, for older layers may have been merged."""
    below = {
        upper.path: lower.path for disk in vm.disks for upper, lower in zip(disk.chain, disk.chain[1:], strict=False)
    }
    return tuple((disk.target, below.get(disk.new, disk.old)) for disk in kept.disks)


def _open_prunes(entries: Sequence[JournalEntry]) -> set[str]:
    """Restore points that a prune was begun for and not ended."""
    begun: set[str] = set()
    for entry in entries:
        if entry.step == PRUNE_STEP and entry.result is not None:
            name = from_json(entry.result, KeptRecord).snapshot
            (begun.add if entry.kind is EntryKind.INTENT else begun.discard)(name)
    return begun


async def prune(agents: AgentDirectory, store: Store, pair: Pair, author: Author, keep: int) -> tuple[str, ...]:
    """Merge the oldest restore points away until `keep` stand; the names of those that are gone. The caller holds the
    pair's lock.

    Raises:
        UsageError: `keep` is negative; `WrongState`: the pair is not in Ready; `Refused`: the replica is not off.
    """
    if keep < 0:
        raise UsageError("--keep says how many restore points stay: 0 or more", code="bad-number")
    if pair.state is not State.READY:
        raise WrongState(
            f"{pair.name} is in {pair.state.value}: restore points are pruned while it is in Ready and its replica off",
            pair=pair.name,
            state=pair.state.value,
        )
    points = await list_restore_points(agents, store, pair)
    doomed = [p for p in points if p.half_pruned]
    doomed += [p for p in points[: max(0, len(points) - keep)] if not p.half_pruned]
    if not doomed:
        return ()
    agent = agents.agent(pair.replica.host)
    vm = await ask(agent, InspectVm(vm=pair.replica.uuid), VmDescription, timeout_s=QUESTION_TIMEOUT_S)
    if vm.power is not Power.OFF:
        raise Refused(
            f"the replica {pair.replica.name} on {pair.replica.host} is {vm.power.value}: power it off, then prune",
            code="replica-not-off",
        )
    epoch = await store.write(lambda connection: registry.raise_epoch(connection, pair.name))
    pair = await store.read(lambda connection: registry.get_pair(connection, pair.name))
    order = Order(pair=pair.name, run=f"prune-{epoch}", epoch=epoch)
    for point in doomed:
        await store.write(partial(_note, pair=pair, author=author, kind=EntryKind.INTENT, point=point))
        await _merge(agent, pair, order, point)
        await store.write(partial(_note, pair=pair, author=author, kind=EntryKind.DONE, point=point))
    return tuple(point.name for point in doomed)


async def _merge(agent: Agent, pair: Pair, order: Order, point: RestorePointFacts) -> None:
    uuid = pair.replica.uuid
    targets = tuple(disk.replica for disk in pair.disks)
    fence = FenceVm(order=order, vm_uuid=uuid, side=Side.REPLICA, targets=targets)
    await ask(agent, fence, FenceDescription)
    merge = MergeRestorePoint(order=order, vm_uuid=uuid, snapshot=point.name)
    await ask(agent, merge, Done, timeout_s=MERGE_TIMEOUT_S)
    await ask(agent, LiftFence(order=order, vm_uuid=uuid, restore_autostart=True), Done)


def _note(connection: Connection, *, pair: Pair, author: Author, kind: EntryKind, point: RestorePointFacts) -> None:
    registry.check_epoch(connection, pair.name, pair.epoch)
    takeover.note(
        connection,
        pair,
        author,
        kind,
        PRUNE_STEP,
        run="",
        sentence=f"merge the restore point {point.name} into its base",
        record=KeptRecord(snapshot=point.name, disks=()),
    )
