"""Two coordinators and three fences on two real hosts: one run at a time, and nothing that must not start does."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from tests.lab.agent_process import PROGRAM, AgentProcess, Identity
from tests.lab.coordinator_process import CoordinatorProcess
from tests.lab.private_host import HostError, PrivateHost
from tests.lab.site import LabVm, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

START = ("start", "--yes", "--foreground", "--shutdown-timeout", "60s", "--no-power-on")


def _with_a_copy_of_the_database(site: Site) -> CoordinatorProcess:
    """Another coordinator, with the same certificate."""
    folder = site.folder / "second"
    agents = list(site.agents.values())
    pki = site.folder / "pki"
    identity = Identity(pki / "ca.crt", pki / "coordinator.crt", pki / "coordinator.key")
    made = CoordinatorProcess(folder, identity, agents, network=site.dr.network)
    (folder / "state").mkdir()
    for file in (site.folder / "coordinator/state").glob("registry.sqlite*"):
        shutil.copy(file, folder / "state")
    return made


def _verb(coordinator: CoordinatorProcess, *words: str, exit_code: int = 0) -> dict[str, Any]:
    done = coordinator.run("--json", *words)
    assert done.code == exit_code, done.output + done.errors
    assert "Traceback" not in done.errors
    answer = done.json()
    assert isinstance(answer, dict)
    return answer


def _fences(agent: AgentProcess) -> list[str]:
    listed = json.loads((agent.config.parent / "state/fenced.json").read_text())["fences"]
    return [fence["vm_name"] for fence in listed]


def _hook(host: PrivateHost, agent: AgentProcess, word: str) -> None:
    done = host.run([str(PROGRAM), "--config", str(agent.config), "fence", word])
    assert done.returncode == 0, done.stderr


def _refusal(vm: LabVm) -> str:
    with pytest.raises(HostError) as caught:
        vm.host.virsh("start", vm.name)
    return str(caught.value)


def test_a_second_coordinator_is_refused_until_a_person_takes_over_and_fences_hold_all_the_while(site: Site) -> None:
    hosts = {"prod": site.production, "dr": site.dr}
    for name, agent in site.agents.items():
        _hook(hosts[name], agent, "install")
    pair = site.make_pair("held")
    pair.replica.host.virsh("autostart", pair.replica.name)
    site.failback(*START, pair.name)
    assert _fences(site.agents["dr"]) == [pair.replica.name]
    assert "must not start" in _refusal(pair.replica)

    second = _with_a_copy_of_the_database(site)
    for words in (("undo", "--yes"), ("commit", "--yes")):
        error = _verb(second, words[0], pair.name, *words[1:], exit_code=3)["error"]
        assert error["code"] == "held"
        assert "--take-over" in error["sentence"]
        assert str(site.folder / "coordinator/state") in error["sentence"]
    assert _verb(second, "status", pair.name)["state"] == "Failback"

    site.agents["dr"].kill9()
    said = _refusal(pair.replica)
    assert "lock" not in said.replace("unlocked", "")
    assert f"the pair {pair.name} as its replica" in said
    site.agents["dr"].start()

    _verb(second, "undo", "--yes", "--take-over", pair.name)
    assert pair.replica.is_running()
    assert pair.replica.has_autostart()
    assert _fences(site.agents["dr"]) == []
    assert site.failback("commit", "--yes", pair.name, exit_code=3)["error"]["code"] == "held"

    # A fresh run of the one that holds the pair needs nothing said; its commit leaves the replica free.
    _verb(second, *START, pair.name)
    assert not pair.replica.has_autostart()
    _verb(second, "commit", "--yes", "--restore-point", "drop", pair.name)
    assert _fences(site.agents["dr"]) == _fences(site.agents["prod"]) == []
    assert pair.replica.has_autostart()
    pair.replica.start()
    pair.replica.host.virsh("destroy", pair.replica.name)
    for name, agent in site.agents.items():
        _hook(hosts[name], agent, "remove")
