"""What the coordinator orders an agent to do to a VM, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from protocol.messages.questions import FenceDescription
from protocol.messages.words import Condition, OnTimeout, Order, Side, Tracking


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The order is carried out; nothing more to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakePair:
    """A person says that the coordinator which holds the pair holds it no more: from now on the one that asks does,
    under an epoch that must be higher than any seen. Every other order of another coordinator is refused (code
    ``held``). Acknowledged when everything under the lower epoch has ended."""

    order: Order
    reply: ClassVar[type] = Done


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
        rung: by what it knows it, ``bitmap`` or ``overlay``; empty: not told.
    """

    target: str
    size_bytes: int
    tracked: bool = False
    since: str | None = None
    why_not: str = ""
    rung: str = ""


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
    `reopen`: answer with that very view, as it was frozen before, also by an agent process that was killed since; where
    it is not there any more nothing is opened, and the order fails with code `no-view`.
    """

    order: Order
    vm_uuid: str
    targets: tuple[str, ...]
    view: str
    track: Tracking = Tracking.NONE
    since: tuple[ViewSince, ...] = ()
    freeze_guest: bool = False
    reopen: bool = False
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
    """Take the protective snapshot of the shut-off, fenced replica, or the working snapshot of the original; its new
    overlays are fenced as well, and an original's are what passes write to from then on.

    Of an original whose disks are torn none is taken (code ``torn``): it would give nothing back.
    """

    order: Order
    vm_uuid: str
    targets: tuple[str, ...]
    snapshot: str
    side: Side = Side.REPLICA
    reply: ClassVar[type] = Protected


@dataclass(frozen=True, slots=True, kw_only=True)
class Unprotect:
    """Drop the snapshot: the shut-off VM's disks are their bases again, exactly as they were. The flag of an original's
    disks is then *intact*, unless somebody wrote to a base. Harmless when repeated; refused once `MergeProtection` has
    begun."""

    order: Order
    vm_uuid: str
    snapshot: str
    side: Side = Side.REPLICA
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeProtection:
    """Put what the overlays of the original's working snapshot hold into their bases, while it runs or with it off, and
    remove them: its disks are defined as before the run, and hold what its guest wrote. Harmless when repeated."""

    order: Order
    vm_uuid: str
    snapshot: str
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRestorePoint:
    """The protective snapshot of the shut-off, fenced replica stays: its bases become read-only until it goes."""

    order: Order
    vm_uuid: str
    snapshot: str
    reply: ClassVar[type] = Protected


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRestorePoint:
    """Merge the oldest restore point of the shut-off, fenced VM into its bases, and forget it. The disks read the same
    before and after. Harmless when repeated, and after an attempt that was cut short."""

    order: Order
    vm_uuid: str
    snapshot: str
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
