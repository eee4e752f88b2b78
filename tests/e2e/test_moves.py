"""Failback to a VM restored beforehand, on real hosts: the destination is a second VM of the production host."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.lab import console, disks
from tests.lab.private_host import HostError
from tests.lab.site import LabPair, LabVm, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

START = ("start", "--yes", "--foreground", "--shutdown-timeout", "60s")


def _restored(site: Site, pair: LabPair) -> tuple[LabVm, LabPair]:
    """A VM with the disks that the original had, "restored from a backup", and the pair as the run is to make it."""
    name = f"{pair.name}-restored"
    folder = site.production.images / name
    folder.mkdir()
    folder.chmod(0o777)
    vm = site.define(site.production, name, disks.copy_set(pair.original.disks, folder), role="reader")
    return vm, LabPair(pair.name, vm, pair.replica)


def _checksums(vm: LabVm) -> dict[Path, str]:
    return {disk.path: hashlib.blake2b(disk.path.read_bytes()).hexdigest() for disk in vm.disks}


def _assert_kept_off(vm: LabVm) -> None:
    assert not vm.is_running()
    assert not vm.has_autostart()
    with pytest.raises(HostError):
        vm.host.virsh("start", vm.name)


def test_the_restored_vm_boots_with_everything_and_commit_excludes_the_original(site: Site) -> None:
    pair = site.make_pair("moved")
    vm, moved = _restored(site, pair)
    old = _checksums(pair.original)
    site.failback(*START, "--no-power-on", "--to", "vm", f"prod:{vm.name}", pair.name)
    moved.assert_same_disks()
    status = site.failback("status", pair.name)
    assert status["former"] == "prod/moved, off and fenced"
    _assert_kept_off(pair.original)
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    vm.start()
    assert console.found(vm.log) == console.last(pair.replica.log)
    assert _checksums(pair.original) == old
    _assert_kept_off(pair.original)
    (left,) = site.failback("pairs")["excluded"]
    assert (left["vm"]["name"], left["why"]) == ("moved", "former")
    refused = site.failback(
        "register", "again", "--original", "prod/moved", "--replica", f"prod/{vm.name}", exit_code=3
    )
    assert refused["error"]["code"] == "excluded", refused


def test_undo_after_the_restored_vm_ran_gives_both_the_replica_and_the_original_back(site: Site) -> None:
    pair = site.make_pair("movedback", formats=("raw", "qcow2"))
    vm, _ = _restored(site, pair)
    old = _checksums(pair.original)
    site.failback(*START, "--power-on", "--to", "vm", f"prod:{vm.name}", pair.name)
    assert vm.is_running()
    left = console.last(pair.replica.log)
    site.failback("undo", pair.name, "--yes")
    console.wait_ready(pair.replica.log, after=console.read(pair.replica.log).index("FAILBACK LAST"))
    assert console.found(pair.replica.log) == left
    assert pair.replica.sources() == {disk.target: disk.path for disk in pair.replica.disks}
    _assert_kept_off(vm)
    status = site.failback("status", pair.name)
    assert (status["state"], status["former"]) == ("Failover", None)
    assert status["original"]["name"] == pair.name
    assert _checksums(pair.original) == old
    # In place works as ever afterwards, byte for byte.
    site.failback(*START, "--no-power-on", pair.name)
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")


@pytest.mark.long
def test_a_move_killed_in_its_first_pass_is_resumed_and_one_cancelled_leaves_the_original_as_it_was(
    site: Site,
) -> None:
    pair = site.make_pair("movekill")
    vm, moved = _restored(site, pair)
    old = _checksums(pair.original)
    to = ("--to", "vm", f"prod:{vm.name}")
    with site.bulk_stalled():
        run = site.spawn(*START, *to, pair.name)
        site.wait_for_status(pair.name, lambda status: status["step"] == "pass:1" and bool(status["progress"]), run)
        run.kill()
        run.wait(60)
    site.failback("cancel", pair.name)
    _assert_kept_off(vm)
    assert _checksums(pair.original) == old
    assert pair.replica.is_running()
    (left,) = [each for each in site.failback("pairs")["excluded"] if each["pair"] == pair.name]
    assert left["why"] == "overwritten"
    with site.bulk_stalled():
        run = site.spawn(*START, "--no-power-on", *to, pair.name)
        site.wait_for_status(pair.name, lambda status: status["step"] == "pass:1" and bool(status["progress"]), run)
        run.kill()
        run.wait(60)
    site.failback("resume", "--foreground", pair.name)
    moved.assert_same_disks()
    site.failback("commit", pair.name, "--yes")
