"""How hard to compress: as the link, the receiver and our own processors were waited for in the last interval.

Measured values in, a choice out, without a clock. The controller climbs a ladder of zstd levels one rung at a time
while the network is the bottleneck and the packers have time to spare, and steps down at once when packing is what
everything waits for. Data that does not shrink turns compression off whatever the rung; now and then the rung is tried
again.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Choice:
    """What a packer is told.

    Attributes:
        level: zstd level; None for off.
        frame_bytes: plain bytes of a frame at most.
    """

    level: int | None
    frame_bytes: int


@dataclass(frozen=True, slots=True)
class Interval:
    """What was seen in a stretch of time, of all the disks and lanes that share the packers.

    Attributes:
        wall_s: its length in seconds, more than 0.
        link_limited_s: how long the sender waited for the network itself, or for our own limit of it.
        receiver_limited_s: how long it waited for the receiver.
        packing_s: thread-seconds spent packing.
        packers: threads that may pack, at least 1.
        plain_bytes: what was packed, in bytes.
        stored_bytes: what it was packed into, in bytes.
        idle_share: of the host's processors, from 0 to 1: with nothing left of it, packing holds up everything else.
    """

    wall_s: float
    link_limited_s: float
    receiver_limited_s: float
    packing_s: float
    packers: int
    plain_bytes: int
    stored_bytes: int
    idle_share: float = 1.0


@dataclass(frozen=True, slots=True)
class _Rung:
    level: int | None
    bytes_per_s: float  # nominal, of one core, on system files
    frame_bytes: int


_HASHING_BYTES_PER_S = 5e9
"""BLAKE3 proofs, which packing also spends its time on, whatever the level."""

_LADDER = (
    _Rung(None, 1e12, 4 * MIB),
    _Rung(-20, 1.2e9, 2 * MIB),
    _Rung(-5, 0.7e9, 2 * MIB),
    _Rung(-1, 0.5e9, 2 * MIB),
    _Rung(1, 0.42e9, 2 * MIB),
    _Rung(3, 0.25e9, 2 * MIB),
    _Rung(5, 0.13e9, 4 * MIB),
    _Rung(6, 0.09e9, 4 * MIB),
    _Rung(9, 0.05e9, 4 * MIB),
)
"""Speeds matter only against one another: what a rung costs here and now is measured while on it. A frame costs either
side half a millisecond whatever its size, so those that cost nothing else are large; stronger levels look back further,
so theirs are, too; beyond 4 MiB a frame saves little and delays what is behind it."""
_START = 4
_SCARCE = 5
"""Where the link is scarce (somebody limited it), bytes count more than processor time: never below level 3."""

_LINK_BOUND = 0.3  # share of the time waited for the network from which on more compression may help
_LINK_FREE = 0.15  # and below which it cannot: between the two nothing changes
_RECEIVER_BOUND = 0.3
_PACKERS_BUSY = 0.6  # share of the packers' time; with neither link nor receiver waited for, they hold everything up
_NO_IDLE = 0.1  # idle share of the host below which its processors are what everything waits for
_PACKERS_MATTER = 0.1  # share of the packers' time below which a faster level would not be felt
_PACKERS_FULL = 0.92  # too much even while the link is waited for
_SPARE_AFTER = 0.75  # what a climb may make of the packers' time, by prediction: well below full, or it would come back
_EASILY = 0.5  # and below this one interval is evidence enough

_SHRINKS_NOT = 0.96  # stored by plain bytes from which on compression is off
_EVIDENCE_BYTES = 8 * MIB  # of data, before it is called so
_FIRST_REST, _LONGEST_REST = 4, 32  # intervals of being off for that reason before the rung is tried again
_FIRST_BAN, _LONGEST_BAN = 8, 64  # intervals during which a rung that proved too much is not tried again
_SLOWER_LINK = 0.5  # of what the link then carried: the ban is off, for the conditions are others


class CompressionController:
    """Chooses level and frame size. One for all that share packers and link; used by one thread at a time.

    Args:
        link_is_scarce: bytes on the link are dear whether it is waited for or not.
    """

    def __init__(self, *, link_is_scarce: bool = False) -> None:
        self._floor = _SCARCE if link_is_scarce else 0
        self._rung = max(_START, self._floor)
        self._effort = 1.0  # what packing costs here, by what the ladder says of the rung
        self._link_bound_before = False
        self._link_bound = False
        self._ceiling = len(_LADDER) - 1
        self._ban, self._ban_length, self._next_ban = 0, _FIRST_BAN, _FIRST_BAN
        self._banned_at_bytes_per_s = 0.0
        self._plain_bytes = self._stored_bytes = 0  # since it last shrank, or was tried
        self._rest, self._next_rest = 0, _FIRST_REST

    @property
    def choice(self) -> Choice:
        """What holds now."""
        rung = _LADDER[self._rung]
        return Choice(None if self._rest else rung.level, rung.frame_bytes)

    @property
    def link_bound(self) -> bool:
        """Whether the link was what was waited for in the last intervals that told anything."""
        return self._link_bound

    def observe(self, interval: Interval) -> Choice:
        """Take in what was seen under the last choice; the next one.

        Raises:
            ValueError: an interval of no length, or without packers.
        """
        if interval.wall_s <= 0 or interval.packers < 1:
            raise ValueError(f"an interval of {interval.wall_s} s with {interval.packers} packers tells nothing")
        if not interval.plain_bytes:
            return self.choice  # nothing to send, nothing to learn
        self._see_link(interval)
        if self._rest:
            self._rest_on(interval)
            return self.choice
        if self._shrinks_not(interval):
            self._rest = self._next_rest
            self._next_rest = min(2 * self._next_rest, _LONGEST_REST)
            return self.choice
        self._measure_effort(interval)
        self._lift_ban(interval)
        self._step(interval)
        return self.choice

    def _see_link(self, interval: Interval) -> None:
        """Between the two shares nothing changes."""
        share = interval.link_limited_s / interval.wall_s
        receiver = interval.receiver_limited_s / interval.wall_s
        if share >= _LINK_BOUND and share > receiver:
            self._link_bound = True
        elif share < _LINK_FREE:
            self._link_bound = False

    def _rest_on(self, interval: Interval) -> None:
        """Off since the data did not shrink. Whether it does now is asked only while the link is waited for."""
        if self._rest > 1 or interval.link_limited_s >= _LINK_BOUND * interval.wall_s:
            self._rest -= 1

    def _shrinks_not(self, interval: Interval) -> bool:
        if _LADDER[self._rung].level is None:
            return False
        self._plain_bytes += interval.plain_bytes
        self._stored_bytes += interval.stored_bytes
        if self._plain_bytes < _EVIDENCE_BYTES:
            return False
        share = self._stored_bytes / self._plain_bytes
        self._plain_bytes = self._stored_bytes = 0
        if share < _SHRINKS_NOT:
            self._next_rest = _FIRST_REST
            return False
        return True

    def _measure_effort(self, interval: Interval) -> None:
        measured = interval.packing_s / interval.plain_bytes / _cost(self._rung)
        # Bounded, since a few bytes in a short interval may say anything; averaged, since data is a mixture.
        self._effort += (min(max(measured, 0.1), 10.0) - self._effort) / 2

    def _lift_ban(self, interval: Interval) -> None:
        if self._ban:
            self._ban -= 1
            link_bound = interval.link_limited_s >= _LINK_BOUND * interval.wall_s
            slower = interval.stored_bytes / interval.wall_s < _SLOWER_LINK * self._banned_at_bytes_per_s
            if link_bound and slower:
                self._ban, self._next_ban = 0, _FIRST_BAN
        if not self._ban:
            self._ceiling = len(_LADDER) - 1

    def _step(self, interval: Interval) -> None:
        link = interval.link_limited_s / interval.wall_s
        receiver = interval.receiver_limited_s / interval.wall_s
        busy = interval.packing_s / interval.wall_s / interval.packers
        packing_bound = link < _LINK_FREE and receiver < _RECEIVER_BOUND and busy > _PACKERS_BUSY
        # Whether it is our processors or a receiver on them that lags, shows in who waits for whom only by chance.
        packing_bound |= link < _LINK_FREE and interval.idle_share < _NO_IDLE and busy > _PACKERS_MATTER
        # A receiver that holds everything up gains nothing from faster packing, but nothing is gained by full packers.
        if packing_bound or busy > _PACKERS_FULL:
            self._step_down(interval)
            return
        link_bound = link >= _LINK_BOUND and link > receiver
        seen_twice, self._link_bound_before = link_bound and self._link_bound_before, link_bound
        if not link_bound or self._rung >= self._ceiling:
            return
        predicted = self._busy_on(self._rung + 1, interval)
        if predicted < _EASILY or (seen_twice and predicted < _SPARE_AFTER):
            self._rung += 1

    def _step_down(self, interval: Interval) -> None:
        self._link_bound_before = False
        if self._rung <= self._floor:
            return
        if not self._ban:  # a retreat of several rungs is one mistake, not several
            self._ban_length = self._next_ban
            self._next_ban = min(2 * self._next_ban, _LONGEST_BAN)
        self._rung -= 1
        self._ceiling = self._rung
        self._ban = self._ban_length
        self._banned_at_bytes_per_s = interval.stored_bytes / interval.wall_s

    def _busy_on(self, rung: int, interval: Interval) -> float:
        """Share of the packers' time that a rung would take at the rate of now, with effort as measured. The rate of
        plain bytes rises with what the rung saves more; the margin of `_SPARE_AFTER` is there for that."""
        return interval.plain_bytes / interval.wall_s * _cost(rung) * self._effort / interval.packers


def _cost(rung: int) -> float:
    """Thread-seconds for a plain byte on a rung, nominally."""
    return 1 / _HASHING_BYTES_PER_S + 1 / _LADDER[rung].bytes_per_s
