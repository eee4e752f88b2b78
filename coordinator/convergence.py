"""Whether another pass is worth it while the replica serves. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.prediction import Measured, pass_seconds
from coordinator.records import Prediction
from coordinator.rounds import DoneRound

WORTH_S = 0.5
"""Another pass must shorten the downtime by at least this much …"""
WORTH_PART = 0.1
"""… and by this part of it."""
KEEPS_UP = 0.9
"""A guest that writes at this part of the speed of copying, or faster, leaves no pass anything to win."""
MOST_IN_A_ROW = 12
"""Passes without a rest, whatever the arithmetic says of the next one."""
MEASURES_NOTHING_AFTER = 3
"""So many passes without knowing how fast the guest writes, and it will not be known."""
LARGE_CHANGE = 0.1
"""A first whole pass that found more than this part changed took long for it: the next one will not."""
LONG_PASS_S = 10.0


class Next(enum.Enum):
    """What follows a round."""

    AGAIN = "again"  # another one, at once
    READY = "ready"  # little is left: it may be switched
    HOLD = "hold"  # nothing is to be won now, and it must not be switched by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What follows, and why: `key` is one of ``measuring``, ``shrinks``, ``ready``, ``diverges``, ``over-max``;
    `sentence` is for people."""

    next: Next
    key: str
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """After a round.

    Attributes:
        rounds: the complete rounds of this process since it last rested.
        measured, prediction: see `coordinator.prediction`.
        earlier_s: downtimes predicted after the rounds before, since the last rest, oldest first.
        max_downtime_s: what was agreed; None: nothing.
        pair: for the sentences.
    """

    rounds: Sequence[DoneRound]
    measured: Measured
    prediction: Prediction
    earlier_s: Sequence[float]
    max_downtime_s: float | None
    pair: str


def decide(situation: Situation) -> Decision:
    """Another pass while each shrinks the downtime worthwhile; else ready, or a hold that says what can be done."""
    prediction = situation.prediction
    within = situation.max_downtime_s is not None and prediction.total_s <= situation.max_downtime_s
    if prediction.dirty_bytes_s is None:
        if _wants_a_second(situation):
            return Decision(next=Next.AGAIN, key="measuring", sentence="another pass shows how fast the guest writes")
        return _settled(situation)
    if len(situation.rounds) < MOST_IN_A_ROW and _is_worth_it(situation) and not _stalls(situation):
        return Decision(
            next=Next.AGAIN,
            key="shrinks",
            sentence=f"another pass shortens the downtime from about {prediction.total_s:.1f} s",
        )
    if prediction.dirty_bytes_s >= KEEPS_UP * prediction.copy_bytes_s and not within:
        return _diverges(situation)
    return _settled(situation)


def _settled(situation: Situation) -> Decision:
    total_s, agreed_s = situation.prediction.total_s, situation.max_downtime_s
    if agreed_s is None or total_s <= agreed_s:
        return Decision(next=Next.READY, key="ready", sentence=f"the downtime would be about {total_s:.1f} s")
    whole = situation.prediction.whole
    reads = f", most of it for reading {', '.join(whole)} whole" if whole else ""
    return Decision(
        next=Next.HOLD,
        key="over-max",
        sentence=(
            f"the downtime would be about {total_s:.0f} s{reads}, more than the {agreed_s:.0f} s agreed "
            f"(--max-downtime): passes go on; `failback limit {situation.pair}` lifts limits, `failback switch "
            f"{situation.pair}` switches all the same"
        ),
    )


def _diverges(situation: Situation) -> Decision:
    pair, prediction = situation.pair, situation.prediction
    dirty, copied = (prediction.dirty_bytes_s or 0.0) / (1 << 20), prediction.copy_bytes_s / (1 << 20)
    return Decision(
        next=Next.HOLD,
        key="diverges",
        sentence=(
            f"does not converge: the guest writes {dirty:.1f} MiB/s and {copied:.1f} MiB/s "
            f"are copied, so the downtime would be about {prediction.total_s:.0f} s and grows; `failback limit {pair}` "
            f"lifts limits, a larger --max-downtime lets it switch, `failback switch {pair}` switches all the same"
        ),
    )


def _wants_a_second(situation: Situation) -> bool:
    """Nothing is known of how fast the guest writes: whether a pass to learn it pays."""
    if len(situation.rounds) >= MEASURES_NOTHING_AFTER:
        return False
    if situation.measured.tracked:
        return True
    if not situation.rounds:
        return False
    first = situation.rounds[-1]
    changed = sum(report.changed_bytes for report in first.passed.source.disks)
    compared = sum(report.compared_bytes for report in first.passed.source.disks)
    return first.elapsed_s >= LONG_PASS_S and changed > LARGE_CHANGE * compared


def _is_worth_it(situation: Situation) -> bool:
    """Whether the pass after another one would be that much shorter than the pass now."""
    measured, now_s = situation.measured, situation.prediction.pass_s
    dirty = situation.prediction.dirty_bytes_s or 0.0
    # The pass in between takes as long as this one would; what is written meanwhile is left for the one after it.
    after_s = pass_seconds(measured, delta=dirty * now_s, whole=situation.prediction.whole)
    gain_s = now_s - after_s
    return gain_s >= max(WORTH_S, WORTH_PART * now_s)


def _stalls(situation: Situation) -> bool:
    """Whether the last pass did not win what such passes promise: noise, or a guest that became busier."""
    earlier = situation.earlier_s
    return len(earlier) >= 2 and situation.prediction.total_s > (1 - WORTH_PART) * earlier[-1]
