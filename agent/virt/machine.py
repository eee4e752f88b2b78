"""What of a domain is no disk: its definition, where its firmware's variables and its TPM's state are kept."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import libvirt

from agent.errors import HypervisorError
from agent.virt.connection import errors_of
from agent.virt.definition_edit import state_refs
from agent.virt.inspection import power_state
from agent.virt.places import Places
from agent.virt.seam import PowerState, StatePlace, StateRole

_INACTIVE = libvirt.VIR_DOMAIN_XML_INACTIVE


def definition(domain: Any, *, secrets: bool) -> str:
    """See `agent.virt.seam.Hypervisor.definition`."""
    text: str = domain.XMLDesc(_INACTIVE | (libvirt.VIR_DOMAIN_XML_SECURE if secrets else 0))
    return text


def define(domain: Any, xml: str) -> str:
    """See `agent.virt.seam.Hypervisor.define`."""
    name = domain.name()
    with errors_of("changing its definition", name):
        if power_state(domain) is not PowerState.OFF:
            raise HypervisorError(f"VM {name} must be off while its definition is changed: power it off.", vm=name)
        fresh = domain.connect().defineXML(xml)
        if fresh.UUIDString() != domain.UUIDString():
            raise HypervisorError(f"VM {name}: what was to be its definition is another VM's.", vm=name)
        return definition(fresh, secrets=True)


def state_places(domain: Any, places: Places) -> tuple[StatePlace, ...]:
    """See `agent.virt.seam.Hypervisor.state_places`.

    Where the definition names no path, libvirt's QEMU driver has fixed ones beside each other
    (https://libvirt.org/formatdomain.html, *nvram*; drvqemu.html): ``nvram/NAME_VARS.fd`` under its folder, and
    ``swtpm/UUID/tpm2`` next to that.
    """
    found: list[StatePlace] = []
    for ref in state_refs(definition(domain, secrets=False)):
        path = ref.path
        if path is None and ref.role is StateRole.NVRAM:
            path = places.lib_dir / "nvram" / f"{domain.name()}_VARS.fd"
        elif path is None:
            folder = "tpm1.2" if ref.format == "1.2" else "tpm2"
            path = places.lib_dir.parent / "swtpm" / domain.UUIDString() / folder
        found.append(StatePlace(role=ref.role, path=path, format=ref.format, problem=ref.problem))
    return tuple(found)


def networks(handle: Any) -> tuple[str, ...]:
    """See `agent.virt.seam.Hypervisor.networks`. A driver without networks has none of libvirt's."""
    named: list[str] = []
    with contextlib.suppress(libvirt.libvirtError):
        named = [f"network:{network.name()}" for network in handle.listAllNetworks(0)]
    devices = Path("/sys/class/net")
    links = [name for _, name in socket.if_nameindex() if name != "lo" and not (devices / name / "device").exists()]
    return (*sorted(named), *(f"bridge:{name}" for name in sorted(links)))
