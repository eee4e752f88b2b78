"""What the agents of `tests.fakes.agent` have on record: what the replica wrote, what the original is known to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from protocol.messages import DiskTracking, TargetEvidence, ViewedDisk, ViewSince

DIRTY_BYTES = 65536
"""What a disk counts that was written to at all."""


@dataclass
class FakeView:
    """A frozen view; `dirty`: by disk, whether it was written to since the view that its `since` names."""

    live: bool
    content: dict[str, bytes]
    disks: tuple[ViewedDisk, ...]
    dirty: dict[str, bool]


@dataclass
class SourceRecords:
    """The checkpoints and bitmaps of the replica, by the view they begin with.

    Attributes:
        checkpoints: what libvirt knows; `bitmaps`: what the images hold: by view, by disk, whether it was written to.
        untracked: disks whose format has no bitmaps; `broken`: views whose bitmaps are in use or gone.
        lost_late: they break once, when the replica that is off has been protected.
    """

    checkpoints: set[str] = field(default_factory=set)
    bitmaps: dict[str, dict[str, bool]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    untracked: set[str] = field(default_factory=set)
    lost_late: bool = False

    def wrote(self, target: str) -> None:
        """The guest wrote to that disk."""
        for bitmap in self.bitmaps.values():
            if target in bitmap:
                bitmap[target] = True

    def begin(self, view: str, disks: Sequence[ViewedDisk]) -> tuple[ViewedDisk, ...]:
        """Record what is written from here on, to the disks that can."""
        assert view not in self.bitmaps, "a bitmap of that name is in the image already"
        able = tuple(replace(disk, tracked=disk.target not in self.untracked) for disk in disks)
        self.bitmaps[view] = {disk.target: False for disk in able if disk.tracked}
        self.checkpoints.add(view)
        return able

    def viewed(self, target: str, size_bytes: int, since: Sequence[ViewSince], *, live: bool) -> ViewedDisk:
        """What a new view knows of that disk."""
        asked = next((one.view for one in since if one.target == target), None)
        disk = ViewedDisk(target=target, size_bytes=size_bytes)
        if asked is None:
            return replace(disk, why_not="nothing was asked since any view")
        why = self._why_not(target, asked)
        if live and not why and asked not in self.checkpoints:
            why = f"the checkpoint {asked} is gone"
        return replace(disk, since=None if why else asked, why_not=why)

    def dirty_of(self, disks: Sequence[ViewedDisk]) -> dict[str, bool]:
        """What was written since the views that the disks know of."""
        return {disk.target: self.bitmaps[disk.since][disk.target] if disk.since else True for disk in disks}

    def read(self, since: ViewSince) -> DiskTracking:
        """What the closed image recorded."""
        why = self._why_not(since.target, since.view)
        dirty = not why and self.bitmaps[since.view][since.target]
        view = None if why else since.view
        return DiskTracking(target=since.target, since=view, dirty_bytes=DIRTY_BYTES if dirty else 0, why_not=why)

    def _why_not(self, target: str, view: str) -> str:
        if target not in self.bitmaps.get(view, {}):
            return f"the bitmap {view} is gone"
        return f"the bitmap {view} is in use" if view in self.broken else ""

    def drop(self, keep: Sequence[str], *, running: bool) -> None:
        """Checkpoints go, their bitmaps with them while the VM runs."""
        self.checkpoints &= set(keep)
        if running:
            self.bitmaps = {view: bitmap for view, bitmap in self.bitmaps.items() if view in keep}

    def kill(self) -> None:
        """QEMU ended without writing its bitmaps."""
        self.broken |= set(self.bitmaps)

    def end(self) -> None:
        """Nothing of ours stays."""
        self.checkpoints.clear()
        self.bitmaps.clear()
        self.broken.clear()

    @property
    def is_clear(self) -> bool:
        """Whether nothing of ours is left."""
        return not self.checkpoints and not self.bitmaps


@dataclass
class TargetRecords:
    """What the original's agent has durably written of each disk: the view it equals (or is torn from), and what the
    disk held then, which stands for the file's stamp. `maps`: seeds of its digest maps."""

    known: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    maps: dict[str, int] = field(default_factory=dict)

    def torn(self, target: str, content: bytes, *, since: str | None) -> None:
        """A pass has begun to write: what is torn by a tracked one lies in what was written since that view."""
        self.known.pop(target, None)
        if since is not None:
            self.known[target] = (since, content)

    def equal(self, target: str, content: bytes, view: str) -> None:
        """A pass is complete."""
        self.known[target] = (view, content)
        self.maps.setdefault(target, 1000 + len(self.maps))

    def of(self, target: str, disks: Mapping[str, bytes], *, held: bool) -> TargetEvidence:
        """What is proven of that disk now."""
        view, content = self.known.get(target, (None, b""))
        why = "" if view is not None else "no pass was complete"
        if view is not None and (not held or disks[target] != content):
            view, why = None, f"the file of {target} was changed since"
        seed = self.maps.get(target)
        return TargetEvidence(
            target=target,
            equals=view,
            why_not=why,
            map_seed=seed,
            map_known_bytes=0 if seed is None else 1 << 20,
            why_no_map="no pass was complete" if seed is None else "",
        )

    def answer(self, targets: Sequence[str], disks: Mapping[str, bytes], *, held: bool) -> tuple[TargetEvidence, ...]:
        """What is proven of those disks."""
        return tuple(self.of(target, disks, held=held) for target in targets)
