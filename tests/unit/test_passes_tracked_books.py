"""The coordinator's check of two reports knows what is unchanged, and believes it only where both sides say it."""

from __future__ import annotations

import pytest

from coordinator.passes import PassDisagrees, check_reports
from coordinator.records import DiskSizes
from protocol.messages import DiskReport, PassReport

DISKS = (DiskSizes(original="vda", replica="vdb", source_size_bytes=100, target_size_bytes=100),)

SINCE = {"vdb"}


def report(target: str, *, zero: int = 0, compared: int = 0, unchanged: int = 0) -> PassReport:
    disk = DiskReport(
        target=target,
        size_bytes=100,
        zero_bytes=zero,
        compared_bytes=compared,
        changed_bytes=0,
        wire_bytes=0,
        written_bytes=0,
        zeroed_bytes=0,
        verified_bytes=0,
        rung="bitmap",
        why_not_higher="",
        past_cache=True,
        frames={},
        stored_bytes=0,
        lanes=1,
        superblock_bytes=0,
        detail_bytes=0,
        access="",
        unchanged_bytes=unchanged,
    )
    return PassReport(view="r1-2", elapsed_s=0.0, disks=(disk,))


def test_what_is_unchanged_is_accounted_for() -> None:
    check_reports(
        DISKS, "r1-2", report("vdb", zero=10, compared=20, unchanged=70), report("vda", unchanged=70), {"vdb"}
    )


def test_a_disk_of_which_too_little_is_unchanged_proves_nothing() -> None:
    with pytest.raises(PassDisagrees, match="only 99 are accounted for"):
        check_reports(
            DISKS, "r1-2", report("vdb", zero=10, compared=20, unchanged=69), report("vda", unchanged=69), {"vdb"}
        )


def test_sides_that_differ_about_what_is_unchanged_prove_nothing() -> None:
    with pytest.raises(PassDisagrees, match="70 bytes of disk vdb were told to be unchanged, 0 were taken as such"):
        check_reports(DISKS, "r1-2", report("vdb", zero=10, compared=20, unchanged=70), report("vda"), SINCE)


def test_nothing_is_unchanged_of_a_disk_that_was_to_be_looked_at_whole() -> None:
    with pytest.raises(PassDisagrees, match="70 bytes of disk vdb were told to be unchanged, and the pass was to look"):
        check_reports(DISKS, "r1-2", report("vdb", zero=10, compared=20, unchanged=70), report("vda", unchanged=70))
