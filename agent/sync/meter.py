"""Books of one disk in one pass: what was compared, sent, written, verified; read for progress, closed as a report."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.delta.pack import Packed
from protocol.messages import ByteRange, DiskProgress, DiskReport, GrantedDisk

RUNG = "digests"
RUNG_MAP = "map"
TRACKED_RUNG = "bitmap"
WHY_NOT_BITMAP = "no dirty bitmap of this disk is at hand since a view that the target equals"
WHY_NOT_HIGHER = "no dirty bitmap and no digest map of this disk is at hand, so both sides are read and hashed"

_OF_AN_ATTEMPT = (
    "zero_bytes",
    "compared_bytes",
    "settled_bytes",
    "changed_bytes",
    "written_bytes",
    "zeroed_bytes",
    "verified_bytes",
    "stored_bytes",
    "unchanged_bytes",
    "mapped_bytes",
    "unmapped_bytes",
    "differing_bytes",
    "resumed_bytes",
)
"""Counters that begin anew when the connections are lost; what of them is proven is `resumed_bytes` then."""


@dataclass
class Meter:
    """Counters in bytes of disk unless they say otherwise; they only grow, but for `cut`. Only the pass's own tasks
    write here."""

    target: str
    size_bytes: int
    zero_bytes: int = 0
    compared_bytes: int = 0
    settled_bytes: int = 0
    changed_bytes: int = 0
    wire_bytes: int = 0
    written_bytes: int = 0
    zeroed_bytes: int = 0
    verified_bytes: int = 0
    past_cache: bool = True
    frames: dict[str, int] = field(default_factory=dict)
    stored_bytes: int = 0
    lanes: int = 1
    superblock_bytes: int = 0
    detail_bytes: int = 0
    access: str = ""
    unchanged_bytes: int = 0
    work_bytes: int | None = None  # what is to be settled, where it is not the whole disk
    rung: str = RUNG
    why_not_higher: str = WHY_NOT_HIGHER
    mapped_bytes: int = 0  # of what was asked about: known from the digest map
    unmapped_bytes: int = 0  # not known from it
    differing_bytes: int = 0
    differing: list[ByteRange] = field(default_factory=list)
    resumed_bytes: int = 0
    reconnects: int = 0
    reconnecting: bool = False
    earlier_compared_bytes: int = 0
    earlier_changed_bytes: int = 0

    @classmethod
    def of(cls, granted: GrantedDisk, why_not: str | None = None) -> Meter:
        """The books of a granted disk. `why_not`: why this side cannot prove more than its grant says."""
        meter = cls(granted.target, granted.source_size_bytes)
        if granted.since is not None:
            meter.rung, meter.why_not_higher = TRACKED_RUNG, ""
        elif why_not:
            meter.why_not_higher = why_not
        return meter

    def cut(self) -> None:
        """The connections of the disk are lost: what follows is counted anew, and this attempt's work apart."""
        self.reconnects += 1
        self.reconnecting = True
        self.earlier_compared_bytes += self.compared_bytes
        self.earlier_changed_bytes += self.changed_bytes or self.written_bytes
        for name in _OF_AN_ATTEMPT:
            setattr(self, name, 0)
        self.frames.clear()
        self.differing.clear()
        self.work_bytes = None

    def add_frame(self, packed: Packed, stored_bytes: int) -> None:
        """A frame of data was sent, stored in `stored_bytes`."""
        kind = packed.codec.value if packed.level is None else f"{packed.codec.value} {packed.level}"
        self.frames[kind] = self.frames.get(kind, 0) + 1
        self.changed_bytes += packed.plain_bytes
        self.stored_bytes += stored_bytes

    def name_rung(self, lost: str) -> None:
        """The target kept a digest map; `lost`: why it was given up in the middle, a clause, or empty. A rung above the
        map's stays."""
        if self.rung != RUNG:
            return
        if self.mapped_bytes > self.unmapped_bytes:
            self.rung = RUNG_MAP
            if self.why_not_higher == WHY_NOT_HIGHER:
                self.why_not_higher = WHY_NOT_BITMAP
        elif lost:
            self.why_not_higher = f"the digest map of this disk was given up: {lost}"
        elif self.unmapped_bytes:
            self.why_not_higher = "the digest map of this disk did not know most of it yet, so both sides were read"

    def progress(self) -> DiskProgress:
        """How far the disk is."""
        return DiskProgress(
            target=self.target,
            total_bytes=self.size_bytes if self.work_bytes is None else self.work_bytes,
            done_bytes=self.settled_bytes,
            zero_bytes=self.zero_bytes,
            changed_bytes=self.changed_bytes,
            wire_bytes=self.wire_bytes,
            reconnects=self.reconnects,
            reconnecting=self.reconnecting,
        )

    def report(self) -> DiskReport:
        """The closed books."""
        return DiskReport(
            target=self.target,
            size_bytes=self.size_bytes,
            zero_bytes=self.zero_bytes,
            compared_bytes=self.compared_bytes,
            changed_bytes=self.changed_bytes,
            wire_bytes=self.wire_bytes,
            written_bytes=self.written_bytes,
            zeroed_bytes=self.zeroed_bytes,
            verified_bytes=self.verified_bytes,
            rung=self.rung,
            why_not_higher=self.why_not_higher,
            past_cache=self.past_cache,
            frames=dict(self.frames),
            stored_bytes=self.stored_bytes,
            lanes=self.lanes,
            superblock_bytes=self.superblock_bytes,
            detail_bytes=self.detail_bytes,
            access=self.access,
            unchanged_bytes=self.unchanged_bytes,
            differing_bytes=self.differing_bytes,
            differing=tuple(self.differing),
            resumed_bytes=self.resumed_bytes,
            reconnects=self.reconnects,
            earlier_compared_bytes=self.earlier_compared_bytes,
            earlier_changed_bytes=self.earlier_changed_bytes,
        )
