"""The definition of a VM that is made anew: checked against what it may name, and put on its volumes. Pure.

It comes from another host. Elements that this list does not know are not taken: what stands in them might be a path, a
device of this host, or an argument for QEMU (https://libvirt.org/formatdomain.html).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from xml.dom import minidom
from xml.parsers.expat import ExpatError

from agent.errors import HypervisorError
from agent.virt.names import ImageRef

TOP = frozenset(
    (
        "name",
        "uuid",
        "title",
        "description",
        "metadata",
        "memory",
        "currentMemory",
        "maxMemory",
        "vcpu",
        "vcpus",
        "os",
        "features",
        "cpu",
        "clock",
        "on_poweroff",
        "on_reboot",
        "on_crash",
        "pm",
        "devices",
        "iothreads",
        "memoryBacking",
        "genid",
        "sysinfo",
    )
)
DEVICES = frozenset(
    (
        "disk",
        "controller",
        "interface",
        "serial",
        "console",
        "parallel",
        "channel",
        "input",
        "tpm",
        "graphics",
        "sound",
        "audio",
        "video",
        "watchdog",
        "memballoon",
        "rng",
        "vsock",
        "panic",
        "iommu",
        "redirdev",
        "hub",
    )
)
_NICS = {"network": "network", "bridge": "bridge", "user": None}
_CHARACTER = ("serial", "console", "parallel", "channel")
CHARACTER_KINDS = ("pty", "unix", "spicevmc", "qemu-vdagent", "null")
FILES = ("loader", "kernel", "initrd", "dtb", "shim")
_RANDOM = ("/dev/random", "/dev/urandom")
HOST_ATTRIBUTES = frozenset(("file", "path", "tap", "vhost", "socket", "rendernode", "evdev"))
"""Attributes that name a file or device of the host, wherever they stand."""
INPUTS = ("mouse", "tablet", "keyboard")
_PROSE = ("title", "description", "metadata")


def named_files(xml: str) -> tuple[str, ...]:
    """The firmware, kernels and initial RAM disks that a definition names."""
    root = minidom.parseString(xml).documentElement
    assert root is not None
    return tuple(_text(element) for os in _children(root, "os") for element in _boot_files(os) if _text(element))


def kind_of(xml: str) -> tuple[str, str, str]:
    """Architecture, virtualisation and machine type of a definition; empty where it names none.

    Raises:
        HypervisorError: it is no definition.
    """
    root = _root(xml)
    kind = next((element for os in _children(root, "os") for element in _children(os, "type")), None)
    arch, machine = ("", "") if kind is None else (kind.getAttribute("arch"), kind.getAttribute("machine"))
    return arch, root.getAttribute("type"), machine


def on_volumes(xml: str, uuid: str, name: str, volumes: Mapping[str, ImageRef], files: Collection[str]) -> str:
    """The definition with its disks on those volumes, by target.

    Args:
        xml: of the new VM, its disks without sources; drives for removable media are empty.
        uuid: what it must have; `name`: likewise.
        name: see `uuid`.
        volumes: the image of each disk.
        files: what it may name as firmware, kernel or initial RAM disk.

    Raises:
        HypervisorError: it is no such definition.
    """
    root = _root(xml)
    for tag, wanted in (("uuid", uuid), ("name", name)):
        if [_text(element) for element in _children(root, tag)] != [wanted]:
            raise HypervisorError(f"The definition of the new VM {name} has another {tag}.", vm=name)
    unknown = next(_unknown(root, files), None)
    if unknown is not None:
        raise HypervisorError(f"The definition of the new VM {name} has {unknown}, which is not taken.", vm=name)
    missing = dict(volumes)
    for devices in _children(root, "devices"):
        for disk in _children(devices, "disk"):
            target = next((each.getAttribute("dev") for each in _children(disk, "target")), "")
            if disk.getAttribute("device") in ("cdrom", "floppy"):
                disk.setAttribute("type", "file")
            elif target in missing:
                _put_on(disk, missing.pop(target))
            else:
                raise HypervisorError(f"No volume is to be made for the disk {target} of the new VM {name}.", vm=name)
    if missing:
        raise HypervisorError(f"The new VM {name} has no disk {', '.join(sorted(missing))}.", vm=name)
    return root.toxml()


def _put_on(disk: minidom.Element, image: ImageRef) -> None:
    document = disk.ownerDocument
    assert document is not None
    disk.setAttribute("type", "file")
    drivers = _children(disk, "driver")
    driver = drivers[0] if drivers else disk.appendChild(document.createElement("driver"))
    driver.setAttribute("name", "qemu")
    driver.setAttribute("type", image.format)
    disk.appendChild(document.createElement("source")).setAttribute("file", str(image.path))


def _unknown(root: minidom.Element, files: Collection[str]) -> Iterator[str]:
    """What may not stand there, in words."""
    for element in _elements(root):
        if element.tagName not in TOP:
            yield f"an element <{element.tagName}>"
    for os in _children(root, "os"):
        for element in _boot_files(os):
            if _text(element) and _text(element) not in files:
                yield f"a file {_text(element)} that no VM of this host names"
        if any(_text(nvram) or nvram.attributes.length for nvram in _children(os, "nvram")):
            yield "a place for its firmware's variables"
    for devices in _children(root, "devices"):
        for device in _elements(devices):
            yield from _unknown_device(device)
    for element in _elements(root):
        if element.tagName not in _PROSE:
            yield from _of_the_host(element)


def _of_the_host(element: minidom.Element) -> Iterator[str]:
    """Files and devices of the host that are named anywhere below, but for those that have a rule of their own."""
    for name, value in element.attributes.items():
        if name in HOST_ATTRIBUTES or value.startswith("/"):
            yield f"a <{element.tagName}> that names {value} of the host"
    own_rule = element.tagName in FILES or (element.tagName == "backend" and _text(element) in _RANDOM)
    if element.tagName == "table" or (_text(element).startswith("/") and not own_rule):
        yield f"a <{element.tagName}> that names {_text(element)} of the host"
    for below in _elements(element):
        yield from _of_the_host(below)


def _unknown_device(device: minidom.Element) -> Iterator[str]:
    tag, kind = device.tagName, device.getAttribute("type")
    if tag not in DEVICES:
        yield f"a device <{tag}>"
    elif tag == "disk" and (_children(device, "source") or _children(device, "backingStore")):
        yield "a disk with a source"
    elif tag == "interface":
        attribute = _NICS.get(kind, "")
        sources = _children(device, "source")
        if kind not in _NICS or _children(device, "script") or _children(device, "target"):
            yield f"a NIC of the type {kind or '-'}"
        elif any({name for name, _ in source.attributes.items()} - {attribute} for source in sources):
            yield "a NIC with more of a source than its network"
    elif tag in _CHARACTER and (kind not in CHARACTER_KINDS or _children(device, "source") or _children(device, "log")):
        yield f"a <{tag}> of the type {kind or '-'}"
    elif tag == "rng" and any(_text(backend) not in _RANDOM for backend in _children(device, "backend")):
        yield "a source of random numbers"
    elif tag == "tpm" and any(
        backend.getAttribute("type") != "emulator" or _elements(backend) for backend in _children(device, "backend")
    ):
        yield "a TPM that is not emulated"
    elif tag == "input" and kind not in INPUTS:
        yield f"an <{tag}> of the type {kind or '-'}"
    elif tag == "redirdev" and kind != "spicevmc":
        yield f"a <{tag}> of the type {kind or '-'}"


def _boot_files(os: minidom.Element) -> list[minidom.Element]:
    return [element for tag in FILES for element in _children(os, tag)]


def _root(xml: str) -> minidom.Element:
    if "<!" in xml:
        raise HypervisorError("The definition of a new VM declares something of its own.")
    try:
        root = minidom.parseString(xml).documentElement
    except ExpatError as error:
        raise HypervisorError(f"The definition of a new VM is no XML: {error}.") from error
    if root is None or root.tagName != "domain":
        raise HypervisorError("The definition of a new VM is none of a domain.")
    return root


def _elements(parent: minidom.Element) -> list[minidom.Element]:
    return [node for node in parent.childNodes if isinstance(node, minidom.Element)]


def _children(parent: minidom.Element, name: str) -> list[minidom.Element]:
    return [node for node in _elements(parent) if node.tagName == name]


def _text(element: minidom.Element) -> str:
    return "".join(node.data for node in element.childNodes if isinstance(node, minidom.Text)).strip()
