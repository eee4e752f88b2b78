"""Every message that crosses a wire, as frozen, typed values.

Two conversations use them (``protocol/SPEC.md``):

* **control**: the coordinator asks, an agent answers. Each `Request` class names its reply in ``reply``.
* **bulk**: a source agent and a target agent make one disk equal one view.

Plain types only: ``str``, ``int``, ``bool``, ``bytes``, enums, tuples of those, and other messages. Sizes and offsets
are bytes, durations are seconds. A path in a message is for people to read: no agent opens a path it was sent.
"""

from __future__ import annotations

from protocol.messages.bulk import (
    BlockData,
    CompareSpan,
    Credit,
    EndOfPass,
    PassFailed,
    PassVerified,
    ProvenRanges,
    SpanAnswer,
    SpansSettled,
    TrackedSpan,
    ZeroRanges,
)
from protocol.messages.handshake import BulkHello, BulkWelcome, Goodbye, Hello, Welcome
from protocol.messages.health import (
    AskHoldings,
    Cleaned,
    CleanLeftovers,
    ForgetPair,
    HeldCondition,
    HeldDisk,
    HeldFence,
    HeldPair,
    HeldPass,
    HeldServer,
    Holdings,
    MappedDisk,
    PairMap,
    RememberPair,
    Remnant,
    RemnantKind,
    VmName,
)
from protocol.messages.homes import (
    CreateVm,
    DescribeProvisions,
    KeepCreated,
    NewVolume,
    Provisions,
    RemoveCreated,
    StoragePool,
    VmCreated,
)
from protocol.messages.machine import (
    ChangeDefinition,
    CreateDisk,
    DefinitionChange,
    DescribeMachine,
    DiskCreated,
    KeepMachine,
    ListState,
    MachineDescription,
    MachineShare,
    PlaceState,
    ReadState,
    RestoreMachine,
    StateChunk,
    StateFile,
    StateFiles,
    StateKind,
    StatePart,
    WriteState,
)
from protocol.messages.orders import (
    AskWritten,
    Cancel,
    CloseView,
    DiskTracking,
    Done,
    DropCheckpoints,
    EndTracking,
    Failure,
    FenceVm,
    KeepRestorePoint,
    LiftFence,
    MergeProtection,
    MergeRestorePoint,
    OpenView,
    PoweredOff,
    PowerOff,
    PowerOn,
    Protect,
    Protected,
    ProtectedDisk,
    ReadTracking,
    SetCondition,
    TakePair,
    TrackingRead,
    Unprotect,
    ViewedDisk,
    ViewOpened,
    ViewSince,
)
from protocol.messages.passes import (
    AllowPass,
    DiskProgress,
    DiskReport,
    Grant,
    GrantedDisk,
    PassProgress,
    PassReport,
    RunPass,
    SetLimits,
)
from protocol.messages.questions import (
    AskAuthority,
    AskEvidence,
    AskPower,
    BlockSamples,
    DescribeHost,
    DiskDescription,
    Evidence,
    FenceDescription,
    HostDescription,
    ImageDescription,
    InspectVm,
    LiftDescription,
    PairAuthority,
    Ping,
    Pong,
    PowerAnswer,
    SampleBlocks,
    SnapshotDescription,
    TargetEvidence,
    VmDescription,
)
from protocol.messages.words import (
    ByteRange,
    Codec,
    Condition,
    Direction,
    HookState,
    OnTimeout,
    Order,
    PassKind,
    Power,
    Role,
    Side,
    Tracking,
)

PROTOCOL_VERSIONS = (2,)
"""The versions this software speaks, best first."""

Question = (
    DescribeHost
    | InspectVm
    | AskPower
    | AskEvidence
    | AskWritten
    | SampleBlocks
    | Ping
    | AskHoldings
    | AskAuthority
    | DescribeMachine
    | DescribeProvisions
)
MachineOrder = (
    ListState | ReadState | WriteState | PlaceState | ChangeDefinition | CreateDisk | RestoreMachine | KeepMachine
)
"""Orders about what of a VM is no disk."""

HomeOrder = CreateVm | RemoveCreated | KeepCreated
"""Orders about a VM that is made anew."""

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
    | KeepRestorePoint
    | MergeRestorePoint
    | MergeProtection
    | AllowPass
    | RunPass
    | SetLimits
    | TakePair
    | RememberPair
    | CleanLeftovers
    | ForgetPair
    | MachineOrder
    | HomeOrder
)
Request = Question | OrderRequest
Reply = (
    HostDescription
    | VmDescription
    | PowerAnswer
    | Evidence
    | BlockSamples
    | PairAuthority
    | Pong
    | Done
    | PoweredOff
    | FenceDescription
    | ViewOpened
    | TrackingRead
    | Protected
    | PassReport
    | Holdings
    | Cleaned
    | MachineDescription
    | StateFiles
    | StateChunk
    | DiskCreated
    | Provisions
    | VmCreated
)
ControlMessage = Hello | Welcome | Goodbye | Request | Reply | Cancel | Failure | PassProgress

BulkMessage = (
    BulkHello
    | BulkWelcome
    | Goodbye
    | CompareSpan
    | TrackedSpan
    | ZeroRanges
    | SpansSettled
    | BlockData
    | EndOfPass
    | SpanAnswer
    | ProvenRanges
    | Credit
    | PassVerified
    | PassFailed
)

__all__ = [
    "PROTOCOL_VERSIONS",
    "AllowPass",
    "AskAuthority",
    "AskEvidence",
    "AskHoldings",
    "AskPower",
    "AskWritten",
    "BlockData",
    "BlockSamples",
    "BulkHello",
    "BulkMessage",
    "BulkWelcome",
    "ByteRange",
    "Cancel",
    "ChangeDefinition",
    "CleanLeftovers",
    "Cleaned",
    "CloseView",
    "Codec",
    "CompareSpan",
    "Condition",
    "ControlMessage",
    "CreateDisk",
    "CreateVm",
    "Credit",
    "DefinitionChange",
    "DescribeHost",
    "DescribeMachine",
    "DescribeProvisions",
    "Direction",
    "DiskCreated",
    "DiskDescription",
    "DiskProgress",
    "DiskReport",
    "DiskTracking",
    "Done",
    "DropCheckpoints",
    "EndOfPass",
    "EndTracking",
    "Evidence",
    "Failure",
    "FenceDescription",
    "FenceVm",
    "ForgetPair",
    "Goodbye",
    "Grant",
    "GrantedDisk",
    "HeldCondition",
    "HeldDisk",
    "HeldFence",
    "HeldPair",
    "HeldPass",
    "HeldServer",
    "Hello",
    "Holdings",
    "HomeOrder",
    "HookState",
    "HostDescription",
    "ImageDescription",
    "InspectVm",
    "KeepCreated",
    "KeepMachine",
    "KeepRestorePoint",
    "LiftDescription",
    "LiftFence",
    "ListState",
    "MachineDescription",
    "MachineOrder",
    "MachineShare",
    "MappedDisk",
    "MergeProtection",
    "MergeRestorePoint",
    "NewVolume",
    "OnTimeout",
    "OpenView",
    "Order",
    "OrderRequest",
    "PairAuthority",
    "PairMap",
    "PassFailed",
    "PassKind",
    "PassProgress",
    "PassReport",
    "PassVerified",
    "Ping",
    "PlaceState",
    "Pong",
    "Power",
    "PowerAnswer",
    "PowerOff",
    "PowerOn",
    "PoweredOff",
    "Protect",
    "Protected",
    "ProtectedDisk",
    "ProvenRanges",
    "Provisions",
    "Question",
    "ReadState",
    "ReadTracking",
    "RememberPair",
    "Remnant",
    "RemnantKind",
    "RemoveCreated",
    "Reply",
    "Request",
    "RestoreMachine",
    "Role",
    "RunPass",
    "SampleBlocks",
    "SetCondition",
    "SetLimits",
    "Side",
    "SnapshotDescription",
    "SpanAnswer",
    "SpansSettled",
    "StateChunk",
    "StateFile",
    "StateFiles",
    "StateKind",
    "StatePart",
    "StoragePool",
    "TakePair",
    "TargetEvidence",
    "TrackedSpan",
    "Tracking",
    "TrackingRead",
    "Unprotect",
    "ViewOpened",
    "ViewSince",
    "ViewedDisk",
    "VmCreated",
    "VmDescription",
    "VmName",
    "Welcome",
    "WriteState",
    "ZeroRanges",
]
