"""The main job on two real hosts: private libvirtd each, own network namespace, guests that write all the while."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.lab import console, disks
from tests.lab.private_host import HostError
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
    assert not pair.replica.is_running()
    console.wait_ready(pair.original.log)
    _assert_original_holds_everything(pair)
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    assert _state(site, pair) == "Ready"
    assert pair.replica.sources() == {disk.target: disk.path for disk in pair.replica.disks}
    assert pair.original.is_running()


def test_both_sides_are_equal_after_the_last_pass_and_undo_gives_the_replica_back(site: Site) -> None:
    pair = site.make_pair("undone", formats=("raw", "qcow2"))
    pair.replica.host.virsh("autostart", pair.replica.name)
    _start(site, pair, "--no-power-on")
    assert not pair.original.is_running()
    assert not pair.replica.is_running()
    assert not pair.replica.has_autostart()
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    assert _state(site, pair) == "Failover"
    assert pair.replica.is_running()
    assert pair.replica.has_autostart()
    assert not pair.original.is_running()
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
    assert not pair.original.is_running()


@pytest.mark.parametrize("restore_point", ["keep", "drop"])
def test_two_failbacks_in_succession(site: Site, restore_point: str) -> None:
    pair = site.make_pair(f"twice-{restore_point}", original_role="writer")
    _start(site, pair, "--power-on")
    console.wait_for_writes(pair.original.log, "vda", 1)
    site.failback("commit", pair.name, "--restore-point", restore_point, "--yes")
    # The next disaster: the original stops, the replica takes over (on its own data: nothing replicates here).
    pair.original.host.virsh("destroy", pair.original.name)
    pair.replica.start()
    console.wait_for_writes(pair.replica.log, "vdb", 1)
    site.failback("failover", pair.name)
    newest = pair.replica.sources()
    _start(site, pair, "--no-power-on")
    for disk in pair.original.disks:
        kept = "qcow2" if restore_point == "keep" else disk.format
        disks.assert_same(disk.path, disk.format, newest[disk.target], kept, locked=True)
    site.failback("commit", pair.name, "--restore-point", restore_point, "--yes")
    snapshots = pair.replica.host.virsh("snapshot-list", "--name", pair.replica.name).split()
    assert len(snapshots) == (2 if restore_point == "keep" else 0)
    assert _state(site, pair) == "Ready"


def _in_the_middle(status: dict[str, Any], step: str) -> bool:
    return status["step"] == step and status["progress"] is not None and status["progress"]["changed_bytes"] > 0


def test_cancel_leaves_the_replica_serving_and_a_torn_original_fenced(site: Site) -> None:
    pair = site.make_pair("cancelled")
    with site.bulk_stalled():
        run = site.spawn(*START, pair.name)
        site.wait_for_status(pair.name, lambda status: _in_the_middle(status, "pass:1"), run)
        site.failback("cancel", pair.name)
        assert run.wait(60) == 1
    status = site.failback("status", pair.name)
    assert status["state"] == "Failover"
    assert status["original"]["flag"]["condition"] == "torn"
    assert pair.replica.is_running()
    assert pair.replica.host.virsh("domjobinfo", pair.replica.name).split() == ["Job", "type:", "None"]
    console.wait_for_writes(pair.replica.log, "vda", 1)
    with pytest.raises(HostError, match="lock"):
        pair.original.host.virsh("start", pair.original.name)
    # The next run makes it whole.
    _start(site, pair, "--no-power-on")
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")


def test_resume_after_the_coordinator_was_killed_in_the_middle_of_the_first_pass(site: Site) -> None:
    pair = site.make_pair("killed-first")
    with site.bulk_stalled():
        run = site.spawn(*START, "--power-on", pair.name)
        site.wait_for_status(pair.name, lambda status: _in_the_middle(status, "pass:1"), run)
        run.send_signal(signal.SIGKILL)
        run.wait(60)
    assert site.failback("status", pair.name)["active"] is False
    site.failback("resume", "--foreground", pair.name)
    assert _state(site, pair) == "Failback"
    console.wait_ready(pair.original.log)
    _assert_original_holds_everything(pair)
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")


def test_resume_after_the_coordinator_was_killed_in_the_middle_of_the_last_pass(site: Site) -> None:
    # A guest that ignores shutdown holds the run at that step until the test pulls its plug.
    pair = site.make_pair("killed-last", ignore_acpi=True)
    run = site.spawn(*START, "--no-power-on", pair.name)
    site.wait_for_status(pair.name, lambda status: status["step"] == "replica_off", run)
    with site.bulk_stalled(6_000):
        pair.replica.host.virsh("destroy", pair.replica.name)
        site.wait_for_status(pair.name, lambda status: _in_the_middle(status, "last_pass"), run)
        run.send_signal(signal.SIGKILL)
        run.wait(60)
    assert not pair.replica.is_running()
    with pytest.raises(HostError, match="lock"):
        pair.replica.host.virsh("start", pair.replica.name)
    site.failback("resume", "--foreground", pair.name)
    assert _state(site, pair) == "Failback"
    pair.assert_same_disks()
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")


def test_a_replica_that_ignores_shutdown_goes_on_serving(site: Site) -> None:
    pair = site.make_pair("deaf", ignore_acpi=True)
    answer = site.failback("start", "--yes", "--foreground", "--shutdown-timeout", "3s", pair.name, exit_code=1)
    assert "power off" in str(answer)
    assert _state(site, pair) == "Failover"
    assert pair.replica.is_running()
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
    assert pair.original.is_running()
    assert pair.replica.is_running()
    assert _state(site, pair) == "Failover"
