"""Changes of a domain's definition, libvirt's XML, and where it keeps state that is no disk. No I/O, no libvirt.

What is put into a definition may come from another host: of each element only what the guest sees is taken, never a
path (https://libvirt.org/formatdomain.html).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.dom import minidom
from xml.parsers.expat import ExpatError

from agent.errors import HypervisorError
from agent.virt.names import ImageRef
from agent.virt.seam import StateRole

ELEMENT_LIMIT_CHARACTERS = 16 * 1024
"""Of one element from the wire; an interface with every setting there is takes some two thousand."""

_SCALARS = ("memory", "currentMemory", "vcpu")
_NIC_KINDS = {"network": "network", "bridge": "bridge", "user": None}
_NIC_PARTS = ("mac", "model", "mtu", "vlan", "virtualport", "link")
_DISK_PARTS = ("serial", "wwn", "blockio")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateRef:
    """State that a definition speaks of. `path`: where it says that it is; None: where libvirt puts it by itself."""

    role: StateRole
    path: Path | None
    format: str
    problem: str = ""


def state_refs(xml: str) -> tuple[StateRef, ...]:
    """The state beside the disks of the domain with that definition."""
    root = _root(xml)
    return (*_nvram(root), *_tpm(root))


def _nvram(root: minidom.Element) -> Iterator[StateRef]:
    os = _child(root, "os")
    loader = None if os is None else _child(os, "loader")
    if os is None or not (
        os.getAttribute("firmware") == "efi" or (loader is not None and loader.getAttribute("type") == "pflash")
    ):
        return
    if loader is not None and loader.getAttribute("stateless") == "yes":
        return
    nvram = _child(os, "nvram")
    if nvram is None:
        yield StateRef(role=StateRole.NVRAM, path=None, format="raw")
        return
    source = _child(nvram, "source")
    text = _text(nvram) if source is None else source.getAttribute("file")
    problem = ""
    if nvram.getAttribute("type") not in ("", "file") or (source is not None and not text):
        problem = "the variables of its firmware are not kept in a file"
    yield StateRef(
        role=StateRole.NVRAM,
        path=Path(text) if text else None,
        format=nvram.getAttribute("format") or "raw",
        problem=problem,
    )


def _tpm(root: minidom.Element) -> Iterator[StateRef]:
    devices = _child(root, "devices")
    for tpm in [] if devices is None else _children(devices, "tpm"):
        backend = _child(tpm, "backend")
        kind = "" if backend is None else backend.getAttribute("type")
        if backend is None or kind != "emulator":
            problem = f"its TPM is not emulated by swtpm ({kind or 'no backend'}), so its state stays where it is"
            yield StateRef(role=StateRole.TPM, path=None, format="", problem=problem)
            continue
        source = _child(backend, "source")
        problem = ""
        if source is not None and source.getAttribute("type") != "dir":
            problem = "the state of its TPM is not kept in a folder"
        elif _child(backend, "encryption") is not None:
            problem = "the state of its TPM is encrypted with a secret of its host"
        path = source.getAttribute("path") if source is not None else ""
        version = backend.getAttribute("version") or "2.0"
        yield StateRef(role=StateRole.TPM, path=Path(path) if path else None, format=version, problem=problem)


def apply_changes(xml: str, elements: Sequence[str]) -> str:
    """The definition with these elements in it: ``memory``, ``currentMemory``, ``vcpu`` and ``topology`` in the place
    of its own, each ``interface`` added.

    Raises:
        HypervisorError: an element is none of those, or is not XML.
    """
    root = _root(xml)
    for text in elements:
        element = _foreign(text)
        if element.tagName in _SCALARS:
            _put_scalar(root, element)
        elif element.tagName == "topology":
            _put_topology(root, element)
        elif element.tagName == "interface":
            _child_or_new(root, "devices").appendChild(_interface(root, element))
        else:
            raise HypervisorError(f"A definition is not changed by <{element.tagName}> here.", element=element.tagName)
    return root.toxml()


def _put_scalar(root: minidom.Element, element: minidom.Element) -> None:
    ours = _child_or_new(root, element.tagName)
    for attribute in ("unit", "current"):
        if element.hasAttribute(attribute):
            ours.setAttribute(attribute, element.getAttribute(attribute))
        elif ours.hasAttribute(attribute):
            ours.removeAttribute(attribute)
    number = _text(element)
    if not number.isascii() or not number.isdigit():
        raise HypervisorError(f"<{element.tagName}> holds no number.", element=element.tagName)
    for node in list(ours.childNodes):
        ours.removeChild(node)
    ours.appendChild(_document(root).createTextNode(number))


def _put_topology(root: minidom.Element, element: minidom.Element) -> None:
    cpu = _child(root, "cpu")
    if cpu is None:
        if not element.attributes.length:
            return
        cpu = _child_or_new(root, "cpu")
    for old in _children(cpu, "topology"):
        cpu.removeChild(old)
    if element.attributes.length:
        fresh = _document(root).createElement("topology")
        _copy_attributes(element, fresh)
        cpu.appendChild(fresh)


def _interface(root: minidom.Element, element: minidom.Element) -> minidom.Element:
    kind = element.getAttribute("type")
    if kind not in _NIC_KINDS:
        raise HypervisorError(f"A NIC of the type {kind or '-'} is not added here.", element="interface")
    document = _document(root)
    fresh = document.createElement("interface")
    fresh.setAttribute("type", kind)
    source, attribute = _child(element, "source"), _NIC_KINDS[kind]
    if attribute is not None:
        ours = fresh.appendChild(document.createElement("source"))
        ours.setAttribute(attribute, "" if source is None else source.getAttribute(attribute))
    for part in _NIC_PARTS:
        for found in _children(element, part):
            fresh.appendChild(document.importNode(found, True))
    _keep_address(root, element, fresh)
    return fresh


def add_disk(xml: str, target: str, image: ImageRef, element: str) -> str:
    """The definition with a disk of that target on that image, on the bus of the other host's `element`.

    Raises:
        HypervisorError: the element is no disk, or the definition has a drive of that target.
    """
    root, theirs = _root(xml), _foreign(element)
    if theirs.tagName != "disk":
        raise HypervisorError(f"<{theirs.tagName}> is no disk.", element=theirs.tagName)
    devices = _child_or_new(root, "devices")
    if any(_target(disk) == target for disk in _children(devices, "disk")):
        raise HypervisorError(f"The definition has a drive {target} already.", target=target)
    document = _document(root)
    disk = document.createElement("disk")
    disk.setAttribute("type", "file")
    disk.setAttribute("device", "disk")
    driver = disk.appendChild(document.createElement("driver"))
    driver.setAttribute("name", "qemu")
    driver.setAttribute("type", image.format)
    their_driver = _child(theirs, "driver")
    if their_driver is not None and their_driver.hasAttribute("discard"):
        driver.setAttribute("discard", their_driver.getAttribute("discard"))
    disk.appendChild(document.createElement("source")).setAttribute("file", str(image.path))
    ours = disk.appendChild(document.createElement("target"))
    ours.setAttribute("dev", target)
    their_target = _child(theirs, "target")
    if their_target is not None and their_target.hasAttribute("bus"):
        ours.setAttribute("bus", their_target.getAttribute("bus"))
    for part in _DISK_PARTS:
        for found in _children(theirs, part):
            disk.appendChild(document.importNode(found, True))
    _keep_address(root, theirs, disk)
    devices.appendChild(disk)
    return root.toxml()


def remove_disk(xml: str, target: str, path: Path) -> str | None:
    """The definition without the disk of that target, if it is on that very image; None: there is no such disk."""
    root = _root(xml)
    devices = _child(root, "devices")
    for disk in [] if devices is None else _children(devices, "disk"):
        source = _child(disk, "source")
        if _target(disk) == target and source is not None and source.getAttribute("file") == str(path):
            assert devices is not None
            devices.removeChild(disk)
            return root.toxml()
    return None


def _keep_address(root: minidom.Element, theirs: minidom.Element, ours: minidom.Element) -> None:
    """The PCI address of the other host's device, by which the guest knows it, where nothing is in its place here."""
    address = _child(theirs, "address")
    if address is None or address.getAttribute("type") != "pci":
        return
    devices = _child_or_new(root, "devices")
    taken = {_pci(other) for other in devices.getElementsByTagName("address") if other.getAttribute("type") == "pci"}
    buses = {
        controller.getAttribute("index")
        for controller in _children(devices, "controller")
        if controller.getAttribute("type") == "pci"
    }
    try:
        place = _pci(address)
    except ValueError:
        return
    if place not in taken and (place[1] == 0 or str(place[1]) in buses):
        fresh = _document(root).createElement("address")
        for name in ("type", "domain", "bus", "slot", "function"):
            if address.hasAttribute(name):
                fresh.setAttribute(name, address.getAttribute(name))
        ours.appendChild(fresh)


def _pci(address: minidom.Element) -> tuple[int, int, int, int]:
    domain, bus, slot, function = (
        int(address.getAttribute(name) or "0", 0) for name in ("domain", "bus", "slot", "function")
    )
    return domain, bus, slot, function


# --- minidom ----------------------------------------------------------------------------------------------------


def _root(xml: str) -> minidom.Element:
    root = minidom.parseString(xml).documentElement
    assert root is not None
    return root


def _foreign(text: str) -> minidom.Element:
    """An element from another host: short, and without declarations, whose expansion has no bounds."""
    if len(text) > ELEMENT_LIMIT_CHARACTERS or "<!" in text:
        raise HypervisorError("An element of a definition is too long, or declares something.")
    try:
        return _root(text)
    except ExpatError as error:
        raise HypervisorError(f"An element of a definition is no XML: {error}.") from error


def _document(element: minidom.Element) -> minidom.Document:
    document = element.ownerDocument
    assert document is not None
    return document


def _children(element: minidom.Element, name: str) -> list[minidom.Element]:
    return [node for node in element.childNodes if isinstance(node, minidom.Element) and node.tagName == name]


def _child(element: minidom.Element, name: str) -> minidom.Element | None:
    return next(iter(_children(element, name)), None)


def _child_or_new(element: minidom.Element, name: str) -> minidom.Element:
    found = _child(element, name)
    return element.appendChild(_document(element).createElement(name)) if found is None else found


def _text(element: minidom.Element) -> str:
    return "".join(node.data for node in element.childNodes if isinstance(node, minidom.Text)).strip()


def _target(disk: minidom.Element) -> str:
    target = _child(disk, "target")
    return "" if target is None else target.getAttribute("dev")


def _copy_attributes(source: minidom.Element, target: minidom.Element) -> None:
    for name, value in source.attributes.items():
        target.setAttribute(name, value)
