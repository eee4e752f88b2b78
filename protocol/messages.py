"""Every message that crosses a wire, as frozen, typed values.

Two conversations use them (``protocol/SPEC.md``):

* **control**: the coordinator asks, an agent answers. Each `Request` class names its reply in ``reply``.
* **bulk**: a source agent and a target agent make one disk equal one view.

Plain types only: ``str``, ``int``, ``bool``, ``bytes``, enums, tuples of those, and other messages. Sizes and offsets
are bytes, durations are seconds. A path in a message is for people to read: no agent opens a path it was sent.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

PROTOCOL_VERSIONS = (2,)
"""The versions this software speaks, best first."""


# --- words shared by several messages -------------------------------------------------------------------------


class Role(enum.Enum):
    """What a peer is; also written in its certificate."""

    COORDINATOR = "coordinator"
    AGENT = "agent"


class Power(enum.Enum):
    """What a VM is doing."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUTTING_DOWN = "shutting-down"
    OFF = "off"
    CRASHED = "crashed"
    SUSPENDED = "suspended"


class Side(enum.Enum):
    """Which VM of the pair an order speaks of."""

    ORIGINAL = "original"
    REPLICA = "replica"


class Direction(enum.Enum):
    """What an agent does in a pass."""

    SEND = "send"
    RECEIVE = "receive"


class OnTimeout(enum.Enum):
    """What to do with a guest that does not power off in time."""

    ABORT = "abort"  # leave it running, fail
    FORCE = "force"  # destroy it, gracefully first


class Condition(enum.Enum):
    """The durable flag of the original's disks, kept by its agent and by the registry."""

    INTACT = "intact"  # whole: as it was at the disaster, or as its own guest left it
    TORN = "torn"  # from the first write until verified: it must not boot
    EQUALS_VIEW = "equals-view"  # verified equal to the view named beside it


class Codec(enum.Enum):
    """How the payload of `BlockData` is stored."""

    RAW = "raw"
    ZSTD = "zstd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Under whose authority an order comes: an agent obeys only the highest epoch it has seen for the pair."""

    pair: str
    run: str
    epoch: int


class Tracking(enum.Enum):
    """How what the guest writes from a view on is recorded."""

    NONE = "none"
    BITMAP = "bitmap"  # by dirty bitmaps, for the disks whose format has them
    OVERLAY = "overlay"  # by dirty bitmaps where the format has them, by a live overlay where it has not


class PassKind(enum.Enum):
    """What a pass is for."""

    SYNC = "sync"  # make the target equal the view
    AUDIT = "audit"  # compare the view, read whole, with the target's digest map; nothing is written
    VERIFY = "verify"  # compare the view with the target's storage, both read whole; nothing is written


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """A stretch of a disk."""

    offset_bytes: int
    length_bytes: int


# --- handshake (control and bulk) -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of the side that connected, on a control connection."""

    versions: tuple[int, ...]
    software: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The agent's answer: the version chosen and who it is."""

    version: int
    software: str
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkHello:
    """First message of the source agent on a bulk connection: which grant, which of its disks. A disk may get several
    connections; all carry the same seed."""

    versions: tuple[int, ...]
    software: str
    grant: str
    target: str  # name of the disk at the receiving side
    digest_seed: int  # seed of the xxh3-128 digests of this pass, random, 64 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkWelcome:
    """The target agent's answer. `window_bytes`: how much `BlockData` payload may be unacknowledged on this connection;
    `ahead_bytes`: how many bytes of data may be asked for on it with `CompareSpan` and not be answered yet; `lanes`:
    how many connections it takes for this disk."""

    version: int
    software: str
    window_bytes: int
    ahead_bytes: int
    lanes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """Said before closing on purpose; `code` and `sentence` say why. Nothing follows it."""

    code: str
    sentence: str


# --- control: questions that change nothing -------------------------------------------------------------------


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
    """

    target: str
    equals: str | None
    why_not: str
    map_seed: int | None
    map_known_bytes: int
    why_no_map: str


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
class Pong:
    """Answer to `Ping`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Are you there?"""

    reply: ClassVar[type] = Pong


# --- control: orders ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The order is carried out; nothing more to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoweredOff:
    """The VM is off."""

    was_running: bool
    forced: bool
    elapsed_s: float
    killed: bool = False  # it did not end gracefully either: its bitmaps are lost


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOff:
    """Ask the guest to power off (repeatedly, through its agent where that answers, else by ACPI), wait `timeout_s`,
    then do as `on_timeout` says: FORCE ends QEMU gracefully, so that bitmaps survive, and kills it after
    `kill_after_s`.

    Fails with code ``shutdown-timeout`` when the guest still runs at the end. No-op when off.
    """

    order: Order
    vm_uuid: str
    timeout_s: float
    on_timeout: OnTimeout
    kill_after_s: float = 60.0
    reply: ClassVar[type] = PoweredOff


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOn:
    """Start the VM. No-op when it runs. Refused (code ``fenced``) while the agent fences it."""

    order: Order
    vm_uuid: str
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceVm:
    """Keep the shut-off VM from starting, durably: autostart off, image locks held (again after an agent restart).

    An original's images are locked exclusively (we write through that lock); a replica's bases are locked so that
    they can be read and nobody can write. Repeated, it takes what is missing. Fails with ``disk-busy`` when another
    process holds an image.
    """

    order: Order
    vm_uuid: str
    side: Side
    targets: tuple[str, ...]
    reply: ClassVar[type] = FenceDescription


@dataclass(frozen=True, slots=True, kw_only=True)
class LiftFence:
    """Release the locks and forget the fence. `restore_autostart`: set autostart to what it was before the fence, or,
    where `autostart` is given, to that (an earlier fence had taken it away and was lifted without giving it back).

    Refused (code ``torn``) while the flag of the disks says torn. Harmless when there is no fence.
    """

    order: Order
    vm_uuid: str
    restore_autostart: bool
    autostart: bool | None = None
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class SetCondition:
    """Write the durable flag of the fenced original's disks. `view` names the view for EQUALS_VIEW, else None."""

    order: Order
    vm_uuid: str
    condition: Condition
    view: str | None
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewedDisk:
    """One disk of a view.

    Attributes:
        tracked: from this view on, what the guest writes to it is recorded, so that a later view may be opened `since`
            this one.
        since: the earlier view since which this one knows what was written; None: it does not.
        why_not: why it is not tracked, or does not know: a sentence, or empty.
    """

    target: str
    size_bytes: int
    tracked: bool = False
    since: str | None = None
    why_not: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewOpened:
    """The view is there and frozen. `live`: served by the running VM, otherwise the images of the shut-off one."""

    view: str
    live: bool
    disks: tuple[ViewedDisk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSince:
    """The earlier view of a disk since which a new one shall know what was written."""

    target: str
    view: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenView:
    """Freeze a view named `view` of the VM's disks: a pull-mode backup when it runs, its (fenced) images when off.

    `track`: how to record what is written from this view on, from the same instant.
    `since`: what was written since these views shall be known; the answer says of which disks it is, and why not.
    `freeze_guest`: ask the guest's agent to freeze its file systems for that instant; always thawed.
    """

    order: Order
    vm_uuid: str
    targets: tuple[str, ...]
    view: str
    track: Tracking = Tracking.NONE
    since: tuple[ViewSince, ...] = ()
    freeze_guest: bool = False
    reply: ClassVar[type] = ViewOpened


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseView:
    """End that view and remove what belonged to it. Harmless when there is none."""

    order: Order
    vm_uuid: str
    view: str
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class DropCheckpoints:
    """Forget what our views of this VM recorded (checkpoints, overlays), but for the views named in `keep`: for real
    while it runs, the checkpoints' metadata alone while it is off (`EndTracking` does the rest). What others made
    stays. Harmless when repeated."""

    order: Order
    vm_uuid: str
    keep: tuple[str, ...] = ()
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskTracking:
    """The record of what was written to one disk of a shut-off VM: `since` is the view it goes back to, None where it
    is not valid any more, and `why_not` a sentence."""

    target: str
    since: str | None
    dirty_bytes: int
    why_not: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingRead:
    """Answer to `ReadTracking` and `AskWritten`."""

    disks: tuple[DiskTracking, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTracking:
    """How much was written to the disks of the shut-off, fenced VM since those views? Validates the records."""

    order: Order
    vm_uuid: str
    since: tuple[ViewSince, ...]
    reply: ClassVar[type] = TrackingRead


@dataclass(frozen=True, slots=True, kw_only=True)
class AskWritten:
    """About how much has been written to the disks of the running VM since those views? For predictions alone: nothing
    is proven by the answer, and it is out of date when it comes."""

    vm_uuid: str
    since: tuple[ViewSince, ...]
    reply: ClassVar[type] = TrackingRead


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTracking:
    """Remove everything our views left in this VM: checkpoints, persistent bitmaps in its images, live overlays, which
    are merged into their bases, whether it runs or is off. What others made stays. The last act of commit, undo and
    cancel. Harmless when repeated."""

    order: Order
    vm_uuid: str
    targets: tuple[str, ...]
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectedDisk:
    """One disk of a protective snapshot."""

    target: str
    base: str
    base_format: str
    overlay: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Protected:
    """The protective snapshot stands."""

    snapshot: str
    disks: tuple[ProtectedDisk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Protect:
    """Take the protective snapshot of the shut-off, fenced replica; its new overlays are fenced as well."""

    order: Order
    vm_uuid: str
    targets: tuple[str, ...]
    snapshot: str
    reply: ClassVar[type] = Protected


@dataclass(frozen=True, slots=True, kw_only=True)
class Unprotect:
    """Drop the protective snapshot: the VM's disks are their bases again, exactly as they were."""

    order: Order
    vm_uuid: str
    snapshot: str
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantedDisk:
    """One disk of a grant: its name at the agent that is told, its name at the peer, its size at the source and
    at the target (a larger target is zeroed behind the source's end).

    `since`: both sides have proven that the target equals that view, so that only what was written since then is sent,
    without comparing. `digest_seed`: the seed of the target's digest map, which then stands for the target's blocks.
    """

    target: str
    peer_target: str
    source_size_bytes: int
    target_size_bytes: int
    since: str | None = None
    digest_seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What the bulk connections of one pass may do; told to both agents beforehand.

    Attributes:
        grant: 128 random bits, hex.
        direction: what the agent that is told does.
        peer_fingerprint: SHA-256 (hex) of the only certificate the other end may show.
        view: the view the target is made equal to, or is compared with.
        kind: what the pass is for.
    """

    grant: str
    vm_uuid: str
    direction: Direction
    peer_fingerprint: str
    view: str
    disks: tuple[GrantedDisk, ...]
    kind: PassKind = PassKind.SYNC


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskReport:
    """What a pass did to one disk, in bytes of disk unless it says otherwise. Sender and receiver each fill what they
    know; what a side does not know is 0.

    Attributes:
        target: the disk's name at the reporting side.
        size_bytes: the source's size.
        zero_bytes: known to read as zero at the source, not read.
        compared_bytes: read and hashed on this side; of what was sent without comparing, what the source read for it.
        changed_bytes: what differed and was sent as data: of blocks, or of pages within them.
        wire_bytes: everything the disk's bulk connections carried, both ways, before TLS.
        written_bytes, zeroed_bytes: what the target wrote and what it zeroed or discarded.
        verified_bytes: read back at the target and equal to the source's BLAKE3 digest, or to zero.
        rung: the rung of evidence used (DESIGN: ``digests``, ``extents`` …) and `why_not_higher`, a sentence.
        past_cache: whether the read-back went past the page cache.
        frames: how many frames of data were sent, by how they were stored: ``raw``, or ``zstd`` and the level.
        stored_bytes: what `changed_bytes` became in those frames.
        lanes: connections used.
        superblock_bytes, detail_bytes: the granularity of comparing that the pass ended with.
        access: how this side read the disk, in words.
        differing_bytes: in a pass that only compares: what differs; `differing`: where, the first 64 stretches.
        unchanged_bytes: not written since the view that the grant's `since` names, so neither read nor sent. With
            `zero_bytes` and `compared_bytes` of the source it is the whole disk.
    """

    target: str
    size_bytes: int
    zero_bytes: int
    compared_bytes: int
    changed_bytes: int
    wire_bytes: int
    written_bytes: int
    zeroed_bytes: int
    verified_bytes: int
    rung: str
    why_not_higher: str
    past_cache: bool
    frames: dict[str, int]
    stored_bytes: int
    lanes: int
    superblock_bytes: int
    detail_bytes: int
    access: str
    differing_bytes: int = 0
    differing: tuple[ByteRange, ...] = ()
    unchanged_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """A pass is complete on the reporting side: every range is proven against `view`."""

    view: str
    elapsed_s: float
    disks: tuple[DiskReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskProgress:
    """How far one disk is. `done_bytes` of `total_bytes` (source size, or what was written since the granted view) are
    settled: compared, and sent where they differed."""

    target: str
    total_bytes: int
    done_bytes: int
    zero_bytes: int
    changed_bytes: int
    wire_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassProgress:
    """Pushed by the source agent about twice a second while `RunPass` works."""

    disks: tuple[DiskProgress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowPass:
    """Store the grant. A grant lives until its pass ends, a newer one comes for the pair, or the agent restarts."""

    order: Order
    grant: Grant
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPass:
    """Carry out the granted pass. The sender connects to `peer_host`:`peer_port` (certificate name `peer_name`); the
    receiver waits for it and gives those as ``""``, 0, ``""``. The receiver durably marks the original torn before
    its first write.

    `limit_network`, `limit_read`: bytes/s that this agent may send and read in the pass, all disks together; None:
    no limit."""

    order: Order
    grant: str
    peer_name: str
    peer_host: str
    peer_port: int
    limit_network: int | None = None
    limit_read: int | None = None
    reply: ClassVar[type] = PassReport


@dataclass(frozen=True, slots=True, kw_only=True)
class SetLimits:
    """Other limits (as in `RunPass`, both) for the pass of the pair that is granted or running here, from now on.

    What it says stands also against a `RunPass` of the same grant that is read after it. Harmless when there is no
    pass; nothing is remembered beyond it."""

    order: Order
    limit_network: int | None
    limit_read: int | None
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop the request of that number; it is answered with a `Failure` of code ``cancelled``. Has no answer itself."""

    request: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The request failed: a stable code, a sentence for the administrator, and plain facts."""

    code: str
    sentence: str
    facts: dict[str, str | int]


Question = DescribeHost | InspectVm | AskPower | AskEvidence | AskWritten | SampleBlocks | Ping
OrderRequest = (
    PowerOff
    | PowerOn
    | FenceVm
    | LiftFence
    | SetCondition
    | OpenView
    | CloseView
    | DropCheckpoints
    | ReadTracking
    | EndTracking
    | Protect
    | Unprotect
    | AllowPass
    | RunPass
    | SetLimits
)
Request = Question | OrderRequest
Reply = (
    HostDescription
    | VmDescription
    | PowerAnswer
    | Evidence
    | BlockSamples
    | Pong
    | Done
    | PoweredOff
    | FenceDescription
    | ViewOpened
    | TrackingRead
    | Protected
    | PassReport
)
ControlMessage = Hello | Welcome | Goodbye | Request | Reply | Cancel | Failure | PassProgress


# --- bulk: source to target -----------------------------------------------------------------------------------
# Ranges travel in the payload as little-endian unsigned 64-bit pairs (offset, length); digests as 16 or 32 raw bytes.


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSpan:
    """A stretch of the disk, whole: the ranges of it that hold data, with their digests; the rest of it reads as zero.
    Answered with `SpanAnswer`, unless nothing of it is data. The spans of one connection rise; together those of all
    connections are the disk.

    Payload: `count` ranges, then one digest (16 bytes) for each superblock of them, in order. Ranges start at multiples
    of 64 KiB and end there, or where the span ends. A superblock is what of one range lies between two multiples of
    `superblock_bytes`. `detail_bytes`: what the answer shall tell digests of within superblocks that differ; where it
    equals `superblock_bytes`, it tells none.
    """

    batch: int
    offset_bytes: int
    length_bytes: int
    superblock_bytes: int
    detail_bytes: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedSpan:
    """A stretch of the disk, whole, of which is told only what was written since the view that the grant's `since`
    names: the rest, however much, is unchanged. Allowed only where the grant has `since`, and `CompareSpan` is not.

    Payload: `data_count` ranges that hold data, `zero_count` ranges that read as zero, then, where it asks, one digest
    (16 bytes) for each superblock of the data. `superblock_bytes` 0: it asks nothing and is not answered, and all of
    its data comes. Otherwise it asks about its data as `CompareSpan` does, and is answered with `SpanAnswer` unless it
    has none. Both kinds of ranges start at multiples of 64 KiB and end there, or where the span ends.
    """

    batch: int
    offset_bytes: int
    length_bytes: int
    superblock_bytes: int
    detail_bytes: int
    data_count: int
    zero_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroRanges:
    """Ranges that were compared, differ, and turned out to hold only zeroes. Payload: `count` ranges."""

    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockData:
    """What differs. Payload: `count` ranges, then `count` BLAKE3 digests (32 bytes each, of the plain bytes),
    then the ranges' bytes, concatenated, stored as `codec` says; `plain_bytes` is their length before that."""

    count: int
    codec: Codec
    plain_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EndOfPass:
    """Nothing more comes on this connection: when all `lanes` connections of the disk have said so, the target flushes,
    reads back, verifies, and answers `PassVerified` on each. The counts are the source's own books of this connection,
    for the target to check against its own."""

    lanes: int
    data_bytes: int
    zero_bytes: int
    compared_bytes: int
    unchanged_bytes: int = 0


# --- bulk: target to source -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanAnswer:
    """Which superblocks of a span differ at the target.

    Payload: a bit for each superblock, set where it differs; a bit for each, set where it differs and the target reads
    as zero there (each row of bits, most significant first, fills whole bytes); then `details` digests (16 bytes): of
    each `detail_bytes` of the superblocks that differ and are not zero here, in order.
    `read_bytes`: what the target had to read for it (the rest is known to be zero).
    """

    batch: int
    read_bytes: int
    details: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """`payload_bytes` of `BlockData` payload more are off the wire and out of memory."""

    payload_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassVerified:
    """Everything is flushed, read back past the page cache and equal to what was sent."""

    written_bytes: int
    zeroed_bytes: int
    verified_bytes: int
    compared_bytes: int
    past_cache: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PassFailed:
    """The pass ends here on the side that says so; both sides report it. `offset_bytes` is -1 where there is none."""

    code: str
    sentence: str
    target: str
    offset_bytes: int


BulkMessage = (
    BulkHello
    | BulkWelcome
    | Goodbye
    | CompareSpan
    | TrackedSpan
    | ZeroRanges
    | BlockData
    | EndOfPass
    | SpanAnswer
    | Credit
    | PassVerified
    | PassFailed
)
