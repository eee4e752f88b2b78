"""A definition for another host: what the guest sees stays, what is a host's own is mapped, left out or refused."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import HypervisorError
from agent.virt import new_definition
from agent.virt.names import ImageRef
from coordinator import relocation
from coordinator.errors import UsageError
from coordinator.place_mapping import PlaceMapping, mapping_of
from coordinator.relocation import NewVm, Relocated, new_mac, relocate
from protocol.messages import Provisions

UUID = "0b7a3c52-57a5-4a5b-9f3c-3f1d1f3b0a09"
CODE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
HAS = Provisions(
    machines=("pc-q35-7.2", "q35"),
    cpu_modes=("host-model", "custom"),
    cpu_models=("Nehalem", "qemu64"),
    firmware=("bios", "efi"),
    files=(CODE,),
    tpm_models=("tpm-crb", "tpm-tis"),
    networks=("network:default", "bridge:br1"),
    pools=(),
)
VM = NewVm(name="web", uuid=UUID, disks=("vda",), mapping=PlaceMapping())
DISK = (
    "<disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/><source dev='/dev/vg/web'/>"
    "<backingStore/><target dev='vda' bus='virtio'/><serial>S1</serial><alias name='virtio-disk0'/>"
    "<address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/></disk>"
)
NIC = (
    "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><target dev='vnet3'/>"
    "<model type='virtio'/><alias name='net0'/></interface>"
)


def definition(devices: str = "", *, os: str = "", top: str = "", machine: str = "pc-q35-7.2") -> str:
    return (
        "<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>web-replica</name>"
        "<uuid>0b7a3c52-57a5-4a5b-9f3c-3f1d1f3b0a02</uuid><memory unit='KiB'>1048576</memory>"
        f"<vcpu cpuset='2-3'>2</vcpu>{top}<os><type arch='x86_64' machine='{machine}'>hvm</type>{os}</os>"
        f"<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{DISK}{devices}</devices></domain>"
    )


def made(text: str, vm: NewVm = VM, has: Provisions = HAS) -> Relocated:
    return relocate(text, "prod2", vm, has)


def codes(found: Relocated) -> list[str]:
    return [refusal.code for refusal in found.refusals]


def test_what_the_guest_sees_stays_and_names_and_addresses_are_new() -> None:
    vm = replace(VM, mapping=PlaceMapping(networks=(("br0", "br1"),)))
    found = made(definition(NIC), vm)
    root = ET.fromstring(found.definition)
    assert (found.refusals, found.notes) == ((), ())
    assert (root.findtext("name"), root.findtext("uuid"), root.get("id")) == ("web", UUID, None)
    assert (root.findtext("memory"), root.find("vcpu").attrib) == ("1048576", {})  # type: ignore[union-attr]
    (disk,) = root.findall("devices/disk")
    assert [child.tag for child in disk] == ["driver", "target", "serial", "address"]
    (nic,) = root.findall("devices/interface")
    assert nic.find("source").attrib == {"bridge": "br1"}  # type: ignore[union-attr]
    assert [mac.get("address") for mac in nic.findall("mac")] == [new_mac(UUID, 0)]
    assert new_mac(UUID, 0) != new_mac(UUID, 1)
    assert nic.find("target") is None
    assert root.find("devices/emulator") is None


def test_a_bridge_may_become_a_network_and_an_identity_may_be_kept() -> None:
    mapping = PlaceMapping(networks=(("br0", "default"),))
    found = made(definition(NIC), replace(VM, mapping=mapping, keep_identity=True))
    nic = ET.fromstring(found.definition).find("devices/interface")
    assert nic is not None
    assert (nic.get("type"), [mac.get("address") for mac in nic.findall("mac")]) == ("network", ["52:54:00:00:00:01"])
    explicit = PlaceMapping(networks=(("br0", "bridge:default"),))
    assert codes(made(definition(NIC), replace(VM, mapping=explicit))) == ["network-missing"]


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (definition(machine="pc-q35-9.0"), "machine-type", "no machine type pc-q35-9.0 (it has: pc-q35-7.2)"),
        (definition(top="<cpu mode='host-passthrough'/>"), "cpu-model", "(it can: host-model, custom)"),
        (definition(top="<cpu><model>EPYC</model></cpu>"), "cpu-model", "cannot give the processor EPYC"),
        (definition(os="<loader>/old/CODE.fd</loader>"), "firmware-missing", f"(it has: {CODE})"),
        (definition(NIC), "network-missing", "no bridge br0"),
        (definition("<interface type='direct'><source dev='eth0'/></interface>"), "network-missing", "type direct"),
        (definition("<tpm model='tpm-spapr'><backend type='emulator'/></tpm>"), "tpm-missing", "tpm-crb, tpm-tis"),
        (definition("<tpm model='tpm-tis'><backend type='passthrough'/></tpm>"), "tpm-missing", "is not emulated"),
    ],
)
def test_what_the_host_cannot_give_is_refused_with_what_it_has(text: str, code: str, words: str) -> None:
    found = made(text)
    assert codes(found) == [code]
    assert words in found.refusals[0].sentence


@pytest.mark.parametrize("models", [(), ("tpm-crb",)])
def test_a_tpm_that_the_host_can_give(models: tuple[str, ...]) -> None:
    tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'><source type='dir' path='/x'/></backend></tpm>"
    found = made(definition(tpm), has=replace(HAS, tpm_models=models))
    assert codes(found) == ([] if models else ["tpm-missing"])
    assert "/x" not in found.definition


def test_uefi_is_the_hosts_own_and_may_be_mapped() -> None:
    os = "<loader readonly='yes' type='pflash'>/old/CODE.fd</loader><nvram template='/old/VARS.fd'>/old/web.fd</nvram>"
    mapping = PlaceMapping(firmware=(("/old/CODE.fd", CODE),))
    found = made(definition(os=os), replace(VM, mapping=mapping))
    assert found.refusals == ()
    assert "/old" not in found.definition
    auto = definition(os="").replace("<os>", "<os firmware='efi'>")
    assert codes(made(auto)) == []
    assert codes(made(auto, has=replace(HAS, firmware=("bios",)))) == ["firmware-missing"]


def test_what_is_a_hosts_own_is_left_out_and_told_of() -> None:
    devices = (
        "<serial type='file'><source path='/log'/><log file='/l'/></serial><filesystem type='mount'/>"
        "<graphics type='vnc' port='5901' autoport='no' listen='10.0.0.1'><listen type='address'/></graphics>"
        "<disk type='file' device='cdrom'><source file='/iso'/><target dev='sda' bus='sata'/><readonly/></disk>"
        "<disk type='file' device='disk'><source file='/extra'/><target dev='vdz'/></disk>"
        "<rng model='virtio'><backend model='egd' type='udp'><source host='1.2.3.4'/></backend></rng>"
    )
    top = "<cputune><vcpupin vcpu='0' cpuset='1'/></cputune><qemu:commandline><qemu:arg value='-x'/></qemu:commandline>"
    found = made(definition(devices, top=top))
    told = " ".join(found.notes)
    assert found.refusals == ()
    assert all(word in told for word in ("<filesystem>", "<commandline>", "A serial", "The disk vdz"))
    assert "cputune" not in told
    assert not any(path in found.definition for path in ("/log", "/iso", "/extra", "10.0.0.1", "5901", "-x"))


def test_the_agent_takes_what_is_made_of_a_definition_with_everything() -> None:
    devices = (
        "<interface type='network'><source network='default' portid='9f3c'/><virtualport/></interface>"
        "<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm><controller type='usb' index='0'/>"
        "<console type='pty' tty='/dev/pts/3'><source path='/dev/pts/3'/><target type='serial'/></console>"
        "<channel type='unix'><source mode='bind' path='/x'/><target type='virtio' name='org.qemu.guest_agent.0'/>"
        "</channel><rng model='virtio'><backend model='random'>/dev/hwrng</backend></rng><memballoon model='virtio'/>"
        "<disk type='file' device='cdrom'><source file='/iso'/><target dev='sda' bus='sata'/><readonly/></disk>"
    )
    found = made(definition(devices, os=f"<loader type='pflash'>{CODE}</loader><nvram>/n</nvram>", top="<hyper/>"))
    assert found.refusals == ()
    assert "<console" in found.definition
    image = ImageRef(path=Path("/pool/web-vda.raw"), format="raw")
    taken = new_definition.on_volumes(found.definition, UUID, "web", {"vda": image}, HAS.files)
    sources = [disk.find("source") for disk in ET.fromstring(taken).findall("devices/disk")]
    assert [None if source is None else source.attrib for source in sources] == [{"file": "/pool/web-vda.raw"}, None]


PLAIN_DISK = "<disk type='file' device='disk'><target dev='vda'/></disk>"
OF_THE_HOST = [
    "<sysinfo type='fwcfg'><entry name='opt/x' file='/etc/shadow'/></sysinfo>",
    "<sysinfo type='fwcfg'><entry name='opt/x' file='etc/shadow'/></sysinfo>",
    "<os><acpi><table type='slic'>/etc/shadow</table></acpi></os>",
    "<os><acpi><table type='slic'>etc/shadow</table></acpi></os>",
    "<devices>@<interface type='user'><rom file='/etc/shadow'/></interface></devices>",
    "<devices>@<interface type='user'><backend tap='/dev/net/tun' vhost='/dev/vhost-net'/></interface></devices>",
    "<devices>@<audio id='1' type='file' path='/etc/crontab'/></devices>",
    "<devices>@<input type='evdev'><source dev='/dev/input/event1'/></input></devices>",
    "<devices>@<input type='passthrough' bus='virtio'><source evdev='/dev/input/event1'/></input></devices>",
    "<devices>@<graphics type='vnc' socket='/run/x.sock'/></devices>",
    "<devices>@<graphics type='spice'><gl rendernode='/dev/dri/renderD128'/></graphics></devices>",
    "<devices><disk type='file' device='disk'><target dev='vda'/><mirror file='/etc/shadow'/></disk></devices>",
]


@pytest.mark.parametrize("part", OF_THE_HOST)
def test_no_file_or_device_of_a_host_is_named(part: str) -> None:
    part = part.replace("@", PLAIN_DISK)
    whole = part if "<devices>" in part else f"{part}<devices>{PLAIN_DISK}</devices>"
    xml = f"<domain type='qemu'><name>web</name><uuid>{UUID}</uuid>{whole}</domain>"
    image = ImageRef(path=Path("/pool/web-vda.raw"), format="raw")
    with pytest.raises(HypervisorError, match="is not taken"):
        new_definition.on_volumes(xml, UUID, "web", {"vda": image}, HAS.files)
    found = made(xml)
    assert all(word not in found.definition for word in ("/etc/", "etc/shadow", "/dev/", "/run/"))


def test_coordinator_and_agent_know_the_same_elements() -> None:
    assert new_definition.TOP == relocation.KEPT
    assert new_definition.DEVICES == relocation.DEVICES
    assert new_definition.CHARACTER_KINDS == relocation.CHARACTER_KINDS
    assert new_definition.FILES == relocation.FILES
    assert new_definition.HOST_ATTRIBUTES == relocation.HOST_ATTRIBUTES
    assert new_definition.INPUTS == relocation.INPUTS


class TestMapping:
    def test_words_and_a_file_of_them(self, tmp_path: Path) -> None:
        file = tmp_path / "map.toml"
        file.write_text('name = "www"\n[network]\nbr0 = "br1"\nbr9 = ""\n[pool]\nfast = "slow"\n')
        found = mapping_of(("pool:fast=default", "network:br0=bridge:br2", "firmware:/a=/b"), file)
        assert found == PlaceMapping(
            networks=(("br0", "bridge:br2"),), pools=(("fast", "default"),), firmware=(("/a", "/b"),), name="www"
        )
        assert mapping_of(("name=x",), None) == PlaceMapping(name="x")

    @pytest.mark.parametrize("word", ["br0=br1", "network:=x", "network:a", "disk:a=b", "name=", "=x"])
    def test_what_is_no_mapping(self, word: str) -> None:
        with pytest.raises(UsageError, match="is no mapping"):
            mapping_of((word,), None)

    @pytest.mark.parametrize("text", ["x = 1", "name = 3", "[network]\na = 1", "[pool", ""])
    def test_a_file_that_is_none(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "map.toml"
        if text:
            file.write_text(text)
        with pytest.raises(UsageError, match="the mapping"):
            mapping_of((), file)
