"""What the fake agents' VMs are beside their disks: definitions, firmware variables, TPM state."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass, field

from blake3 import blake3

from coordinator.errors import AgentRefused
from protocol.messages import (
    ChangeDefinition,
    CreateDisk,
    DiskCreated,
    Done,
    KeepMachine,
    ListState,
    MachineDescription,
    MachineOrder,
    MachineShare,
    PlaceState,
    ReadState,
    Reply,
    RestoreMachine,
    StateChunk,
    StateFile,
    StateFiles,
    StateKind,
    StatePart,
    WriteState,
)

State = dict[tuple[StateKind, str], bytes]
CHUNK_BYTES = 4


@dataclass
class FakeMachine:
    """One VM beside its disks. `old_*`: kept for the run that replaced it; `created`: disks that a run made."""

    memory_kib: int = 1024
    vcpus: int = 1
    nics: tuple[str, ...] = ()
    state: State = field(default_factory=dict)
    networks: tuple[str, ...] = ("network:default",)
    arriving: State = field(default_factory=dict)
    old_state: State | None = None
    old_definition: tuple[int, int, tuple[str, ...]] | None = None
    created: tuple[str, ...] = ()

    def describe(self, uuid: str, targets: tuple[str, ...]) -> MachineDescription:
        disks = "".join(f"<disk device='disk'><target dev='{target}' bus='virtio'/></disk>" for target in targets)
        definition = (
            "<domain type='kvm'><os><type arch='x86_64' machine='pc'>hvm</type></os>"
            f"<memory unit='KiB'>{self.memory_kib}</memory><vcpu>{self.vcpus}</vcpu>"
            f"<devices>{disks}{''.join(self.nics)}</devices></domain>"
        )
        kinds = {kind for kind, _ in self.state}
        parts = (StatePart(kind=kind, path="/", format="raw", size_bytes=4, present=True) for kind in kinds)
        return MachineDescription(
            vm_uuid=uuid, definition=(definition,), parts=tuple(parts), networks=self.networks, missing_tools=()
        )

    def files(self) -> tuple[StateFile, ...]:
        return tuple(
            StateFile(kind=kind, name=name, size_bytes=len(data), digest=blake3(data).digest())
            for (kind, name), data in sorted(self.state.items(), key=lambda item: item[0][1])
        )

    def obey(self, request: MachineOrder, disks: dict[str, bytes], *, is_off: bool, fenced: bool) -> Reply:
        """Carry out an order; `disks` is the VM's own, which `CreateDisk` adds to."""
        assert is_off or isinstance(request, KeepMachine), "a running VM is changed"
        assert fenced or isinstance(request, KeepMachine | CreateDisk | RestoreMachine), "changed without a fence"
        match request:
            case ListState():
                return StateFiles(files=self.files())
            case ReadState():
                whole = self.state[request.kind, request.name]
                return StateChunk(data=whole[request.offset_bytes : request.offset_bytes + CHUNK_BYTES])
            case WriteState():
                key = request.kind, request.name
                before = self.arriving.get(key, b"") if request.offset_bytes else b""
                assert len(before) >= request.offset_bytes
                self.arriving[key] = before[: request.offset_bytes] + request.data
                return Done()
            case PlaceState():
                return self._place(request)
            case ChangeDefinition():
                if self.old_definition is None:
                    self.old_definition = self.memory_kib, self.vcpus, self.nics
                self.memory_kib, self.vcpus, self.nics = self.old_definition
                for change in request.changes:
                    self._change(change.element)
                return Done()
            case CreateDisk():
                if request.target not in disks:
                    disks[request.target] = b""
                    self.created += (request.target,)
                return DiskCreated(path=f"/{request.target}")
            case RestoreMachine():
                self._restore(request.share, disks)
                return Done()
            case _:
                self.old_state = self.old_definition = None
                self.created = ()
                return Done()

    def _place(self, request: PlaceState) -> StateFiles:
        for file in request.files:
            if blake3(self.arriving.get((file.kind, file.name), b"")).digest() != file.digest:
                raise AgentRefused(f"{file.name} did not arrive whole", code="machine-state")
        if self.old_state is None:
            self.old_state = dict(self.state)
        kinds = {file.kind for file in request.files}
        kept = {key: data for key, data in self.state.items() if key[0] not in kinds}
        self.state = kept | {(f.kind, f.name): self.arriving[f.kind, f.name] for f in request.files}
        self.arriving = {}
        return StateFiles(files=request.files)

    def _change(self, text: str) -> None:
        element = ET.fromstring(text)
        if element.tag == "memory":
            self.memory_kib = int(element.text or "0")
        elif element.tag == "vcpu":
            self.vcpus = int(element.text or "0")
        elif element.tag == "interface":
            self.nics += (text,)

    def _restore(self, share: MachineShare, disks: dict[str, bytes]) -> None:
        if share is MachineShare.STATE and self.old_state is not None:
            self.state, self.old_state = self.old_state, None
        elif share is MachineShare.DEFINITION and self.old_definition is not None:
            (self.memory_kib, self.vcpus, self.nics), self.old_definition = self.old_definition, None
        elif share is MachineShare.DISKS:
            for target in self.created:
                disks.pop(target, None)
            self.created = ()
