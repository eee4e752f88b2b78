"""The words of the registry: pairs, states, runs and their options, as frozen values."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field

PAIR_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class State(enum.Enum):
    """State of a pair; what may follow which stands in `coordinator.states`."""

    READY = "Ready"
    FAILOVER = "Failover"
    SYNCING = "Syncing"
    READY_TO_SWITCH = "Ready to switch"
    SWITCHING = "Switching"
    FAILBACK = "Failback"
    ROLLING_BACK = "Rolling back"
    CANCELLING = "Cancelling"
    UNDOING = "Undoing"
    COMMITTING = "Committing"
    NEEDS_OPERATOR = "Needs operator"


class Newest(enum.Enum):
    """The side that holds the newest data in full."""

    ORIGINAL = "original"
    REPLICA = "replica"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRef:
    """A VM on a host. `host` is the name in its agent's certificate; `uuid` pins the VM found at registration."""

    host: str
    name: str
    uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPair:
    """One disk of the pair by target name at each side."""

    original: str
    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalFlag:
    """The durable flag of the original: ``intact``, ``torn`` or ``equals-view`` (with the view's name)."""

    condition: str = "intact"
    view: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCall:
    """Why a pair is in *Needs operator*: a sentence, the verbs that lead out, and the state it was in before."""

    sentence: str
    exits: tuple[str, ...]
    before: State


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One original with its replica, disk by disk. `epoch` only ever grows; `run` is the unfinished or last run.

    `original_autostart` is what the original's autostart was before a run first took it away; None while no run has.
    """

    name: str
    original: VmRef
    replica: VmRef
    disks: tuple[DiskPair, ...]
    excluded: tuple[str, ...]  # disk targets (of either side) and host devices left out on purpose
    state: State
    newest: Newest
    flag: OriginalFlag
    epoch: int
    run: str | None
    original_autostart: bool | None = None
    operator: OperatorCall | None = None


class RestorePoint(enum.Enum):
    """What commit does with the protective snapshot."""

    KEEP = "keep"
    DROP = "drop"


class ShutdownPolicy(enum.Enum):
    """What to do with a replica that does not power off in time."""

    ABORT = "abort"
    FORCE = "force"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the administrator chose at `start`; lives in the journal, never in argv of the run's process."""

    power_on: bool = True
    power_off_original: bool = False
    shutdown_timeout_s: float = 900.0
    shutdown_policy: ShutdownPolicy = ShutdownPolicy.ABORT
    allow_larger_target: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One reason why the plan says no. `about` names the thing; `sentence` has thing, cause and cure."""

    code: str
    about: str
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDisk:
    """What would happen to one disk."""

    original: str
    replica: str
    source_size_bytes: int
    target_size_bytes: int
    source_format: str
    target_format: str
    rung: str
    why_not_higher: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would do, refuse and cost, computed without changing anything."""

    pair: str
    refusals: tuple[Refusal, ...]
    disks: tuple[PlannedDisk, ...]
    steps: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRequest:
    """What `register` is told. VMs by name or UUID; `disks` empty: map by equal target names. `excluded`: disk
    targets of either side and host devices that are left out. `in_failover`: the replica has taken over already
    (proven: original off, replica on)."""

    name: str
    original_host: str
    original_vm: str
    replica_host: str
    replica_vm: str
    disks: tuple[DiskPair, ...] = ()
    excluded: tuple[str, ...] = ()
    in_failover: bool = False
