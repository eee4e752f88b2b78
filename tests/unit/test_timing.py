"""When to switch, by values: at once, at a set time, when a person says so; each word is carried out once."""

from __future__ import annotations

from datetime import datetime

import pytest

from coordinator.cli.parameters import MOMENT, next_local
from coordinator.convergence import Decision, Next
from coordinator.entries import EntryKind, JournalEntry, Phase
from coordinator.errors import UsageError
from coordinator.model import RunOptions, State, SwitchPolicy
from coordinator.plain import to_json
from coordinator.records import SwitchOrder
from coordinator.runlog import RunLog
from coordinator.switch_order import check_switch_time
from coordinator.timing import (
    LATE_RETURN,
    LATEST_S,
    SWITCH,
    Due,
    Order,
    Trigger,
    due_before,
    judge,
    order_in_force,
)

READY = Decision(next=Next.READY, key="ready", sentence="the downtime would be about 3.0 s")
HOLD = Decision(next=Next.HOLD, key="over-max", sentence="too long")
AT = RunOptions(switch=SwitchPolicy.AT, switch_at_s=1000.0)


def log(*said: SwitchOrder | State | str) -> RunLog:
    """A journal of words on when to switch, states that were reached, and other notes."""
    entries = []
    for seq, one in enumerate(said, start=1):
        state = isinstance(one, State)
        step = one.value if isinstance(one, State) else SWITCH if isinstance(one, SwitchOrder) else one
        entries.append(
            JournalEntry(
                seq=seq, pair="web", run="r1", epoch=1, at_s=0.0, kind=EntryKind.STATE if state else EntryKind.NOTE,
                phase=Phase.DO, step=step, actor="", sentence="", elapsed_s=None,
                result=to_json(one) if isinstance(one, SwitchOrder) else None,
            )
        )  # fmt: skip
    return RunLog(entries)


TURN = RunOptions(switch=SwitchPolicy.TURN)
TURN_AT = RunOptions(switch=SwitchPolicy.TURN, switch_at_s=1000.0)
COME = SwitchOrder(at_s=None, turn=True)
NOW, LATER = SwitchOrder(at_s=None), SwitchOrder(at_s=2000.0)
BACK = (State.SWITCHING, LATE_RETURN, State.SYNCING)


@pytest.mark.parametrize(
    ("options", "said", "order"),
    [
        (RunOptions(), (), Order(trigger=Trigger.AUTO)),
        (RunOptions(switch=SwitchPolicy.MANUAL), (), Order(trigger=Trigger.PERSON)),
        (AT, (), Order(trigger=Trigger.AT, at_s=1000.0)),
        (AT, BACK, Order(trigger=Trigger.AT, at_s=1000.0, used=True)),
        (AT, (LATER,), Order(trigger=Trigger.AT, at_s=2000.0)),
        (AT, (LATER, *BACK), Order(trigger=Trigger.AT, at_s=2000.0, used=True)),
        (AT, (LATER, NOW), Order(trigger=Trigger.NOW)),
        (RunOptions(switch=SwitchPolicy.MANUAL), (NOW,), Order(trigger=Trigger.NOW)),
        (RunOptions(switch=SwitchPolicy.MANUAL), (NOW, *BACK), Order(trigger=Trigger.PERSON)),
        (RunOptions(), BACK, Order(trigger=Trigger.AUTO)),
        (RunOptions(), (*BACK, *BACK), Order(trigger=Trigger.PERSON)),
        (TURN, (), Order(trigger=Trigger.TURN)),
        (TURN, (COME,), Order(trigger=Trigger.AUTO)),
        (TURN, (COME, *BACK, *BACK), Order(trigger=Trigger.PERSON)),
        (TURN, (NOW,), Order(trigger=Trigger.NOW)),
        (TURN, (NOW, *BACK), Order(trigger=Trigger.TURN)),
        (TURN, (LATER, COME), Order(trigger=Trigger.AT, at_s=2000.0)),
        (TURN_AT, (), Order(trigger=Trigger.TURN)),
        (TURN_AT, (COME,), Order(trigger=Trigger.AT, at_s=1000.0)),
    ],
)
def test_the_last_word_holds_until_it_is_carried_out(
    options: RunOptions, said: tuple[SwitchOrder | State | str, ...], order: Order
) -> None:
    assert order_in_force(options, log(*said)) == order


@pytest.mark.parametrize(
    ("order", "decision", "wall_s", "go", "words"),
    [
        (Order(trigger=Trigger.AUTO), READY, 0.0, True, "about 3.0 s"),
        (Order(trigger=Trigger.AUTO), HOLD, 0.0, False, "too long"),
        (Order(trigger=Trigger.NOW), HOLD, 0.0, True, "a person"),
        (Order(trigger=Trigger.PERSON), READY, 0.0, False, "`failback switch web`"),
        (Order(trigger=Trigger.TURN), READY, 0.0, False, "its turn in the plan"),
        (Order(trigger=Trigger.TURN), HOLD, 0.0, False, "too long"),
        (Order(trigger=Trigger.AT, at_s=1000.0), READY, 999.9, False, "--at TIME"),
        (Order(trigger=Trigger.AT, at_s=1000.0), READY, 1000.0, True, "has come"),
        (Order(trigger=Trigger.AT, at_s=1000.0), READY, 1000.0 + LATEST_S, True, "has come"),
        (Order(trigger=Trigger.AT, at_s=1000.0), READY, 1001.0 + LATEST_S, False, "more than 15 minutes ago"),
        (Order(trigger=Trigger.AT, at_s=1000.0), HOLD, 1000.0, False, "too long"),
        (Order(trigger=Trigger.AT, at_s=1000.0, used=True), READY, 1000.0, False, "obeyed once"),
    ],
)
def test_the_moment_to_switch(order: Order, decision: Decision, wall_s: float, go: bool, words: str) -> None:
    verdict = judge(order, decision, wall_s=wall_s, pair="web")
    assert verdict.go is go
    assert words in verdict.waiting.sentence


AT_1000 = Order(trigger=Trigger.AT, at_s=1000.0)


@pytest.mark.parametrize(
    ("order", "wall_s", "rested_s", "due"),
    [
        (AT_1000, 969.0, 300.0, Due.NOTHING),
        (AT_1000, 971.0, 300.0, Due.ROUND),  # 1.25 times 20 s and 5 s more are left
        (AT_1000, 972.0, 1.0, Due.REST),
        (AT_1000, 999.0, 6.0, Due.REST),
        (AT_1000, 999.0, 31.0, Due.ROUND),  # nobody was there to begin it in time: better late than a large delta
        (AT_1000, 1000.0, 300.0, Due.NOTHING),  # now it switches
        (Order(trigger=Trigger.AT, at_s=1000.0, used=True), 980.0, 300.0, Due.NOTHING),
        (Order(trigger=Trigger.PERSON), 980.0, 300.0, Due.NOTHING),
        (Order(trigger=Trigger.AUTO), 980.0, 300.0, Due.NOTHING),
    ],
)
def test_one_more_round_ends_just_before_the_set_time(order: Order, wall_s: float, rested_s: float, due: Due) -> None:
    assert due_before(order, wall_s=wall_s, rested_s=rested_s, takes_s=20.0) is due


def test_a_time_that_is_past_is_a_wrong_word() -> None:
    with pytest.raises(UsageError, match="is past: name one to come"):
        check_switch_time(999.0, 1000.0)
    check_switch_time(1000.0, 1000.0)
    check_switch_time(None, 1000.0)


def test_a_time_without_a_date_is_the_next_one_on_the_local_clock() -> None:
    now = datetime(2031, 1, 31, 15, 30)  # noqa: DTZ001  # local, as the function says
    assert next_local("15:31", now) == datetime(2031, 1, 31, 15, 31).timestamp()  # noqa: DTZ001
    assert next_local("15:30", now) == datetime(2031, 2, 1, 15, 30).timestamp()  # noqa: DTZ001
    assert next_local("2:00", now) == datetime(2031, 2, 1, 2, 0).timestamp()  # noqa: DTZ001


def test_a_time_with_its_zone_is_one_moment_everywhere() -> None:
    assert MOMENT.convert("2031-01-31T02:00+01:00", None, None) == MOMENT.convert("2031-01-31T01:00Z", None, None)
