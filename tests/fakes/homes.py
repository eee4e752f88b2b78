"""What the fake agents have to give for a VM that is made anew, and what they have made."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.errors import AgentRefused
from protocol.messages import CreateVm, Provisions, StoragePool

PROVISIONS = Provisions(
    machines=("pc", "q35"),
    cpu_modes=("host-model", "custom"),
    cpu_models=("qemu64",),
    firmware=("bios", "efi"),
    files=(),
    tpm_models=(),
    networks=("network:default",),
    pools=(StoragePool(name="default", kind="dir", path="/pool", active=True, free_bytes=1 << 30),),
)


@dataclass
class FakeHomes:
    """Of whichever host a run goes to. `full`: its pool turns out to be full while volumes are made."""

    provisions: Provisions = PROVISIONS
    full: bool = False
    made: dict[str, CreateVm] = field(default_factory=dict)

    def create(self, request: CreateVm) -> None:
        if self.full:
            raise AgentRefused("the pool default has no room", code="disk-full")
        self.made[request.vm_uuid] = request

    def forget(self, vm_uuid: str) -> bool:
        """Whether it was made for a run that is not final."""
        return self.made.pop(vm_uuid, None) is not None
