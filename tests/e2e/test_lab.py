"""The lab itself: its guest keeps what it promises, and its hosts are hosts. Everything else in e2e stands on this."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from tests.lab import console, disks
from tests.lab.agent_process import AgentError, AgentProcess, Identity
from tests.lab.domain import LabDisk, domain_xml
from tests.lab.embed_host import EmbedHost, EmbedHostError
from tests.lab.guest import Guest
from tests.lab.private_host import PrivateHost, PrivateNetwork

pytestmark = pytest.mark.real

SIZE_BYTES = 24 * disks.MIB + disks.ODD_BYTES
NAME = "lab-guest"


def _two_disks(folder: Path) -> list[LabDisk]:
    return disks.make_set(folder, ["qcow2", "raw"], SIZE_BYTES)


def test_guest_keeps_its_journal_over_a_clean_power_off(guest: Guest, lab_folder: Path) -> None:
    log = lab_folder / "console.log"
    with EmbedHost(lab_folder / "root") as host:
        host.define(domain_xml(NAME, str(uuid.uuid4()), _two_disks(lab_folder), guest, log, rate="max"))
        host.start(NAME)
        console.wait_ready(log)
        assert console.found(log) == {"vda": console.Record(0, "-"), "vdb": console.Record(0, "-")}
        console.wait_for_writes(log, "vdb", 18)  # more than there are slots
        host.shut_down(NAME)
        left = console.last(log)
        assert left["vda"].sequence == console.wrote(log)["vda"] >= 18
        said = len(console.read(log))
        host.start(NAME)
        console.wait_ready(log, after=said)
        assert console.found(log) == left
    assert console.failures(log) == []


def test_guest_notices_a_byte_it_did_not_write(guest: Guest, lab_folder: Path) -> None:
    log = lab_folder / "console.log"
    disk = LabDisk("vda", lab_folder / "vda.raw", "raw", "raw")
    disks.make_blank(disk.path, "raw", SIZE_BYTES)
    with EmbedHost(lab_folder / "root") as host:
        host.define(domain_xml(NAME, str(uuid.uuid4()), [disk], guest, log, rate="max"))
        host.start(NAME)
        console.wait_for_writes(log, "vda", 16)
        host.shut_down(NAME)
        in_last_slot = SIZE_BYTES - 8 * disks.SECTOR_BYTES + 1000  # the last slot ends with the disk
        disks.scatter_writes(disk.path, "raw", [f"write -P 0x21 {in_last_slot} 1"])
        said = len(console.read(log))
        host.start(NAME)
        console.wait_ready(log, after=said)
        assert not console.found(log)["vda"].consistent


def test_guest_can_be_deaf_to_its_power_button(guest: Guest, lab_folder: Path) -> None:
    log = lab_folder / "console.log"
    with EmbedHost(lab_folder / "root", shutdown_timeout_s=1) as host:
        host.define(domain_xml(NAME, str(uuid.uuid4()), [], guest, log, role="idle", ignore_acpi=True))
        host.start(NAME)
        console.wait_ready(log)
        with pytest.raises(EmbedHostError, match="still running"):
            host.shut_down(NAME)
        host.destroy(NAME)


@pytest.fixture
def network(lab_folder: Path) -> Iterator[PrivateNetwork]:
    with PrivateNetwork(lab_folder) as network:
        yield network


def _reaches(argv_of: PrivateHost | PrivateNetwork, address: str, port: int) -> bool:
    probe = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1)"
    return argv_of.run([sys.executable, "-c", probe, address, str(port)]).returncode == 0


@pytest.mark.root
@pytest.mark.parametrize("qemu_user", [None, "libvirt-qemu"])
def test_private_hosts_see_each_other_and_run_guests(
    guest: Guest,
    lab_folder: Path,
    lab_cache: Path,
    network: PrivateNetwork,
    qemu_user: Literal["libvirt-qemu"] | None,
) -> None:
    def host(name: str, address: str) -> PrivateHost:
        return PrivateHost(name, lab_folder / name, address, network, qemu_user=qemu_user, cache_dir=lab_cache)

    with host("prod1", "10.77.0.1") as prod, host("dr1", "10.77.0.2") as dr:
        assert prod.run(["uname", "-n"]).stdout.strip() == "prod1"
        serve = "import socket; s = socket.create_server(('', 7)); print('up', flush=True)\nwhile True: s.accept()"
        server = dr.spawn([sys.executable, "-c", serve], stdout=subprocess.PIPE)
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        assert _reaches(prod, dr.address, 7)
        assert _reaches(network, dr.address, 7)
        network.cut_link(dr)
        assert not _reaches(prod, dr.address, 7)
        network.restore_link(dr)
        assert _reaches(prod, dr.address, 7)
        server.terminate()
        server.communicate()
        for each in (prod, dr):
            log = each.images / "console.log"
            each.define(domain_xml(NAME, str(uuid.uuid4()), _two_disks(each.images), each.adopt(guest), log))
            each.virsh("start", NAME)
        for each in (prod, dr):
            console.wait_for_writes(each.images / "console.log", "vdb", 2)
            owner = each.run(["stat", "-c", "%U", str(each.images / "vda.qcow2")]).stdout.strip()
            assert owner == (qemu_user or "root")
        dr.stop_libvirtd(kill=True)
        dr.start_libvirtd()
        assert dr.virsh("domstate", NAME) == "running"


def test_agent_that_ends_instead_of_becoming_ready_is_reported_with_its_words(lab_folder: Path) -> None:
    identity = Identity(lab_folder / "ca.pem", lab_folder / "x.pem", lab_folder / "x.key")
    program = [sys.executable, "-c", "import sys; sys.exit('no such port')"]
    agent = AgentProcess("prod1", lab_folder / "agent", identity, program=program)
    with pytest.raises(AgentError, match="exit code 1 before it was ready:\nno such port"):
        agent.start()
    assert not agent.running
