"""The expected downtime, from journals as runs write them."""

from __future__ import annotations

import pytest

from coordinator.entries import EntryKind, JournalEntry, Phase
from coordinator.model import RunLimits
from coordinator.plain import to_json
from coordinator.prediction import DEFAULT_STEP_S, Known, fixed_seconds, measure, predict, shutdown_seen_s
from coordinator.records import (
    DiskEvidence,
    PassRecord,
    PowerOffRecord,
    Record,
    TrackingRecord,
    ViewRecord,
)
from coordinator.rounds import group_size, is_hopeless, next_group, next_round
from coordinator.runlog import RunLog
from protocol.messages import DiskReport, DiskTracking, PassReport, ViewedDisk

MIB, GIB = 1 << 20, 1 << 30


class Diary:
    """A journal that is written down round by round."""

    def __init__(self) -> None:
        self.log = RunLog()

    def add(self, step: str, kind: EntryKind, record: Record | None = None, elapsed_s: float | None = None) -> None:
        self.log.add(
            JournalEntry(
                seq=len(self.log.entries) + 1, pair="web", run="r1", epoch=1, at_s=0.0, kind=kind, phase=Phase.DO,
                step=step, actor="", sentence="", elapsed_s=elapsed_s,
                result=None if record is None else to_json(record),
            )
        )  # fmt: skip

    def step(self, step: str, record: Record, elapsed_s: float = 0.1) -> None:
        self.add(step, EntryKind.INTENT)
        self.add(step, EntryKind.DONE, record, elapsed_s)

    def round(
        self, number: int, *, at_s: float, bytes_: int, elapsed_s: float, tracked: bool = True, since: bool = True
    ) -> None:
        view = f"r1-{number}"
        shown = ViewedDisk(target="vda", size_bytes=8 * GIB, tracked=tracked)
        self.step(f"open_view:{number}", ViewRecord(view=view, live=True, disks=(shown,), opened_s=at_s), 0.4)
        whole = not (since and number > 1)
        report = DiskReport(
            target="vda", size_bytes=8 * GIB, zero_bytes=0, compared_bytes=8 * GIB if whole else bytes_,
            changed_bytes=bytes_, wire_bytes=bytes_, written_bytes=bytes_, zeroed_bytes=0, verified_bytes=bytes_,
            rung="", why_not_higher="", past_cache=True, frames={}, stored_bytes=bytes_, lanes=1, superblock_bytes=0,
            detail_bytes=0, access="",
        )  # fmt: skip
        both = PassReport(view=view, elapsed_s=elapsed_s, disks=(report,))
        chosen = DiskEvidence(
            original="vda", replica="vda", rung="", since=None if whole else f"r1-{number - 1}", map_seed=None,
            why_not_higher="",
        )  # fmt: skip
        self.step(f"pass:{number}", PassRecord(view=view, source=both, target=both, evidence=(chosen,)), elapsed_s)
        self.step(f"close_view:{number}", ViewRecord(view=view, live=False), 0.05)


def known(now_s: float, *, limits: RunLimits | None = None, guest_s: float | None = None) -> Known:
    return Known(limits=limits or RunLimits(), guest_s=guest_s, now_s=now_s, epoch=1)


def tracked_run() -> RunLog:
    diary = Diary()
    diary.step("fence_original", ViewRecord(view="", live=False), 0.3)
    diary.round(1, at_s=100.0, bytes_=GIB, elapsed_s=20.0)
    diary.round(2, at_s=120.0, bytes_=200 * MIB, elapsed_s=2.0)
    return diary.log


def test_what_was_written_since_the_last_view_is_copied_at_the_measured_speed() -> None:
    log, now = tracked_run(), known(126.0, guest_s=4.0)
    predicted = predict(log, now, measure(log, now))
    assert predicted.dirty_bytes_s == pytest.approx(10 * MIB)
    assert predicted.copy_bytes_s == pytest.approx(100 * MIB)
    assert predicted.delta_bytes == 60 * MIB
    assert predicted.pass_s == pytest.approx(0.3 + 0.6)
    assert (predicted.guest_s, predicted.guest_seen, predicted.whole) == (4.0, True, ())
    # 0.3 fence, 0.4 and 0.05 a view, the rest by default.
    assert predicted.fixed_s == pytest.approx(0.1 + 0.3 + 0.2 + 0.1 + 0.2 + 0.4 + 0.05 + 0.1 + 0.1 + 0.7)
    assert predicted.total_s == pytest.approx(predicted.guest_s + predicted.ours_s)


def test_a_limit_bounds_the_speed_and_an_unseen_guest_is_a_guess() -> None:
    log, now = tracked_run(), known(126.0, limits=RunLimits(network_bytes_s=10 * MIB))
    predicted = predict(log, now, measure(log, now))
    assert predicted.pass_s == pytest.approx(0.3 + 6.0)
    assert not predicted.guest_seen


def test_a_disk_that_is_not_tracked_is_read_whole_while_nobody_is_served() -> None:
    diary = Diary()
    diary.round(1, at_s=0.0, bytes_=GIB, elapsed_s=20.0, tracked=False, since=False)
    now = known(20.0)
    predicted = predict(diary.log, now, measure(diary.log, now))
    assert (predicted.whole, predicted.dirty_bytes_s) == (("vda",), None)
    assert predicted.pass_s == pytest.approx(0.3 + 20.0)


def test_what_the_closed_image_recorded_is_better_than_a_rate_and_a_lost_record_is_a_whole_read() -> None:
    log, now = tracked_run(), known(126.0)
    measured = measure(log, now)
    read = DiskTracking(target="vda", since="r1-2", dirty_bytes=100 * MIB)
    assert predict(log, now, measured, read=TrackingRecord(disks=(read,))).pass_s == pytest.approx(0.3 + 1.0)
    lost = DiskTracking(target="vda", since=None, dirty_bytes=0, why_not="in use")
    assert predict(log, now, measured, read=TrackingRecord(disks=(lost,))).whole == ("vda",)


def test_another_process_does_not_compare_its_clock_with_the_one_before() -> None:
    log = tracked_run()
    later = Known(limits=RunLimits(), guest_s=None, now_s=5.0, epoch=2)
    assert measure(log, later).dirty_bytes_s == {}
    assert measure(log, later).since_s == {}


def test_the_guests_shutdown_is_remembered_over_runs() -> None:
    diary = Diary()
    assert shutdown_seen_s(diary.log.entries) is None
    diary.step("replica_off", PowerOffRecord(was_running=True, forced=False, guest_s=7.0))
    diary.step("replica_off", PowerOffRecord(was_running=False, forced=False, guest_s=0.0))
    assert shutdown_seen_s(diary.log.entries) == 7.0


def test_a_round_that_broke_off_is_worked_on_and_a_finished_one_is_followed() -> None:
    diary = Diary()
    assert next_round(diary.log) == 1
    diary.add("open_view:1", EntryKind.INTENT)
    assert next_round(diary.log) == 1
    diary.round(1, at_s=0.0, bytes_=0, elapsed_s=1.0)
    assert next_round(diary.log) == 1, "its records are still to be dropped"
    diary.step("drop_checkpoints:1", ViewRecord(view="", live=False))
    assert next_round(diary.log) == 2


def test_without_failures_every_view_shows_every_disk() -> None:
    log = RunLog()
    assert next_group(log, 1, ("vda", "vdb", "vdc")) == ("vda", "vdb", "vdc")
    assert group_size(log, 1, 3) == 3
    assert not is_hopeless((), ())


def test_what_earlier_switchovers_took_counts_before_what_is_merely_alike() -> None:
    log = tracked_run()
    before, _ = fixed_seconds(log, {})
    after, measured = fixed_seconds(log, {"fence_replica": 0.05, "original_on": 0.2})
    assert measured
    assert after == pytest.approx(before - (0.3 - 0.05) - (DEFAULT_STEP_S["original_on"] - 0.2))


def test_a_round_of_which_nothing_is_recorded_is_finished_without_dropping_records() -> None:
    diary = Diary()
    diary.add("open_view:1", EntryKind.INTENT)
    diary.round(1, at_s=0.0, bytes_=0, elapsed_s=1.0, tracked=False, since=False)
    assert next_round(diary.log) == 2, "a process that takes over here would work on a round that has no steps left"
