"""Whether a run protects the original: what the plan decides, needs and says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator import protecting
from coordinator.findings import Case
from coordinator.model import OriginalFlag, Plan, RunOptions
from coordinator.plan import make_plan
from coordinator.protecting import needed_bytes, settled
from protocol.messages import Side
from tests.unit.plan_cases import GIB, PAIR, case, disk, image, side

ASKED = RunOptions(protect_original=True)


def plan(made: Case) -> Plan:
    return make_plan(made.pair, made.findings, made.options)


def small(free_bytes: int) -> Case:
    """The original's disks have that much room beside them."""
    disks = tuple(disk(t, f"/v/{t}.qcow2", free_bytes=free_bytes) for t in ("vda", "vdb"))
    return case(original=side(Side.ORIGINAL, disks=disks))


def test_asked_for_it_is_a_step_a_room_and_a_note() -> None:
    made = plan(case(options=ASKED))
    assert made.protects_original
    assert any("working snapshot" in step for step in made.steps)
    assert any("overlays of the original" in room.purpose for room in made.rooms)
    assert any("byte for byte" in note for note in made.notes)
    assert not any("no bootable copy" in note for note in made.notes)


def test_left_out_the_plan_says_that_no_bootable_copy_remains() -> None:
    made = plan(case(options=RunOptions(protect_original=False)))
    assert not made.protects_original
    assert any("no bootable copy of the original remains" in note for note in made.notes)
    assert not any("overlays of the original" in room.purpose for room in made.rooms)


def test_asked_for_without_room_is_a_refusal() -> None:
    made = plan(replace(small(GIB), options=ASKED))
    assert [refusal.code for refusal in made.refusals] == ["no-room"]
    assert "overlays of the original" in made.refusals[0].sentence


def test_where_room_allows_it_is_taken_and_otherwise_the_plan_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protecting, "UNSAID", None)
    assert plan(small(100 * GIB)).protects_original
    made = plan(small(GIB))
    assert not made.protects_original
    assert not made.refusals
    assert any("are free" in note and "no bootable copy" in note for note in made.notes)


def test_a_torn_original_is_overwritten_though_protection_was_asked_for() -> None:
    torn = case(pair=replace(PAIR, flag=OriginalFlag(condition="torn")), options=ASKED)
    made = plan(torn)
    assert not made.protects_original
    assert settled(ASKED, made).protect_original is False
    assert any("torn already" in note for note in made.notes)


def test_a_sparse_base_needs_room_twice_and_a_full_one_once() -> None:
    def needed(allocated_bytes: int) -> int:
        chain = (image("/v/a", allocated_bytes=allocated_bytes),)
        made = case(original=side(Side.ORIGINAL, disks=(disk("vda", "/v/a", chain=chain), disk("vdb", "/v/b"))))
        here, there = next(iter(made.found_pairs()))
        return needed_bytes(here, there, GIB)

    tables = (8 * GIB) // 8192 + (1 << 20)
    assert needed(8 * GIB) == GIB + tables
    assert needed(0) == 2 * GIB + tables


def test_a_working_snapshot_that_a_run_had_to_leave_is_no_foreign_chain() -> None:
    def refused(top: str) -> bool:
        chain = (image(top), image("/v/vda.qcow2"))
        disks = (disk("vda", top, chain=chain), disk("vdb", "/v/vdb.qcow2"))
        return bool(plan(case(original=side(Side.ORIGINAL, disks=disks))).refusals)

    assert not refused(f"/v/vda.failback-{PAIR.name}-r1.qcow2")
    assert refused("/v/vda.mine.qcow2")
