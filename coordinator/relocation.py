"""The definition of a VM for another host: made of the replica's, with what that host has. Pure.

What the guest sees is kept: memory, processors, machine type, devices in their places. What belongs to a host is mapped
or left out. Elements that are not in these lists are left out and told of. Formats:
https://libvirt.org/formatdomain.html.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from coordinator.definitions import parse
from coordinator.model import Refusal
from coordinator.place_mapping import Pairs, PlaceMapping
from protocol.messages import Provisions

KEPT = frozenset(
    (
        *("name", "uuid", "title", "description", "metadata", "memory", "currentMemory", "maxMemory", "vcpu", "vcpus"),
        *("os", "features", "cpu", "clock", "on_poweroff", "on_reboot", "on_crash", "pm", "devices", "iothreads"),
        *("memoryBacking", "genid", "sysinfo"),
    )
)
DEVICES = frozenset(
    (
        *("disk", "controller", "interface", "serial", "console", "parallel", "channel", "input", "tpm", "graphics"),
        *("sound", "audio", "video", "watchdog", "memballoon", "rng", "vsock", "panic", "iommu", "redirdev", "hub"),
    )
)
QUIETLY = frozenset(("emulator", "seclabel", "resource", "cputune", "numatune", "blkiotune", "iothreadids"))
"""The host's own, of which the guest knows nothing; not worth a word."""
CHARACTER = ("serial", "console", "parallel", "channel")
CHARACTER_KINDS = ("pty", "unix", "spicevmc", "qemu-vdagent", "null")
HOST_ATTRIBUTES = frozenset(("file", "path", "tap", "vhost", "socket", "rendernode", "evdev"))
INPUTS = ("mouse", "tablet", "keyboard")
PROSE = ("title", "description", "metadata")
FILES = ("loader", "kernel", "initrd", "dtb", "shim")
NICS = {"network": "network", "bridge": "bridge", "user": ""}
NIC_PARTS = ("mac", "model", "mtu", "vlan", "link", "boot", "address", "driver", "bandwidth", "coalesce", "rom", "acpi")
DISK_PARTS = ("driver", "target", "serial", "wwn", "blockio", "boot", "address", "iotune", "geometry")
RANDOM = ("/dev/random", "/dev/urandom")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVm:
    """What the new VM is to be. `keep_identity`: it takes the place of one that never comes back, MACs and all;
    `disks`: target names of those that get a volume."""

    name: str
    uuid: str
    disks: tuple[str, ...]
    mapping: PlaceMapping
    keep_identity: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Relocated:
    """The definition, as `protocol.messages.CreateVm` takes it; what the host cannot give; what a person is to know."""

    definition: str
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Work:
    host: str
    vm: NewVm
    has: Provisions
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, code: str, about: str, sentence: str) -> None:
        self.refusals.append(Refusal(code=code, about=about, sentence=sentence))


def kind_of(definition: str) -> tuple[str, str, str]:
    """Architecture, virtualisation and machine type. Raises `coordinator.definitions.BadDefinition`."""
    root = parse(definition)
    kind = root.find("os/type")
    arch, machine = ("", "") if kind is None else (kind.get("arch", ""), kind.get("machine", ""))
    return arch, root.get("type", ""), machine


def relocate(definition: str, host: str, vm: NewVm, has: Provisions) -> Relocated:
    """That VM on that host.

    Args:
        definition: the replica's, libvirt's XML.
        host: the new host's name, for sentences.
        vm: what it is to be.
        has: what that host has for a VM of this kind.

    Raises:
        BadDefinition: the definition is not XML.
    """
    root, work = parse(definition), _Work(host, vm, has)
    _machine_type(work, root)
    _processor(work, root)
    for tag, text in (("name", vm.name), ("uuid", vm.uuid)):
        for old in root.findall(tag):
            root.remove(old)
        fresh = ET.Element(tag)
        fresh.text = text
        root.insert(0, fresh)
    root.attrib.pop("id", None)
    _drop(work, root, KEPT, "")
    for vcpu in root.findall("vcpu"):
        vcpu.attrib.pop("cpuset", None)
    os = root.find("os")
    if os is not None:
        _boot(work, os)
    devices = root.find("devices")
    if devices is not None:
        _drop(work, devices, DEVICES, "device ")
        _devices(work, devices)
    for element in root:
        if element.tag not in PROSE:
            _leave_host_files(work, element)
    return Relocated(
        definition=ET.tostring(root, encoding="unicode"), refusals=tuple(work.refusals), notes=tuple(work.notes)
    )


def _drop(work: _Work, parent: ET.Element, kept: Collection[str], what: str) -> None:
    for element in list(parent):
        if element.tag not in kept:
            parent.remove(element)
            if element.tag not in QUIETLY:
                name = str(element.tag).rpartition("}")[2]
                work.notes.append(
                    f"The {what}<{name}> of the replica's definition is its host's own and is left out of the new "
                    "VM's; add what takes its place by `virsh edit`."
                )


def _leave_host_files(work: _Work, parent: ET.Element) -> None:
    """Leave out what names a file or device of the replica's host: the new host's agent takes none."""
    for element in list(parent):
        text = (element.text or "").strip()
        named = [v for k, v in element.attrib.items() if k in HOST_ATTRIBUTES or v.startswith("/")]
        if element.tag == "table" or (text.startswith("/") and element.tag not in FILES and text not in RANDOM):
            named.append(text)
        if element.tag == "input" and element.get("type") not in INPUTS:
            named.append(element.get("type", "-"))
        if not named:
            _leave_host_files(work, element)
            continue
        parent.remove(element)
        work.notes.append(
            f"The <{element.tag}> of the replica's definition names {', '.join(named)} of its host and is left out of "
            "the new VM's; add what takes its place by `virsh edit`."
        )


def _machine_type(work: _Work, root: ET.Element) -> None:
    arch, virt_type, machine = kind_of(ET.tostring(root, encoding="unicode"))
    if not work.has.machines:
        work.refuse(
            "machine-type",
            work.host,
            f"Host {work.host} runs no VMs of the type {virt_type} for {arch}: install QEMU for it there (and, for "
            "kvm, load its module), or choose another host.",
        )
    elif machine not in work.has.machines:
        family = machine.rpartition("-")[0] or machine
        alike = [name for name in work.has.machines if name.startswith(family)] or work.has.machines
        work.refuse(
            "machine-type",
            work.host,
            f"Host {work.host} has no machine type {machine} (it has: {_some(alike)}); install the QEMU that has it, "
            "or give the replica one of those with `virsh edit`.",
        )


def _processor(work: _Work, root: ET.Element) -> None:
    cpu = root.find("cpu")
    if cpu is None or not work.has.machines:
        return
    mode = cpu.get("mode", "custom")
    model = cpu.findtext("model", "").strip()
    if mode not in work.has.cpu_modes and (mode != "custom" or model):
        work.refuse(
            "cpu-model",
            work.host,
            f"Host {work.host} cannot give a processor of the mode {mode} (it can: {_some(work.has.cpu_modes)}); give "
            "the replica one of those with `virsh edit`, or choose another host.",
        )
    elif mode == "custom" and model and model not in work.has.cpu_models:
        work.refuse(
            "cpu-model",
            work.host,
            f"Host {work.host} cannot give the processor {model} (it can: {_some(work.has.cpu_models)}); give the "
            "replica one of those with `virsh edit`, or choose another host.",
        )


def _boot(work: _Work, os: ET.Element) -> None:
    if os.get("firmware") == "efi" and work.has.machines and "efi" not in work.has.firmware:
        work.refuse(
            "firmware-missing",
            work.host,
            f"Host {work.host} has no UEFI firmware: install the package ovmf (or edk2-ovmf) there.",
        )
    for nvram in os.findall("nvram"):
        os.remove(nvram)  # the host has a place of its own for it
    for element in [found for tag in FILES for found in os.findall(tag)]:
        path = (element.text or "").strip()
        wanted = _mapped(work.vm.mapping.firmware, path) or path
        if path and wanted not in work.has.files:
            work.refuse(
                "firmware-missing",
                work.host,
                f"Host {work.host} has no {element.tag} {wanted} (it has: {_some(work.has.files)}); install it there, "
                f"or say which to take: --map firmware:{path}=PATH.",
            )
        element.text = wanted or None


# --- devices --------------------------------------------------------------------------------------------------------


def _devices(work: _Work, devices: ET.Element) -> None:
    nic = 0
    for device in list(devices):
        for alias in device.findall("alias"):
            device.remove(alias)
        if device.tag == "disk":
            _disk(work, devices, device)
        elif device.tag == "interface":
            _nic(work, device, nic)
            nic += 1
        elif device.tag in CHARACTER:
            _character(work, device)
        elif device.tag == "graphics":
            _graphics(device)
        elif device.tag == "rng":
            for backend in device.findall("backend"):
                if (backend.text or "").strip() not in RANDOM:
                    backend.attrib.clear()
                    backend.set("model", "random")
                    backend.text = "/dev/urandom"
        elif device.tag == "tpm":
            _tpm(work, device)
        elif device.tag == "redirdev" and device.get("type") != "spicevmc":
            devices.remove(device)
            work.notes.append("A redirected device of the replica is left out of the new VM's definition.")


def _disk(work: _Work, devices: ET.Element, disk: ET.Element) -> None:
    if disk.get("device") in ("cdrom", "floppy"):
        for part in ("source", "backingStore", "driver"):
            for element in disk.findall(part):
                disk.remove(element)
        disk.set("type", "file")
        return
    target = disk.find("target")
    if target is None or target.get("dev", "") not in work.vm.disks:
        devices.remove(disk)
        name = "" if target is None else target.get("dev", "")
        work.notes.append(f"The disk {name} of the replica is left out of the pair, and the new VM does not have it.")
        return
    for element in list(disk):
        if element.tag not in DISK_PARTS:
            disk.remove(element)
    disk.attrib.clear()
    disk.attrib.update({"type": "file", "device": "disk"})


def _nic(work: _Work, nic: ET.Element, index: int) -> None:
    kind = nic.get("type", "")
    source = nic.find("source")
    if kind not in NICS:
        work.refuse(
            "network-missing",
            work.vm.name,
            f"A NIC of the replica is of the type {kind or '-'}, which is its host's own; attach it to a network or a "
            "bridge with `virsh edit`, then plan again.",
        )
        return
    old = "" if source is None else source.get(NICS[kind] or "-", "")
    for element in list(nic):
        if element.tag not in NIC_PARTS:
            nic.remove(element)
    if not work.vm.keep_identity:
        for mac in nic.findall("mac"):
            nic.remove(mac)
        nic.insert(0, ET.Element("mac", {"address": new_mac(work.vm.uuid, index)}))
    if kind == "user":
        return
    found = _network(work, kind, old)
    if found is not None:
        nic.set("type", found[0])
        nic.insert(0, ET.Element("source", {NICS[found[0]]: found[1]}))


def _network(work: _Work, kind: str, old: str) -> tuple[str, str] | None:
    new = _mapped(work.vm.mapping.networks, old) or old
    named_kind, colon, name = new.partition(":")
    wanted = [(named_kind, name)] if colon and named_kind in NICS else [(kind, new)]
    if new != old and not colon:
        wanted += [(other, new) for other in ("network", "bridge") if other != kind]
    for each in wanted:
        if ":".join(each) in work.has.networks:
            return each
    has = _some([name.replace(":", " ", 1) for name in work.has.networks])
    work.refuse(
        "network-missing",
        work.host,
        f"Host {work.host} has no {wanted[0][0]} {wanted[0][1]}, to which a NIC is attached (it has: {has}); make it "
        f"there, or map it: --map network:{old}=NAME.",
    )
    return None


def new_mac(uuid: str, index: int) -> str:
    """The address of the new VM's NIC of that number: the same each time it is asked for, in QEMU's range."""
    tail = hashlib.blake2b(f"{uuid} {index}".encode(), digest_size=3).digest()
    return ":".join(f"{byte:02x}" for byte in b"\x52\x54\x00" + tail)


def _character(work: _Work, device: ET.Element) -> None:
    if device.get("type") not in CHARACTER_KINDS:
        work.notes.append(
            f"A {device.tag} of the replica is of the type {device.get('type', '-')}, which names what is its host's "
            "own: the new VM has a pty in its place (`virsh console`)."
        )
        device.set("type", "pty")
    device.attrib.pop("tty", None)
    for part in ("source", "log", "protocol"):
        for element in device.findall(part):
            device.remove(element)


def _graphics(device: ET.Element) -> None:
    """On an address and a port of the host's choice."""
    for element in device.findall("listen"):
        device.remove(element)
    kind = device.get("type", "")
    device.attrib.clear()
    device.attrib.update({"type": kind} | ({"autoport": "yes"} if kind in ("vnc", "spice") else {}))


def _tpm(work: _Work, device: ET.Element) -> None:
    backend = device.find("backend")
    kind = "" if backend is None else backend.get("type", "")
    if kind != "emulator":
        work.refuse(
            "tpm-missing",
            work.vm.name,
            f"The TPM of the replica is not emulated ({kind or 'no backend'}), and a new VM can have no other: give "
            "the replica an emulated one with `virsh edit`.",
        )
        return
    assert backend is not None
    for element in list(backend):
        backend.remove(element)
    model = device.get("model", "")
    if work.has.machines and (not work.has.tpm_models or (model and model not in work.has.tpm_models)):
        has = _some(work.has.tpm_models)
        work.refuse(
            "tpm-missing",
            work.host,
            f"Host {work.host} cannot give a TPM {model} (it has: {has}); install the packages swtpm and swtpm-tools "
            "there, or choose another host.",
        )


def _mapped(pairs: Pairs, old: str) -> str:
    return dict(pairs).get(old, "")


def _some(names: Collection[str], most: int = 12) -> str:
    shown = list(names)[:most]
    more = len(names) - len(shown)
    return (", ".join(shown) or "none") + (f" and {more} more" if more else "")


def networks_of(definition: str) -> tuple[str, ...]:
    """The networks and bridges that its NICs are attached to."""
    return tuple(dict.fromkeys(_networks(parse(definition))))


def _networks(root: ET.Element) -> Iterator[str]:
    for nic in root.findall("devices/interface"):
        source = nic.find("source")
        name = "" if source is None else source.get(NICS.get(nic.get("type", ""), "") or "-", "")
        if name:
            yield name


def files_of(definition: str) -> tuple[str, ...]:
    """The firmware, kernels and initial RAM disks that it names."""
    texts = ((found.text or "").strip() for tag in FILES for found in parse(definition).findall(f"os/{tag}"))
    return tuple(text for text in texts if text)
