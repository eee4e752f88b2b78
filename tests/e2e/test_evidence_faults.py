"""Evidence and overlays when something dies or is started by hand in the middle, on real libvirt and QEMU."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from coordinator.divergence import CLOCK_SLACK_S
from tests.e2e.test_evidence import (
    MIB,
    _assert_nothing_left,
    _idle_pair,
    _last_pass,
    _ready,
    _reasons,
    _switch,
    _write,
)
from tests.lab.site import LabPair, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

MERGE_BEGINS_WITHIN_S = 60.0


def _report(site: Site, pair: LabPair) -> dict[str, Any]:
    report = site.failback("history", pair.name, "--report")["report"]
    assert isinstance(report, dict)
    return report


def test_an_original_that_was_started_between_passes_is_compared_again(site: Site) -> None:
    pair = _idle_pair(site, "started", "qcow2", "raw")
    agent, host = site.agents["prod"], pair.original.host
    with _ready(site, pair, "--track", "overlay") as run:
        run.kill()
        run.wait(60)
    rounds = site.failback("status", pair.name)["round"]
    assert rounds >= 1
    agent.kill9()  # its fence goes with it
    host.virsh("start", pair.original.name)
    _write(pair.original, (0, 12 * MIB, MIB), (1, 12 * MIB, MIB))
    host.virsh("destroy", pair.original.name, "--graceful")
    agent.start()
    _write(pair.replica, (0, 20 * MIB, MIB), (1, 20 * MIB, MIB))
    site.failback("switch", pair.name)
    site.failback("resume", "--foreground", pair.name)
    assert site.failback("status", pair.name)["state"] == "Failback"
    before = {f"pass:{number}" for number in range(1, rounds + 1)}
    later = [line for line in _report(site, pair)["disks"] if line["pass_name"] not in before]
    first = {line["original"]: line for line in reversed(later)}
    assert {target: line["rung"] for target, line in first.items()} == {"vda": "digests", "vdb": "digests"}, later
    assert all(line["why_not_higher"] for line in first.values())
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    _assert_nothing_left(pair)


def test_a_plan_tells_that_the_original_ran_after_the_failover_and_since_when_both_run(site: Site) -> None:
    pair = _idle_pair(site, "ran-again", "qcow2")
    host = pair.original.host
    assert site.failback("plan", "--no-estimate", pair.name)["plan"]["refusals"] == []
    time_before = time.time()
    while time.time() < time_before + 2 * CLOCK_SLACK_S:
        time.sleep(0.1)  # what happens sooner after the failover may be a matter of clocks
    host.virsh("start", pair.original.name)
    both = site.failback("plan", "--no-estimate", pair.name, exit_code=3)
    (refusal,) = [r for r in both["plan"]["refusals"] if r["code"] == "both-running"]
    assert "the original runs since 20" in refusal["sentence"]
    assert "the replica runs since 20" in refusal["sentence"]
    host.virsh("destroy", pair.original.name, "--graceful")
    after = site.failback("plan", "--no-estimate", pair.name, exit_code=3)
    told = [r for r in after["plan"]["refusals"] if r["code"] == "diverged" and "and its log there" in r["sentence"]]
    assert len(told) == 1, after["plan"]["refusals"]
    assert "was started at" in told[0]["sentence"]
    assert time.time() > time_before


def _when_a_merge_has_begun(site: Site, pair: LabPair, run: subprocess.Popen[bytes], act: Callable[[], None]) -> None:
    """Do that as soon as the agent has written down that it merges an overlay of the replica."""
    ledger = next((site.agents["dr"].config.parent).rglob("ledger.json"))
    deadline = time.monotonic() + MERGE_BEGINS_WITHIN_S
    while time.monotonic() < deadline and run.poll() is None:
        overlays = json.loads(ledger.read_text()).get("overlays", [])
        if any(record["merging_into"] is not None for record in overlays):
            act()
            return
    raise AssertionError("no merge began")


@pytest.mark.parametrize("who", ["qemu", "libvirtd"])
def test_what_dies_while_an_overlay_is_merged_costs_no_byte(site: Site, who: str) -> None:
    pair = _idle_pair(site, f"merge-{who}", "raw")
    host, image = pair.replica.host, pair.replica.disks[0].path
    with _ready(site, pair, "--track", "overlay") as run:
        _write(pair.replica, (0, 0, 40 * MIB), (0, 4 * MIB, MIB))
        with pair.replica.monitor() as monitor:
            monitor.flush(0)  # what was not flushed may be lost with its QEMU
        request = site.spawn("cancel", pair.name)

        def die() -> None:
            if who == "qemu":
                host.kill_qemu(pair.replica.name)
            else:
                host.stop_libvirtd(kill=True)
                host.start_libvirtd()

        _when_a_merge_has_begun(site, pair, run, die)
        run.wait(120)
        request.wait(60)
    while site.failback("status", pair.name)["state"] != "Failover":
        site.failback("resume", "--foreground", pair.name, exit_code=1)  # the end of a cancelled run
    assert pair.replica.is_running() == (who == "libvirtd")
    _assert_nothing_left(pair)
    if pair.replica.is_running():
        host.virsh("destroy", pair.replica.name, "--graceful")
    content = image.read_bytes()
    assert content[: 4 * MIB] == bytes([1]) * (4 * MIB)
    assert content[4 * MIB : 5 * MIB] == bytes([2]) * MIB
    assert content[5 * MIB : 40 * MIB] == bytes([1]) * (35 * MIB)


def test_a_qemu_that_hears_nothing_any_more_is_killed_after_its_time(site: Site) -> None:
    pair = _idle_pair(site, "stopped", "qcow2")
    words = ("--shutdown-timeout", "2s", "--shutdown-policy", "force", "--kill-after", "2s")
    with _ready(site, pair, *words, "--late-evidence", "proceed") as run:
        _write(pair.replica, (0, 8 * MIB, MIB))
        pid = (pair.replica.host.folder / "run/libvirt/qemu" / f"{pair.replica.name}.pid").read_text().strip()
        assert pair.replica.host.run(["kill", "-STOP", pid]).returncode == 0
        report = _switch(site, pair, run)
    lines = _last_pass(report)
    assert lines["vda"]["rung"] in ("map", "digests"), _reasons(lines)
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    assert pair.replica.is_running()
    _assert_nothing_left(pair)
