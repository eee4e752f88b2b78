"""What a host has to give for a VM that is made anew, and the acts that make one: a part of `agent.virt.seam`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A storage pool; `free_bytes` is 0 where it is not active."""

    name: str
    kind: str
    path: Path
    active: bool
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostProvisions:
    """What a host has for VMs of one architecture and kind; the fields are those of
    `protocol.messages.Provisions`."""

    machines: tuple[str, ...] = ()
    cpu_modes: tuple[str, ...] = ()
    cpu_models: tuple[str, ...] = ()
    firmware: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    tpm_models: tuple[str, ...] = ()
    pools: tuple[Pool, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A volume by the names that libvirt knows it by, and where it is."""

    pool: str
    name: str
    path: Path


class Provider(Protocol):
    """The acts. None of them is undone by itself: the caller writes down before what it is about to do."""

    def provisions(self, arch: str, virt_type: str, machine: str) -> HostProvisions:
        """What this host has for a VM of that architecture, virtualisation and machine type."""

    def find_volume(self, pool: str, name: str) -> Volume | None:
        """The volume of that name, looked for in the pool's storage and not only in libvirt's memory; None: none."""

    def create_volume(self, pool: str, name: str, image_format: str, size_bytes: int) -> Volume:
        """Make a sparse volume of exactly that size, owned and labelled as libvirt does. A name that is taken is an
        error, and a volume that could not be made whole may be left, for the caller to remove."""

    def remove_volume(self, pool: str, name: str) -> None:
        """Remove that volume; harmless where there is none."""

    def define_new(self, uuid: str, name: str, xml: str) -> None:
        """Define a domain that this host does not know; one that has its UUID or its name is an error."""

    def undefine(self, uuid: str, *, keep_nvram: bool) -> None:
        """Forget the shut-off domain, with its metadata and the state that is no disk; `keep_nvram`: but for the file
        of its firmware's variables. Harmless where it is not known."""
