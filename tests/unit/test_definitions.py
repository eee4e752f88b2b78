"""What differs between two definitions, in words, and what of it can be applied."""

from __future__ import annotations

import pytest

from coordinator.definitions import BadDefinition, Difference, compare, disk_element, targets
from coordinator.model import DiskPair
from tests.unit.plan_cases import definition

DISKS = (DiskPair(original="vda", replica="vda"), DiskPair(original="vdb", replica="vdb"))


def nic(mac: str, *, model: str = "virtio", bridge: str = "br0", kind: str = "bridge") -> str:
    return (
        f"<interface type='{kind}'><mac address='{mac}'/><source bridge='{bridge}'/><model type='{model}'/></interface>"
    )


def found(original: str, replica: str) -> dict[str, Difference]:
    return {each.what: each for each in compare(original, replica, DISKS)}


def test_a_vm_does_not_differ_from_itself() -> None:
    whole = definition(nic("52:54:00:00:00:01"), more="<features><acpi/></features><cpu mode='host-model'/>")
    assert compare(whole, whole, DISKS) == ()


def test_what_each_host_has_of_its_own_is_left_out() -> None:
    here = definition(nic("52:54:00:00:00:01", bridge="br0") + "<tpm model='t'><alias name='a'/></tpm>")
    there = definition(nic("52:54:00:00:00:02", bridge="lan") + "<tpm model='t'><alias name='b'/></tpm>")
    named = "<domain type='kvm'><name>{}</name><uuid>{}</uuid>"
    here = here.replace("<domain type='kvm'>", named.format("a", 1))
    there = there.replace("<domain type='kvm'>", named.format("b", 2))
    assert compare(here, there, DISKS) == ()


def test_memory_and_vcpus_differ_in_words_and_can_be_applied() -> None:
    differing = found(definition(), definition(memory_kib=4194304, vcpus=4))
    assert (differing["memory"].original, differing["memory"].replica) == ("2048 MiB", "4096 MiB")
    assert differing["memory"].elements == (
        "<memory unit='KiB'>4194304</memory>",
        "<currentMemory unit='KiB'>4194304</currentMemory>",
    )
    assert (differing["vCPUs"].original, differing["vCPUs"].replica) == ("2", "4")
    assert differing["vCPUs"].elements == ("<vcpu>4</vcpu>", "<topology />")


def test_a_topology_comes_along_with_the_vcpus() -> None:
    there = definition(vcpus=4, more="<cpu><topology sockets='1' cores='4' threads='1'/></cpu>")
    vcpus = found(definition(), there)["vCPUs"]
    assert vcpus.replica == "4 (1 sockets, 4 cores, 1 threads)"
    assert 'cores="4"' in vcpus.elements[1]


def test_memory_that_is_laid_out_in_cells_is_left_to_a_person() -> None:
    there = definition(memory_kib=4194304, more="<cpu><numa><cell id='0' cpus='0' memory='4194304'/></numa></cpu>")
    assert found(definition(), there)["memory"].elements == ()


def test_a_nic_of_the_replica_alone_can_be_added_and_says_where_it_was_attached() -> None:
    one, two = nic("52:54:00:00:00:01"), nic("52:54:00:00:00:02", bridge="br7")
    added = found(definition(one), definition(one + two))["NIC 52:54:00:00:00:02"]
    assert (added.original, added.replica, added.network) == ("none", "virtio, on bridge br7", "bridge:br7")
    assert "52:54:00:00:00:02" in added.elements[0]


def test_a_nic_of_the_original_alone_stays() -> None:
    one, two = nic("52:54:00:00:00:01"), nic("52:54:00:00:00:02")
    gone = found(definition(one + two), definition(one))["NIC 52:54:00:00:00:02"]
    assert (gone.original, gone.replica, gone.elements) == ("virtio", "none", ())


def test_nics_with_other_addresses_belong_together_by_their_order() -> None:
    here, there = nic("52:54:00:00:00:01"), nic("52:54:00:00:00:02", model="e1000")
    differing = found(definition(here), definition(there))
    assert list(differing) == ["NIC 52:54:00:00:00:01"]
    assert (differing["NIC 52:54:00:00:00:01"].replica, differing["NIC 52:54:00:00:00:01"].elements) == ("e1000", ())


def test_a_nic_that_is_bound_to_its_host_cannot_be_added() -> None:
    added = nic("52:54:00:00:00:01", kind="direct")
    assert found(definition(), definition(added))["NIC 52:54:00:00:00:01"].elements == ()


@pytest.mark.parametrize(
    ("what", "more", "devices"),
    [
        ("firmware", "<os firmware='efi'/>", ""),
        ("CPU", "<cpu mode='host-passthrough'/>", ""),
        ("features", "<features><acpi/></features>", ""),
        ("clock", "<clock offset='localtime'/>", ""),
        ("TPM", "", "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"),
        ("sound", "", "<sound model='ich9'/>"),
        ("channel", "", "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"),
        ("disk vdc", "", "<disk device='disk'><target dev='vdc' bus='virtio'/></disk>"),
    ],
)
def test_what_else_differs_is_shown_and_left_to_a_person(what: str, more: str, devices: str) -> None:
    differing = found(definition(), definition(devices, more=more))
    assert list(differing) == [what]
    assert differing[what].elements == ()


def test_a_definition_that_declares_something_is_not_read() -> None:
    bomb = "<!DOCTYPE d [<!ENTITY a 'aaaa'>]><domain>&a;</domain>"
    with pytest.raises(BadDefinition):
        compare(bomb, definition())
    with pytest.raises(BadDefinition):
        compare(definition(), "<domain>")


def test_drives_are_found_by_their_target() -> None:
    whole = definition("<disk device='cdrom'><target dev='sda' bus='sata'/></disk>")
    assert targets(whole) == {"vda", "vdb", "sda"}
    assert 'dev="vdb"' in (disk_element(whole, "vdb") or "")
    assert disk_element(whole, "vdz") is None
