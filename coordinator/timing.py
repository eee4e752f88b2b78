"""When to switch: at once, at a set time, or when a person says so. Pure.

Wall time is compared with the set time and with nothing else; waits are short, so that setting a clock takes effect.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import UTC, datetime

from coordinator.convergence import Decision, Next
from coordinator.model import RunOptions, State, SwitchPolicy
from coordinator.plain import from_json
from coordinator.records import SwitchOrder, Waiting
from coordinator.runlog import RunLog

SWITCH = "switch"
"""Name of the note, and verb of the request: a person's later word on when to switch."""
LATE_RETURN = "late_return"
"""Name of the note that the replica goes back into service because the downtime would be too long."""
LATEST_S = 15 * 60.0
"""How late a set time may be and still count."""
LAST_ROUND_TIMES, LAST_ROUND_MORE_S = 1.25, 5.0
"""The last round before a set time gets this many times what the latest one took, and this much more."""
MOST_RETURNS = 2
"""After so many returns from the switchover only a person switches."""


class Trigger(enum.Enum):
    """What the run waits for."""

    AUTO = "auto"
    AT = "at"
    PERSON = "person"
    TURN = "turn"
    NOW = "now"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The word on when to switch that holds now. `at_s`: of AT; `used`: the set time has been obeyed or missed."""

    trigger: Trigger
    at_s: float | None = None
    used: bool = False


def order_in_force(options: RunOptions, log: RunLog) -> Order:
    """The last word of a person, as long as it has not been carried out; before any, that of `start`."""
    told = [(entry, from_json(entry.result or "", SwitchOrder)) for entry in log.notes(SWITCH)]
    switched = log.seq_of_state(State.SWITCHING.value)
    persons = [(entry, order) for entry, order in told if not order.turn]
    if persons:
        entry, last = persons[-1]
        used = switched > entry.seq
        if last.at_s is not None:
            return Order(trigger=Trigger.AT, at_s=last.at_s, used=used)
        if not used:
            return Order(trigger=Trigger.NOW)
    policy = options.switch
    if policy is SwitchPolicy.TURN and any(order.turn for _, order in told):
        policy = SwitchPolicy.AUTO if options.switch_at_s is None else SwitchPolicy.AT
    match policy:
        case SwitchPolicy.AUTO:
            tired = len(log.notes(LATE_RETURN)) >= MOST_RETURNS
            return Order(trigger=Trigger.PERSON if tired else Trigger.AUTO)
        case SwitchPolicy.AT:
            return Order(trigger=Trigger.AT, at_s=options.switch_at_s, used=switched >= 0)
        case SwitchPolicy.TURN:
            return Order(trigger=Trigger.TURN)
        case SwitchPolicy.MANUAL:
            return Order(trigger=Trigger.PERSON)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether to switch now, or what is waited for; `sentence` of the one or the other."""

    go: bool
    waiting: Waiting


def judge(order: Order, decision: Decision, *, wall_s: float, pair: str) -> Verdict:
    """Whether to switch now.

    Args:
        order: the word that holds.
        decision: what followed the latest round; a person's word goes above it.
        wall_s: seconds since 1970.
        pair: for the sentences.
    """
    if order.trigger is Trigger.NOW:
        return _go("a person asked for it")
    if decision.next is not Next.READY:
        return _wait(decision.key, decision.sentence)
    by_hand = f"`failback switch {pair}` switches"
    if order.trigger is Trigger.AUTO:
        return _go(decision.sentence)
    if order.trigger is Trigger.TURN:
        return _wait("turn", turn_words(pair))
    if order.trigger is Trigger.PERSON or order.at_s is None:
        return _wait("person", f"waits for a person: {by_hand}")
    late_s = wall_s - order.at_s
    when = moment(order.at_s)
    if order.used:
        return _wait("used", f"the set time {when} was obeyed once and the replica serves again: {by_hand}")
    if late_s < 0:
        return _wait(f"at {order.at_s}", f"waits for {when} (`failback switch {pair} --at TIME` changes it)")
    if late_s <= LATEST_S:
        return _go(f"the set time {when} has come")
    return _wait(
        "missed",
        f"the set time {when} passed more than {LATEST_S / 60:.0f} minutes ago while the run was not ready: {by_hand}, "
        f"`failback switch {pair} --at TIME` sets another time",
    )


class Due(enum.Enum):
    """What a set time asks of the rounds before it."""

    NOTHING = "nothing"  # it is far, or past, or nobody set one
    ROUND = "round"  # one more begins now, and ends just before that time
    REST = "rest"  # that one is over: another one would end after that time


def due_before(order: Order, *, wall_s: float, rested_s: float, takes_s: float) -> Due:
    """What a set time asks of the rounds now, so that little is left to copy when it comes.

    Args:
        order: the word that holds.
        wall_s: seconds since 1970.
        rested_s: how long ago the latest round ended.
        takes_s: how long it took.
    """
    if order.trigger is not Trigger.AT or order.at_s is None or order.used or wall_s >= order.at_s:
        return Due.NOTHING
    begins_s = order.at_s - (LAST_ROUND_TIMES * takes_s + LAST_ROUND_MORE_S)
    if wall_s < begins_s:
        return Due.NOTHING
    return Due.ROUND if rested_s > wall_s - begins_s else Due.REST


def turn_words(pair: str) -> str:
    """What a pair of a plan says while others come before it."""
    return f"waits for its turn in the plan (`failback switch {pair}` switches at once)"


def moment(at_s: float) -> str:
    """Wall time with its zone, to the minute (seconds where there are any)."""
    local = datetime.fromtimestamp(at_s, UTC).astimezone()
    return local.strftime("%Y-%m-%d %H:%M:%S %Z" if local.second else "%Y-%m-%d %H:%M %Z")


def _go(sentence: str) -> Verdict:
    return Verdict(go=True, waiting=Waiting(key="go", sentence=sentence))


def _wait(key: str, sentence: str) -> Verdict:
    return Verdict(go=False, waiting=Waiting(key=key, sentence=sentence))
