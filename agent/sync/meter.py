"""Books of one disk in one pass: what was compared, sent, written, verified; read for progress, closed as a report."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.delta.pack import Packed
from protocol.messages import ByteRange, DiskProgress, DiskReport

RUNG = "digests"
RUNG_MAP = "map"
WHY_NOT_BITMAP = "no dirty bitmap of this disk is at hand since a view that the target equals"
WHY_NOT_HIGHER = "no dirty bitmap and no digest map of this disk is at hand, so both sides are read and hashed"


@dataclass
class Meter:
    """Counters in bytes of disk unless they say otherwise; they only grow. Only the pass's own tasks write here."""

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
    rung: str = RUNG
    why_not_higher: str = WHY_NOT_HIGHER
    mapped_bytes: int = 0  # of what was asked about: known from the digest map
    unmapped_bytes: int = 0  # not known from it
    differing_bytes: int = 0
    differing: list[ByteRange] = field(default_factory=list)

    def add_frame(self, packed: Packed, stored_bytes: int) -> None:
        """A frame of data was sent, stored in `stored_bytes`."""
        kind = packed.codec.value if packed.level is None else f"{packed.codec.value} {packed.level}"
        self.frames[kind] = self.frames.get(kind, 0) + 1
        self.changed_bytes += packed.plain_bytes
        self.stored_bytes += stored_bytes

    def name_rung(self, lost: str) -> None:
        """The target kept a digest map; `lost`: why it was given up in the middle, a clause, or empty."""
        if self.mapped_bytes > self.unmapped_bytes:
            self.rung, self.why_not_higher = RUNG_MAP, WHY_NOT_BITMAP
        elif lost:
            self.why_not_higher = f"the digest map of this disk was given up: {lost}"
        elif self.unmapped_bytes:
            self.why_not_higher = "the digest map of this disk did not know most of it yet, so both sides were read"

    def progress(self) -> DiskProgress:
        """How far the disk is."""
        return DiskProgress(
            target=self.target,
            total_bytes=self.size_bytes,
            done_bytes=self.settled_bytes,
            zero_bytes=self.zero_bytes,
            changed_bytes=self.changed_bytes,
            wire_bytes=self.wire_bytes,
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
            differing_bytes=self.differing_bytes,
            differing=tuple(self.differing),
        )
