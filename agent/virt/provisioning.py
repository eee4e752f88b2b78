"""What a libvirt host has to give for a VM that is made anew, and the acts that make one and remove it again.

Volumes are made by libvirt's storage driver, so that owner, mode and label are what it gives every volume of the pool.
Formats: https://libvirt.org/formatdomaincaps.html, https://libvirt.org/formatstorage.html.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.dom import minidom
from xml.sax.saxutils import escape

import libvirt

from agent.errors import DiskFull, HypervisorError
from agent.virt.connection import errors_of
from agent.virt.inspection import power_state
from agent.virt.new_definition import named_files
from agent.virt.provision_seam import HostProvisions, Pool, Volume
from agent.virt.seam import PowerState

FILE_POOLS = ("dir", "fs", "netfs")
"""Kinds of pools whose volumes are files, which can be sparse and have any size."""
_QCOW2_GRAIN_BYTES = 1024
"""libvirt rounds the size of a qcow2 volume up to this when it makes one, though not when it resizes one."""
_KNOWN_MODES = ("host-passthrough", "host-model", "maximum", "custom")


def provisions(handle: Any, arch: str, virt_type: str, machine: str) -> HostProvisions:
    """See `agent.virt.provision_seam.Provider.provisions`."""
    machines = _machines(minidom.parseString(handle.getCapabilities()), arch, virt_type)
    pools, problem = _pools(handle)
    if not machines:
        return HostProvisions(pools=pools, files=_own_files(handle), problem=problem)
    told = minidom.parseString(
        handle.getDomainCapabilities(None, arch, machine if machine in machines else None, virt_type, 0)
    )
    loaders = [_text(value) for value in _under(told, "loader") if value.tagName == "value"]
    modes = [mode for mode in told.getElementsByTagName("mode") if mode.getAttribute("supported") == "yes"]
    models = [model for mode in modes if mode.getAttribute("name") == "custom" for model in _elements(mode, "model")]
    return HostProvisions(
        machines=machines,
        cpu_modes=tuple(name for name in _KNOWN_MODES if name in {mode.getAttribute("name") for mode in modes}),
        cpu_models=tuple(sorted(_text(model) for model in models if model.getAttribute("usable") != "no")),
        firmware=("bios", *(name for name in _enum(told, "os", "firmware") if name == "efi")),
        files=tuple(sorted({*loaders, *_own_files(handle)})),
        tpm_models=tuple(_enum(told, "tpm", "model")) if "emulator" in _enum(told, "tpm", "backendModel") else (),
        pools=pools,
        problem=problem,
    )


def _machines(capabilities: minidom.Document, arch: str, virt_type: str) -> tuple[str, ...]:
    found: set[str] = set()
    for element in capabilities.getElementsByTagName("arch"):
        if element.getAttribute("name") != arch:
            continue
        for domain in _elements(element, "domain"):
            if domain.getAttribute("type") == virt_type:
                own = _elements(domain, "machine") or _elements(element, "machine")
                for machine in own:
                    found |= {_text(machine), machine.getAttribute("canonical")}
    return tuple(sorted(found - {""}))


def _pools(handle: Any) -> tuple[tuple[Pool, ...], str]:
    try:
        return tuple(sorted((_pool(pool) for pool in handle.listAllStoragePools(0)), key=lambda pool: pool.name)), ""
    except libvirt.libvirtError as error:
        why = (error.get_error_message() or str(error)).rstrip(".")
        return (), f"This host's libvirt tells of no storage pools ({why}): see that its storage driver is installed."


def _pool(pool: Any) -> Pool:
    root = minidom.parseString(pool.XMLDesc(0)).documentElement
    assert root is not None
    active = bool(pool.isActive())
    if active:
        with contextlib.suppress(libvirt.libvirtError):  # while a volume is made it cannot be; what it says is older
            pool.refresh(0)
    path = next((_text(p) for target in _elements(root, "target") for p in _elements(target, "path")), "")
    free_bytes = int(pool.info()[3]) if active else 0
    return Pool(name=pool.name(), kind=root.getAttribute("type"), path=Path(path), active=active, free_bytes=free_bytes)


def _own_files(handle: Any) -> tuple[str, ...]:
    """What the host's own VMs boot from: their administrator has named it."""
    found: set[str] = set()
    for domain in handle.listAllDomains(0):
        with contextlib.suppress(libvirt.libvirtError):  # gone meanwhile
            found.update(named_files(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)))
    return tuple(sorted(found))


# --- volumes --------------------------------------------------------------------------------------------------------


def find_volume(handle: Any, pool: str, name: str) -> Volume | None:
    """See `agent.virt.provision_seam.Provider.find_volume`."""
    found = _lookup(_active_pool(handle, pool), name)
    return None if found is None else Volume(pool=pool, name=name, path=Path(found.path()))


def create_volume(handle: Any, pool: str, name: str, image_format: str, size_bytes: int) -> Volume:
    """See `agent.virt.provision_seam.Provider.create_volume`."""
    with errors_of("looking at the pool", pool):
        where = _active_pool(handle, pool)
        kind = _pool(where).kind
    if kind not in FILE_POOLS:
        raise HypervisorError(
            f"The pool {pool} is of the type {kind}, and volumes are made in {', '.join(FILE_POOLS)} alone: choose "
            "another one.",
            pool=pool,
        )
    rounded = size_bytes if image_format == "raw" else size_bytes - size_bytes % _QCOW2_GRAIN_BYTES
    xml = f"""<volume><name>{escape(name)}</name><capacity unit='bytes'>{rounded or _QCOW2_GRAIN_BYTES}</capacity>
        <allocation unit='bytes'>0</allocation><target><format type='{image_format}'/>
        {"<compat>1.1</compat>" if image_format == "qcow2" else ""}</target></volume>"""
    with _room_errors(pool, name):
        made = where.createXML(xml, 0)
        if rounded != size_bytes:
            made.resize(size_bytes, 0)
        return Volume(pool=pool, name=name, path=Path(made.path()))


def remove_volume(handle: Any, pool: str, name: str) -> None:
    """See `agent.virt.provision_seam.Provider.remove_volume`."""
    with errors_of(f"removing the volume {name}", pool):
        found = _lookup(_active_pool(handle, pool), name)
        if found is not None:
            found.delete(0)


def _lookup(pool: Any, name: str) -> Any:
    """The volume, or None. What an interrupted call has left is in the pool's storage and in nobody's memory."""
    pool.refresh(0)
    try:
        return pool.storageVolLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
            raise
        return None


def _active_pool(handle: Any, name: str) -> Any:
    try:
        pool = handle.storagePoolLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() not in (libvirt.VIR_ERR_NO_STORAGE_POOL, libvirt.VIR_ERR_NO_SUPPORT):
            raise
        raise HypervisorError(
            f"This host has no storage pool {name}: see `virsh pool-list --all`.", pool=name
        ) from error
    if not pool.isActive():
        raise HypervisorError(f"The storage pool {name} is not active: `virsh pool-start {name}` first.", pool=name)
    return pool


@contextlib.contextmanager
def _room_errors(pool: str, name: str) -> Iterator[None]:
    """A full pool by its own code; qemu-img's and the kernel's words reach us inside libvirt's message alone."""
    with errors_of(f"making the volume {name}", pool):
        try:
            yield
        except libvirt.libvirtError as error:
            said = error.get_error_message() or ""
            if "No space left" in said or "not enough free space" in said.lower():
                raise DiskFull(
                    f"The pool {pool} has no room for the volume {name}: make room there, or map another pool.",
                    pool=pool,
                ) from error
            raise


# --- domains --------------------------------------------------------------------------------------------------------


def define_new(handle: Any, uuid: str, name: str, xml: str) -> None:
    """See `agent.virt.provision_seam.Provider.define_new`."""
    with errors_of("defining it", name):
        for look_up, what in ((handle.lookupByUUIDString, uuid), (handle.lookupByName, name)):
            try:
                look_up(what)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                    raise
                continue
            raise HypervisorError(f"This host has a VM {what} already: choose another name for the new one.", vm=what)
        handle.defineXML(xml)


def undefine(handle: Any, uuid: str, *, keep_nvram: bool) -> None:
    """See `agent.virt.provision_seam.Provider.undefine`."""
    with errors_of("undefining it", uuid):
        try:
            domain = handle.lookupByUUIDString(uuid)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return
            raise
        if power_state(domain) is not PowerState.OFF:
            raise HypervisorError(f"VM {domain.name()} must be off to be removed: power it off.", vm=uuid)
        nvram = libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM if keep_nvram else libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
        domain.undefineFlags(
            nvram
            | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        )


# --- minidom --------------------------------------------------------------------------------------------------------


def _elements(parent: minidom.Element | minidom.Document, name: str) -> list[minidom.Element]:
    return [node for node in parent.childNodes if isinstance(node, minidom.Element) and node.tagName == name]


def _under(document: minidom.Document, name: str) -> list[minidom.Element]:
    """The children of every element of that name."""
    found = document.getElementsByTagName(name)
    return [node for element in found for node in element.childNodes if isinstance(node, minidom.Element)]


def _enum(document: minidom.Document, parent: str, name: str) -> list[str]:
    return [
        _text(value)
        for enum in _under(document, parent)
        if enum.tagName == "enum" and enum.getAttribute("name") == name
        for value in _elements(enum, "value")
    ]


def _text(element: minidom.Element) -> str:
    return "".join(node.data for node in element.childNodes if isinstance(node, minidom.Text)).strip()
