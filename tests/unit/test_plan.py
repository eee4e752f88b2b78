"""What the plan says a run will do, shaped by its options and by what was found."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from coordinator.cli.output import Output
from coordinator.cli.report_view import show_plan
from coordinator.findings import DiskSample
from coordinator.model import LateEvidence, Plan, RunOptions, SwitchPolicy
from coordinator.plan import make_plan
from protocol.messages import BlockSamples, Power, Side, Tracking
from tests.unit.plan_cases import GIB, case, disk, image, side


def planned(options: RunOptions | None = None, *, power: Power = Power.RUNNING, map_known_bytes: int = 0) -> Plan:
    """Of a pair whose replica has a qcow2 disk vda and a raw disk vdb."""
    disks = (
        disk("vda", "/img/a.qcow2"),
        disk("vdb", "/img/b.raw", chain=(image("/img/b.raw", format="raw"),)),
    )
    made = case(replica=side(Side.REPLICA, power=power, disks=disks), options=options)
    block = BlockSamples(digests=b"s" * 16, data_bytes=GIB, read_bytes_s=1e8)
    known = DiskSample(original="vda", replica="vda", source=block, target=block, map_known_bytes=map_known_bytes)
    samples = (known, replace(known, original="vdb", replica="vdb", map_known_bytes=0)) if map_known_bytes else ()
    return make_plan(made.pair, replace(made.findings, samples=samples), made.options)


def said(plan: Plan) -> str:
    """Its steps, one in a line."""
    return "\n".join(plan.steps)


def shown(plan: Plan) -> str:
    """As `plan` shows it in a pipe."""
    text = io.StringIO()
    show_plan(Output(as_json=False, no_color=True, stdout=text, stderr=io.StringIO()), plan)
    return text.getvalue()


def test_a_plan_goes_from_the_first_pass_over_rounds_and_the_records_to_the_audit() -> None:
    begins = (
        "put the pair's replication on hold",
        "fence the original",
        "first pass",
        "more passes while each shortens the expected downtime",
        "Ready to switch: the switchover begins at once",
        "switchover: shut the replica down",
        "read what was recorded of the replica's last writes",
        "take the protective snapshot",
        "last pass: what the replica wrote since the pass before",
        "point of no return",
        "audit: read the frozen replica whole",
        "Failback:",
    )
    steps = planned().steps
    assert len(steps) == len(begins)
    assert all(step.startswith(words) for step, words in zip(steps, begins, strict=True)), steps


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (RunOptions(), "Ready to switch: the switchover begins at once\n"),
        (
            RunOptions(switch=SwitchPolicy.MANUAL, background_s=60.0),
            "begins when `failback switch web1` says so; until then a pass every 60 s keeps what is left small\n",
        ),
        (
            RunOptions(max_downtime_s=30.0),
            "begins at once, if at most 30 s of downtime are expected; until then a pass every 300 s",
        ),
        (RunOptions(switch=SwitchPolicy.AT, switch_at_s=1893456000.0), "or up to 15 minutes later; until then a pass"),
    ],
)
def test_the_plan_says_when_it_switches_and_what_it_does_until_then(options: RunOptions, sentence: str) -> None:
    assert sentence in said(planned(options))


def test_the_set_time_is_told() -> None:
    told = said(planned(RunOptions(switch=SwitchPolicy.AT, switch_at_s=1893456000.0)))
    assert "begins at 20" in told
    assert "the set time" not in told


def test_options_that_add_or_leave_out_steps_are_seen_in_the_plan() -> None:
    assert "--verify full" not in said(planned())
    assert "read both sides' storage whole and compare" in said(planned(RunOptions(verify_full=True)))
    without = planned(RunOptions(audit=False))
    assert "audit" not in said(without)
    assert any("--no-audit" in note for note in without.notes)
    untracked = said(planned(RunOptions(track=Tracking.NONE)))
    assert "nothing records what it writes (--track none)" in untracked
    assert "recorded of the replica's last writes" not in untracked
    assert "--freeze-guest" in said(planned(RunOptions(freeze_guest=True)))


@pytest.mark.parametrize(
    ("track", "rungs"),
    [
        (Tracking.BITMAP, ["bitmap", "map"]),
        (Tracking.OVERLAY, ["bitmap", "overlay"]),
        (Tracking.NONE, ["map", "map"]),
    ],
)
def test_each_disk_names_the_rung_of_its_last_pass_and_why_no_higher_one(track: Tracking, rungs: list[str]) -> None:
    plan = planned(RunOptions(track=track))
    assert [line.last_rung for line in plan.disks] == rungs
    reasons = [line.why_last_not_higher for line in plan.disks]
    assert [bool(reason) for reason in reasons] == [rung == "map" for rung in rungs]
    if track is Tracking.BITMAP:
        assert reasons[1] == "raw has no dirty bitmaps (qcow2 has); --track overlay records what is written to it"
        assert "Last pass of vdb: raw has no dirty bitmaps" in shown(plan)
    if track is Tracking.NONE:
        assert "Last pass of vda, vdb: what the replica writes is not recorded (--track none)." in shown(plan)


def test_notes_tell_what_the_last_pass_reads_of_each_disk() -> None:
    notes = "\n".join(planned().notes)
    assert "Of vda the last pass reads what the replica wrote since the pass before, and no more" in notes
    assert "Of vdb the last pass reads the replica whole while nobody is served" in notes
    assert "makes the downtime much longer than expected, the replica goes back" in notes
    assert "longer than --max-downtime, the replica goes back" in "\n".join(
        planned(RunOptions(max_downtime_s=30.0)).notes
    )
    proceed = planned(RunOptions(late_evidence=LateEvidence.PROCEED))
    assert any("the switchover goes on, however long" in note for note in proceed.notes)


def test_a_digest_map_that_knows_something_is_what_the_first_pass_rests_on() -> None:
    plan = planned(map_known_bytes=GIB)
    assert [line.rung for line in plan.disks] == ["map", "digests"]
    assert "matched (xxh3-128) with the original's digest map" in plan.disks[0].why_not_higher


def test_plan_for_a_replica_that_is_off_has_one_pass() -> None:
    plan = planned(power=Power.OFF, map_known_bytes=GIB)
    assert plan.refusals == ()
    for words in ("first pass", "more passes", "Ready to switch", "switchover:", "recorded"):
        assert words not in said(plan)
    assert any("one pass is enough" in note for note in plan.notes)
    assert [line.last_rung for line in plan.disks] == ["", ""]
    text = shown(plan)
    assert "The pass rests on" in text
    assert "The only pass: " in text
    assert "Last pass" not in text.partition("Disk  ")[0]
    assert "Downtime:" not in text


def test_a_replica_that_is_off_still_waits_for_the_word_that_was_chosen() -> None:
    plan = planned(RunOptions(switch=SwitchPolicy.MANUAL), power=Power.OFF)
    assert any("when `failback switch web1` says so" in step for step in plan.steps)


@pytest.mark.parametrize("track", [Tracking.BITMAP, Tracking.OVERLAY])
def test_a_qcow2_image_of_version_2_is_planned_without_a_bitmap_and_told_the_cure(track: Tracking) -> None:
    old = disk("vda", "/srv/dr/a.qcow2", chain=(image("/srv/dr/a.qcow2", keeps_bitmaps=False),))
    new = disk("vdb", "/srv/dr/b.qcow2", chain=(image("/srv/dr/b.qcow2", keeps_bitmaps=True),))
    made = case(replica=side(Side.REPLICA, disks=(old, new)), options=RunOptions(track=track))
    first, second = make_plan(made.pair, made.findings, made.options).disks
    assert (first.last_rung, second.last_rung) == ("map", "bitmap")
    assert "compat=0.10" in first.why_last_not_higher
    assert "qemu-img amend -f qcow2 -o compat=1.1 /srv/dr/a.qcow2" in first.why_last_not_higher
    assert second.why_last_not_higher == ""
