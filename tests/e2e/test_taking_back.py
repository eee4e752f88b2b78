"""Switchovers that fail and wait for a person, and originals that nobody can reach: on two real hosts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.lab import console
from tests.lab.private_host import HostError
from tests.lab.site import LabPair, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

START = ("start", "--yes", "--foreground", "--shutdown-timeout", "60s")


@contextlib.contextmanager
def unreachable(site: Site) -> Iterator[None]:
    """Inside, nothing that is sent to the production host arrives."""
    rule = ["INPUT", "-p", "tcp", "-j", "DROP"]
    done = site.production.run(["iptables", "-A", *rule])
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        done = site.production.run(["iptables", "-D", *rule])
        assert done.returncode == 0, done.stderr


def _held(site: Site, name: str) -> LabPair:
    """A pair whose switchover failed, the target agent dead by then, and is held."""
    pair = site.make_pair(
        name, ignore_acpi=True
    )  # a guest that holds the run at its power-off until its plug is pulled
    target = site.agents["prod"]
    run = site.spawn(*START, "--no-power-on", "--on-failure", "hold", pair.name)
    site.wait_for_status(pair.name, lambda status: status["step"] == "replica_off", run)
    target.kill9()
    pair.replica.host.virsh("destroy", pair.replica.name)
    assert run.wait(120) == 4, (site.folder / "failback.log").read_text()
    target.start()
    status = site.failback("status", pair.name)
    assert status["state"] == "Needs operator"
    assert status["operator"]["exits"] == ["resume", "undo"]
    said = status["operator"]["sentence"]
    assert "is held (--on-failure hold)" in said
    assert "the replica on dr is off" in said
    assert "whether the original is off is not known (prod does not say)" in said
    assert not pair.replica.is_running()
    with pytest.raises(HostError, match="lock"):
        pair.replica.host.virsh("start", pair.replica.name)
    return pair


def test_a_failed_switchover_that_is_held_goes_on_where_it_stopped(site: Site) -> None:
    pair = _held(site, "held-on")
    site.failback("resume", "--foreground", pair.name)
    assert site.failback("status", pair.name)["state"] == "Failback"
    pair.assert_same_disks()
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")


def test_a_failed_switchover_that_is_held_is_taken_back_by_undo(site: Site) -> None:
    pair = _held(site, "held-back")
    site.failback("undo", pair.name, "--yes")
    assert site.failback("status", pair.name)["state"] == "Failover"
    assert pair.replica.is_running()
    assert not pair.original.is_running()
    assert pair.replica.sources() == {disk.target: disk.path for disk in pair.replica.disks}


def test_an_original_on_a_host_that_is_gone_is_called_off_and_fenced_when_the_host_is_back(site: Site) -> None:
    pair = site.make_pair("calledoff", original_role="writer")
    site.failback(*START, "--power-on", pair.name)
    console.wait_for_writes(pair.original.log, "vda", 1)
    left = console.last(pair.replica.log)
    pair.original.host.virsh("destroy", pair.original.name)  # its host loses its power
    with unreachable(site):
        answer = site.failback("undo", pair.name, "--yes", exit_code=4)
        assert f"failback undo {pair.name} --original-is-off prod" in str(answer["sentence"])
        assert not pair.replica.is_running()
        site.failback("undo", pair.name, "--yes", "--original-is-off", "dr", exit_code=2)
        site.failback("undo", pair.name, "--yes", "--original-is-off", "prod")
        assert site.failback("status", pair.name)["state"] == "Failover"
        console.wait_ready(pair.replica.log, after=console.read(pair.replica.log).index("FAILBACK LAST"))
        assert console.found(pair.replica.log) == left
        (owed,) = site.failback("status", pair.name)["owed"]
        assert "fenced there at the first contact with prod" in owed
    # The host boots, and its libvirt starts the original, beside the replica.
    pair.original.host.virsh("start", pair.original.name)
    site.failback("plan", "--no-estimate", "--discard-divergence", pair.name)
    assert not pair.original.is_running()
    with pytest.raises(HostError, match="lock"):
        pair.original.host.virsh("start", pair.original.name)
    assert site.failback("status", pair.name)["owed"] == []
    steps = [entry["step"] for entry in site.failback("history", pair.name)["entries"]]
    assert steps.index("original_is_off") < steps.index("fenced_at_first_contact")
    site.failback(*START, "--no-power-on", "--discard-divergence", pair.name)
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    assert pair.replica.is_running()
