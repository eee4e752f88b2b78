"""A healthy pair in *Failover*, as values; tests spoil one thing of it at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coordinator.findings import Case, Findings, Problem, SideFindings
from coordinator.model import DiskPair, Newest, OriginalFlag, Pair, RunOptions, State, VmRef
from protocol.messages import (
    DiskDescription,
    HostDescription,
    ImageDescription,
    MachineDescription,
    Power,
    PowerAnswer,
    Side,
    StateKind,
    StatePart,
    VmDescription,
)

GIB = 1 << 30
ORIGINAL_UUID = "0b7a3c52-57a5-4a5b-9f3c-3f1d1f3b0a01"
REPLICA_UUID = "0b7a3c52-57a5-4a5b-9f3c-3f1d1f3b0a02"

PAIR = Pair(
    name="web1",
    original=VmRef(host="prod1", name="web1", uuid=ORIGINAL_UUID),
    replica=VmRef(host="dr1", name="web1-replica", uuid=REPLICA_UUID),
    disks=(DiskPair(original="vda", replica="vda"), DiskPair(original="vdb", replica="vdb")),
    excluded=(),
    state=State.FAILOVER,
    newest=Newest.REPLICA,
    flag=OriginalFlag(),
    epoch=3,
    run=None,
)


def image(path: str, **changes: Any) -> ImageDescription:
    """A clean qcow2 image of 8 GiB."""
    plain = ImageDescription(
        path=path,
        format="qcow2",
        identity=f"file:{path}",
        virtual_size_bytes=8 * GIB,
        internal_snapshots=0,
        bitmaps=(),
        dirty=False,
        corrupt=False,
        encrypted=False,
        external_data=False,
    )
    return replace(plain, **changes)


def disk(target: str, path: str, **changes: Any) -> DiskDescription:
    """A plain file disk with 100 GiB free beside it."""
    plain = DiskDescription(
        target=target,
        kind="file",
        chain=(image(path),),
        sector_bytes=512,
        shareable=False,
        readonly=False,
        problem=None,
        free_bytes=100 * GIB,
    )
    return replace(plain, **changes)


def vm(side: Side, **changes: Any) -> VmDescription:
    """The original, off; or the replica, running."""
    original = side is Side.ORIGINAL
    folder = "/var/lib/libvirt/images" if original else "/srv/dr"
    plain = VmDescription(
        uuid=ORIGINAL_UUID if original else REPLICA_UUID,
        name="web1" if original else "web1-replica",
        power=Power.OFF if original else Power.RUNNING,
        persistent=True,
        autostart=False,
        managed_save=False,
        on_poweroff="destroy",
        machine="pc-i440fx-7.2",
        firmware="bios",
        has_tpm=False,
        passthrough=(),
        disks=(disk("vda", f"{folder}/web1-a.qcow2"), disk("vdb", f"{folder}/web1-b.qcow2")),
        snapshots=(),
        checkpoints=(),
        job=None,
        job_is_ours=False,
        fence=None,
    )
    return replace(plain, **changes)


def host(name: str, **changes: Any) -> HostDescription:
    """A host that has everything."""
    plain = HostDescription(
        host=name,
        software="failback 0.1.0",
        hypervisor_uri="qemu:///system",
        libvirt_version="9.0.0",
        qemu_version="7.2.0",
        bulk_port=9861,
        fingerprint="00" * 32,
        missing_tools=(),
    )
    return replace(plain, **changes)


def side(
    which: Side,
    *,
    host_answer: HostDescription | Problem | None = None,
    answer: PowerAnswer | None = None,
    problem: Problem | None = None,
    machine: MachineDescription | Problem | None = None,
    **changes: Any,
) -> SideFindings:
    """What one agent said; `changes` are of its VM."""
    name = "prod1" if which is Side.ORIGINAL else "dr1"
    described = vm(which, **changes)
    free = PowerAnswer(power=described.power, images_free=described.power is Power.OFF, holders=())
    return SideFindings(host=host_answer or host(name), vm=problem or described, power=answer or free, machine=machine)


def definition(devices: str = "", *, memory_kib: int = 2097152, vcpus: int = 2, more: str = "") -> str:
    """A definition as libvirt tells it, with the disks of `vm`."""
    disks = "".join(f"<disk type='file' device='disk'><target dev='{t}' bus='virtio'/></disk>" for t in ("vda", "vdb"))
    return (
        f"<domain type='kvm'><memory unit='KiB'>{memory_kib}</memory><currentMemory unit='KiB'>{memory_kib}"
        f"</currentMemory><vcpu placement='static'>{vcpus}</vcpu>{more}<devices>{disks}{devices}</devices></domain>"
    )


def machine(which: Side, **changes: Any) -> MachineDescription:
    """A VM beside its disks: nothing in which the two would differ."""
    plain = MachineDescription(
        vm_uuid=ORIGINAL_UUID if which is Side.ORIGINAL else REPLICA_UUID,
        definition=(definition(),),
        parts=(),
        networks=("network:default", "bridge:br0"),
        missing_tools=(),
    )
    return replace(plain, **changes)


def part(kind: StateKind, **changes: Any) -> StatePart:
    """State that is there and can be carried."""
    plain = StatePart(kind=kind, path="/state", format="raw", size_bytes=540672, present=True)
    return replace(plain, **changes)


def case(
    *,
    pair: Pair = PAIR,
    original: SideFindings | None = None,
    replica: SideFindings | None = None,
    options: RunOptions | None = None,
    failover_since: str | None = None,
) -> Case:
    """A case without a fault unless one is given."""
    findings = Findings(
        original=original or side(Side.ORIGINAL),
        replica=replica or side(Side.REPLICA),
        failover_since=failover_since,
    )
    return Case(pair=pair, findings=findings, options=options or RunOptions())
