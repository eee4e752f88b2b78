"""What was written on the original after the failover is told before it is destroyed, where it can be told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.divergence import divergence_notes
from coordinator.findings import Case
from coordinator.model import RunOptions
from coordinator.plan import make_plan
from coordinator.refusals import find_refusals
from protocol.messages import Power, Side, TargetEvidence
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


def vm_case(**changes: Any) -> Case:
    """Of an original whose disk vda is a block device, with what its host's log and its agent tell."""
    evidence = changes.pop("evidence", ())
    options = changes.pop("options", RunOptions())
    device = disk("vda", "/dev/vg/a", kind="block")
    made = case(original=side(Side.ORIGINAL, disks=(device, disk("vdb", "/img/b.qcow2")), **changes))
    original = replace(made.findings.original, evidence=evidence)
    findings = replace(made.findings, original=original, failover_s=FAILOVER_S, original_ahead_s=0.0)
    return replace(made, findings=findings, options=options)


@pytest.mark.parametrize(
    ("started_s", "stopped_s", "words"),
    [
        (FAILOVER_S + 3600, FAILOVER_S + 7200, "was started at 2023-11-14T23:13:20Z and stopped at"),
        (FAILOVER_S - 3600, FAILOVER_S + 3600, "was stopped at 2023-11-14T23:13:20Z"),
    ],
)
def test_an_original_that_its_log_says_ran_after_the_failover_is_refused_whatever_its_disks_are(
    started_s: float, stopped_s: float, words: str
) -> None:
    ran = vm_case(last_started_s=started_s, last_stopped_s=stopped_s)
    (refusal,) = find_refusals(ran)
    assert (refusal.code, refusal.about) == ("diverged", "web1")
    assert words in refusal.sentence
    assert codes(replace(ran, options=RunOptions(discard_divergence=True))) == []


def test_one_that_its_log_says_did_not_is_noted_as_such() -> None:
    idle = vm_case(last_started_s=FAILOVER_S - 7200, last_stopped_s=FAILOVER_S - 3600)
    assert codes(idle) == []
    (note,) = divergence_notes(idle)
    assert "was not started after 2023-11-14T20:13:20Z; what was done by hand leaves no trace" in note
    (note,) = divergence_notes(vm_case())
    assert "Nor does prod1 keep a log of the starts of web1" in note


def test_a_disk_that_is_not_what_the_run_before_left_is_refused() -> None:
    proof = TargetEvidence(
        target="vda",
        equals=None,
        why_not="/dev/vg/a was changed since by somebody else",
        map_seed=None,
        map_known_bytes=0,
        why_no_map="",
        touched=True,
    )
    (refusal,) = find_refusals(vm_case(evidence=(proof,)))
    assert (refusal.code, refusal.about) == ("diverged", "web1 vda")
    assert "is not what the run before left under its fence: /dev/vg/a was changed since" in refusal.sentence
    assert codes(vm_case(evidence=(replace(proof, touched=False),))) == []


def test_where_both_run_it_is_told_since_when_each_does() -> None:
    made = vm_case(power=Power.RUNNING, running_since_s=FAILOVER_S + 60)
    replica = side(Side.REPLICA, running_since_s=FAILOVER_S - 60)
    found = replace(made.findings, replica=replica, failover_since="2023-11-14T22:13:20Z", replica_ahead_s=0.0)
    (refusal,) = find_refusals(replace(made, findings=found))
    assert refusal.code == "both-running"
    for words in (
        "the replica took over at 2023-11-14T22:13:20Z",
        "the original runs since 2023-11-14T22:14:20Z by the clock of prod1",
        "the replica runs since 2023-11-14T22:12:20Z by the clock of dr1",
    ):
        assert words in refusal.sentence
