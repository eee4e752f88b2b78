"""What an agent holds and knows, for `failback doctor` and `failback adopt`, and the orders that follow from it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from protocol.messages.orders import Done
from protocol.messages.words import Condition, Direction, Order, PassKind, Power, Side


class RemnantKind(enum.Enum):
    """What a run leaves in or beside a VM for as long as it needs it."""

    VIEW = "view"  # a view of the running VM: a backup job of ours
    TRACKING = "tracking"  # the record that a view began, of what is written from it on
    BITMAP = "bitmap"  # a persistent dirty bitmap of ours in an image
    OVERLAY = "overlay"  # a live overlay of ours, or its file
    SNAPSHOT = "snapshot"  # a protective snapshot of ours
    SCRATCH = "scratch"  # a scratch file of a view
    SOCKET = "socket"  # a socket of a disk's server
    THAW = "thaw"  # the guest's file systems were frozen, and it is owed a thaw


@dataclass(frozen=True, slots=True, kw_only=True)
class VmName:
    """A VM on a host, as the coordinator knows it."""

    host: str
    name: str
    uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedDisk:
    """One disk of a pair, by target name at each side."""

    original: str
    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairMap:
    """Which VMs a pair is, disk by disk. `excluded`: disks and host devices that are left out on purpose."""

    original: VmName
    replica: VmName
    disks: tuple[MappedDisk, ...]
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RememberPair:
    """Keep what the pair is, durably, so that a registry that was lost can be rebuilt (`failback adopt`). `side`: which
    of its VMs is on this host. In place of what was remembered of the pair's side before."""

    order: Order
    side: Side
    mapping: PairMap
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPair:
    """A pair that the agent has obeyed orders of. `mapping` and `side`: as it was told last; None: never. `run`: the
    latest one it knows of, or empty."""

    pair: str
    epoch: int
    run: str
    side: Side | None
    mapping: PairMap | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFence:
    """A fence. `vm` and `power`: as libvirt says now; empty and None where it does not know the VM. `autostart`: now;
    None: not known. `since_s`: seconds since 1970 by the agent's clock; 0: not known."""

    vm_uuid: str
    vm: str
    power: Power | None
    pair: str
    run: str
    side: Side
    since_s: float
    autostart_before: bool
    autostart: bool | None
    locked: tuple[str, ...]
    unlocked: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldCondition:
    """The durable flag of a VM's disks."""

    vm_uuid: str
    condition: Condition
    view: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldDisk:
    """What is known of a disk's content: the view it equals (None: none), and what its digest map takes (0: none).
    `pair`: empty where no pair that is remembered has the VM."""

    vm_uuid: str
    pair: str
    target: str
    equals: str | None
    map_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPass:
    """A pass that is granted; `running`: somebody has begun it."""

    pair: str
    run: str
    epoch: int
    kind: PassKind
    direction: Direction
    running: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Remnant:
    """Something of ours in or beside a VM. `name`: of the view, snapshot, bitmap or file. `recorded`: it stands in the
    agent's ledger. `in_use`: the VM's disks read through it, or this agent works with it. `removable`: `CleanLeftovers`
    takes it away."""

    kind: RemnantKind
    vm_uuid: str
    name: str
    recorded: bool
    in_use: bool
    removable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldServer:
    """A qemu-nbd process of this agent."""

    pid: int
    image: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Answer to `AskHoldings`. Each array has at most 500 items; `left_off`: how many were left off in all.

    Attributes:
        certificate_ends_s: when the agent's certificate expires, seconds since 1970; 0: it cannot be read.
        state_free_bytes: room where the agent keeps its state.
        problems: what could not be found out, a sentence each.
    """

    host: str
    software: str
    pairs: tuple[HeldPair, ...]
    fences: tuple[HeldFence, ...]
    conditions: tuple[HeldCondition, ...]
    disks: tuple[HeldDisk, ...]
    passes: tuple[HeldPass, ...]
    remnants: tuple[Remnant, ...]
    servers: tuple[HeldServer, ...]
    certificate_ends_s: float
    state_free_bytes: int
    problems: tuple[str, ...]
    left_off: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AskHoldings:
    """What do you hold, and what do you know durably?"""

    reply: ClassVar[type] = Holdings


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned:
    """What was removed, a few words each, and what was left where it is, with the reason."""

    removed: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanLeftovers:
    """Remove what runs that are over left in and beside the VM: views, records of writes, scratch files; and what is
    known of disks that no VM of this host has any more. Snapshots, fences and what others made stay.

    Refused (code ``pass-running``) while a pass of the pair is under way. Harmless when repeated."""

    order: Order
    vm_uuid: str
    reply: ClassVar[type] = Cleaned


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetPair:
    """As `CleanLeftovers`; and forget what the pair is and what is known of the VM's disks. The epoch stays.

    Refused (code ``fenced``) while a fence of the pair stands on the VM, (code ``torn``) while its disks are."""

    order: Order
    vm_uuid: str
    reply: ClassVar[type] = Cleaned
