"""What of a VM is no disk comes home on two real hosts: firmware variables, TPM state, definition, missing disks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.lab import console, disks
from tests.lab.domain import LabDisk, disk_xml
from tests.lab.private_host import HostError
from tests.lab.site import LabPair, LabVm, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

START = ("start", "--yes", "--foreground", "--shutdown-timeout", "90s", "--no-audit")
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
NIC_MAC = "52:54:00:fa:11:01"
BRIDGE = "fbbr0"


def _redefine(vm: LabVm, *changes: tuple[str, str]) -> None:
    """Edit the definition as `virsh edit` would: each pattern becomes its replacement."""
    xml = vm.host.virsh("dumpxml", "--inactive", "--security-info", vm.name)
    for pattern, replacement in changes:
        xml, count = re.subn(pattern, replacement, xml, count=1, flags=re.DOTALL)
        assert count == 1, (pattern, xml)
    vm.host.define(xml)


def _definition(vm: LabVm) -> str:
    return vm.host.virsh("dumpxml", "--inactive", "--security-info", vm.name)


def _uefi(*devices: str) -> tuple[tuple[str, str], ...]:
    return (
        ("<os>", "<os firmware='efi'>"),
        (r"machine='[^']*'", "machine='q35'"),
        (r"<controller type='pci'.*?(?=<serial|<input)", ""),
        (r"(<address type='pci'[^>]*>)", ""),
        (
            r"<memory unit='KiB'>\d+</memory>\s*<currentMemory[^>]*>\d+</currentMemory>",
            "<memory unit='MiB'>256</memory>",
        ),
        ("</devices>", f"{''.join(devices)}</devices>"),
    )


def _nvram(vm: LabVm) -> Path:
    """As seen from outside: the host's own /var/lib/libvirt."""
    return vm.host.folder / "lib/qemu/nvram" / f"{vm.name}_VARS.fd"


def _tpm_state(vm: LabVm) -> dict[str, bytes]:
    uuid = vm.host.virsh("domuuid", vm.name)
    folder = vm.host.folder / "lib/swtpm" / uuid / "tpm2"
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def _modes(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, found.st_mode


def _machine_pair(site: Site, name: str, *devices: str) -> LabPair:
    """A pair with UEFI firmware; both VMs have run once, so that both have variables of their own."""
    pair = site.make_pair(name, failed_over=False, size_bytes=32 << 20)
    for vm in (pair.original, pair.replica):
        _redefine(vm, *_uefi(*devices))
        vm.start()
        vm.host.virsh("destroy", vm.name)
    disks.copy(pair.original.disks[0].path, "qcow2", pair.replica.disks[0].path, "qcow2")
    return pair


def _take_over(site: Site, pair: LabPair) -> None:
    pair.replica.start()
    site.failback("failover", pair.name)


def _change_variables(vm: LabVm, mark: bytes) -> bytes:
    """Put a mark into the spare area of the variable store, where firmware looks at nothing; returns all of it."""
    with _nvram(vm).open("r+b") as store:
        store.seek(-64, 2)
        store.write(mark)
    return _nvram(vm).read_bytes()


def _leftovers(vm: LabVm) -> list[str]:
    return [str(path) for path in (vm.host.folder / "lib").rglob("*failback*")]


def test_a_uefi_guests_variables_come_home_byte_for_byte_and_undo_gives_the_old_back(site: Site) -> None:
    pair = _machine_pair(site, "uefi")
    old = _change_variables(pair.original, b"old")
    owner = _modes(_nvram(pair.original))
    _take_over(site, pair)
    new = _change_variables(pair.replica, b"boot entry of the failover")
    plan = site.failback("plan", pair.name)
    assert plan["plan"]["refusals"] == []
    site.failback(*START, "--no-power-on", pair.name)
    # The guest's own shutdown may have written variables too: the replica's file as it was left is what counts.
    assert b"boot entry of the failover" in new
    assert _nvram(pair.original).read_bytes() == _nvram(pair.replica).read_bytes()
    assert b"boot entry of the failover" in _nvram(pair.original).read_bytes()
    assert _modes(_nvram(pair.original)) == owner
    pair.original.start()
    site.failback("undo", pair.name, "--yes")
    assert _nvram(pair.original).read_bytes() == old
    assert _modes(_nvram(pair.original)) == owner
    assert pair.replica.is_running()
    assert _leftovers(pair.original) == []


def test_a_tpms_state_comes_home_the_original_starts_with_it_and_commit_drops_the_old(site: Site) -> None:
    pair = _machine_pair(site, "tpm", TPM)
    old = _tpm_state(pair.original)
    _take_over(site, pair)
    site.failback(*START, "--power-on", pair.name)
    console.wait_ready(pair.original.log, after=0)
    state = _tpm_state(pair.replica)
    assert state
    assert state != old, "two TPMs that were made apart have other keys"
    # Starting it, swtpm may write its own counters; the keys are the replica's: its size and name are.
    assert _tpm_state(pair.original).keys() == state.keys()
    assert _leftovers(pair.original) != []
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    assert _leftovers(pair.original) == []


@pytest.mark.long
def test_undo_gives_a_tpms_old_state_back(site: Site) -> None:
    pair = _machine_pair(site, "tpmundo", TPM)
    old = _tpm_state(pair.original)
    _take_over(site, pair)
    site.failback(*START, "--no-power-on", pair.name)
    assert _tpm_state(pair.original) == _tpm_state(pair.replica) != old
    site.failback("undo", pair.name, "--yes")
    assert _tpm_state(pair.original) == old
    assert _leftovers(pair.original) == []


def test_firmware_or_a_tpm_on_one_side_alone_is_refused(site: Site) -> None:
    pair = site.make_pair("onesided")
    _redefine(pair.original, *_uefi(TPM))
    answer = site.failback(*START, pair.name, exit_code=3)
    codes = {refusal["code"] for refusal in answer["plan"]["refusals"]}
    assert codes >= {"firmware-differs", "tpm-differs"}


def _add_disk(pair: LabPair) -> LabDisk:
    """A disk that the replica got while it served."""
    path = pair.replica.disks[0].path.with_name("vdc.qcow2")
    disks.make_blank(path, "qcow2", 8 << 20, seed=5, content_bytes=1 << 20)
    path.chmod(0o666)
    added = LabDisk("vdc", path, "qcow2")
    xml = pair.replica.host.folder / "disk.xml"
    xml.write_text(disk_xml(added))
    pair.replica.host.virsh("attach-device", pair.replica.name, str(xml), "--live", "--config")
    return added


def _created(pair: LabPair) -> list[Path]:
    return sorted(pair.original.disks[0].path.parent.glob(f"{pair.original.name}-vdc-*"))


def test_a_disk_that_was_added_is_created_at_the_original_and_undo_removes_exactly_it(site: Site) -> None:
    pair = site.make_pair("added")
    added = _add_disk(pair)
    before = _definition(pair.original)
    files = sorted(path.name for path in pair.original.disks[0].path.parent.iterdir())
    answer = site.failback(*START, pair.name, exit_code=3)
    refusals = answer["plan"]["refusals"]
    assert [refusal["code"] for refusal in refusals] == ["disk-not-mapped"]
    assert "--create-missing" in refusals[0]["sentence"]
    site.failback(*START, "--create-missing", "--no-power-on", pair.name)
    (made,) = _created(pair)
    assert pair.original.sources()["vdc"] == made
    disks.assert_same(made, "qcow2", added.path, "qcow2", locked=True)
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    assert _created(pair) == []
    assert _definition(pair.original) == before
    assert sorted(path.name for path in pair.original.disks[0].path.parent.iterdir()) == files
    assert pair.replica.is_running()
    # And once more, to the end.
    site.failback(*START, "--create-missing", "--power-on", pair.name)
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    (made,) = _created(pair)
    assert pair.original.sources()["vdc"] == made


@pytest.mark.long
def test_cancel_removes_a_created_disk(site: Site) -> None:
    pair = site.make_pair("addcancel")
    _add_disk(pair)
    before = _definition(pair.original)
    run = site.spawn(*START, "--create-missing", "--switch", "manual", pair.name)
    site.wait_for_status(pair.name, lambda status: status["state"] == "Ready to switch", run)
    assert len(_created(pair)) == 1
    site.failback("cancel", pair.name)
    run.wait(60)
    assert _created(pair) == []
    assert _definition(pair.original) == before


@pytest.fixture
def bridges(site: Site) -> None:
    for host in (site.production, site.dr):
        done = host.run(["ip", "link", "add", BRIDGE, "type", "bridge"])
        assert done.returncode == 0 or "exists" in done.stderr, done.stderr


def _grow_replica(pair: LabPair) -> None:
    """More memory, a vCPU and a NIC, as they take effect at the replica's next start."""
    source = f"<mac address='{NIC_MAC}'/><source bridge='{BRIDGE}'/><model type='virtio'/>"
    nic = f"<interface type='bridge'>{source}</interface>"
    _redefine(
        pair.replica,
        (
            r"<memory unit='KiB'>\d+</memory>\s*<currentMemory[^>]*>\d+</currentMemory>",
            "<memory unit='MiB'>160</memory>",
        ),
        (r"<vcpu[^>]*>\d+</vcpu>", "<vcpu>2</vcpu>"),
        ("</devices>", f"{nic}</devices>"),
    )


@pytest.mark.usefixtures("bridges")
def test_what_was_changed_of_the_definition_is_shown_applied_when_told_and_taken_back(site: Site) -> None:
    pair = site.make_pair("grown")
    _grow_replica(pair)
    before = _definition(pair.original)
    plan = site.failback("plan", pair.name)["plan"]
    shown = {each["what"]: (each["original"], each["replica"]) for each in plan["differences"]}
    assert shown["memory"] == ("128 MiB", "160 MiB")
    assert shown["vCPUs"] == ("1", "2")
    assert shown[f"NIC {NIC_MAC}"] == ("none", f"virtio, on bridge {BRIDGE}")
    site.failback(*START, "--apply-config", "--power-on", pair.name)
    after = _definition(pair.original)
    assert "<memory unit='KiB'>163840</memory>" in after
    assert NIC_MAC in after
    console.wait_ready(pair.original.log, after=0)
    assert pair.original.is_running()
    site.failback("undo", pair.name, "--yes")
    assert _definition(pair.original) == before
    assert pair.replica.is_running()
    # Without being told the definition stays.
    site.failback(*START, "--no-power-on", pair.name)
    assert _definition(pair.original) == before
    site.failback("undo", pair.name, "--yes")


def test_a_nic_on_a_bridge_that_the_production_host_lacks_is_refused(site: Site) -> None:
    pair = site.make_pair("bridgeless")
    _redefine(
        pair.replica,
        (
            "</devices>",
            f"<interface type='bridge'><mac address='{NIC_MAC}'/><source bridge='fbnone0'/></interface></devices>",
        ),
    )
    answer = site.failback(*START, "--apply-config", pair.name, exit_code=3)
    assert [refusal["code"] for refusal in answer["plan"]["refusals"]] == ["network-missing"]
    with pytest.raises(HostError):
        pair.original.host.virsh("domiflist", "nobody")


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    for program in ("swtpm", "swtpm_setup"):
        assert subprocess.run(["which", program], capture_output=True, check=False).returncode == 0
