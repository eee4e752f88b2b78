"""What steps leave in the journal: one small frozen value for each kind of step."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.model import DiskPair, Replication, RestorePoint, RunLimits
from protocol.messages import ByteRange, DiskTracking, PassKind, PassReport, Power, ViewedDisk


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """The step has nothing to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSizes:
    """One disk of the pair, by target names, with its sizes now; `source_format`: of the replica's image."""

    original: str
    replica: str
    source_size_bytes: int
    target_size_bytes: int
    source_format: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyRecord:
    """Both sides as the run found them. Fingerprints are those of the agents' certificates; `carries_state`: a VM has
    firmware variables or a TPM."""

    original_power: Power
    replica_power: Power
    original_fingerprint: str
    replica_fingerprint: str
    bulk_port: int
    disks: tuple[DiskSizes, ...]
    carries_state: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HooksRecord:
    """Names of the executables that ran."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOffRecord:
    """How a VM went off. `killed`: QEMU did not end gracefully, so that its bitmaps are lost."""

    was_running: bool
    forced: bool
    guest_s: float
    killed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceRecord:
    """A fence that stands."""

    autostart_before: bool
    condition: str
    view: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRecord:
    """A view that was opened.

    Attributes:
        disks: what the source said of each disk; empty where it was closed.
        opened_s: when, by the monotonic clock of the process that wrote the entry: comparable under one epoch only.
    """

    view: str
    live: bool
    disks: tuple[ViewedDisk, ...] = ()
    opened_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskEvidence:
    """On what a pass rests for one disk.

    Attributes:
        original, replica: its target names.
        rung: ``bitmap``, ``overlay``, ``map`` or ``digests``.
        since: the view that both sides have proven the target to equal; None below rung 1.
        map_seed: seed of the target's digest map, if it keeps one: the pass fills it, or goes by it.
        why_not_higher: a sentence; empty at the top.
    """

    original: str
    replica: str
    rung: str
    since: str | None
    map_seed: int | None
    why_not_higher: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRecord:
    """A complete pass: what both sides said of it, and the evidence it was allowed to rest on."""

    view: str
    source: PassReport
    target: PassReport
    evidence: tuple[DiskEvidence, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointsRecord:
    """What was recorded since these views is kept; the rest is forgotten."""

    kept: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingRecord:
    """What the replica's records say after its power-off."""

    disks: tuple[DiskTracking, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFailure:
    """A round that was given up and is followed by another one. `targets`: the replica's disks it was about."""

    number: int
    code: str
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchOrder:
    """A later word on when to switch. `at_s`: seconds since 1970; None: now. `turn`: no person's word, but that the
    pair's turn in its plan has come (see `SwitchPolicy.TURN`); `at_s` is None then."""

    at_s: float | None
    turn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What a run that could switch waits for. `key`: changes when the reason does; `sentence`: for people."""

    key: str
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How long nobody would be served if the switchover began now.

    Attributes:
        guest_s: the guest's own shutdown; `guest_seen`: measured for this guest, else a default.
        fixed_s: the orders around the last pass; `fixed_measured`: at least in part measured in this run.
        pass_s: the last pass.
        delta_bytes: what it would send; `read_bytes`: what the source would read.
        whole: replica's disks which it would have to read whole.
        dirty_bytes_s: how fast the guest writes anew; None: not measured yet.
        copy_bytes_s: how fast changes were copied.
    """

    guest_s: float
    guest_seen: bool
    fixed_s: float
    fixed_measured: bool
    pass_s: float
    delta_bytes: int
    read_bytes: int
    whole: tuple[str, ...]
    dirty_bytes_s: float | None
    copy_bytes_s: float

    @property
    def ours_s(self) -> float:
        """Without the guest's own shutdown."""
        return self.fixed_s + self.pass_s

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.guest_s + self.ours_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectRecord:
    """The protective snapshot, with its overlays' paths for people."""

    snapshot: str
    overlays: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRecord:
    """The original equals that view."""

    view: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRecord:
    """What became of the original's fence when the run was taken back. `kept`: it still stands."""

    kept: bool
    condition: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FormerRecord:
    """The original that a run moves away from. `fenced`: its host keeps it off, or it is `gone`; else that is owed."""

    fenced: bool
    gone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePointRecord:
    """What commit was told to do with the protective snapshot."""

    restore_point: RestorePoint


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptDisk:
    """One disk of a restore point: `old` is its read-only base, `new` is what the replica writes to from now on."""

    target: str
    old: str
    old_format: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRecord:
    """The protective snapshot that stays as a restore point."""

    snapshot: str
    disks: tuple[KeptDisk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationRecord:
    """How the pair is replicated, as a person said."""

    replication: Replication


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedDisk:
    """One disk, compared whole. `differing`: where it differs, as many ranges as the agents told."""

    original: str
    replica: str
    size_bytes: int
    differing_bytes: int
    differing: tuple[ByteRange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRecord:
    """A complete comparison of a view: an audit or a verification in full."""

    view: str
    kind: PassKind
    elapsed_s: float
    disks: tuple[CheckedDisk, ...]

    @property
    def differs(self) -> bool:
        """Whether anything does."""
        return any(disk.differing_bytes for disk in self.disks)


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestMap:
    """The digest map of one of the original's disks: its seed, or why there is none."""

    original: str
    seed: int | None
    why_not: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MapsRecord:
    """The digest maps that stood for the original when it started; `why_not`: why nothing is known of any."""

    maps: tuple[DigestMap, ...]
    why_not: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingRecord:
    """The disks that the original lacks and this run creates."""

    disks: tuple[DiskPair, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedRecord:
    """They were created there."""

    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigRecord:
    """What was applied to the original's definition, in words."""

    applied: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateRecord:
    """The files that were carried: kind and name, size in bytes, BLAKE3."""

    files: tuple[str, ...]


Record = (
    Nothing
    | SurveyRecord
    | HooksRecord
    | PowerOffRecord
    | FenceRecord
    | ViewRecord
    | PassRecord
    | ProtectRecord
    | VerifyRecord
    | ReleaseRecord
    | FormerRecord
    | RestorePointRecord
    | KeptRecord
    | ReplicationRecord
    | CheckRecord
    | MapsRecord
    | RunLimits
    | CheckpointsRecord
    | TrackingRecord
    | RoundFailure
    | SwitchOrder
    | Waiting
    | Prediction
    | MissingRecord
    | CreatedRecord
    | ConfigRecord
    | StateRecord
)
