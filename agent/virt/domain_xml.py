"""Libvirt's XML, in and out: documents become facts, facts become documents. No I/O, no libvirt.

Formats: https://libvirt.org/formatdomain.html, formatbackup.html and formatsnapshot.html.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.dom import minidom

from agent.virt.names import ImageRef
from agent.virt.seam import SourceKind

_KINDS = {"file": SourceKind.FILE, "block": SourceKind.BLOCK, "network": SourceKind.NETWORK}
_PATH_ATTRIBUTE = {SourceKind.FILE: "file", SourceKind.BLOCK: "dev"}
_DEFAULT_SECTOR_BYTES = 512
GUEST_AGENT_CHANNEL = "org.qemu.guest_agent.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """One ``<disk device='disk'>``. `image` is None unless the source is a file or a block device."""

    target: str
    kind: SourceKind
    image: ImageRef | None
    sector_bytes: int
    shareable: bool
    readonly: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainFacts:
    """What a domain's XML says. `drives` names the targets of every ``<disk>``, CD-ROM and floppy drives too;
    `agent_connected`: something in the guest has the guest agent's channel open."""

    uuid: str
    name: str
    on_poweroff: str
    machine: str
    firmware: str
    has_tpm: bool
    passthrough: tuple[str, ...]
    disks: tuple[DiskFacts, ...]
    drives: tuple[str, ...]
    agent_connected: bool = False

    def disk(self, target: str) -> DiskFacts | None:
        """The disk of that target name, or None."""
        return next((disk for disk in self.disks if disk.target == target), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupFacts:
    """A running backup job: its NBD socket (None over TCP or in push mode) and its scratch files."""

    socket: Path | None
    scratch: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFacts:
    """A snapshot's metadata: `overlays` by target for external disks, `domain` as it was when it was taken."""

    name: str
    description: str
    external: bool
    overlays: dict[str, Path]
    domain: DomainFacts | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """A checkpoint, with the targets it has a bitmap for."""

    name: str
    description: str
    tracked: tuple[str, ...]


def parse_domain(xml: str) -> DomainFacts:
    """The facts of a domain's XML, live or inactive."""
    return _domain_facts(ET.fromstring(xml))


def _domain_facts(root: ET.Element) -> DomainFacts:
    disks = root.findall("devices/disk")
    return DomainFacts(
        uuid=root.findtext("uuid", "").strip().lower(),
        name=root.findtext("name", ""),
        on_poweroff=root.findtext("on_poweroff", "destroy"),
        machine=_attribute(root, "os/type", "machine"),
        firmware=_firmware(root),
        has_tpm=root.find("devices/tpm") is not None,
        passthrough=tuple(_passthrough(root)),
        disks=tuple(_disk_facts(disk) for disk in disks if disk.get("device", "disk") == "disk"),
        drives=tuple(_target(disk) for disk in disks),
        agent_connected=any(
            channel.get("name") == GUEST_AGENT_CHANNEL and channel.get("state") == "connected"
            for channel in root.findall("devices/channel/target")
        ),
    )


def _attribute(element: ET.Element, path: str, name: str, default: str = "") -> str:
    found = element.find(path)
    return default if found is None else found.get(name, default)


def _firmware(root: ET.Element) -> str:
    is_uefi = _attribute(root, "os", "firmware") == "efi" or _attribute(root, "os/loader", "type") == "pflash"
    return "uefi" if is_uefi else "bios"


def _passthrough(root: ET.Element) -> Iterable[str]:
    """Host devices by kind and address; a ``lun`` disk is one, for the guest talks SCSI to the host's device."""
    for device in root.findall("devices/hostdev"):
        kind = device.get("type", device.get("mode", "device"))
        yield f"{kind} {_host_address(device.find('source'))}".rstrip()
    for interface in root.findall("devices/interface[@type='hostdev']"):
        yield f"pci {_host_address(interface.find('source'))}".rstrip()
    for disk in root.findall("devices/disk[@device='lun']"):
        yield f"lun {_target(disk)}"


def _host_address(source: ET.Element | None) -> str:
    if source is None:
        return ""
    address = source.find("address")
    if address is None:
        return ":".join(_attribute(source, part, "id") for part in ("vendor", "product") if _has(source, part))
    if address.get("uuid") is not None:
        return address.get("uuid", "")
    if address.get("slot") is not None:
        domain, bus, slot, function = (int(address.get(part, "0"), 0) for part in ("domain", "bus", "slot", "function"))
        return f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}"
    return ":".join(address.attrib.values())


def _has(element: ET.Element, child: str) -> bool:
    return element.find(child) is not None


def _target(disk: ET.Element) -> str:
    return _attribute(disk, "target", "dev")


def _disk_facts(disk: ET.Element) -> DiskFacts:
    kind = _KINDS.get(disk.get("type", ""), SourceKind.OTHER)
    return DiskFacts(
        target=_target(disk),
        kind=kind,
        image=_image_ref(disk, kind),
        sector_bytes=int(_attribute(disk, "blockio", "logical_block_size", str(_DEFAULT_SECTOR_BYTES))),
        shareable=_has(disk, "shareable"),
        readonly=_has(disk, "readonly"),
    )


def _image_ref(disk: ET.Element, kind: SourceKind) -> ImageRef | None:
    if kind not in _PATH_ATTRIBUTE:
        return None
    path = _attribute(disk, "source", _PATH_ATTRIBUTE[kind])
    if not path:
        return None
    # libvirt itself reads a missing type as raw and never probes.
    driver_format = _attribute(disk, "driver", "type", "raw")
    return ImageRef(path=Path(path), format=driver_format, block=kind is SourceKind.BLOCK)


def point_disks_at(xml: str, images: Mapping[str, ImageRef], *, like: str | None = None) -> str:
    """The domain XML with the disks named in `images` pointing at those images; everything else stays as it is.

    Edited with minidom, for ElementTree would move namespace declarations (an application's metadata,
    ``qemu:commandline``) to the root, and libvirt would then keep the metadata changed.

    Args:
        xml: an inactive domain XML, with its secrets, as a redefinition needs it.
        images: the new source of each disk, by target.
        like: an XML that contains an older definition of the same domain (a snapshot's metadata): where its disk has
            the very image asked for, its ``<source>`` and ``<backingStore>`` are taken over whole, for they may carry
            encryption, labels or a chain the administrator wrote.
    """
    document = minidom.parseString(xml)
    older = {} if like is None else _disk_nodes(minidom.parseString(like))
    for target, disk in _disk_nodes(document).items():
        image = images.get(target)
        if image is not None:
            before = older.get(target)
            _point_disk(disk, image, before if before is not None and _image_of_node(before) == image else None)
    root = document.documentElement
    assert root is not None
    return root.toxml()


def _disk_nodes(document: minidom.Document) -> dict[str, minidom.Element]:
    devices = document.getElementsByTagName("devices")
    return {_target_of_node(disk): disk for element in devices for disk in _children(element, "disk")}


def _target_of_node(disk: minidom.Element) -> str:
    target = _child(disk, "target")
    return "" if target is None else target.getAttribute("dev")


def _image_of_node(disk: minidom.Element) -> ImageRef | None:
    return _disk_facts(ET.fromstring(disk.toxml())).image


def _children(element: minidom.Element, name: str) -> list[minidom.Element]:
    nodes = element.childNodes
    return [node for node in nodes if isinstance(node, minidom.Element) and node.tagName == name]


def _child(element: minidom.Element, name: str) -> minidom.Element | None:
    return next(iter(_children(element, name)), None)


def _child_or_new(element: minidom.Element, name: str) -> minidom.Element:
    found = _child(element, name)
    if found is not None:
        return found
    document = element.ownerDocument
    assert document is not None
    return element.appendChild(document.createElement(name))


def _point_disk(disk: minidom.Element, image: ImageRef, older: minidom.Element | None) -> None:
    """`older`: what the disk was when it had that very image, or None."""
    kind = SourceKind.BLOCK if image.block else SourceKind.FILE
    disk.setAttribute("type", kind.value)
    driver = _child_or_new(disk, "driver")
    if not driver.hasAttribute("name"):
        driver.setAttribute("name", "qemu")
    driver.setAttribute("type", image.format)
    source = _child_or_new(disk, "source")
    for store in _children(disk, "backingStore"):
        disk.removeChild(store)
    document = disk.ownerDocument
    if older is not None and document is not None:
        disk.replaceChild(document.importNode(_child_or_new(older, "source"), True), source)
        for store in _children(older, "backingStore"):
            disk.appendChild(document.importNode(store, True))
        return
    for attribute in ("file", "dev", "index"):
        if source.hasAttribute(attribute):
            source.removeAttribute(attribute)
    source.setAttribute(_PATH_ATTRIBUTE[kind], str(image.path))


def disk_xml(xml: str, target: str) -> str:
    """The ``<disk>`` of that target, as it stands in a domain's XML; empty when there is none."""
    node = _disk_nodes(minidom.parseString(xml)).get(target)
    return "" if node is None else node.toxml()


def within_domain(disk: str) -> str:
    """A document with that one ``<disk>``, as `point_disks_at` compares with."""
    return f"<domain><devices>{disk}</devices></domain>"


def mirror_is_ready(xml: str, target: str) -> bool:
    """Whether the block job on that disk, by a running domain's XML, has caught up with the guest."""
    for disk in ET.fromstring(xml).findall("devices/disk"):
        if _target(disk) == target:
            return _attribute(disk, "mirror", "ready") == "yes"
    return False


def point_snapshot_at(xml: str, target: str, gone: set[Path], image: ImageRef, *, like: str) -> str | None:
    """A snapshot's metadata with that disk of the domain of before pointing at `image` where it was one of `gone`.

    Returns None where there is nothing to change. `like`: see `point_disks_at`.
    """
    document = minidom.parseString(xml)
    older = _disk_nodes(minidom.parseString(like)).get(target)
    changed = False
    for devices in document.getElementsByTagName("devices"):
        for disk in _children(devices, "disk"):
            before = _image_of_node(disk)
            if _target_of_node(disk) == target and before is not None and before.path in gone:
                _point_disk(disk, image, older if older is not None and _image_of_node(older) == image else None)
                changed = True
    root = document.documentElement
    assert root is not None
    return root.toxml() if changed else None


def backup_xml(
    socket: Path, scratch: Mapping[str, Path], excluded: Iterable[str], since: Mapping[str, str] | None = None
) -> str:
    """A pull-mode backup: `scratch` files by target of the disks that take part, all others by name excluded.

    `since`: by target, the checkpoint since which the export tells what was written, in the metadata context
    ``qemu:dirty-bitmap:`` followed by `dirty_bitmap_name`.
    """
    since = since or {}
    root = ET.Element("domainbackup", {"mode": "pull"})
    ET.SubElement(root, "server", {"transport": "unix", "socket": str(socket)})
    disks = ET.SubElement(root, "disks")
    for target, path in scratch.items():
        disk = ET.SubElement(disks, "disk", {"name": target, "backup": "yes", "type": "file", "exportname": target})
        if target in since:
            disk.attrib |= {
                "backupmode": "incremental",
                "incremental": since[target],
                "exportbitmap": dirty_bitmap_name(target),
            }
        ET.SubElement(disk, "driver", {"type": "qcow2"})
        ET.SubElement(disk, "scratch", {"file": str(path)})
    for target in excluded:
        ET.SubElement(disks, "disk", {"name": target, "backup": "no"})
    return ET.tostring(root, encoding="unicode")


def parse_backup(xml: str) -> BackupFacts:
    """Socket and scratch files of a running backup job, by which its owner is recognised."""
    root = ET.fromstring(xml)
    socket = _attribute(root, "server", "socket")
    return BackupFacts(
        socket=Path(socket) if socket else None,
        scratch=tuple(Path(path) for s in root.iter("scratch") if (path := s.get("file", s.get("dev", "")))),
    )


def dirty_bitmap_name(target: str) -> str:
    """What a view exports the bitmap of a disk's earlier checkpoint as."""
    return f"since-{target}"


def checkpoint_xml(
    name: str, description: str, tracked: Iterable[str], excluded: Iterable[str], *, created_s: int | None = None
) -> str:
    """A checkpoint with a bitmap for each of the disks `tracked`, none for the others
    (https://libvirt.org/formatcheckpoint.html). `created_s`, seconds since 1970: it is there already, and libvirt is
    to be told of it again."""
    root = ET.Element("domaincheckpoint")
    ET.SubElement(root, "name").text = name
    ET.SubElement(root, "description").text = description
    if created_s is not None:
        ET.SubElement(root, "creationTime").text = str(created_s)
    disks = ET.SubElement(root, "disks")
    for target in tracked:
        ET.SubElement(disks, "disk", {"name": target, "checkpoint": "bitmap", "bitmap": name})
    for target in excluded:
        ET.SubElement(disks, "disk", {"name": target, "checkpoint": "no"})
    return ET.tostring(root, encoding="unicode")


def parse_checkpoint(xml: str) -> CheckpointFacts:
    """The facts of a checkpoint."""
    root = ET.fromstring(xml)
    return CheckpointFacts(
        name=root.findtext("name", ""),
        description=root.findtext("description", ""),
        tracked=tuple(d.get("name", "") for d in root.findall("disks/disk") if d.get("checkpoint") == "bitmap"),
    )


def checkpoint_sizes(xml: str) -> dict[str, int]:
    """By target, what its bitmaps counted, in bytes; of a checkpoint's description that was asked for with sizes."""
    disks = ET.fromstring(xml).findall("disks/disk")
    return {d.get("name", ""): int(d.get("size", "0")) for d in disks if d.get("size") is not None}


def snapshot_xml(name: str, description: str, overlays: Mapping[str, Path], excluded: Sequence[str]) -> str:
    """An external disk-only snapshot: qcow2 `overlays` by target, the other disks left out of it."""
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "name").text = name
    ET.SubElement(root, "description").text = description
    disks = ET.SubElement(root, "disks")
    for target, path in overlays.items():
        disk = ET.SubElement(disks, "disk", {"name": target, "snapshot": "external", "type": "file"})
        ET.SubElement(disk, "driver", {"type": "qcow2"})
        ET.SubElement(disk, "source", {"file": str(path)})
    for target in excluded:
        ET.SubElement(disks, "disk", {"name": target, "snapshot": "no"})
    return ET.tostring(root, encoding="unicode")


def parse_snapshot(xml: str) -> SnapshotFacts:
    """The facts of a snapshot's metadata."""
    root = ET.fromstring(xml)
    disks = root.findall("disks/disk")
    domain = root.find("domain")
    return SnapshotFacts(
        name=root.findtext("name", ""),
        description=root.findtext("description", ""),
        external=any(part.get("snapshot") == "external" for part in [*disks, *root.findall("memory")]),
        overlays={
            disk.get("name", ""): Path(_attribute(disk, "source", "file"))
            for disk in disks
            if disk.get("snapshot") == "external" and _attribute(disk, "source", "file")
        },
        domain=None if domain is None else _domain_facts(domain),
    )
