"""A run that is killed with its coordinator and its source agent, and whose registry is deleted: nothing is lost."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.lab import console
from tests.lab.site import LabPair, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

START = ("start", "--yes", "--foreground", "--shutdown-timeout", "60s")
WITHIN_S = 60.0


def _in_the_first_pass(status: dict[str, Any]) -> bool:
    return status["step"] == "pass:1" and status["progress"] is not None and status["progress"]["changed_bytes"] > 0


def _database(site: Site) -> list[Path]:
    found = sorted(site.folder.glob("coordinator/**/registry.sqlite*"))
    assert found
    return found


def _codes(answer: dict[str, Any]) -> set[str]:
    return {each["code"] for each in answer["differences"] if each["severity"] != "note"}


def _assert_nothing_is_left(site: Site, pair: LabPair) -> None:
    for host, agent in ((site.production, site.agents["prod"]), (site.dr, site.agents["dr"])):
        state = agent.config.parent
        files = [*host.folder.glob("lib/qemu/domain-*/failback-*"), *(host.images / pair.name).glob("*failback-*")]
        assert files == []
        ledger = json.loads(next(state.rglob("ledger.json")).read_text())
        for kind in ("views", "trackings", "overlays", "thaws", "protections"):
            assert ledger[kind] == [], kind
    for disk in pair.replica.disks:
        done = site.dr.run(["qemu-img", "info", "-U", "--output=json", str(disk.path)])
        assert "failback-" not in done.stdout, done.stdout
    assert site.dr.virsh("checkpoint-list", "--name", pair.replica.name).strip() == ""


def test_a_pair_whose_run_was_killed_and_whose_registry_was_deleted_is_adopted_and_fails_back(site: Site) -> None:
    pair = site.make_pair("lost", formats=("qcow2", "raw"))
    source = site.agents["dr"]
    with site.bulk_stalled():
        run = site.spawn(*START, pair.name)
        site.wait_for_status(pair.name, _in_the_first_pass, run)
        run.send_signal(signal.SIGKILL)
        source.kill9()
        assert run.wait(WITHIN_S) != 0
    dead = site.failback("doctor", pair.name, exit_code=1)
    assert {"agent-silent", "orphaned-run"} <= _codes(dead)
    for file in _database(site):
        file.unlink()
    source.start()

    gone = site.failback("doctor", exit_code=1)["error"]
    assert gone["code"] == "database"
    assert "failback adopt" in gone["sentence"]
    adopted = site.failback("adopt", "prod", "dr", "--yes")
    (found,) = adopted["adopted"]
    assert (found["name"], found["state"], found["newest"]) == (pair.name, "Failover", "replica")
    assert found["flag"]["condition"] == "torn"
    assert pair.replica.is_running()

    # The view is kept for a run that is resumed; this one never is.
    left = _codes(site.failback("doctor", pair.name, exit_code=1))
    assert {"leftover-view", "leftover-tracking"} <= left
    assert not any(code.startswith(("agent", "epoch", "torn")) for code in left)
    cleaned = site.failback("doctor", pair.name, "--clean", "--yes")
    assert any("record of writes" in what for host in cleaned["cleaned"] for what in host["cleaned"]["removed"])
    _assert_nothing_is_left(site, pair)

    site.failback(*START, pair.name)
    pair.assert_same_disks()
    site.failback("commit", pair.name, "--yes", "--restore-point", "drop")
    assert pair.original.is_running()
    site.failback("doctor", pair.name)
    _assert_nothing_is_left(site, pair)
    pair.original.host.virsh("destroy", pair.original.name)
    forgotten = site.failback("forget", pair.name, "--yes")
    assert any("digest map" in what for host in forgotten["cleaned"] for what in host["cleaned"]["removed"])
    assert list(site.agents["prod"].config.parent.rglob("*.map")) == []


def test_a_failback_whose_registry_was_deleted_is_adopted_with_undo_as_its_way_out(site: Site) -> None:
    pair = site.make_pair("late", formats=("qcow2",))
    site.failback(*START, pair.name)
    assert pair.original.is_running()
    for file in _database(site):
        file.unlink()
    (found,) = site.failback("adopt", "prod", "dr", "--yes")["adopted"]
    assert (found["state"], found["operator"]["exits"]) == ("Needs operator", ["undo"])
    site.failback("undo", pair.name, "--yes")
    assert site.failback("status", pair.name)["state"] == "Failover"
    assert pair.replica.is_running()
    assert not pair.original.is_running()
    console.wait_for_writes(pair.replica.log, "vda", 1)
    site.failback("doctor", pair.name)
    _assert_nothing_is_left(site, pair)
