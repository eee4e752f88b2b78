"""What differs between the definitions of original and replica, in words, and what of it can be applied. Pure.

Left out is what each host has of its own: names, UUIDs, MAC addresses, paths, aliases, addresses on the bus, and where
NICs are attached to. Formats: https://libvirt.org/formatdomain.html.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from coordinator.errors import CoordinatorError
from coordinator.model import DiskPair

NONE = "none"
APPLICABLE_NICS = {"network": "network", "bridge": "bridge", "user": ""}
"""Kinds of NICs that can be added, each with the attribute of its source that says where to."""
COUNTED = (
    "video",
    "graphics",
    "sound",
    "rng",
    "watchdog",
    "input",
    "channel",
    "filesystem",
    "shmem",
    "redirdev",
    "vsock",
)
"""Devices that are only counted, by their model or type; how many of which there are is what the guest sees."""


class BadDefinition(CoordinatorError):
    """What an agent sent as a definition is none."""

    code = "bad-definition"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that differs.

    Attributes:
        what: the thing, for people.
        original, replica: what each has, for people.
        elements: what makes the original's as the replica's, XML; empty: that is left to a person.
        network: what the original's host must have for it, as in `protocol.messages.MachineDescription.networks`.
    """

    what: str
    original: str
    replica: str
    elements: tuple[str, ...] = ()
    network: str = ""


def compare(
    original: str, replica: str, disks: Sequence[DiskPair] = (), excluded: Sequence[str] = ()
) -> tuple[Difference, ...]:
    """What differs, in the order in which a person would look.

    Args:
        original: libvirt's XML of the original; `replica`: of the replica.
        replica: see `original`.
        disks: how the disks belong together; those in none, and not in `excluded`, are on one side only.
        excluded: disks that are left out of the pair.

    Raises:
        BadDefinition: one is not XML.
    """
    here, there = parse(original), parse(replica)
    return (
        *_memory(here, there),
        *_vcpus(here, there),
        *_plain(here, there),
        *_disks(here, there, disks, excluded),
        *_nics(here, there),
        *_tpm(here, there),
        *_devices(here, there),
    )


def parse(definition: str) -> ET.Element:
    """The definition's root. Declarations, whose expansion has no bounds, are not taken.

    Raises:
        BadDefinition: it is not XML.
    """
    if "<!" in definition:
        raise BadDefinition("a VM's definition declares something of its own: agents of another kind answer there")
    try:
        return ET.fromstring(definition)
    except ET.ParseError as error:
        raise BadDefinition(f"a VM's definition cannot be read ({error}): see the agent's log on its host") from error


def disk_element(definition: str, target: str) -> str | None:
    """The ``disk`` of that target, XML; None where there is none."""
    for disk in parse(definition).findall("devices/disk"):
        if _target(disk) == target:
            return ET.tostring(disk, encoding="unicode")
    return None


def targets(definition: str) -> frozenset[str]:
    """The targets of every drive, CD-ROMs and floppies too."""
    return frozenset(_target(disk) for disk in parse(definition).findall("devices/disk"))


# --- memory and processors ----------------------------------------------------------------------------------------


def _memory(here: ET.Element, there: ET.Element) -> Iterator[Difference]:
    names = ("memory", "currentMemory")
    ours, theirs = ([_kib(root, name) for name in names] for root in (here, there))
    if ours == theirs:
        return
    fixed = any(root.find("cpu/numa") is not None or root.find("maxMemory") is not None for root in (here, there))
    elements = tuple(
        f"<{name} unit='KiB'>{kib}</{name}>" for name, kib in zip(names, theirs, strict=True) if kib is not None
    )
    yield Difference(
        what="memory",
        original=_memory_words(*ours),
        replica=_memory_words(*theirs),
        elements=() if fixed else elements,
    )


def _kib(root: ET.Element, name: str) -> int | None:
    """libvirt writes what it tells in KiB."""
    text = root.findtext(name, "").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _memory_words(memory: int | None, current: int | None) -> str:
    if memory is None:
        return "not told"
    extra = "" if current in (None, memory) else f", {_mib(current or 0)} of it in use"
    return f"{_mib(memory)}{extra}"


def _mib(kib: int) -> str:
    return f"{kib // 1024} MiB" if kib % 1024 == 0 else f"{kib} KiB"


def _vcpus(here: ET.Element, there: ET.Element) -> Iterator[Difference]:
    if _vcpu_words(here) == _vcpu_words(there):
        return
    theirs = there.find("vcpu")
    fixed = any(root.find("cpu/numa") is not None or root.find("vcpus") is not None for root in (here, there))
    elements: tuple[str, ...] = ()
    if theirs is not None and not fixed:
        current = theirs.get("current")
        vcpu = ET.Element("vcpu", {} if current is None else {"current": current})
        vcpu.text = (theirs.text or "").strip()
        topology = there.find("cpu/topology")
        fresh = ET.Element("topology", {} if topology is None else dict(topology.attrib))
        elements = (ET.tostring(vcpu, encoding="unicode"), ET.tostring(fresh, encoding="unicode"))
    yield Difference(what="vCPUs", original=_vcpu_words(here), replica=_vcpu_words(there), elements=elements)


def _vcpu_words(root: ET.Element) -> str:
    vcpu = root.find("vcpu")
    if vcpu is None:
        return "1"
    count, current = (vcpu.text or "1").strip(), vcpu.get("current")
    topology = root.find("cpu/topology")
    shape = ""
    if topology is not None:
        parts = ((topology.get(name), name) for name in ("sockets", "dies", "cores", "threads"))
        shape = " (" + ", ".join(f"{number} {name}" for number, name in parts if number not in (None, "")) + ")"
    return f"{count}{'' if current in (None, count) else f', {current} of them on'}{shape}"


# --- what is one word on each side ----------------------------------------------------------------------------------


def _plain(here: ET.Element, there: ET.Element) -> Iterator[Difference]:
    for what, words in PLAIN:
        ours, theirs = words(here), words(there)
        if ours != theirs:
            yield Difference(what=what, original=ours, replica=theirs)


def _firmware(root: ET.Element) -> str:
    os, loader = root.find("os"), root.find("os/loader")
    uefi = (os is not None and os.get("firmware") == "efi") or (loader is not None and loader.get("type") == "pflash")
    secure = loader is not None and loader.get("secure") == "yes"
    return ("UEFI with secure boot" if secure else "UEFI") if uefi else "BIOS"


def _cpu(root: ET.Element) -> str:
    cpu = root.find("cpu")
    if cpu is None:
        return "libvirt's default"
    model = cpu.findtext("model", "").strip()
    features = sorted(f"{f.get('policy', 'require')} {f.get('name', '')}" for f in cpu.findall("feature"))
    words = [word for word in (cpu.get("mode", "custom"), model, *features) if word]
    return " ".join(words) if cpu.get("mode") or model else "libvirt's default"


def _features(root: ET.Element) -> str:
    found = root.find("features")
    return ", ".join(sorted(each.tag for each in found)) if found is not None and len(found) else NONE


def _attribute(path: str, name: str, default: str) -> Callable[[ET.Element], str]:
    def words(root: ET.Element) -> str:
        found = root.find(path)
        return default if found is None else found.get(name, default)

    return words


PLAIN: tuple[tuple[str, Callable[[ET.Element], str]], ...] = (
    ("machine type", _attribute("os/type", "machine", NONE)),
    ("architecture", _attribute("os/type", "arch", NONE)),
    ("firmware", _firmware),
    ("CPU", _cpu),
    ("features", _features),
    ("clock", _attribute("clock", "offset", "utc")),
    ("memory balloon", _attribute("devices/memballoon", "model", "virtio")),
)


# --- devices --------------------------------------------------------------------------------------------------------


def _disks(
    here: ET.Element, there: ET.Element, pairs: Sequence[DiskPair], excluded: Sequence[str]
) -> Iterator[Difference]:
    ours, theirs = ({_target(d): d for d in root.findall("devices/disk") if _is_disk(d)} for root in (here, there))
    for pair in pairs:
        a, b = ours.get(pair.original), theirs.get(pair.replica)
        if a is not None and b is not None and _disk_words(a) != _disk_words(b):
            yield Difference(what=f"disk {pair.original}", original=_disk_words(a), replica=_disk_words(b))
    mapped = {pair.original for pair in pairs}, {pair.replica for pair in pairs}
    for target, disk in ours.items():
        if target not in mapped[0] and target not in excluded:
            yield Difference(what=f"disk {target}", original=_disk_words(disk), replica=NONE)
    for target, disk in theirs.items():
        if target not in mapped[1] and target not in excluded:
            yield Difference(what=f"disk {target}", original=NONE, replica=_disk_words(disk))


def _is_disk(disk: ET.Element) -> bool:
    return disk.get("device", "disk") == "disk"


def _target(disk: ET.Element) -> str:
    target = disk.find("target")
    return "" if target is None else target.get("dev", "")


def _disk_words(disk: ET.Element) -> str:
    target, serial = disk.find("target"), disk.findtext("serial", "").strip()
    bus = "" if target is None else target.get("bus", "")
    return f"on {bus or 'no'} bus{f', serial {serial}' if serial else ''}"


def _nics(here: ET.Element, there: ET.Element) -> Iterator[Difference]:
    """NICs belong together by their MAC address, then by their order; what is left over is on one side only."""
    ours, theirs = here.findall("devices/interface"), there.findall("devices/interface")
    known = {_mac(nic): nic for nic in theirs}
    pairs = [(nic, known[_mac(nic)]) for nic in ours if _mac(nic) and _mac(nic) in known]
    ours = [nic for nic in ours if not any(nic is a for a, _ in pairs)]
    theirs = [nic for nic in theirs if not any(nic is b for _, b in pairs)]
    pairs += zip(ours, theirs, strict=False)
    for a, b in pairs:
        if _nic_words(a) != _nic_words(b):
            yield Difference(what=f"NIC {_mac(a)}", original=_nic_words(a), replica=_nic_words(b))
    for nic in ours[len(theirs) :]:
        yield Difference(what=f"NIC {_mac(nic)}", original=_nic_words(nic), replica=NONE)
    for nic in theirs[len(ours) :]:
        network = _network(nic)
        yield Difference(
            what=f"NIC {_mac(nic)}",
            original=NONE,
            replica=f"{_nic_words(nic)}, on {network.replace(':', ' ', 1) or 'no network'}",
            elements=(ET.tostring(nic, encoding="unicode"),) if nic.get("type") in APPLICABLE_NICS else (),
            network=network,
        )


def _mac(nic: ET.Element) -> str:
    mac = nic.find("mac")
    return "" if mac is None else mac.get("address", "").lower()


def _nic_words(nic: ET.Element) -> str:
    model = nic.find("model")
    return "no model" if model is None else model.get("type", "no model")


def _network(nic: ET.Element) -> str:
    attribute, source = APPLICABLE_NICS.get(nic.get("type", ""), ""), nic.find("source")
    name = "" if source is None or not attribute else source.get(attribute, "")
    return f"{attribute}:{name}" if name else ""


def _tpm(here: ET.Element, there: ET.Element) -> Iterator[Difference]:
    ours, theirs = (_tpm_words(root) for root in (here, there))
    if ours != theirs:
        yield Difference(what="TPM", original=ours, replica=theirs)


def _tpm_words(root: ET.Element) -> str:
    tpm, backend = root.find("devices/tpm"), root.find("devices/tpm/backend")
    if tpm is None:
        return NONE
    kind = "" if backend is None else f", {backend.get('type', '')} {backend.get('version', '')}".rstrip()
    return f"{tpm.get('model', 'default model')}{kind}"


def _devices(here: ET.Element, there: ET.Element) -> Iterator[Difference]:
    for tag in COUNTED:
        ours, theirs = (_count_words(root, tag) for root in (here, there))
        if ours != theirs:
            yield Difference(what=tag, original=ours, replica=theirs)


def _count_words(root: ET.Element, tag: str) -> str:
    counted = Counter(_kind(device) for device in root.findall(f"devices/{tag}"))
    return ", ".join(f"{n} × {kind}" if n > 1 else kind for kind, n in sorted(counted.items())) or NONE  # noqa: RUF001


def _kind(device: ET.Element) -> str:
    model = device.find("model")
    names = (
        device.get("model"),
        None if model is None else model.get("type"),
        _attribute("target", "name", "")(device),
        device.get("type"),
    )
    return next((name for name in names if name), device.tag)
