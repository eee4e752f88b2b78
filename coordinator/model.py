"""The words of the registry: pairs, states, runs and their options, as frozen values."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field

from protocol.messages import Tracking

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
class FormerOriginal:
    """The original that a run to another place has taken the pair away from.

    Attributes:
        vm, disks, flag, autostart: what the pair said of it; given back as it is when the run is taken back.
        fenced: whether its host is known to keep it off; False: the fence is *pending*, placed at the first contact.
        gone: its host answers that there is no such VM any more.
    """

    vm: VmRef
    disks: tuple[DiskPair, ...]
    flag: OriginalFlag
    autostart: bool | None
    fenced: bool = False
    gone: bool = False


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
    While a run to another place is not final, `original` is its destination and `former` what it was before; else None.
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
    former: FormerOriginal | None = None


class RestorePoint(enum.Enum):
    """What commit does with the protective snapshot."""

    KEEP = "keep"
    DROP = "drop"


class Replication(enum.Enum):
    """How the replica is kept up to date between failbacks, as a person said."""

    UNKNOWN = "unknown"
    DOMAIN = "domain"  # by a tool that asks libvirt where the disks are
    PATH = "path"  # by a tool that writes the images at the paths they had


class ShutdownPolicy(enum.Enum):
    """What to do with a replica that does not power off in time."""

    ABORT = "abort"
    FORCE = "force"


MIN_RATE_BYTES_S = 100_000
"""Below this a pass would take longer than anybody waits, and could hardly be told from one that is stuck."""
MAX_RATE_BYTES_S = 10**12


@dataclass(frozen=True, slots=True)
class Rate:
    """A limit as a person gave it: bytes/s; None: no limit. Raises `ValueError` when it is out of bounds."""

    bytes_s: int | None

    def __post_init__(self) -> None:
        if self.bytes_s is not None and not MIN_RATE_BYTES_S <= self.bytes_s <= MAX_RATE_BYTES_S:
            raise ValueError(f"{self.bytes_s} bytes/s is out of bounds: at least 100kB/s and at most 1TB/s")

    @property
    def words(self) -> str:
        """For people: ``119 MiB/s``, ``none``."""
        if self.bytes_s is None:
            return "none"
        return f"{self.bytes_s / (1 << 20):.4g} MiB/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLimits:
    """How fast the agents may send and read in a pass, all of its disks together; None: no limit."""

    network_bytes_s: int | None = None
    read_bytes_s: int | None = None

    @property
    def words(self) -> str:
        """For people."""
        return f"network {Rate(self.network_bytes_s).words}, reads {Rate(self.read_bytes_s).words}"

    def changed(self, network: Rate | None, read: Rate | None) -> RunLimits:
        """The limits after these were given; None: not given, that one stays."""
        return RunLimits(
            network_bytes_s=self.network_bytes_s if network is None else network.bytes_s,
            read_bytes_s=self.read_bytes_s if read is None else read.bytes_s,
        )


class SwitchPolicy(enum.Enum):
    """When the switchover begins once little is left to copy."""

    AUTO = "auto"  # at once
    AT = "at"  # at a set time
    MANUAL = "manual"  # when a person says so: `failback switch`
    TURN = "turn"  # when its turn in a plan of several pairs comes; then at once, or at the set time


class Home(enum.Enum):
    """Which of the three ways home a run takes."""

    ORIGINAL = "original"  # the original, in place
    VM = "vm"  # a VM that was restored beforehand, elsewhere
    HOST = "host"  # a host on which the VM is made anew


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a run brings the data: `host` of VM and HOST; `vm`: name or UUID, of VM. Both empty for ORIGINAL."""

    home: Home = Home.ORIGINAL
    host: str = ""
    vm: str = ""

    @property
    def moves(self) -> bool:
        """Whether the pair's original becomes another VM."""
        return self.home is not Home.ORIGINAL

    @property
    def words(self) -> str:
        """As on the command line: ``original``, ``vm prod2:web1``, ``host prod2``."""
        if self.home is Home.VM:
            return f"vm {self.host}:{self.vm}"
        return self.home.value if self.home is Home.ORIGINAL else f"host {self.host}"


class OnFailure(enum.Enum):
    """What follows a failure after the replica went off and before the point of no return."""

    ROLLBACK = "rollback"  # put the replica back into service; the run ends
    HOLD = "hold"  # leave everything as it is and wait for a person, in *Needs operator*


class LateEvidence(enum.Enum):
    """What to do where evidence falls a rung after the replica went off and the new prediction exceeds the agreed
    downtime."""

    RETURN = "return"  # put the replica back into service and go on synchronising
    PROCEED = "proceed"  # bear the longer downtime


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the administrator chose at `start`; lives in the journal, never in argv of the run's process.

    Attributes:
        kill_after_s: how long QEMU may take to end gracefully, after the guest's own time, before it is killed.
        switch, switch_at_s: when to switch; the time of AT (and of TURN, None: at once) in seconds since 1970.
        max_downtime_s: switch only while the predicted downtime is at most this; None: whatever it is.
        background_s: how often a pass keeps the delta small while the run waits for the switchover.
        track: how what the replica writes is recorded between passes.
        freeze_guest: freeze the guest's file systems for the instant of the first view.
        verify_full: read both sides' storage whole before the original may start.
        audit: read the frozen replica whole after the switchover and compare it with what the original started from.
        on_failure: roll a failed switchover back, or wait for a person.
        apply_config: make of the original's definition what the replica's says, as far as that can be applied.
        create_missing: create the disks that the original lacks.
        protect_original: take the working snapshot of the original before the first write, so that it can be given
            back; None: not decided, which a plan does (`coordinator.protecting.settled`).
        discard_divergence: go on though the original's disks seem to have been written to after the failover.
        to: where the data is brought.
    """

    power_on: bool = True
    power_off_original: bool = False
    shutdown_timeout_s: float = 900.0
    shutdown_policy: ShutdownPolicy = ShutdownPolicy.ABORT
    kill_after_s: float = 60.0
    allow_larger_target: bool = False
    limits: RunLimits = field(default_factory=RunLimits)
    switch: SwitchPolicy = SwitchPolicy.AUTO
    switch_at_s: float | None = None
    max_downtime_s: float | None = None
    background_s: float = 300.0
    late_evidence: LateEvidence = LateEvidence.RETURN
    track: Tracking = Tracking.BITMAP
    freeze_guest: bool = False
    verify_full: bool = False
    audit: bool = True
    discard_divergence: bool = False
    on_failure: OnFailure = OnFailure.ROLLBACK
    apply_config: bool = False
    create_missing: bool = False
    protect_original: bool | None = None
    to: Destination = field(default_factory=Destination)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One reason why the plan says no. `about` names the thing; `sentence` has thing, cause and cure."""

    code: str
    about: str
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDisk:
    """What would happen to one disk.

    Attributes:
        rung, why_not_higher: what the first pass is to be expected to rest on; of a replica that is off, the only one.
        last_rung, why_last_not_higher: the same of the last pass; empty where there is only one.
    """

    original: str
    replica: str
    source_size_bytes: int
    target_size_bytes: int
    source_format: str
    target_format: str
    rung: str
    why_not_higher: str
    last_rung: str = ""
    why_last_not_higher: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with how sure it is: the true value lies between `low` and `high` 95 times of 100."""

    low: float
    likely: float
    high: float

    def times(self, factor: float) -> Interval:
        """Each of it, so many times."""
        return Interval(low=self.low * factor, likely=self.likely * factor, high=self.high * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskEstimate:
    """What one disk will cost. None and 0 where it is not estimated; `why_not` says why, in a sentence.

    Attributes:
        sampled_blocks, differing_blocks: what the estimate of the changes rests on.
        source_read_bytes, target_read_bytes: what the first pass reads on each side.
        changed_bytes: what differs now, in blocks of 64 KiB.
        first_pass_s: seconds of the first pass.
        last_rung: what the last pass is expected to rest on, empty where there is one pass alone.
        last_pass_s: seconds of what the last pass reads regardless of what changed.
        map_bytes: size of the digest map.
    """

    original: str
    replica: str
    why_not: str
    last_rung: str
    map_bytes: int
    sampled_blocks: int = 0
    differing_blocks: int = 0
    source_read_bytes: int = 0
    target_read_bytes: int = 0
    changed_bytes: Interval | None = None
    first_pass_s: Interval | None = None
    last_pass_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run will cost. `downtime_s` is without the guest's own shutdown and boot; `sentence`: what the numbers
    leave out."""

    disks: tuple[DiskEstimate, ...]
    first_pass_s: Interval | None
    downtime_s: float | None
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Room on one host: what is needed where, and what is free (None: not told), in bytes."""

    host: str
    place: str
    purpose: str
    needed_bytes: int
    free_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDifference:
    """One thing in which the two definitions differ. `action`: what becomes of it, for people."""

    what: str
    original: str
    replica: str
    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would do, refuse and cost, computed without changing anything."""

    pair: str
    refusals: tuple[Refusal, ...]
    disks: tuple[PlannedDisk, ...]
    steps: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())
    estimate: Estimate | None = None
    rooms: tuple[Room, ...] = ()
    differences: tuple[PlannedDifference, ...] = ()
    protects_original: bool = False


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
    replication: Replication | None = None  # None: not said, what was said before stays
