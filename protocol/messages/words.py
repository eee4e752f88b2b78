"""Words that several messages use."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Role(enum.Enum):
    """What a peer is; also written in its certificate."""

    COORDINATOR = "coordinator"
    AGENT = "agent"


class Power(enum.Enum):
    """What a VM is doing."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUTTING_DOWN = "shutting-down"
    OFF = "off"
    CRASHED = "crashed"
    SUSPENDED = "suspended"


class Side(enum.Enum):
    """Which VM of the pair an order speaks of."""

    ORIGINAL = "original"
    REPLICA = "replica"


class HookState(enum.Enum):
    """Whether libvirt's own hook refuses to start fenced VMs on a host."""

    UNKNOWN = "unknown"  # not told
    INSTALLED = "installed"
    MISSING = "missing"  # `failback-agent fence install` was not called
    OUTDATED = "outdated"  # what lies there was written by another version, or for another agent
    IMPOSSIBLE = "impossible"  # libvirt is embedded in the agent, or has no folder for hooks


class Direction(enum.Enum):
    """What an agent does in a pass."""

    SEND = "send"
    RECEIVE = "receive"


class OnTimeout(enum.Enum):
    """What to do with a guest that does not power off in time."""

    ABORT = "abort"  # leave it running, fail
    FORCE = "force"  # destroy it, gracefully first


class Condition(enum.Enum):
    """The durable flag of the original's disks, kept by its agent and by the registry."""

    INTACT = "intact"  # whole: as it was at the disaster, or as its own guest left it
    TORN = "torn"  # from the first write until verified: it must not boot
    EQUALS_VIEW = "equals-view"  # verified equal to the view named beside it


class Codec(enum.Enum):
    """How the payload of `BlockData` is stored."""

    RAW = "raw"
    ZSTD = "zstd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Under whose authority an order comes: an agent obeys only the highest epoch it has seen for the pair, and only
    the coordinator that holds it. `place` says which registry the order comes from, so that two with one certificate
    are told apart by what follows its last #; empty: not told."""

    pair: str
    run: str
    epoch: int
    place: str = ""


class Tracking(enum.Enum):
    """How what the guest writes from a view on is recorded."""

    NONE = "none"
    BITMAP = "bitmap"  # by dirty bitmaps, for the disks whose format has them
    OVERLAY = "overlay"  # by dirty bitmaps where the format has them, by a live overlay where it has not


class PassKind(enum.Enum):
    """What a pass is for."""

    SYNC = "sync"  # make the target equal the view
    AUDIT = "audit"  # compare the view, read whole, with the target's digest map; nothing is written
    VERIFY = "verify"  # compare the view with the target's storage, both read whole; nothing is written


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """A stretch of a disk."""

    offset_bytes: int
    length_bytes: int
