"""The main job on two real hosts: private libvirtd each, own network namespace, guests that write all the while."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.lab import console, disks
from tests.lab.site import LabPair, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

START = ("start", "--yes", "--foreground", "--shutdown-timeout", "60s")


def _start(site: Site, pair: LabPair, *words: str, exit_code: int = 0) -> dict[str, object]:
    return site.failback(*START, *words, pair.name, exit_code=exit_code)


def _state(site: Site, pair: LabPair) -> str:
    state = site.failback("status", pair.name)["state"]
    assert isinstance(state, str)
    return state


def _assert_original_holds_everything(pair: LabPair) -> None:
    """The original's guest found the very last record that the replica's guest left, by number and chained checksum."""
    left = console.last(pair.replica.log)
    assert left
    assert all(record.consistent and record.sequence > 0 for record in left.values())
    assert console.found(pair.original.log) == left


@pytest.mark.parametrize("site", [None, "libvirt-qemu"], ids=["root", "libvirt-qemu"], indirect=True)
def test_the_original_boots_with_everything_the_replica_wrote_and_commit_is_final(site: Site) -> None:
    pair = site.make_pair("full")
    _start(site, pair, "--power-on")
    assert _state(site, pair) == "Failback"
    assert not pair.replica.running
    console.wait_ready(pair.original.log)
    _assert_original_holds_everything(pair)
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    assert _state(site, pair) == "Ready"
    assert pair.replica.sources() == {disk.target: disk.path for disk in pair.replica.disks}
    assert pair.original.running


def test_both_sides_are_equal_after_the_last_pass_and_undo_gives_the_replica_back(site: Site) -> None:
    pair = site.make_pair("undone", formats=("raw", "qcow2"))
    pair.replica.host.virsh("autostart", pair.replica.name)
    _start(site, pair, "--no-power-on")
    assert not pair.original.running
    assert not pair.replica.running
    assert not pair.replica.autostart
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    assert _state(site, pair) == "Failover"
    assert pair.replica.running
    assert pair.replica.autostart
    assert not pair.original.running
    console.wait_for_writes(pair.replica.log, "vda", 1)
    assert pair.replica.sources() == {disk.target: disk.path for disk in pair.replica.disks}
    assert console.found(pair.replica.log)["vda"].consistent
    assert pair.replica.host.virsh("snapshot-list", "--name", pair.replica.name).split() == []


def test_undo_after_the_original_ran_starts_the_replica_on_exactly_its_own_data(site: Site) -> None:
    pair = site.make_pair("ranonce", original_role="writer")
    _start(site, pair, "--power-on")
    left = console.last(pair.replica.log)
    console.wait_for_writes(pair.original.log, "vdb", 2)
    site.failback("undo", pair.name, "--yes")
    console.wait_ready(pair.replica.log, after=console.read(pair.replica.log).index("FAILBACK LAST"))
    assert console.found(pair.replica.log) == left
    assert not pair.original.running


@pytest.mark.parametrize("restore_point", ["keep", "drop"])
def test_two_failbacks_in_succession(site: Site, restore_point: str) -> None:
    pair = site.make_pair(f"twice-{restore_point}", original_role="writer")
    for _ in range(2):
        _start(site, pair, "--power-on")
        console.wait_for_writes(pair.original.log, "vda", 1)
        site.failback("commit", pair.name, "--restore-point", restore_point, "--yes")
        # The next disaster: the original stops, the replica takes over (its own data: nothing replicates here).
        pair.original.host.virsh("destroy", pair.original.name)
        pair.replica.start()
        site.failback("failover", pair.name)
    kept = pair.replica.host.virsh("snapshot-list", "--name", pair.replica.name).split()
    assert len(kept) == (2 if restore_point == "keep" else 0)
    _start(site, pair, "--no-power-on")
    for disk, path in zip(pair.original.disks, pair.replica.sources().values(), strict=True):
        disks.assert_same(disk.path, disk.format, path, "qcow2", locked=True)
    site.failback("undo", pair.name, "--yes")


def test_cancel_leaves_the_replica_serving_and_a_torn_original_fenced(site: Site) -> None:
    pair = site.make_pair("cancelled", size_bytes=256 << 20)
    run = site.spawn(*START, pair.name)
    try:
        _wait_for_step(site, pair, "first-pass", run)
        site.failback("cancel", pair.name)
    finally:
        run.wait(60)
    status = site.failback("status", pair.name)
    assert status["state"] == "Failover"
    assert pair.replica.running
    assert "backup" not in pair.replica.host.virsh("domjobinfo", pair.replica.name).lower()
    console.wait_for_writes(pair.replica.log, "vda", 1)
    if status["original"]["flag"]["condition"] == "torn":
        with pytest.raises(AssertionError, match="lock"):
            pair.original.host.virsh("start", pair.original.name)
    _start(site, pair, "--no-power-on")
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")


@pytest.mark.parametrize("step", ["first-pass", "last-pass"])
def test_resume_after_the_coordinator_was_killed_in_the_middle_of_a_pass(site: Site, step: str) -> None:
    pair = site.make_pair(f"killed-{step}", size_bytes=128 << 20)
    run = site.spawn(*START, "--power-on", pair.name)
    try:
        _wait_for_step(site, pair, step, run)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait(60)
    site.failback("resume", "--foreground", pair.name)
    assert _state(site, pair) == "Failback"
    console.wait_ready(pair.original.log)
    _assert_original_holds_everything(pair)
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")


def _wait_for_step(site: Site, pair: LabPair, step: str, run: subprocess.Popen[bytes]) -> None:
    """Until the run is in that step; fails when the run ends before."""
    while run.poll() is None:
        if site.failback("status", pair.name).get("step") == step:
            return
    raise AssertionError(f"the run ended before {step}: {(site.folder / 'failback.log').read_text()}")


def test_a_replica_that_ignores_shutdown_goes_on_serving(site: Site) -> None:
    pair = site.make_pair("deaf", ignore_acpi=True)
    answer = site.failback("start", "--yes", "--foreground", "--shutdown-timeout", "3s", pair.name, exit_code=1)
    assert "power off" in str(answer)
    assert _state(site, pair) == "Failover"
    assert pair.replica.running
    console.wait_for_writes(pair.replica.log, "vda", 1)


def test_everything_that_speaks_against_a_run_is_told_at_once_and_nothing_is_touched(site: Site) -> None:
    pair = site.make_pair("refused")
    pair.original.host.virsh("start", pair.original.name)
    pair.replica.host.virsh(
        "snapshot-create-as", pair.replica.name, "mine", "--disk-only", "--diskspec", "vdb,snapshot=no"
    )
    answer = _start(site, pair, exit_code=3)
    codes = {refusal["code"] for refusal in answer["plan"]["refusals"]}  # type: ignore[index]
    assert len(codes) >= 2, answer
    assert pair.original.running
    assert pair.replica.running
    assert _state(site, pair) == "Failover"
