"""On what a pass rests, by values: rung 1 only where both sides prove it, and always the reason for no higher one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.evidence import choose, choose_all, fallen, unproven, without
from coordinator.records import DiskEvidence, DiskSizes
from protocol.messages import TargetEvidence, ViewedDisk

DISK = DiskSizes(
    original="vda", replica="sda", source_size_bytes=1 << 30, target_size_bytes=1 << 30, source_format="qcow2"
)


def viewed(since: str | None, why_not: str = "") -> ViewedDisk:
    return ViewedDisk(target="sda", size_bytes=1 << 30, tracked=True, since=since, why_not=why_not)


def target(equals: str | None, *, seed: int | None = None, why_not: str = "the lock was lost") -> TargetEvidence:
    return TargetEvidence(
        target="vda",
        equals=equals,
        why_not="" if equals else why_not,
        map_seed=seed,
        map_known_bytes=0 if seed is None else 1 << 20,
        why_no_map="" if seed is not None else "it was never made",
    )


def test_both_proofs_make_the_first_rung_and_the_map_is_kept_up_with_it() -> None:
    chosen = choose(DISK, viewed("r1-1"), target("r1-1", seed=7))
    assert (chosen.rung, chosen.since, chosen.map_seed, chosen.why_not_higher) == ("bitmap", "r1-1", 7, "")


def test_what_a_format_without_bitmaps_knows_it_knows_from_an_overlay() -> None:
    raw = DiskSizes(original="vda", replica="sda", source_size_bytes=1, target_size_bytes=1, source_format="raw")
    assert choose(raw, viewed("r1-1"), target("r1-1")).rung == "overlay"


@pytest.mark.parametrize(
    ("told", "rung"), [("overlay", "overlay"), ("bitmap", "bitmap"), ("", "bitmap"), ("new", "bitmap")]
)
def test_the_view_says_by_what_it_knows_where_an_overlay_of_ours_hides_the_format(told: str, rung: str) -> None:
    assert choose(DISK, replace(viewed("r1-1"), rung=told), target("r1-1")).rung == rung


@pytest.mark.parametrize(
    ("source", "there", "why"),
    [
        (viewed("r1-1"), target(None, seed=7), "the lock was lost"),
        (viewed(None, "the bitmap is in use"), target("r1-1", seed=7), "the bitmap is in use"),
        (
            viewed("r1-1"),
            target("r1-2", seed=7),
            "the source knows what was written since r1-1, the target equals r1-2",
        ),
        (viewed(None), target("r1-1", seed=7), "the source keeps no record of what was written"),
    ],
)
def test_one_proof_alone_is_none_and_the_map_comes_next(source: ViewedDisk, there: TargetEvidence, why: str) -> None:
    chosen = choose(DISK, source, there)
    assert (chosen.rung, chosen.since, chosen.map_seed, chosen.why_not_higher) == ("map", None, 7, why)


def test_without_a_map_both_sides_are_read_and_both_reasons_told() -> None:
    chosen = choose(DISK, viewed("r1-1"), target(None))
    assert (chosen.rung, chosen.since, chosen.map_seed) == ("digests", None, None)
    assert chosen.why_not_higher == "the lock was lost; and no digest map: it was never made"


def test_a_target_that_says_nothing_proves_nothing() -> None:
    assert choose(DISK, viewed("r1-1"), None).rung == "digests"
    refused = choose_all([DISK], [viewed("r1-1")], unproven(["vda"], "it does not answer that"))
    assert [(disk.rung, disk.why_not_higher) for disk in refused] == [("digests", "it does not answer that")]


def test_disks_that_a_view_does_not_show_are_in_no_pass() -> None:
    other = DiskSizes(original="vdb", replica="sdb", source_size_bytes=1, target_size_bytes=1)
    assert [disk.replica for disk in choose_all([DISK, other], [viewed(None)], [])] == ["sda"]


def test_what_falls_is_found_and_what_rises_or_is_new_is_not() -> None:
    high, low = choose(DISK, viewed("r1-1"), target("r1-1")), choose(DISK, viewed(None), None)
    assert fallen({"sda": high}, [low]) == (low,)
    assert fallen({"sda": low}, [high]) == ()
    assert fallen({}, [low]) == ()


def test_evidence_that_an_agent_does_not_accept_leaves_full_digests() -> None:
    assert without([choose(DISK, viewed("r1-1"), target("r1-1"))], "the file changed") == (
        DiskEvidence(
            original="vda", replica="sda", rung="digests", since=None, map_seed=None, why_not_higher="the file changed"
        ),
    )
