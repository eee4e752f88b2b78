"""The real hypervisor: `LibvirtHost` fulfils `agent.virt.seam.Hypervisor` on libvirt and QEMU."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import libvirt

from agent.errors import HypervisorError, NoSuchDomain
from agent.virt import checkpoints, guest_agent, inspection, machine, merging, overlays, protection, provisioning, views
from agent.virt.connection import Connection, errors_of
from agent.virt.places import Places, lib_dir_of, log_and_run_dir_of
from agent.virt.provision_seam import HostProvisions, Volume
from agent.virt.seam import (
    NO_EARLIER_VIEW,
    Domain,
    EarlierView,
    HostFacts,
    Overlay,
    PowerState,
    StatePlace,
    TrackOverlay,
    View,
)

_RECHECK_S = 2.0  # an event may be lost with the connection that would have brought it

_CANNOT_ANSWER = {
    PowerState.PAUSED: "is paused and cannot answer a shutdown request: `virsh resume` it or end it by force",
    PowerState.SUSPENDED: "sleeps and cannot answer a shutdown request: `virsh dompmwakeup` it, or end it by force",
    PowerState.CRASHED: "has crashed and cannot answer a shutdown request: end it by force",
}
_CANNOT_START = {
    PowerState.PAUSED: "is paused: let it go on with `virsh resume`",
    PowerState.SUSPENDED: "sleeps: `virsh dompmwakeup` it",
    PowerState.SHUTTING_DOWN: "is shutting down: wait until it is off",
    PowerState.CRASHED: "has crashed and still holds its disks: end it by force first",
}


class LibvirtHost:
    """The domains of one libvirt; connects at the first call, and anew when libvirtd was restarted.

    Args:
        uri: connection URI: ``qemu:///system``, ``qemu:///embed?root=DIR`` (a process can have one such root) …
        scratch_dir: existing folder for scratch files and overlays of disks that are block devices; QEMU's user must be
            able to reach it.
        lib_dir: the QEMU driver's folder of domain directories, where it is not the usual one for the URI.
        qemu_img: the program to ask about images.
    """

    def __init__(self, uri: str, *, scratch_dir: Path, lib_dir: Path | None = None, qemu_img: str = "qemu-img") -> None:
        self._connection = Connection(uri)
        log_dir, run_dir = log_and_run_dir_of(uri)
        self._places = Places(
            lib_dir=lib_dir or lib_dir_of(uri),
            log_dir=log_dir,
            run_dir=run_dir,
            scratch_dir=scratch_dir,
            qemu_img=qemu_img,
        )
        self._agent_shutdowns = guest_agent.AgentShutdowns()

    def facts(self) -> HostFacts:
        """See `agent.virt.seam.Hypervisor.facts`."""
        library, qemu = self._connection.ask(
            lambda handle: (handle.getLibVersion(), handle.getVersion()), "asking for versions", "-"
        )
        return HostFacts(
            hostname=socket.gethostname(),
            uri=self._connection.uri,
            libvirt_version=_version(library),
            qemu_version=_version(qemu),
        )

    def find(self, name_or_uuid: str) -> str:
        """See `agent.virt.seam.Hypervisor.find`."""
        uuid: str = self._connection.domain(name_or_uuid).UUIDString()
        return uuid

    def inspect(self, uuid: str) -> Domain:
        """See `agent.virt.seam.Hypervisor.inspect`."""
        domain = self._connection.domain(uuid)
        with errors_of("inspection", uuid):
            return inspection.inspect(domain, self._places)

    def state(self, uuid: str) -> PowerState:
        """See `agent.virt.seam.Hypervisor.state`."""
        return self._state(self._connection.domain(uuid))

    def _state(self, domain: Any) -> PowerState:
        with errors_of("asking for its power state", domain.name()):
            return inspection.power_state(domain)

    def power_on(self, uuid: str) -> None:
        """See `agent.virt.seam.Hypervisor.power_on`; never resumes saved memory, which would not fit the disks."""
        domain = self._connection.domain(uuid)
        name, state = domain.name(), self._state(domain)
        if state is PowerState.RUNNING:
            return
        if state in _CANNOT_START:
            raise HypervisorError(f"VM {name} {_CANNOT_START[state]}.", vm=name, state=state.value)
        with errors_of("power-on", name):
            if domain.hasManagedSaveImage(0):
                raise HypervisorError(
                    f"VM {name} has saved memory that a start would resume over changed disks: drop it with "
                    f"`virsh managedsave-remove {name}`.",
                    vm=name,
                )
            domain.create()

    def request_shutdown(self, uuid: str) -> None:
        """See `agent.virt.seam.Hypervisor.request_shutdown`; the power button where no agent answers."""
        domain = self._connection.domain(uuid)
        name, state = domain.name(), self._state(domain)
        if state in (PowerState.OFF, PowerState.SHUTTING_DOWN):
            return
        if state in _CANNOT_ANSWER:
            raise HypervisorError(f"VM {name} {_CANNOT_ANSWER[state]}.", vm=name, state=state.value)
        with errors_of("the shutdown request", name):
            asked = self._agent_shutdowns.ask(domain)
        if asked:
            return
        self._end(
            domain, "the shutdown request", lambda: domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
        )

    def wait_off(self, uuid: str, timeout_s: float) -> bool:
        """See `agent.virt.seam.Hypervisor.wait_off`."""
        deadline = time.monotonic() + timeout_s
        seen_before = False
        while True:
            events = self._connection.watch.count(uuid)
            try:
                if self.state(uuid) is PowerState.OFF:
                    return True
            except NoSuchDomain:
                if seen_before:
                    return True  # a transient domain is gone with its process
                raise
            seen_before = True
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return False
            self._connection.watch.wait_beyond(uuid, events, min(remaining_s, _RECHECK_S))

    def force_off(self, uuid: str, *, graceful: bool) -> None:
        """See `agent.virt.seam.Hypervisor.force_off`."""
        domain = self._connection.domain(uuid)
        flags = libvirt.VIR_DOMAIN_DESTROY_GRACEFUL if graceful else libvirt.VIR_DOMAIN_DESTROY_DEFAULT
        if self._state(domain) is not PowerState.OFF:
            self._end(domain, "power-off", lambda: domain.destroyFlags(flags))

    def _end(self, domain: Any, operation: str, act: Any) -> None:
        """Do what ends a domain; that it ended by itself in the same moment is no error."""
        name = domain.name()
        with errors_of(operation, name):
            try:
                act()
            except libvirt.libvirtError as error:
                ended = error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
                if not (ended and inspection.power_state(domain) is PowerState.OFF):
                    raise

    def set_autostart(self, uuid: str, enabled: bool) -> bool:
        """See `agent.virt.seam.Hypervisor.set_autostart`."""
        domain = self._connection.domain(uuid)
        with errors_of("setting autostart", domain.name()):
            before = bool(domain.autostart())
            if before != enabled:
                domain.setAutostart(int(enabled))
        return before

    def open_view(
        self,
        uuid: str,
        targets: Sequence[str],
        tag: str,
        *,
        checkpoint: bool = False,
        since: Mapping[str, EarlierView] = NO_EARLIER_VIEW,
    ) -> View:
        """See `agent.virt.seam.Hypervisor.open_view`."""
        domain = self._connection.domain(uuid)
        with errors_of("opening a view", domain.name()):
            return views.open_view(domain, targets, tag, self._places, checkpoint=checkpoint, since=since)

    def serves_view(self, uuid: str, tag: str) -> bool:
        """See `agent.virt.seam.Hypervisor.serves_view`."""
        domain = self._connection.domain(uuid)
        with errors_of("asking for its backup job", domain.name()):
            return views.serves_view(domain, tag)

    def close_view(self, uuid: str, tag: str) -> None:
        """See `agent.virt.seam.Hypervisor.close_view`."""
        domain = self._connection.domain(uuid)
        with errors_of("closing a view", domain.name()):
            others = [number for number in domain.connect().listDomainsID() if number != domain.ID()]
            views.close_view(domain, tag, self._places, others)

    def has_stalled(self, uuid: str) -> bool:
        """See `agent.virt.seam.Hypervisor.has_stalled`."""
        domain = self._connection.domain(uuid)
        with errors_of("asking for its power state", domain.name()):
            return views.has_stalled(domain)

    def drop_checkpoints(self, uuid: str, keep: Sequence[str] = ()) -> None:
        """See `agent.virt.seam.Hypervisor.drop_checkpoints`."""
        checkpoints.drop(self._connection.domain(uuid), keep)

    def written_since(self, uuid: str, tag: str) -> dict[str, int]:
        """See `agent.virt.seam.Hypervisor.written_since`."""
        return checkpoints.written_since(self._connection.domain(uuid), tag)

    def drop_bitmaps(self, uuid: str) -> None:
        """See `agent.virt.seam.Hypervisor.drop_bitmaps`."""
        domain = self._connection.domain(uuid)
        with errors_of("removing its bitmaps", domain.name()):
            checkpoints.drop_bitmaps(domain, self._places)

    def freeze_guest(self, uuid: str) -> None:
        """See `agent.virt.seam.Hypervisor.freeze_guest`."""
        domain = self._connection.domain(uuid)
        with errors_of("freezing its file systems", domain.name()):
            guest_agent.freeze(domain)

    def thaw_guest(self, uuid: str) -> None:
        """See `agent.virt.seam.Hypervisor.thaw_guest`."""
        guest_agent.thaw(self._connection.domain(uuid))

    def protect(self, uuid: str, targets: Sequence[str], snapshot: str, description: str) -> tuple[Overlay, ...]:
        """See `agent.virt.seam.Hypervisor.protect`."""
        domain = self._connection.domain(uuid)
        with errors_of("its protective snapshot", domain.name()):
            return protection.protect(domain, targets, snapshot, description, self._places)

    def unprotect(self, uuid: str, snapshot: str, overlays: Sequence[Overlay]) -> None:
        """See `agent.virt.seam.Hypervisor.unprotect`."""
        domain = self._connection.domain(uuid)
        with errors_of("undoing its protective snapshot", domain.name()):
            protection.unprotect(domain, snapshot, overlays, self._places)

    def plan_protection(self, uuid: str, targets: Sequence[str], snapshot: str) -> tuple[Overlay, ...]:
        """See `agent.virt.seam.Hypervisor.plan_protection`."""
        domain = self._connection.domain(uuid)
        with errors_of("planning its snapshot", domain.name()):
            return protection.plan(domain, targets, snapshot, self._places)

    def merge_protection(self, uuid: str, snapshot: str, overlays: Sequence[Overlay], *, timeout_s: float) -> None:
        """See `agent.virt.seam.Hypervisor.merge_protection`."""
        domain = self._connection.domain(uuid)
        with errors_of("merging its snapshot", domain.name()):
            merging.merge_protection(domain, snapshot, overlays, self._places, timeout_s=timeout_s)

    def plan_overlays(self, uuid: str, targets: Sequence[str], tag: str) -> tuple[TrackOverlay, ...]:
        """See `agent.virt.seam.Hypervisor.plan_overlays`."""
        domain = self._connection.domain(uuid)
        with errors_of("planning live overlays", domain.name()):
            return overlays.plan_overlays(domain, targets, tag, self._places)

    def begin_overlays(self, uuid: str, planned: Sequence[TrackOverlay]) -> None:
        """See `agent.virt.seam.Hypervisor.begin_overlays`."""
        domain = self._connection.domain(uuid)
        with errors_of("putting live overlays over its disks", domain.name()):
            overlays.begin_overlays(domain, planned, self._places)

    def merge_overlays(
        self, uuid: str, paths: Sequence[Path], into: Path, disk: TrackOverlay, *, timeout_s: float
    ) -> None:
        """See `agent.virt.seam.Hypervisor.merge_overlays`."""
        domain = self._connection.domain(uuid)
        with errors_of("merging overlays", domain.name()):
            overlays.merge_overlays(domain, paths, into, disk, self._places, timeout_s=timeout_s)

    def forget_overlays(self, uuid: str, paths: Sequence[Path], into: Path, disk: TrackOverlay) -> None:
        """See `agent.virt.seam.Hypervisor.forget_overlays`."""
        overlays.forget_overlays(self._connection.domain(uuid), paths, into, disk)

    def definition(self, uuid: str, *, secrets: bool = False) -> str:
        """See `agent.virt.seam.Hypervisor.definition`."""
        domain = self._connection.domain(uuid)
        with errors_of("reading its definition", domain.name()):
            return machine.definition(domain, secrets=secrets)

    def define(self, uuid: str, xml: str) -> str:
        """See `agent.virt.seam.Hypervisor.define`."""
        return machine.define(self._connection.domain(uuid), xml)

    def state_places(self, uuid: str) -> tuple[StatePlace, ...]:
        """See `agent.virt.seam.Hypervisor.state_places`."""
        domain = self._connection.domain(uuid)
        with errors_of("reading its definition", domain.name()):
            return machine.state_places(domain, self._places)

    def networks(self) -> tuple[str, ...]:
        """See `agent.virt.seam.Hypervisor.networks`."""
        found: tuple[str, ...] = self._connection.ask(machine.networks, "listing its networks", "-")
        return found

    def provisions(self, arch: str, virt_type: str, machine: str) -> HostProvisions:
        """See `agent.virt.provision_seam.Provider.provisions`."""
        found: HostProvisions = self._connection.ask(
            lambda handle: provisioning.provisions(handle, arch, virt_type, machine), "asking what it provides", "-"
        )
        return found

    def find_volume(self, pool: str, name: str) -> Volume | None:
        """See `agent.virt.provision_seam.Provider.find_volume`."""
        found: Volume | None = self._connection.ask(
            lambda handle: provisioning.find_volume(handle, pool, name), "looking for a volume", pool
        )
        return found

    def create_volume(self, pool: str, name: str, image_format: str, size_bytes: int) -> Volume:
        """See `agent.virt.provision_seam.Provider.create_volume`."""
        return provisioning.create_volume(self._connection.alive(), pool, name, image_format, size_bytes)

    def remove_volume(self, pool: str, name: str) -> None:
        """See `agent.virt.provision_seam.Provider.remove_volume`."""
        provisioning.remove_volume(self._connection.alive(), pool, name)

    def define_new(self, uuid: str, name: str, xml: str) -> None:
        """See `agent.virt.provision_seam.Provider.define_new`."""
        provisioning.define_new(self._connection.alive(), uuid, name, xml)

    def undefine(self, uuid: str, *, keep_nvram: bool) -> None:
        """See `agent.virt.provision_seam.Provider.undefine`."""
        provisioning.undefine(self._connection.alive(), uuid, keep_nvram=keep_nvram)

    def close(self) -> None:
        """See `agent.virt.seam.Hypervisor.close`."""
        self._connection.close()


def _version(number: int) -> str:
    """libvirt's version numbers: major * 1,000,000 + minor * 1,000 + release."""
    return f"{number // 1_000_000}.{number // 1_000 % 1_000}.{number % 1_000}"
