"""An open view as this process reads it, whether it was opened here or by a process that was killed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import structlog

from agent.disk.allocated import open_allocated
from agent.disk.dirty import DirtyRanges, open_dirty_view
from agent.disk.lock import HeldImage
from agent.disk.open import open_view
from agent.disk.seam import Disk
from agent.errors import DiskError
from agent.overlay_chain import FrozenDisk
from agent.served_views import ServedView
from agent.virt.seam import View

log = structlog.get_logger("failback.agent")


@dataclass
class OpenedView:
    """One open view: its disks by target name stay open until it is closed.

    Attributes:
        tracked: targets whose writes are recorded from this view on.
        since: by target: the earlier view since which it is known what was written.
        dirty: by target, of the same disks: what that is.
        why_not: by target, reasons why it is not tracked, or does not know.
    """

    pair: str
    view: str
    live: bool
    disks: dict[str, Disk] = field(default_factory=dict)
    tracked: set[str] = field(default_factory=set)
    since: dict[str, str] = field(default_factory=dict)
    dirty: dict[str, DirtyRanges] = field(default_factory=dict)
    why_not: dict[str, list[str]] = field(default_factory=dict)
    locks: list[HeldImage] = field(default_factory=list)

    def tell(self, target: str, reason: str) -> None:
        """Add a reason to `why_not`."""
        self.why_not.setdefault(target, []).append(reason)

    def know(self, target: str, since: str, read: Callable[[], DirtyRanges]) -> None:
        """What was written to a disk since an earlier view is told by `read`, if it can be read."""
        try:
            self.dirty[target] = read()
        except DiskError as error:
            self.tell(target, error.sentence)
        else:
            self.since[target] = since

    @property
    def sizes(self) -> dict[str, int]:
        """Size in bytes by target name."""
        return {target: disk.size_bytes for target, disk in self.disks.items()}

    def close(self) -> None:
        """Close every disk. They were only read: nothing that goes wrong here loses anything."""
        both: list[Disk | DirtyRanges] = [*self.dirty.values(), *self.disks.values()]
        for opened in both:
            with contextlib.suppress(DiskError):
                opened.close()
        self.dirty.clear()
        self.disks.clear()
        for lock in self.locks:
            lock.close()
        self.locks.clear()

    def know_overlays(self, disk: FrozenDisk, *, asked: bool) -> None:
        """What overlays know of a disk; `asked`: an earlier view was asked for."""
        if disk.since is not None:
            self.know(disk.target, disk.since, partial(open_allocated, disk.target, disk.image, disk.layers))
        elif asked:
            self.tell(disk.target, disk.why_not)


def attached(record: ServedView) -> OpenedView | None:
    """The view of that record, which QEMU still serves; None where it cannot be read."""
    opened = OpenedView(record.pair, record.view, live=True)
    opened.tracked |= set(record.tracked)
    for target, reasons in record.why_not.items():
        opened.why_not[target] = list(reasons)
    try:
        for target in record.targets:
            opened.disks[target] = open_view(target, record.socket, record.exports[target])
    except DiskError as error:
        log.warning("the view of a former agent cannot be read", view=record.view, reason=error.sentence)
        opened.close()
        return None
    for target, context in record.contexts.items():
        opened.know(
            target,
            record.since[target],
            partial(open_dirty_view, target, record.socket, record.exports[target], context),
        )
    return opened


def record_of(vm_uuid: str, opened: OpenedView, served: View) -> ServedView:
    """What is to be recorded of a view that a backup job serves whole."""
    return ServedView(
        vm_uuid=vm_uuid,
        pair=opened.pair,
        view=opened.view,
        targets=tuple(opened.disks),
        socket=served.socket,
        exports=served.exports,
        contexts={target: context for target, context in served.dirty_contexts.items() if target in opened.since},
        scratch=served.scratch,
        tracked=tuple(sorted(opened.tracked)),
        since=dict(opened.since),
        why_not={target: tuple(reasons) for target, reasons in opened.why_not.items()},
    )
