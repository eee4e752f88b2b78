"""What was written on the original after the failover is told before it is destroyed, where it can be told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.divergence import divergence_notes
from coordinator.findings import Case
from coordinator.model import RunOptions
from coordinator.plan import make_plan
from coordinator.refusals import find_refusals
from protocol.messages import Power, Side
from tests.unit.plan_cases import case, disk, image, side

FAILOVER_S = 1_700_000_000.0


def spoiled(
    modified_s: float, *, ahead_s: float | None = 0.0, power: Power = Power.OFF, options: RunOptions | None = None
) -> Case:
    written = disk("vda", "/img/a.qcow2", chain=(image("/img/a.qcow2", modified_s=modified_s),))
    made = case(original=side(Side.ORIGINAL, disks=(written, disk("vdb", "/img/b.qcow2")), power=power))
    findings = replace(made.findings, failover_s=FAILOVER_S, original_ahead_s=ahead_s)
    return replace(made, findings=findings, options=options or RunOptions())


def codes(made: Case) -> list[str]:
    return [refusal.code for refusal in find_refusals(made)]


def test_a_disk_written_after_the_failover_is_refused_with_both_times_and_the_cure() -> None:
    (refusal,) = find_refusals(spoiled(FAILOVER_S + 3600))
    assert refusal.code == "diverged"
    for words in ("2023-11-14T23:13:20Z", "2023-11-14T22:13:20Z", "by the clock of prod1", "--discard-divergence"):
        assert words in refusal.sentence


@pytest.mark.parametrize(
    ("modified_s", "ahead_s", "diverges"),
    [
        (FAILOVER_S - 3600, 0.0, False),
        (0.0, 0.0, False),
        (FAILOVER_S + 100, 120.0, False),
        (FAILOVER_S + 100, 60.0, True),
        (FAILOVER_S - 100, -600.0, True),
        (FAILOVER_S + 100, None, True),
    ],
)
def test_the_hosts_clocks_are_compared_before_their_times_are(
    modified_s: float, ahead_s: float | None, diverges: bool
) -> None:
    assert ("diverged" in codes(spoiled(modified_s, ahead_s=ahead_s))) == diverges


def test_a_clock_that_is_off_is_told() -> None:
    (refusal,) = find_refusals(spoiled(FAILOVER_S + 3600, ahead_s=600.0))
    assert "which is 600 s ahead of this host's" in refusal.sentence


def test_agreed_to_it_is_the_first_note() -> None:
    agreed = spoiled(FAILOVER_S + 3600, options=RunOptions(discard_divergence=True))
    assert codes(agreed) == []
    notes = make_plan(agreed.pair, agreed.findings, agreed.options).notes
    assert notes[0].startswith("DIVERGENCE: Disk vda of original web1 was written to at")


def test_a_running_original_has_a_refusal_of_its_own() -> None:
    assert codes(spoiled(FAILOVER_S + 3600, power=Power.RUNNING)) == ["both-running"]


def test_of_a_block_device_it_is_said_that_it_cannot_be_told() -> None:
    device = disk("vda", "/dev/vg/a", kind="block")
    made = case(original=side(Side.ORIGINAL, disks=(device, disk("vdb", "/img/b.qcow2"))))
    made = replace(made, findings=replace(made.findings, failover_s=FAILOVER_S))
    (note,) = divergence_notes(made)
    assert "disk vda of original web1 was written to after the failover cannot be told" in note
