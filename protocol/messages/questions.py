"""What the coordinator asks without changing anything, and what agents answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from protocol.messages.words import Condition, HookState, Power, Side


@dataclass(frozen=True, slots=True, kw_only=True)
class HostDescription:
    """Answer to `DescribeHost`."""

    host: str
    software: str
    hypervisor_uri: str
    libvirt_version: str
    qemu_version: str
    bulk_port: int
    fingerprint: str  # SHA-256 of the agent's certificate (DER), hex: what the peer's grant names
    missing_tools: tuple[str, ...]  # each "program (package)"
    clock_s: float = 0.0  # its wall clock as it answers, seconds since 1970; 0: not told
    state_free_bytes: int = 0  # room for digest maps, where the agent keeps its state; 0: not told
    hook: HookState = HookState.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribeHost:
    """Who are you, and what do you run?"""

    reply: ClassVar[type] = HostDescription


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDescription:
    """One image of a backing chain, the top one first."""

    path: str
    format: str
    identity: str
    virtual_size_bytes: int
    internal_snapshots: int
    bitmaps: tuple[str, ...]
    dirty: bool
    corrupt: bool
    encrypted: bool
    external_data: bool
    modified_s: float = 0.0  # when its file was last written, seconds since 1970 by that host's clock; 0: not known
    allocated_bytes: int = 0  # what it takes of its storage
    keeps_bitmaps: bool | None = None  # whether its format can hold persistent dirty bitmaps; None: not told


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskDescription:
    """One disk of a VM as inspection found it."""

    target: str
    kind: str  # file, block, network, other
    chain: tuple[ImageDescription, ...]
    sector_bytes: int
    shareable: bool
    readonly: bool
    problem: str | None
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotDescription:
    """A libvirt snapshot; `ours` when failback made it."""

    name: str
    ours: bool
    external: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceDescription:
    """What keeps a VM from starting, as its agent knows it.

    `condition` and `view` are the durable flag of the disks (originals only; None for a replica).
    """

    pair: str
    run: str
    side: Side
    autostart_before: bool
    locked: tuple[str, ...]  # targets whose images are locked now
    unlocked: tuple[str, ...]  # targets whose lock could not be taken back, for example after a restart
    condition: Condition | None
    view: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiftDescription:
    """A person lifted the fence of a VM on its host: by whom, why, when (seconds since 1970 by that host's clock), of
    which pair and run it was, and what the flag of the disks said then."""

    pair: str
    run: str
    by: str
    reason: str
    at_s: float
    condition: Condition


@dataclass(frozen=True, slots=True, kw_only=True)
class VmDescription:
    """Answer to `InspectVm`."""

    uuid: str
    name: str
    power: Power
    persistent: bool
    autostart: bool
    managed_save: bool
    on_poweroff: str
    machine: str
    firmware: str
    has_tpm: bool
    passthrough: tuple[str, ...]
    disks: tuple[DiskDescription, ...]
    snapshots: tuple[SnapshotDescription, ...]
    checkpoints: tuple[str, ...]
    job: str | None
    job_is_ours: bool
    fence: FenceDescription | None
    lifted: LiftDescription | None = None  # until a run has fenced and released it again
    running_since_s: float = 0.0  # when its process started, seconds since 1970; 0: it does not run, or not known
    last_started_s: float = 0.0  # when it was started and stopped last, by its host's log; 0: the log does not tell
    last_stopped_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectVm:
    """Tell everything a plan needs about the VM of that name or UUID."""

    vm: str
    reply: ClassVar[type] = VmDescription


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerAnswer:
    """The VM's power state now; `images_free`: no process holds a write lock on any of its disks' images
    (our own fence does not count)."""

    power: Power
    images_free: bool
    holders: tuple[str, ...]  # targets whose image some other process holds


@dataclass(frozen=True, slots=True, kw_only=True)
class AskPower:
    """Is that VM off, and is nobody else writing to its disks?"""

    vm_uuid: str
    reply: ClassVar[type] = PowerAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetEvidence:
    """What the target's durable record says of one disk of the original.

    Attributes:
        equals: the view that it equals, or from which a pass that was limited to what had changed since then left it
            torn; None where nothing proves any. Proven by the lock held ever since, or by an unchanged file.
        why_not: a sentence, where `equals` is None.
        map_seed: the seed of its digest map, to be used for the digests of the next pass and of an audit; that of a map
            to be made where there is none yet; None: it keeps no maps.
        map_known_bytes: how much of the disk the map knows.
        why_no_map: a sentence, where that is nothing.
        touched: somebody else has written to the disk since this agent left it; `why_not` says what tells so.
    """

    target: str
    equals: str | None
    why_not: str
    map_seed: int | None
    map_known_bytes: int
    why_no_map: str
    touched: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Answer to `AskEvidence`."""

    disks: tuple[TargetEvidence, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AskEvidence:
    """What is known of the disks of that original without reading them?"""

    vm_uuid: str
    targets: tuple[str, ...]
    reply: ClassVar[type] = Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSamples:
    """Answer to `SampleBlocks`.

    Attributes:
        digests: a digest (xxh3-128, 16 bytes) for each of the offsets, in order; where time ran out, of the first ones.
        data_bytes: how much of the disk is data (does not surely read as zero).
        read_bytes_s: how fast longer runs of data were read, 0 where that cannot be told.
        offsets: the blocks of those digests, where the agent was to choose them.
    """

    digests: bytes
    data_bytes: int
    read_bytes_s: float
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleBlocks:
    """What do these blocks of 64 KiB hold, about now? For estimates alone: a running VM writes meanwhile, and no
    evidence is made of the answer.

    `choose`: so many blocks, picked at random all over the disk's data, instead of `offsets`; in random order, so
    that the first ones of them are a sample too. At most 4096 either way."""

    vm_uuid: str
    target: str
    seed: int
    offsets: tuple[int, ...] = ()
    choose: int = 0
    reply: ClassVar[type] = BlockSamples


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAuthority:
    """Answer to `AskAuthority`.

    Attributes:
        epoch: the highest seen, 0 where none was.
        holder: whose it is, by the name in that coordinator's certificate and the place of its registry, in words.
        is_you: whoever asks is that coordinator, with that registry; also where nobody holds the pair.
        run: the run it came for.
        since_s: when that coordinator first showed it, seconds since 1970 by the agent's clock.
    """

    epoch: int
    holder: str
    is_you: bool
    run: str
    since_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AskAuthority:
    """Which is the highest epoch you have seen for that pair, and who holds it? `place`: as in `Order`."""

    pair: str
    place: str = ""
    reply: ClassVar[type] = PairAuthority


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """Answer to `Ping`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Are you there?"""

    reply: ClassVar[type] = Pong
