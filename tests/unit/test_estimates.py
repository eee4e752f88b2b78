"""What a plan says a run will cost, and how sure it says it is."""

from __future__ import annotations

import io
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from coordinator.cli.cost_view import cost_tables
from coordinator.cli.planning import plan_run
from coordinator.estimates import AROUND_S, estimate, map_bytes, share
from coordinator.findings import DiskSample, Problem
from coordinator.model import Estimate, RunLimits, RunOptions
from coordinator.plan import make_plan
from coordinator.refusals import find_refusals
from protocol.messages import BlockSamples, Power, Side, Tracking
from tests.unit.cli_house import Command
from tests.unit.plan_cases import GIB, case, disk, host, image, side

MB = 10**6


def samples(differ: int, of: int = 1000, *, pace: float = 100 * MB) -> DiskSample:
    """Of the first disk: so many blocks of its samples differ; it has 1 GiB of data."""
    same, other = b"s" * 16, b"o" * 16
    here = BlockSamples(digests=same * of, data_bytes=GIB, read_bytes_s=pace)
    there = replace(here, digests=other * differ + same * (of - differ))
    return DiskSample(original="vda", replica="vda", source=here, target=there)


def estimated(
    found: DiskSample, *, options: RunOptions | None = None, raw: bool = False, off: bool = False
) -> Estimate:
    power = Power.OFF if off else Power.RUNNING
    first = disk("vda", "/img/a", chain=(image("/img/a", format="raw" if raw else "qcow2"),))
    made = case(replica=side(Side.REPLICA, power=power, disks=(first, disk("vdb", "/img/b"))), options=options)
    told = estimate(replace(made, findings=replace(made.findings, samples=(found,))))
    assert told is not None
    return told


def test_nothing_is_estimated_where_nothing_was_sampled() -> None:
    assert estimate(case()) is None


@pytest.mark.parametrize(("differing", "of"), [(0, 100), (3, 100), (100, 100), (1, 4), (500, 1000)])
def test_the_interval_holds_what_was_found_and_never_claims_certainty(differing: int, of: int) -> None:
    found = share(differing, of)
    assert 0.0 <= found.low <= found.likely <= found.high <= 1.0
    assert found.likely == differing / of
    assert found.high - found.low > 0


def test_nine_of_ten_intervals_hold_the_true_share() -> None:
    generator = random.Random(4)
    hits = 0
    for _ in range(400):
        found = share(sum(generator.random() < 0.03 for _ in range(1024)), 1024)
        hits += found.low <= 0.03 <= found.high
    assert hits >= 360


def test_bytes_and_seconds_follow_from_samples_data_and_pace() -> None:
    made = estimated(samples(30))
    (found,) = made.disks
    assert (found.source_read_bytes, found.target_read_bytes) == (GIB, GIB)
    assert found.changed_bytes is not None
    assert found.changed_bytes.likely == pytest.approx(0.03 * GIB)
    assert found.first_pass_s is not None
    assert found.first_pass_s.likely == pytest.approx(GIB / (100 * MB) * 1.06)
    assert made.first_pass_s == found.first_pass_s


def test_a_tracked_disk_costs_no_reading_in_the_downtime_and_an_untracked_one_all_of_it() -> None:
    tracked, untracked = estimated(samples(0)), estimated(samples(0), raw=True)
    assert (tracked.disks[0].last_rung, tracked.downtime_s) == ("bitmap", AROUND_S)
    assert untracked.disks[0].last_rung == "map"
    assert untracked.downtime_s == pytest.approx(AROUND_S + GIB / (100 * MB))
    assert "--track overlay would not" in untracked.sentence
    overlaid = estimated(samples(0), raw=True, options=RunOptions(track=Tracking.OVERLAY))
    assert (overlaid.disks[0].last_rung, overlaid.downtime_s) == ("overlay", AROUND_S)


def test_limits_are_kept_in_the_estimate() -> None:
    limits = RunLimits(network_bytes_s=1 * MB, read_bytes_s=10 * MB)
    made = estimated(samples(1000), options=RunOptions(limits=limits))
    assert made.first_pass_s is not None
    assert made.first_pass_s.likely > GIB / MB


def test_no_downtime_is_told_for_a_replica_that_is_off_or_a_pace_nobody_knows() -> None:
    assert estimated(samples(0), off=True).downtime_s is None
    assert estimated(samples(0, pace=0.0), raw=True).downtime_s is None


def test_samples_cut_short_by_time_are_compared_as_far_as_both_have_them() -> None:
    found = samples(10)
    assert isinstance(found.target, BlockSamples)
    cut = replace(found, target=replace(found.target, digests=found.target.digests[: 16 * 100]))
    (told,) = estimated(cut).disks
    assert (told.differing_blocks, told.sampled_blocks) == (10, 100)


def test_an_agent_that_cannot_sample_is_quoted() -> None:
    made = estimated(replace(samples(0), target=Problem(code="disk", sentence="disk vda cannot be read")))
    assert made.disks[0].why_not == "disk vda cannot be read"
    assert made.downtime_s is None


def test_too_little_room_for_digest_maps_is_refused_in_bytes() -> None:
    tight = case(original=side(Side.ORIGINAL, host_answer=host("prod1", state_free_bytes=1000)))
    needed = 2 * map_bytes(8 * GIB)
    (refusal,) = find_refusals(tight)
    assert refusal.code == "no-room"
    assert f"has 1000 bytes free in the agent's state folder but {needed} are needed" in refusal.sentence
    plan = make_plan(tight.pair, tight.findings, tight.options)
    assert [(room.host, room.needed_bytes) for room in plan.rooms if room.free_bytes == 1000] == [("prod1", needed)]


class TestTheCommand:
    @pytest.fixture
    def command(self, memory_folder: Path) -> Command:
        made = Command(memory_folder)
        made.register()
        return made

    def test_plan_tells_costs_in_json_and_asks_both_sides_for_the_same_blocks(self, command: Command) -> None:
        told = command.json("plan", "web")["plan"]["estimate"]
        assert [found["differing_blocks"] for found in told["disks"]] == [4, 4]
        assert told["downtime_s"] > AROUND_S
        asked = [(at, one.target, bool(one.choose)) for at, one in command.world.samples.asked]
        assert asked == [("dr", "vda", True), ("prod", "vda", False), ("dr", "vdb", True), ("prod", "vdb", False)]
        assert command.world.orders == []

    def test_without_estimate_nothing_is_sampled(self, command: Command) -> None:
        assert command.json("plan", "web", "--no-estimate")["plan"]["estimate"] is None
        assert command.world.samples.asked == []

    def test_a_disk_that_cannot_be_sampled_is_no_reason_against_starting(self, command: Command) -> None:
        command.world.samples.refused = {"vdb"}
        told = command("plan", "web")
        assert told.exit_code == 0
        assert "Not estimated for vdb: disk vdb cannot be read: its storage hangs." in " ".join(told.stdout.split())

    @pytest.mark.parametrize("columns", [80, 200])
    def test_costs_fit_the_terminal(self, command: Command, columns: int) -> None:
        plan = command.session().run(lambda known: plan_run(known, "web", RunOptions()))
        console = Console(file=io.StringIO(), width=columns, force_terminal=True, color_system=None)
        for table in cost_tables(plan):
            console.print(table)
        assert isinstance(console.file, io.StringIO)
        lines = console.file.getvalue().splitlines()
        assert max(len(line.rstrip()) for line in lines) <= columns
        assert sum("dirty bitmap" in line or "digest map" in line for line in lines) == 2
        assert any(re.search(r"\(\d+(\.\d+)? to \d+(\.\d+)? KiB\)", line) for line in lines), "the unit stands once"
        told = command("plan", "web").stdout
        for words in ("First pass:", "Downtime: about", "Room on dr in /: "):
            assert words in told
