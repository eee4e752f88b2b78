"""What of a VM is no disk: its definition, its firmware's variables, the state of its TPM."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from protocol.messages.orders import Done
from protocol.messages.words import Order


class StateKind(enum.Enum):
    """State of a VM that is no disk."""

    NVRAM = "nvram"  # the variables of its UEFI firmware, one file
    TPM = "tpm"  # what swtpm keeps of its TPM, the files of one folder


class MachineShare(enum.Enum):
    """A share of what a run has changed of a VM, to be taken back by itself."""

    STATE = "state"
    DEFINITION = "definition"
    DISKS = "disks"


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePart:
    """State that the VM has by its definition.

    Attributes:
        kind: what it is.
        path: the file or folder, for people.
        format: of the file (``raw``, ``qcow2``), or the version of the TPM.
        size_bytes: of all its files.
        present: there is any.
        problem: why it cannot be carried, a sentence; or empty.
    """

    kind: StateKind
    path: str
    format: str
    size_bytes: int
    present: bool
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineDescription:
    """Answer to `DescribeMachine`.

    Attributes:
        vm_uuid: of the VM.
        definition: its inactive definition, libvirt's XML without secrets, cut in pieces of at most 16384 characters;
            empty where it is too long, and `problem` says so.
        parts: its state that is no disk.
        networks: what a NIC can be attached to on that host: ``network:NAME`` of libvirt's, ``bridge:NAME``.
        missing_tools: each "program (package)" that this host lacks to run the VM.
        problem: a sentence, or empty.
    """

    vm_uuid: str
    definition: tuple[str, ...]
    parts: tuple[StatePart, ...]
    networks: tuple[str, ...]
    missing_tools: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribeMachine:
    """What is that VM beside its disks?"""

    vm_uuid: str
    reply: ClassVar[type] = MachineDescription


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFile:
    """One file of a VM's state. `name`: within its folder; the one of NVRAM is called ``vars``. `digest`: BLAKE3 of its
    bytes, 32 bytes."""

    kind: StateKind
    name: str
    size_bytes: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFiles:
    """Answer to `ListState` and `PlaceState`: what is there, read past the page cache where the storage can do that."""

    files: tuple[StateFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListState:
    """Which files is the state of the shut-off, fenced VM, and what do they hold? At most 64 MiB altogether."""

    order: Order
    vm_uuid: str
    reply: ClassVar[type] = StateFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChunk:
    """Answer to `ReadState`: the bytes from that offset on, at most 65536; empty at the end."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadState:
    """Bytes of one file of the shut-off, fenced replica's state."""

    order: Order
    vm_uuid: str
    kind: StateKind
    name: str
    offset_bytes: int
    reply: ClassVar[type] = StateChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteState:
    """Keep these bytes for the state of the shut-off, fenced original, until `PlaceState` puts it in place. A write at
    offset 0 begins the file anew."""

    order: Order
    vm_uuid: str
    kind: StateKind
    name: str
    offset_bytes: int
    data: bytes
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceState:
    """Make exactly these files the state of the shut-off, fenced original: each must have been written whole, as its
    digest proves. What was there is kept for the run. Harmless when repeated."""

    order: Order
    vm_uuid: str
    files: tuple[StateFile, ...]
    reply: ClassVar[type] = StateFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class DefinitionChange:
    """One element of a definition, libvirt's XML, to be put into another one: ``memory``, ``currentMemory``, ``vcpu``
    and ``topology`` take the place of what is there, an ``interface`` is added. Of each no more is taken than what is
    the guest's own; an agent takes no path from it."""

    element: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeDefinition:
    """Make these changes to the shut-off, fenced original's definition. What it was is kept for the run. Harmless when
    repeated: it is the definition kept that is changed."""

    order: Order
    vm_uuid: str
    changes: tuple[DefinitionChange, ...]
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCreated:
    """The disk is there. `path`: for people."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateDisk:
    """Make a disk of that size, sparse and reading as zero, beside the shut-off original's first disk, and add it to
    its definition. `element`: the replica's ``disk``, of which bus, serial number and sector size are taken. Harmless
    when repeated."""

    order: Order
    vm_uuid: str
    target: str
    format: str
    size_bytes: int
    element: str
    reply: ClassVar[type] = DiskCreated


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreMachine:
    """Give that share of the shut-off original back as it was before the run; created disks are removed. Harmless when
    repeated, and where the run has changed nothing of it."""

    order: Order
    vm_uuid: str
    share: MachineShare
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepMachine:
    """The original stays as it is: drop what was kept for the run. Harmless when repeated."""

    order: Order
    vm_uuid: str
    reply: ClassVar[type] = Done
