"""How far a pass is, how fast it goes and when it ends: plain arithmetic on what the source agent pushes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from protocol.messages import DiskProgress

WINDOW_S = 10.0
"""The rate is that of the last ten seconds: long enough to be calm, short enough to notice a link that slows down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The latest picture of a pass.

    Attributes:
        step: ``pass:1``, ``pass:2`` … or ``last_pass``.
        at_s: wall time of the picture, seconds since 1970.
        elapsed_s: since the pass began.
        disks: per disk (replica target), in bytes.
        total_bytes, done_bytes, zero_bytes, changed_bytes, wire_bytes: sums over the disks.
        saved_bytes: settled without crossing the network: done less what was on the wire.
        rate_bytes_s: settled bytes a second, of the last `WINDOW_S`.
        eta_s: seconds to the end of the pass at that rate; None while no rate is known.
    """

    run: str
    step: str
    at_s: float
    elapsed_s: float
    disks: tuple[DiskProgress, ...]
    total_bytes: int
    done_bytes: int
    zero_bytes: int
    changed_bytes: int
    wire_bytes: int
    saved_bytes: int
    rate_bytes_s: float
    eta_s: float | None


@dataclass
class ProgressMeter:
    """Turns pushed counts into a `Progress`."""

    run: str
    step: str
    started_s: float
    _marks: deque[tuple[float, int]] = field(default_factory=deque)

    def take(self, disks: tuple[DiskProgress, ...], *, monotonic_s: float, wall_s: float) -> Progress:
        """The picture after these counts, taken at `monotonic_s`."""
        done = sum(disk.done_bytes for disk in disks)
        total = sum(disk.total_bytes for disk in disks)
        wire = sum(disk.wire_bytes for disk in disks)
        rate = self._rate(monotonic_s, done)
        return Progress(
            run=self.run,
            step=self.step,
            at_s=wall_s,
            elapsed_s=max(0.0, monotonic_s - self.started_s),
            disks=disks,
            total_bytes=total,
            done_bytes=done,
            zero_bytes=sum(disk.zero_bytes for disk in disks),
            changed_bytes=sum(disk.changed_bytes for disk in disks),
            wire_bytes=wire,
            saved_bytes=max(0, done - wire),
            rate_bytes_s=rate,
            eta_s=(total - done) / rate if rate > 0 else (0.0 if done >= total else None),
        )

    def _rate(self, now_s: float, done: int) -> float:
        self._marks.append((now_s, done))
        while len(self._marks) > 2 and now_s - self._marks[0][0] > WINDOW_S:
            self._marks.popleft()
        then_s, before = self._marks[0]
        if now_s <= then_s:
            then_s, before = self.started_s, 0
        return max(0.0, (done - before) / (now_s - then_s)) if now_s > then_s else 0.0
