"""Changes of a definition: what the guest sees is taken from another host's, never a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.errors import HypervisorError
from agent.virt.definition_edit import StateRef, add_disk, apply_changes, remove_disk, state_refs
from agent.virt.domain_xml import parse_domain
from agent.virt.names import ImageRef
from agent.virt.seam import StateRole

OURS = (
    "<domain><name>web</name><memory unit='KiB' dumpCore='off'>1024</memory><vcpu cpuset='0-3' current='1'>2</vcpu>"
    "<cpu mode='host-model'><topology sockets='2' cores='1' threads='1'/></cpu><devices>"
    "<disk type='file' device='disk'><source file='/a'/><target dev='vda' bus='virtio'/>"
    "<address type='pci' domain='0x0000' bus='0x00' slot='0x04' function='0x0'/></disk></devices></domain>"
)
IMAGE = ImageRef(path=Path("/images/new.qcow2"), format="qcow2")


def test_numbers_take_the_place_of_ours_and_what_is_the_hosts_own_stays() -> None:
    changed = apply_changes(OURS, ["<memory unit='KiB' dumpCore='on'>4096</memory>", "<vcpu cpuset='9'>4</vcpu>"])
    assert '<memory unit="KiB" dumpCore="off">4096</memory>' in changed
    assert '<vcpu cpuset="0-3">4</vcpu>' in changed


def test_a_topology_is_replaced_or_taken_away() -> None:
    assert '<topology sockets="1" cores="4"/>' in apply_changes(OURS, ["<topology sockets='1' cores='4'/>"])
    assert "topology" not in apply_changes(OURS, ["<topology/>"])
    assert "<cpu" not in apply_changes("<domain/>", ["<topology/>"])


def nic(slot: str, more: str = "") -> str:
    return (
        "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0' dev='/dev/x'/>"
        f"<target dev='vnet7'/><script path='/bin/evil'/><model type='virtio'/><alias name='net3'/>{more}"
        f"<address type='pci' domain='0x0000' bus='0x00' slot='{slot}' function='0x0'/></interface>"
    )


def test_of_a_nic_only_what_the_guest_sees_is_taken_and_where_it_is_attached() -> None:
    changed = apply_changes(OURS, [nic("0x09")])
    assert 'bridge="br0"' in changed
    assert 'address="52:54:00:00:00:01"' in changed
    assert 'slot="0x09"' in changed
    assert all(word not in changed for word in ("/bin/evil", "/dev/x", "vnet7", "net3"))


def test_a_place_on_the_bus_that_is_taken_or_not_there_is_left_to_libvirt() -> None:
    assert apply_changes(OURS, [nic("0x04")]).count('slot="0x04"') == 1
    assert 'slot="0x09"' not in apply_changes(OURS, [nic("0x09").replace("bus='0x00'", "bus='0x05'")])


@pytest.mark.parametrize(
    "element",
    [
        "<os/>",
        "<disk/>",
        "<interface type='hostdev'/>",
        "<interface type='ethernet'><script path='/x'/></interface>",
        "<memory>many</memory>",
        "<memory",
        "<!DOCTYPE m [<!ENTITY a 'b'>]><memory>&a;</memory>",
        "<memory>" + "1" * 20000 + "</memory>",
    ],
)
def test_nothing_else_changes_a_definition(element: str) -> None:
    with pytest.raises(HypervisorError):
        apply_changes(OURS, [element])


def test_a_disk_is_added_on_the_bus_of_the_other_hosts_and_on_our_image() -> None:
    theirs = (
        "<disk type='block' device='disk'><driver name='qemu' type='raw' discard='unmap' io='native'/>"
        "<source dev='/dev/their'/><target dev='sdq' bus='scsi'/><serial>S1</serial>"
        "<blockio logical_block_size='4096'/></disk>"
    )
    changed = add_disk(OURS, "vdc", IMAGE, theirs)
    added = parse_domain(changed).disk("vdc")
    assert added is not None
    assert (added.image, added.sector_bytes) == (IMAGE, 4096)
    assert 'bus="scsi"' in changed
    assert "<serial>S1</serial>" in changed
    assert "/dev/their" not in changed
    assert "native" not in changed
    with pytest.raises(HypervisorError, match="has a drive vda already"):
        add_disk(OURS, "vda", IMAGE, theirs)


def test_a_disk_is_removed_only_where_it_is_on_that_very_image() -> None:
    with_disk = add_disk(OURS, "vdc", IMAGE, "<disk/>")
    assert remove_disk(with_disk, "vdc", Path("/other")) is None
    without = remove_disk(with_disk, "vdc", IMAGE.path)
    assert without is not None
    assert [disk.target for disk in parse_domain(without).disks] == ["vda"]


def refs(os: str = "", devices: str = "") -> tuple[StateRef, ...]:
    return state_refs(f"<domain>{os}<devices>{devices}</devices></domain>")


def tpm(backend: str) -> str:
    return f"<tpm model='tpm-crb'><backend {backend}/></tpm>"


LOADER = "<loader type='pflash'>/OVMF.fd</loader>"


@pytest.mark.parametrize(
    ("os", "path", "format_", "problem"),
    [
        ("<os firmware='efi'/>", None, "raw", ""),
        (f"<os>{LOADER}<nvram>/n/web_VARS.fd</nvram></os>", "/n/web_VARS.fd", "raw", ""),
        (f"<os>{LOADER}<nvram type='file' format='qcow2'><source file='/n/v'/></nvram></os>", "/n/v", "qcow2", ""),
        (f"<os>{LOADER}<nvram type='network'><source/></nvram></os>", None, "raw", "not kept in a file"),
    ],
)
def test_where_the_firmwares_variables_are(os: str, path: str | None, format_: str, problem: str) -> None:
    (ref,) = refs(os)
    assert (ref.role, ref.path, ref.format) == (StateRole.NVRAM, None if path is None else Path(path), format_)
    assert problem in ref.problem
    assert bool(problem) is bool(ref.problem)


@pytest.mark.parametrize("os", ["<os/>", "<os><loader type='pflash' stateless='yes'>/O</loader></os>"])
def test_a_vm_without_such_variables(os: str) -> None:
    assert refs(os) == ()


@pytest.mark.parametrize(
    ("backend", "format_", "problem"),
    [
        ("type='emulator' version='2.0'", "2.0", ""),
        ("type='emulator' version='1.2'", "1.2", ""),
        ("type='passthrough'", "", "not emulated by swtpm"),
    ],
)
def test_where_a_tpms_state_is(backend: str, format_: str, problem: str) -> None:
    (ref,) = refs(devices=tpm(backend))
    assert (ref.role, ref.path, ref.format) == (StateRole.TPM, None, format_)
    assert problem in ref.problem


def test_a_tpms_state_that_is_encrypted_cannot_be_carried() -> None:
    encrypted = "<tpm><backend type='emulator' version='2.0'><encryption secret='x'/></backend></tpm>"
    assert "encrypted" in refs(devices=encrypted)[0].problem
