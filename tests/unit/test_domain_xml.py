"""Libvirt's XML as values: what is read from it, and what a redefinition must leave as it was."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from agent.virt.domain_xml import (
    backup_xml,
    checkpoint_xml,
    parse_backup,
    parse_checkpoint,
    parse_domain,
    parse_snapshot,
    point_disks_at,
    snapshot_xml,
)
from agent.virt.names import ImageRef, is_ours, marked, overlay_paths
from agent.virt.seam import SourceKind

UUID = "b6f8e687-a4f3-4857-a87e-afbeb313461a"
QEMU_NS = "http://libvirt.org/schemas/domain/qemu/1.0"


def domain(devices: str = "", os: str = "<type arch='x86_64' machine='pc-q35-7.2'>hvm</type>", rest: str = "") -> str:
    return f"""<domain type='kvm' xmlns:qemu='{QEMU_NS}'>
  <name>web &amp; mail</name>
  <uuid>{UUID.upper()}</uuid>
  {rest}
  <os>{os}</os>
  <devices>{devices}</devices>
  <qemu:commandline><qemu:arg value='-foo'/></qemu:commandline>
</domain>"""


def disk(target: str = "vda", source: str = "<source file='/v/a.qcow2'/>", kind: str = "file", more: str = "") -> str:
    return (
        f"<disk type='{kind}' device='disk'><driver name='qemu' type='qcow2' cache='none'/>{source}"
        f"<target dev='{target}' bus='virtio'/>{more}</disk>"
    )


def test_plain_domain() -> None:
    facts = parse_domain(domain())
    assert (facts.uuid, facts.name, facts.machine) == (UUID, "web & mail", "pc-q35-7.2")
    assert (facts.on_poweroff, facts.firmware, facts.has_tpm) == ("destroy", "bios", False)
    assert facts.passthrough == ()
    assert facts.disks == ()


def test_on_poweroff_is_what_it_says() -> None:
    assert parse_domain(domain(rest="<on_poweroff>restart</on_poweroff>")).on_poweroff == "restart"


@pytest.mark.parametrize(
    ("os", "firmware"),
    [
        ("<type>hvm</type><loader readonly='yes' type='pflash'>/OVMF.fd</loader>", "uefi"),
        ("<type>hvm</type><loader type='rom'>/bios.bin</loader>", "bios"),
        ("<type>hvm</type>", "bios"),
    ],
)
def test_firmware(os: str, firmware: str) -> None:
    assert parse_domain(domain(os=os)).firmware == firmware


def test_firmware_that_libvirt_chooses() -> None:
    assert parse_domain(domain().replace("<os>", "<os firmware='efi'>")).firmware == "uefi"


def test_tpm() -> None:
    assert parse_domain(domain("<tpm model='tpm-crb'><backend type='emulator'/></tpm>")).has_tpm


def test_host_devices_are_named_by_address() -> None:
    address = "<address domain='0x0000' bus='0x01' slot='0x00' function='0x1'/>"
    devices = f"""
      <hostdev mode='subsystem' type='pci'><source>{address}</source></hostdev>
      <hostdev mode='subsystem' type='usb'><source><vendor id='0x1234'/><product id='0xbeef'/></source></hostdev>
      <hostdev mode='subsystem' type='mdev'><source><address uuid='c2177883-f1bb'/></source></hostdev>
      <interface type='hostdev'><source>{address.replace("<address", "<address type='pci'")}</source></interface>
      <disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sda'/></disk>"""
    facts = parse_domain(domain(devices))
    assert facts.passthrough == (
        "pci 0000:01:00.1",
        "usb 0x1234:0xbeef",
        "mdev c2177883-f1bb",
        "pci 0000:01:00.1",
        "lun sda",
    )
    assert facts.disks == ()


def test_disk_of_each_kind() -> None:
    devices = (
        disk("vda")
        + disk("vdb", "<source dev='/dev/vg/b'/>", "block")
        + disk("vdc", "<source protocol='rbd' name='pool/c'/>", "network")
        + disk("vdd", "<source pool='p' volume='d'/>", "volume")
        + "<disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>"
        + "<disk type='file'><source file='/v/e'/><target dev='vde'/><shareable/><readonly/>"
        "<blockio logical_block_size='4096'/></disk>"
    )
    facts = parse_domain(domain(devices))
    assert facts.drives == ("vda", "vdb", "vdc", "vdd", "sda", "vde")
    assert [(d.target, d.kind) for d in facts.disks] == [
        ("vda", SourceKind.FILE),
        ("vdb", SourceKind.BLOCK),
        ("vdc", SourceKind.NETWORK),
        ("vdd", SourceKind.OTHER),
        ("vde", SourceKind.FILE),
    ]
    assert [d.image for d in facts.disks] == [
        ImageRef(path=Path("/v/a.qcow2"), format="qcow2"),
        ImageRef(path=Path("/dev/vg/b"), format="qcow2", block=True),
        None,
        None,
        ImageRef(path=Path("/v/e"), format="raw"),  # libvirt's own default
    ]
    last = facts.disk("vde")
    assert last is not None
    assert (last.sector_bytes, last.shareable, last.readonly) == (4096, True, True)
    assert facts.disk("vda") == facts.disks[0]
    assert facts.disk("nope") is None
    assert (facts.disks[0].sector_bytes, facts.disks[0].shareable, facts.disks[0].readonly) == (512, False, False)


def test_repointing_changes_one_disk_and_nothing_else() -> None:
    metadata = "<metadata><app:note xmlns:app='http://example.org/app'><app:x>1</app:x></app:note></metadata>"
    before = domain(disk("vda") + disk("vdb") + "<graphics type='vnc' passwd='secret'/>", rest=metadata)
    after = point_disks_at(before, {"vdb": ImageRef(path=Path("/v/b.raw"), format="raw")})
    assert [d.image for d in parse_domain(after).disks] == [
        ImageRef(path=Path("/v/a.qcow2"), format="qcow2"),
        ImageRef(path=Path("/v/b.raw"), format="raw"),
    ]
    assert "<qemu:commandline>" in after
    assert "<app:x>1</app:x>" in after
    undone = point_disks_at(after, {"vdb": ImageRef(path=Path("/v/a.qcow2"), format="qcow2")})
    assert ET.canonicalize(undone) == ET.canonicalize(before)


def test_repointing_between_file_and_block_device() -> None:
    overlay = disk(source="<source file='/scratch/o.qcow2' index='3'/><backingStore/>")
    after = point_disks_at(domain(overlay), {"vda": ImageRef(path=Path("/dev/vg/a"), format="raw", block=True)})
    (facts,) = parse_domain(after).disks
    assert (facts.kind, facts.image) == (
        SourceKind.BLOCK,
        ImageRef(path=Path("/dev/vg/a"), format="raw", block=True),
    )
    assert "index" not in after
    assert "backingStore" not in after
    assert "o.qcow2" not in after


def test_repointing_takes_what_the_older_definition_said_of_the_image() -> None:
    source = (
        "<source file='/v/a.qcow2'><encryption format='luks'><secret type='passphrase' uuid='x'/></encryption></source>"
    )
    store = "<backingStore type='file'><format type='raw'/><source file='/v/golden.raw'/></backingStore>"
    older = f"<domainsnapshot><domain><devices>{disk(source=source, more=store)}</devices></domain></domainsnapshot>"
    now = domain(disk(source="<source file='/v/o.qcow2'/>", more="<serial>new</serial>"))
    after = point_disks_at(now, {"vda": ImageRef(path=Path("/v/a.qcow2"), format="qcow2")}, like=older)
    root = ET.fromstring(after)
    assert root.find("devices/disk/source/encryption") is not None
    golden = root.find("devices/disk/backingStore/source")
    assert golden is not None
    assert golden.get("file") == "/v/golden.raw"
    assert root.findtext("devices/disk/serial") == "new"


def test_older_definition_of_another_image_is_not_taken() -> None:
    other = disk(source="<source file='/v/z'><seclabel/></source>")
    older = f"<domain><devices>{other}</devices></domain>"
    after = point_disks_at(domain(disk()), {"vda": ImageRef(path=Path("/v/b"), format="raw")}, like=older)
    assert "seclabel" not in after
    (facts,) = parse_domain(after).disks
    assert facts.image == ImageRef(path=Path("/v/b"), format="raw")


def test_backup_names_its_files_and_leaves_others_out() -> None:
    text = backup_xml(Path("/run/x&y.sock"), {"vda": Path("/v/a.scratch")}, ["vdb", "sda"])
    root = ET.fromstring(text)
    assert root.get("mode") == "pull"
    assert [(d.get("name"), d.get("backup")) for d in root.iter("disk")] == [
        ("vda", "yes"),
        ("vdb", "no"),
        ("sda", "no"),
    ]
    facts = parse_backup(text)
    assert facts.socket == Path("/run/x&y.sock")
    assert facts.scratch == (Path("/v/a.scratch"),)


def test_backup_over_tcp_has_no_socket() -> None:
    facts = parse_backup("<domainbackup mode='pull'><server transport='tcp' name='::1' port='1'/></domainbackup>")
    assert facts.socket is None
    assert facts.scratch == ()


def test_snapshot_names_its_overlays_and_leaves_others_out() -> None:
    text = snapshot_xml("failback-a", marked("pair <web>"), {"vda": Path("/v/o.qcow2")}, ["vdb"])
    facts = parse_snapshot(text)
    assert is_ours(facts.name, facts.description)
    assert facts.description == "pair <web> (made by failback)"
    assert facts.external
    assert facts.overlays == {"vda": Path("/v/o.qcow2")}
    assert facts.domain is None


def test_snapshot_of_someone_else() -> None:
    facts = parse_snapshot(f"<domainsnapshot><name>before</name><disks/>{domain(disk())}</domainsnapshot>")
    assert not is_ours(facts.name, facts.description)
    assert not facts.external
    assert facts.domain is not None
    assert facts.domain.disks[0].target == "vda"


@pytest.mark.parametrize(
    ("name", "description", "ours"),
    [
        ("failback-a", "made by failback", True),
        ("failback-a", "mine", False),
        ("a", "made by failback", False),
    ],
)
def test_snapshot_is_ours_by_name_and_description(name: str, description: str, ours: bool) -> None:
    assert is_ours(name, description) is ours


def test_overlays_lie_beside_their_bases_and_names_do_not_grow() -> None:
    first = overlay_paths({"vda": ImageRef(path=Path("/v/a.img"), format="raw")}, "failback-1", Path("/s"))
    assert first == {"vda": Path("/v/a.failback-1.qcow2")}
    second = overlay_paths({"vda": ImageRef(path=first["vda"], format="qcow2")}, "failback-2", Path("/s"))
    assert second == {"vda": Path("/v/a.failback-2.qcow2")}


def test_overlays_of_like_named_bases_differ() -> None:
    paths = overlay_paths(
        {
            "vda": ImageRef(path=Path("/v/a.raw"), format="raw"),
            "vdb": ImageRef(path=Path("/v/a.qcow2"), format="qcow2"),
            "vdc": ImageRef(path=Path("/dev/vg/c"), format="raw", block=True),
        },
        "failback-1",
        Path("/s"),
    )
    assert len(set(paths.values())) == 3
    assert paths["vdc"] == Path("/s/c.failback-1.qcow2")


def test_a_view_asks_for_what_was_written_since_by_disk() -> None:
    xml = backup_xml(Path("/s"), {"vda": Path("/a"), "vdb": Path("/b")}, ["vdc"], {"vda": "failback-1"})
    disks = {disk.get("name"): disk.attrib for disk in ET.fromstring(xml).findall("disks/disk")}
    assert disks["vda"]["incremental"] == "failback-1"
    assert disks["vda"]["exportbitmap"] == "since-vda"
    assert "incremental" not in disks["vdb"]


def test_a_checkpoint_is_known_by_its_mark_and_its_disks() -> None:
    text = checkpoint_xml("failback-1", "made by failback", ["vda"], ["vdb"], created_s=7)
    facts = parse_checkpoint(text)
    assert (facts.name, facts.tracked) == ("failback-1", ("vda",))
    assert is_ours(facts.name, facts.description)
    assert ET.fromstring(text).findtext("creationTime") == "7"


def test_a_guest_agent_counts_when_something_in_the_guest_listens() -> None:
    channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='{}'/></channel>"
    assert parse_domain(domain(channel.format("connected"))).agent_connected
    assert not parse_domain(domain(channel.format("disconnected"))).agent_connected
