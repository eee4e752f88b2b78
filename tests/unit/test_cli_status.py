"""What `status` shows of a run that works, or waits for its moment."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest

from coordinator.audit import AuditState, AuditStatus
from coordinator.cli.output import Output
from coordinator.cli.report_view import show_status
from coordinator.model import Newest, RunLimits, State
from coordinator.records import Prediction
from coordinator.status import PairStatus
from tests.unit.plan_cases import PAIR

PREDICTION = Prediction(
    guest_s=10.0, guest_seen=False, fixed_s=1.5, fixed_measured=True, pass_s=0.5, delta_bytes=1 << 20,
    read_bytes=1 << 30, whole=("vdb",), dirty_bytes_s=1024.0, copy_bytes_s=1e8,
)  # fmt: skip


def status(state: State, waiting: str) -> PairStatus:
    """Of a run that a process works on, after its second round."""
    pair = replace(PAIR, name="web", state=state, run="r1")
    return PairStatus(
        pair=pair, state=state, means="", newest=Newest.REPLICA, flag=pair.flag, run="r1", active=True, step=None,
        step_sentence=None, step_since_s=None, undoing=False, last_failure=None, progress=None, downtime_s=None,
        view="r1-2", operator=None, limits=RunLimits(), outcome=None, reason="", round=2, prediction=PREDICTION,
        audit=AuditStatus(state=AuditState.OFF, running=False, sentence=""), waiting=waiting,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("state", "waiting", "shown", "next_"),
    [
        (
            State.READY_TO_SWITCH,
            "waits for a person: `failback switch web` switches",
            r"Waits +for a person: `failback switch web` switches",
            "`failback watch web` or `failback switch web` or `failback cancel web`",
        ),
        (
            State.SYNCING,
            "the downtime would be about 40 s, more than the 30 s agreed (--max-downtime): passes go on",
            r"Waits +the downtime would be about 40 s",
            "`failback watch web` or `failback cancel web`",
        ),
    ],
)
def test_status_of_a_run_that_waits_says_for_what_and_the_ways_on(
    state: State, waiting: str, shown: str, next_: str
) -> None:
    text = io.StringIO()
    show_status(Output(as_json=False, no_color=True, stdout=text, stderr=text), status(state, waiting))
    told = text.getvalue()
    assert re.search(shown, told)
    assert told.endswith(f"Next: {next_}\n")
    assert "vdb read whole meanwhile" in told
    assert "10.0 s for the guest's shutdown, a guess" in told
