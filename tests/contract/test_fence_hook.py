"""Each fence alone keeps a VM from starting on a real libvirt, and the host's own administrator can lift them all.

The private host has its own ``/etc/libvirt``, so that no hook of these tests is ever seen by the machine's libvirt.
"""

from __future__ import annotations

import json
import subprocess
import time
import uuid as uuids
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.fences import FenceKeeper
from agent.ledger import ConditionRecord, DiskCondition, Ledger
from agent.virt.libvirt_host import LibvirtHost
from tests.lab.agent_process import PROGRAM, AgentProcess
from tests.lab.domain import LabDisk, domain_xml
from tests.lab.guest import Guest
from tests.lab.pki import LabPki
from tests.lab.private_host import HostError, PrivateHost

pytestmark = [pytest.mark.real, pytest.mark.root]

UUID, OTHER = str(uuids.uuid4()), str(uuids.uuid4())
NOTICED_WITHIN_S = 20.0


@dataclass
class FencedHost:
    """A host with the VMs ``web`` (autostart on, fenced when a test begins) and ``other``, and an agent that is off."""

    machine: PrivateHost
    agent: AgentProcess

    def fence(self) -> None:
        """Fence ``web`` as a run does, torn, and let go of the locks as a killed agent does."""
        ledger = Ledger.open(self.state)
        host = LibvirtHost(self.machine.uri, scratch_dir=self.machine.images)
        keeper = FenceKeeper(ledger, host)
        keeper.fence(UUID, pair="shop", run="r7", side="original", targets=["vda"])
        ledger.put_condition(ConditionRecord(vm_uuid=UUID, condition=DiskCondition.TORN))
        keeper.close()
        host.close()
        ledger.close()

    @property
    def state(self) -> Path:
        return self.agent.config.parent / "state"

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """``failback-agent WORDS`` on the host."""
        return self.machine.run([str(PROGRAM), "--config", str(self.agent.config), *words])

    def must(self, *words: str) -> str:
        done = self.command(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def autostart(self) -> bool:
        return "enable" in self.machine.virsh("dominfo", "web").split("Autostart:")[1].split("\n")[0]

    def refusal(self, name: str = "web") -> str:
        """What libvirt says to ``virsh start``, which must fail."""
        with pytest.raises(HostError) as caught:
            self.machine.virsh("start", name)
        return str(caught.value)

    def starts(self, name: str) -> None:
        self.machine.virsh("start", name)
        self.machine.virsh("destroy", name)


@pytest.fixture
def host(lab_folder: Path, lab_cache: Path, guest: Guest) -> Iterator[FencedHost]:
    with PrivateHost("fence", lab_folder / "h", "10.77.0.1", cache_dir=lab_cache) as machine:
        for name, uuid in (("web", UUID), ("other", OTHER)):
            path = machine.images / f"{name}.qcow2"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "4M"], check=True)
            log = machine.images / f"{name}.console"
            machine.define(domain_xml(name, uuid, [LabDisk("vda", path, "qcow2")], machine.adopt(guest), log))
        machine.virsh("autostart", "web")
        pki = LabPki(lab_folder / "pki")
        agent = AgentProcess(
            "fence", machine.folder / "agent", pki.agent("fence"), host=machine, scratch_dir=machine.images
        )
        made = FencedHost(machine, agent)
        made.fence()
        yield made
        if agent.running:
            agent.stop()


def test_locks_alone_the_hook_alone_and_no_fence_of_anybody_elses(host: FencedHost) -> None:
    assert not host.autostart()
    host.agent.start()
    assert "lock" in host.refusal()
    assert "hook" not in host.refusal().lower()
    checked = host.command("check")
    assert checked.returncode == 1
    assert "WRONG fence hook: not installed" in checked.stdout

    assert "proven" in host.must("fence", "install")
    assert "WRONG fence hook" not in host.command("check").stdout
    assert list((host.machine.folder / "etc/hooks/qemu.d").iterdir()) == [
        host.machine.folder / "etc/hooks/qemu.d/failback-fence"
    ]
    assert not (host.state / "fence-probe.json").exists()
    host.agent.kill9()
    said = host.refusal()
    for words in ("the pair shop", "run r7", "torn", "failback status shop", "failback-agent fence lift web --reason"):
        assert words in said, said

    # Its disk under another VM, and another name and UUID; while others' VMs do not notice.
    xml = host.machine.virsh("dumpxml", "web").replace(UUID, str(uuids.uuid4())).replace("<name>web<", "<name>copy<")
    host.machine.define(xml)
    assert "the VM copy must not start" in host.refusal("copy")
    host.starts("other")

    assert "is removed" in host.must("fence", "remove")
    host.starts("web")


def test_the_hook_at_libvirtds_start_and_never_at_a_reconnect(host: FencedHost) -> None:
    host.must("fence", "install")
    host.machine.virsh("start", "other")
    # A person turned autostart on again, nobody holds the locks, the host comes up.
    host.machine.virsh("autostart", "web")
    other = json.dumps({"fences": [*json.loads((host.state / "fenced.json").read_text())["fences"], _entry(OTHER)]})
    (host.state / "fenced.json").write_text(other)
    host.machine.stop_libvirtd()
    (host.machine.folder / "run/libvirt/qemu/autostarted").unlink()  # libvirt's mark that this boot had its autostart
    host.machine.start_libvirtd()
    assert host.machine.virsh("domstate", "other") == "running"
    deadline = time.monotonic() + NOTICED_WITHIN_S
    while "the VM web must not start" not in (host.machine.folder / "libvirtd.log").read_text(errors="replace"):
        assert time.monotonic() < deadline, "autostart did not meet the hook"
    assert host.machine.virsh("domstate", "web") == "shut off"
    host.machine.virsh("destroy", "other")
    assert "the VM other must not start" in host.refusal("other")


def test_a_fenced_vm_stays_off_when_the_list_is_lost_and_others_start(host: FencedHost) -> None:
    host.must("fence", "install")
    for damage in ("", '{"fences": [{"vm_uu', None):
        path = host.state / "fenced.json"
        path.unlink() if damage is None else path.write_text(damage)
        assert "cannot be read" in host.refusal()
        host.starts("other")
    host.agent.start()
    assert UUID in (host.state / "fenced.json").read_text()
    host.agent.kill9()
    assert "the VM web must not start" in host.refusal()


@pytest.mark.parametrize("agent_runs", [True, False], ids=["agent-runs", "agent-dead"])
def test_a_person_lifts_every_fence_on_the_host_alone(host: FencedHost, agent_runs: bool) -> None:
    host.must("fence", "install")
    host.agent.start()
    if not agent_runs:
        host.agent.kill9()
    listed = host.must("fence", "list")
    assert "web: fenced for the pair shop as its original, run r7" in listed
    assert ("images locked" in listed) is agent_runs
    assert host.command("fence", "lift", "nobody", "--reason", "x").returncode == 1
    done = host.command("fence", "lift", "web", "--reason", "the DR site burned down")
    assert done.returncode == 0, done.stderr
    assert "torn" in done.stderr
    assert host.autostart()
    host.starts("web")
    ledger = json.loads((host.state / "ledger.json").read_text())
    assert ledger["fences"] == []
    (lift,) = ledger["lifts"]
    assert (lift["reason"], lift["condition"], lift["pair"]) == ("the DR site burned down", "torn", "shop")
    assert "lifted the fence of the pair shop" in host.must("fence", "list")
    assert "lifted its fence already" in host.command("fence", "lift", "web", "--reason", "x").stderr


def _entry(uuid: str) -> dict[str, object]:
    return {
        "vm_uuid": uuid,
        "vm_name": "other",
        "pair": "p",
        "run": "r",
        "side": "replica",
        "condition": "",
        "images": [],
    }
