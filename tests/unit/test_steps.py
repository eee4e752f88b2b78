"""Every step says how it bears being begun twice, and the document on the journal lists them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coordinator.steps import Step
from coordinator.steps_check import AUDIT_STEP
from coordinator.steps_commit import COMMIT_STEPS
from coordinator.steps_round import round_steps
from coordinator.steps_switch import SWITCH_STEPS
from coordinator.steps_sync import SYNC_STEPS

EVERY = {step.name: step for step in (*SYNC_STEPS, *round_steps(1), *SWITCH_STEPS, AUDIT_STEP, *COMMIT_STEPS)}
PROBED = {"original_off", "replica_off", "lift_original_fence", "original_on"}


def listed() -> dict[str, str]:
    """By step, what docs/JOURNAL.md says of it."""
    text = (Path(__file__).parents[2] / "docs/JOURNAL.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \|$", text, re.M)
    return {name: words for names, words in rows for name in re.findall(r"`([^`]+)`", names)}


@pytest.mark.parametrize("name", sorted(EVERY))
def test_a_step_that_was_begun_is_probed_or_says_why_twice_is_as_good_as_once(name: str) -> None:
    step = EVERY[name]
    probes = type(step).probe is not Step.probe
    assert probes is (name in PROBED)
    assert probes is not bool(step.harmless)


def test_the_document_lists_every_step_and_which_are_probed() -> None:
    rows = listed()
    assert set(rows) == {re.sub(r":1$", ":N", name) for name in EVERY}
    assert {name for name, words in rows.items() if words.startswith("probed")} == PROBED
