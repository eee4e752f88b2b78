"""What steps leave in the journal: one small frozen value for each kind of step."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.model import RestorePoint, RunLimits
from protocol.messages import ByteRange, PassKind, PassReport, Power


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """The step has nothing to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSizes:
    """One disk of the pair, by target names, with its sizes now."""

    original: str
    replica: str
    source_size_bytes: int
    target_size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyRecord:
    """Both sides as the run found them. Fingerprints are those of the agents' certificates."""

    original_power: Power
    replica_power: Power
    original_fingerprint: str
    replica_fingerprint: str
    bulk_port: int
    disks: tuple[DiskSizes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HooksRecord:
    """Names of the executables that ran."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOffRecord:
    """How a VM went off."""

    was_running: bool
    forced: bool
    guest_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceRecord:
    """A fence that stands."""

    autostart_before: bool
    condition: str
    view: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRecord:
    """A view that was opened."""

    view: str
    live: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRecord:
    """A complete pass: what both sides said of it."""

    view: str
    source: PassReport
    target: PassReport


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
class RestorePointRecord:
    """What commit was told to do with the protective snapshot."""

    restore_point: RestorePoint


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
    | RestorePointRecord
    | CheckRecord
    | MapsRecord
    | RunLimits
)
