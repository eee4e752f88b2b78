"""The passes of the in-memory agents that only compare, and the digest maps they compare with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from coordinator.errors import AgentRefused
from protocol.messages import (
    ByteRange,
    DiskReport,
    Grant,
    PassKind,
    PassReport,
    TargetEvidence,
)

SIZE_BYTES = 1 << 20
DIFFERING = (ByteRange(offset_bytes=65536, length_bytes=65536),)
Content = dict[str, bytes]


@dataclass
class FakeMaps:
    """What the target agent keeps of the original's disks.

    Attributes:
        maps: what each disk of the original held, as its map says; made by passes, never by the guest.
        missing: disks without a map.
        doubted: disks whose map proves nothing any more, though it is there.
        rotten: disks of the original whose storage does not give back what was written.
    """

    maps: Content = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    doubted: set[str] = field(default_factory=set)
    rotten: set[str] = field(default_factory=set)

    def told(self, disks: tuple[TargetEvidence, ...]) -> tuple[TargetEvidence, ...]:
        """What the target agent says of its disks, less the maps that are missing."""
        why = "the agent was told to keep none"
        told = (
            replace(disk, map_seed=None, map_known_bytes=0, why_no_map=why) if disk.target in self.missing else disk
            for disk in disks
        )
        return tuple(
            replace(disk, map_known_bytes=0, why_no_map="the file was changed since") if d else disk
            for disk in told
            for d in [disk.target in self.doubted]
        )

    def report(self, grant: Grant, view: Content, original: Content, *, sends: bool) -> PassReport:
        """What one side says of a complete comparison; the target is the one that compares.

        Args:
            view: the replica's disks as the view froze them.
            original: the original's disks now.
        """
        if grant.kind is PassKind.AUDIT and any(disk.digest_seed is None for disk in grant.disks):
            raise AgentRefused("the seed of the map is not told", code="forbidden")
        disks = []
        for disk in grant.disks:
            here, there = (disk.peer_target, disk.target) if sends else (disk.target, disk.peer_target)
            differs = not sends and view[there] != self._held(grant.kind, here, original)
            disks.append(_compared(disk.target, DIFFERING if differs else (), whole=sends))
        return PassReport(view=grant.view, elapsed_s=1.0, disks=tuple(disks))

    def _held(self, kind: PassKind, target: str, original: Content) -> bytes:
        if kind is PassKind.AUDIT:
            return self.maps[target]
        return b"rot" if target in self.rotten else original[target]


def _compared(target: str, differing: tuple[ByteRange, ...], *, whole: bool) -> DiskReport:
    return DiskReport(
        target=target,
        size_bytes=SIZE_BYTES,
        zero_bytes=0,
        compared_bytes=SIZE_BYTES if whole else 0,
        changed_bytes=0,
        wire_bytes=100,
        written_bytes=0,
        zeroed_bytes=0,
        verified_bytes=0,
        rung="digests",
        why_not_higher="",
        past_cache=True,
        frames={},
        stored_bytes=0,
        lanes=1,
        superblock_bytes=0,
        detail_bytes=0,
        access="raw",
        differing_bytes=sum(one.length_bytes for one in differing),
        differing=differing,
    )
