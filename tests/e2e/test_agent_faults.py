"""Agents and hypervisors that die in the middle of a pass, on two real hosts: nothing is lost, nothing stays behind."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lab import console, disks
from tests.lab.agent_process import AgentProcess
from tests.lab.private_host import HostError, PrivateHost
from tests.lab.site import LabPair, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

START = ("start", "--yes", "--foreground", "--shutdown-timeout", "60s", "--no-power-on")
RUN_ENDS_WITHIN_S = 60.0
MIB = 1 << 20


def _in_the_first_pass(status: dict[str, Any]) -> bool:
    return status["step"] == "pass:1" and status["progress"] is not None and status["progress"]["changed_bytes"] > 0


@contextmanager
def _stopped_in_the_first_pass(site: Site, pair: LabPair, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run (`words` begin it) whose first pass has sent something and goes no further; it has ended afterwards."""
    with site.bulk_stalled():
        run = site.spawn(*words, pair.name)
        site.wait_for_status(pair.name, _in_the_first_pass, run)
        yield run
        assert run.wait(RUN_ENDS_WITHIN_S) not in (0, None)


def _left(host: PrivateHost, agent: AgentProcess, pair: LabPair) -> list[str]:
    """What a pass leaves where its agent could not clear up: servers, sockets, scratch files."""
    servers = host.run(["pgrep", "-a", "qemu-nbd"]).stdout.splitlines()
    run_dir = agent.config.parent / "run"
    own = {run_dir / "local.sock"} if agent.running else set()  # of an agent that serves
    files = [*(set(run_dir.iterdir()) - own), *(host.folder / "lib/qemu").glob("domain-*/failback-*")]
    files += (host.images / pair.name).glob("failback-*")
    return servers + [str(path) for path in files]


def _job(pair: LabPair) -> str:
    return pair.replica.host.virsh("domjobinfo", pair.replica.name).split("Job type:")[1].split()[0]


def _assert_original_does_not_boot(pair: LabPair) -> None:
    with pytest.raises(HostError, match="lock"):
        pair.original.host.virsh("start", pair.original.name)


def test_agents_killed_and_stopped_in_the_first_pass_and_the_run_resumed_ends_with_equal_disks(site: Site) -> None:
    pair = site.make_pair("agents", formats=("qcow2", "raw"))
    target, source = site.agents["prod"], site.agents["dr"]

    with _stopped_in_the_first_pass(site, pair, *START):
        target.kill9()
    assert site.production.run(["pgrep", "-a", "qemu-nbd"]).stdout == ""
    target.start()
    _assert_original_does_not_boot(pair)
    assert site.failback("status", pair.name)["original"]["flag"]["condition"] == "torn"

    with _stopped_in_the_first_pass(site, pair, "resume", "--foreground"):
        source.kill9()
    assert pair.replica.is_running()
    assert _left(site.dr, source, pair)
    source.start()
    # QEMU serves the view on, and the next agent takes it over for the run that is resumed.
    deadline = time.monotonic() + RUN_ENDS_WITHIN_S
    while not _events(source, "a view of a former agent is taken over"):
        assert time.monotonic() < deadline
    assert _job(pair) != "None"
    console.wait_for_writes(pair.replica.log, "vda", 1)

    with _stopped_in_the_first_pass(site, pair, "resume", "--foreground"):
        assert len([line for line in _left(site.dr, source, pair) if line.endswith(".scratch")]) == 2
        assert source.stop() == 0
        assert _left(site.dr, source, pair) == []
        assert _job(pair) == "None"
        assert target.stop() == 0
        assert _left(site.production, target, pair) == []
    assert pair.replica.is_running()
    for agent in (target, source):
        agent.start()
    _assert_original_does_not_boot(pair)

    site.failback("resume", "--foreground", pair.name)
    assert site.failback("status", pair.name)["state"] == "Failback"
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    assert pair.replica.is_running()
    for host, agent in ((site.production, target), (site.dr, source)):
        assert _left(host, agent, pair) == []


def _events(agent: AgentProcess, event: str) -> list[dict[str, Any]]:
    return [line for line in _log(agent) if line["event"] == event]


def _noisy_pair(site: Site, name: str) -> LabPair:
    """A running replica with more in its second disk than the original has, which does not shrink."""
    pair = site.make_pair(name, size_bytes=512 * MIB, formats=("qcow2", "raw"), failed_over=False)
    noise = site.folder / "noise"
    noise.write_bytes(os.urandom(8 * MIB))
    data = pair.replica.disks[1]
    disks.scatter_writes(data.path, data.format, [f"write -s {noise} {MIB} {448 * MIB}"])
    pair.replica.start()
    console.wait_for_writes(pair.replica.log, "vda", 2)
    site.failback("failover", pair.name)
    return pair


def test_what_was_proven_before_the_source_agent_was_killed_is_not_done_again(site: Site) -> None:
    pair = _noisy_pair(site, "again")
    source, target = site.agents["dr"], site.agents["prod"]
    with site.bulk_stalled(after_bytes=200 * MIB):
        run = site.spawn(*START, pair.name)
        site.wait_for_status(
            pair.name,
            lambda status: (
                status["step"] == "pass:1"
                and status["progress"] is not None
                and status["progress"]["changed_bytes"] > 150 * MIB
            ),
            run,
        )
        source.kill9()
        assert run.wait(RUN_ENDS_WITHIN_S) != 0
    source.start()
    site.failback("resume", "--foreground", pair.name)
    (view, *_) = {line["view"] for line in _events(target, "a pass goes on") if line.get("pair") == pair.name}
    went_on = [line for line in _events(target, "a pass goes on") if line.get("pair") == pair.name]
    assert sum(line["proven_bytes"] for line in went_on) > 64 * MIB
    assert [line["view"] for line in _events(source, "a view of a former agent is taken over")][-1] == view
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")


def test_a_link_that_is_cut_for_seconds_costs_a_reconnection_and_no_failure(site: Site) -> None:
    pair = _noisy_pair(site, "cut")
    with site.bulk_stalled(after_bytes=200 * MIB):
        run = site.spawn(*START, pair.name)
        site.wait_for_status(
            pair.name,
            lambda status: (
                status["progress"] is not None
                and any(disk["reconnecting"] or disk["reconnects"] for disk in status["progress"]["disks"])
            ),
            run,
        )
    assert run.wait(4 * RUN_ENDS_WITHIN_S) == 0, (site.folder / "failback.log").read_text()
    assert _events(site.agents["dr"], "the connections of a disk are lost")
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")


def test_a_replica_whose_qemu_dies_in_the_first_pass_is_told_and_loses_nothing(site: Site) -> None:
    pair = site.make_pair("dead", size_bytes=224 * MIB, failed_over=False)
    # More than the source reads ahead of a link that is stuck, and it does not shrink: the view breaks off under a pass
    # that still needs it.
    noise = site.folder / "noise"
    noise.write_bytes(os.urandom(8 * MIB))
    data = pair.replica.disks[1]
    disks.scatter_writes(data.path, data.format, [f"write -s {noise} {MIB} {192 * MIB}"])
    pair.replica.start()
    console.wait_for_writes(pair.replica.log, "vda", 2)
    site.failback("failover", pair.name)
    with site.bulk_stalled():
        run = site.spawn(*START, pair.name)
        site.wait_for_status(pair.name, _in_the_first_pass, run)
        _kill_qemu(pair)
    assert run.wait(RUN_ENDS_WITHIN_S) != 0
    agent = site.agents["dr"]
    ours = (line for line in _log(agent) if line.get("pair") == pair.name)  # the agent has served other tests too
    failed = [line for line in ours if line["event"] == "request failed"]
    assert [line["code"] for line in failed] == ["view-lost"]
    assert "stopped in the middle of the pass" in failed[0]["reason"]
    assert "stopped" in (site.folder / "failback.log").read_text().splitlines()[-1]
    assert not pair.replica.is_running()
    _assert_original_does_not_boot(pair)
    # Its own data is whole: its guest finds what it wrote before, and goes on.
    before = console.last(pair.replica.log)
    pair.replica.start()
    found = console.found(pair.replica.log)
    assert all(found[disk].consistent and found[disk].sequence >= before[disk].sequence for disk in before)
    site.failback("resume", "--foreground", pair.name)
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    assert pair.replica.is_running()
    assert _left(site.dr, agent, pair) == []


def _kill_qemu(pair: LabPair) -> None:
    """SIGKILL for the replica's QEMU; returns when libvirt knows."""
    host = pair.replica.host
    pid = (host.folder / "run/libvirt/qemu" / f"{pair.replica.name}.pid").read_text().strip()
    killed = host.run(["kill", "-KILL", pid])
    assert killed.returncode == 0, killed.stderr
    deadline = time.monotonic() + RUN_ENDS_WITHIN_S
    while pair.replica.is_running():
        assert time.monotonic() < deadline


def _log(agent: AgentProcess) -> list[dict[str, Any]]:
    """What the agent logged; every line is one JSON object."""
    return [json.loads(line) for line in agent.log.read_text().splitlines()]


def test_the_logs_of_the_agents_name_pair_and_run(site: Site) -> None:
    for agent in site.agents.values():
        lines = _log(agent)
        assert any(line["event"] == "ready" for line in lines)
        orders = [line for line in lines if line["event"] == "order carried out"]
        assert orders
        assert all(line["pair"] and line["order"] for line in orders)
        assert all(line["run"] for line in orders if line["order"] != "RememberPair")  # which registering sends as well
