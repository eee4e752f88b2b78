"""A VM made anew on a host: what the host has to give, and the orders that make the VM and remove it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from protocol.messages.orders import Done
from protocol.messages.words import Order


@dataclass(frozen=True, slots=True, kw_only=True)
class StoragePool:
    """One storage pool of a host's libvirt.

    Attributes:
        name: libvirt's.
        kind: its type: ``dir``, ``fs``, ``netfs``, ``logical`` …
        path: where its volumes are.
        active: volumes can be made in it now.
        free_bytes: room that is left; 0 where it is not active.
    """

    name: str
    kind: str
    path: str
    active: bool
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Provisions:
    """Answer to `DescribeProvisions`.

    Attributes:
        machines: machine types for VMs of that kind, canonical names and aliases; empty: there are no such VMs.
        cpu_modes: of ``host-passthrough``, ``host-model``, ``maximum`` and ``custom``, those that work there.
        cpu_models: the named models that the host's processor can run.
        firmware: how libvirt can choose firmware by itself: ``bios``, ``efi``.
        files: the firmware, kernels and initial RAM disks that a definition may name: what libvirt offers, and what the
            host's own VMs boot from.
        tpm_models: models of a TPM that swtpm can be for a VM; empty: none.
        networks: as in `MachineDescription`.
        pools: the storage pools.
        problem: why something of this could not be found out, a sentence; or empty.
    """

    machines: tuple[str, ...]
    cpu_modes: tuple[str, ...]
    cpu_models: tuple[str, ...]
    firmware: tuple[str, ...]
    files: tuple[str, ...]
    tpm_models: tuple[str, ...]
    networks: tuple[str, ...]
    pools: tuple[StoragePool, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribeProvisions:
    """What does the host have for a VM of that kind? `arch`, `virt_type`, `machine`: as in a definition (``x86_64``,
    ``kvm``, ``pc-q35-7.2``)."""

    arch: str
    virt_type: str
    machine: str
    reply: ClassVar[type] = Provisions


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVolume:
    """A volume to be made: sparse, of exactly that size, ``raw`` or ``qcow2``, for the disk of that target name."""

    target: str
    pool: str
    format: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VmCreated:
    """The VM is there, off. `paths`: of its volumes, for people."""

    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateVm:
    """Make the volumes, and define the VM with that UUID and name on them.

    `definition`: libvirt's XML in pieces as in `MachineDescription`, in which the disks have no source: an agent puts
    the volumes' paths there, and takes no definition that names a file which `Provisions.files` does not. Everything
    is written down before it is done, and removed again where the order fails. Harmless when repeated by its run.
    """

    order: Order
    vm_uuid: str
    name: str
    definition: tuple[str, ...]
    volumes: tuple[NewVolume, ...]
    reply: ClassVar[type] = VmCreated


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveCreated:
    """Remove the shut-off VM that `CreateVm` made for this run, with its volumes, its fence and what is known of its
    disks; nothing else. Harmless when repeated, and where nothing was made."""

    order: Order
    vm_uuid: str
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepCreated:
    """The VM that was made for this run stays for good: from here on it is not removed any more. Harmless when
    repeated."""

    order: Order
    vm_uuid: str
    reply: ClassVar[type] = Done
