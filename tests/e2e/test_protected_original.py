"""The original under a working snapshot, on real libvirt: given back byte for byte, or merged at commit."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import console, disks
from tests.lab.site import LabPair, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

START = ("start", "--yes", "--foreground", "--shutdown-timeout", "60s", "--protect-original")
FORMATS = pytest.mark.parametrize(
    "formats", [("qcow2", "raw"), pytest.param(("raw", "qcow2"), marks=pytest.mark.long)], ids=["qcow2", "raw"]
)


class Before:
    """The original as it is before a run: its definition and a copy of each disk."""

    def __init__(self, pair: LabPair) -> None:
        self._pair = pair
        self._definition = self._defined()
        folder: Path = pair.original.disks[0].path.parent / "before"
        folder.mkdir()
        self._copies = disks.copy_set(pair.original.disks, folder)

    def _defined(self) -> str:
        return self._pair.original.host.virsh("dumpxml", "--inactive", self._pair.original.name)

    def assert_given_back(self) -> None:
        """Everything is as it was, and nothing lies beside it."""
        self.assert_defined()
        for disk, copy in zip(self._pair.original.disks, self._copies, strict=True):
            disks.assert_same(disk.path, disk.format, copy.path, copy.format)

    def assert_defined(self) -> None:
        """The definition is what it was, to the letter; no overlay and no snapshot is left."""
        host, name = self._pair.original.host, self._pair.original.name
        assert self._defined() == self._definition
        assert host.virsh("snapshot-list", "--name", name).split() == []
        assert [path.name for path in self._pair.original.disks[0].path.parent.glob("*failback-*")] == []


def _flag(site: Site, pair: LabPair) -> str:
    status: dict[str, Any] = site.failback("status", pair.name)
    assert status["state"] == "Failover"
    return str(status["original"]["flag"]["condition"])


def _in_the_middle(status: dict[str, Any]) -> bool:
    return status["step"] == "pass:1" and status["progress"] is not None and status["progress"]["changed_bytes"] > 0


@contextlib.contextmanager
def _qemu_stopped(pair: LabPair) -> Iterator[None]:
    """Inside, the original's QEMU answers nothing, so that a merge that is ordered here does not end here."""
    for signal_name in ("STOP", "CONT"):
        command = f"kill -{signal_name} $(cat /run/libvirt/qemu/{pair.original.name}.pid)"
        done = pair.original.host.run(["sh", "-c", command])
        assert done.returncode == 0, done.stderr
        if signal_name == "STOP":
            yield


@FORMATS
def test_undo_gives_back_the_old_original_though_its_guest_ran(site: Site, formats: tuple[disks.Format, ...]) -> None:
    pair = site.make_pair(f"given-{formats[0]}", formats=formats, original_role="writer")
    before = Before(pair)
    site.failback(*START, "--power-on", pair.name)
    left = console.last(pair.replica.log)
    console.wait_for_writes(pair.original.log, "vdb", 1)
    site.failback("undo", pair.name, "--yes")
    assert _flag(site, pair) == "intact"
    before.assert_given_back()
    console.wait_ready(pair.replica.log, after=console.read(pair.replica.log).index("FAILBACK LAST"))
    assert console.found(pair.replica.log) == left


@FORMATS
def test_cancel_in_the_middle_of_the_first_pass_gives_back_the_old_original(
    site: Site, formats: tuple[disks.Format, ...]
) -> None:
    pair = site.make_pair(f"called-off-{formats[0]}", formats=formats)
    before = Before(pair)
    with site.bulk_stalled():
        run = site.spawn(*START, pair.name)
        site.wait_for_status(pair.name, _in_the_middle, run)
        site.failback("cancel", pair.name)
        assert run.wait(60) == 1
    assert _flag(site, pair) == "intact"
    before.assert_given_back()
    assert pair.replica.is_running()


@FORMATS
def test_commit_merges_while_the_original_writes(site: Site, formats: tuple[disks.Format, ...]) -> None:
    pair = site.make_pair(f"merged-{formats[0]}", formats=formats, original_role="writer")
    before = Before(pair)
    site.failback(*START, "--power-on", pair.name)
    console.wait_for_writes(pair.original.log, "vda", 1)
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    before.assert_defined()
    assert pair.original.is_running()
    assert pair.original.sources() == {disk.target: disk.path for disk in pair.original.disks}
    written = console.last(pair.original.log)
    console.wait_for_writes(pair.original.log, "vda", 2)
    pair.original.host.virsh("destroy", pair.original.name)
    pair.original.start()
    console.wait_ready(pair.original.log)
    found = console.found(pair.original.log)
    assert all(found[target].consistent for target in written)


@FORMATS
def test_commit_with_the_original_off_leaves_what_was_copied(site: Site, formats: tuple[disks.Format, ...]) -> None:
    pair = site.make_pair(f"off-{formats[0]}", formats=formats)
    before = Before(pair)
    site.failback(*START, "--no-power-on", pair.name)
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    before.assert_defined()
    pair.assert_same_disks()
    assert not pair.original.is_running()


def test_resume_ends_a_merge_whose_coordinator_was_killed(site: Site) -> None:
    pair = site.make_pair("killed-merge", formats=("raw", "qcow2"), original_role="writer")
    before = Before(pair)
    site.failback(*START, "--power-on", pair.name)
    console.wait_for_writes(pair.original.log, "vda", 1)
    with _qemu_stopped(pair):
        commit = site.spawn("commit", pair.name, "--restore-point", "drop", "--yes")
        site.wait_for_status(pair.name, lambda status: status["step"] == "merge_original", commit)
        commit.send_signal(signal.SIGKILL)
        commit.wait(60)
    site.failback("resume", "--foreground", pair.name)
    assert site.failback("status", pair.name)["state"] == "Ready"
    before.assert_defined()
    assert pair.original.is_running()
