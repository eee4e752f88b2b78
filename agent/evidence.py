"""What is known of an original's disks without reading them: what each equals, and what proves it.

The order of what becomes durable is the point of it. Before the first write of a pass the record says *torn from view
N* (a pass limited to what was written since N) or nothing at all (any other); only when the pass is verified and the
disk closed it says *equals view N*. A crash between any two of these leaves a record that claims too little.

What proves that a record still holds: of a file its unchanged stamp, be its lock held or not, for locks bind QEMU
alone; of what has no stamp, a block device say, the image lock, held by this process without a gap since then. All
methods block and may be called from several worker threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from agent.disk.lock import HeldImage
from agent.disk.stamp import Stamp, stamp_of
from agent.equals import EqualsBook, EqualsRecord
from agent.errors import NoEvidence
from agent.fences import FenceKeeper
from agent.ledger import FencedImage
from agent.maps import MapDesk
from protocol.messages import Evidence, GrantedDisk, TargetEvidence

SETTLE_S = 0.02
"""Between the last write and the stamp: the kernel stamps files by a clock that moves every few milliseconds (10 at
most), and within one tick a later write would leave no trace."""


Marks = dict[str, tuple[HeldImage, Stamp | None]]
"""By target: the lock that an image is held by, and its stamp."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The view that a disk is proven to equal (or to be torn from), or a sentence why none is; `touched`: because it
    is known to be another image, or one that was written to, than what this agent left."""

    view: str | None
    why_not: str = ""
    touched: bool = False


@dataclass
class EvidenceDesk:
    """The evidence of this host's originals."""

    fences: FenceKeeper
    book: EqualsBook
    maps: MapDesk
    _under: dict[tuple[str, str], HeldImage] = field(default_factory=dict)
    """By VM and target: the very lock that has been held since the record was made or was proven by its stamp."""

    # --- asking ---------------------------------------------------------------------------------------------------

    def answer(self, vm_uuid: str, targets: Iterable[str]) -> Evidence:
        """What is known of those disks."""
        return Evidence(disks=tuple(self._told(vm_uuid, target) for target in targets))

    def _told(self, vm_uuid: str, target: str) -> TargetEvidence:
        proof, digest_map = self.proof(vm_uuid, target), self.maps.told(vm_uuid, target)
        return TargetEvidence(
            target=target,
            equals=proof.view,
            why_not=proof.why_not,
            map_seed=digest_map.seed,
            map_known_bytes=digest_map.known_bytes,
            why_no_map=digest_map.why_not,
            touched=proof.touched,
        )

    def proof(self, vm_uuid: str, target: str) -> Proof:
        """Whether what the record says of the disk still holds."""
        record = self.book.of(vm_uuid, target)
        if record is None:
            return Proof(None, "no pass has made this disk equal a view that is on record here")
        image = self._image(vm_uuid, target)
        if image is None:
            return Proof(None, "the disk is not fenced, so nobody knows who may have written to it")
        if str(image.path) != record.path:
            why_not = f"the disk is the image {image.path} now, and it was {record.path} that equalled a view"
            return Proof(None, why_not, touched=True)
        held = self.fences.held(image.path)
        if held is None or not held.is_named():
            return Proof(None, f"the lock of {image.path} is lost")
        try:
            stamp = stamp_of(held.fd)
        except OSError as error:
            return Proof(None, f"{image.path} cannot be looked at: {error.strerror}")
        under_lock = self._under.get((vm_uuid, target)) is held
        why_not = _touched(record, stamp, under_lock=under_lock)
        if not why_not:
            return Proof(record.view)
        # Without the boot of then, or without a stamp, nothing is known; that is not the same.
        known = record.stamp is not None and (stamp is None or under_lock or record.stamp.boot == stamp.boot)
        if known and under_lock and record.stamp is not None and stamp is not None:
            # Somebody who tries to start the VM by hand has libvirt change the owner of what it then cannot open.
            known = record.stamp.content_changed_to(stamp)
        return Proof(None, why_not, touched=known)

    def _image(self, vm_uuid: str, target: str) -> FencedImage | None:
        """What the fenced VM's disk is now: it stands first among the images of its fence."""
        fence = self.fences.fence_of(vm_uuid)
        return None if fence is None else next((i for i in fence.images if i.target == target), None)

    def _held(self, vm_uuid: str, target: str) -> HeldImage | None:
        image = self._image(vm_uuid, target)
        return None if image is None else self.fences.held(image.path)

    # --- a pass ---------------------------------------------------------------------------------------------------

    def require(self, vm_uuid: str, granted: GrantedDisk) -> None:
        """The disk's pass is about to begin: prove here and now what its grant claims.

        Raises:
            NoEvidence: it claims a view that this record does not prove.
        """
        if granted.since is None:
            return
        proof = self.proof(vm_uuid, granted.target)
        if proof.view != granted.since:
            why = proof.why_not or f"it equals the view {proof.view}"
            raise NoEvidence(
                f"disk {granted.target} is granted as equal to the view {granted.since}, and that is not proven "
                f"({why}): run a pass that compares",
                disk=granted.target,
            )
        held = self._held(vm_uuid, granted.target)
        if held is not None:
            self._under[vm_uuid, granted.target] = held

    def before_writing(self, vm_uuid: str, granted: GrantedDisk) -> None:
        """Durable before the first write of the disk's pass."""
        record = self.book.of(vm_uuid, granted.target)
        if granted.since is not None and record is not None and record.view == granted.since:
            self.book.put(replace(record, torn=True, stamp=None))
        else:
            self._forget(vm_uuid, granted.target)

    def equals_now(self, vm_uuid: str, view: str, targets: Iterable[str]) -> None:
        """A pass is verified and its disks are closed: they equal that view."""
        time.sleep(SETTLE_S)
        for target in targets:
            image, held = self._image(vm_uuid, target), self._held(vm_uuid, target)
            if image is None or held is None or not held.is_named():
                self._forget(vm_uuid, target)
                continue
            self.book.put(
                EqualsRecord(
                    vm_uuid=vm_uuid,
                    target=target,
                    path=str(image.path),
                    view=view,
                    torn=False,
                    stamp=_stamp(held),
                )
            )
            self._under[vm_uuid, target] = held

    def broken_off(self, vm_uuid: str, targets: Iterable[str]) -> None:
        """A pass failed and its disks are closed: those that are torn from a view stay so, under their locks, or as
        long as nobody writes to their files."""
        time.sleep(SETTLE_S)
        for target in targets:
            record, held = self.book.of(vm_uuid, target), self._held(vm_uuid, target)
            under = self._under.get((vm_uuid, target))
            if record is not None and record.torn and held is not None and held is under and held.is_named():
                self.book.put(replace(record, stamp=_stamp(held)))

    # --- a verification in full -----------------------------------------------------------------------------------

    def before_verifying(self, vm_uuid: str, targets: Iterable[str]) -> Marks:
        """What the disks' images are before the first byte of them is read."""
        marks: dict[str, tuple[HeldImage, Stamp | None]] = {}
        for target in targets:
            held = self._held(vm_uuid, target)
            if held is not None and held.is_named():
                marks[target] = held, _stamp(held)
        return marks

    def verified(self, vm_uuid: str, view: str, before: Marks) -> None:
        """Both storages were read whole and are the same: the disks equal that view, as long as nobody has written to
        them since before the first byte was read."""
        for target, (held, stamp) in before.items():
            if held is self._held(vm_uuid, target) and held.is_named():
                self.book.put(
                    EqualsRecord(
                        vm_uuid=vm_uuid, target=target, path=str(held.path), view=view, torn=False, stamp=stamp
                    )
                )
                self._under[vm_uuid, target] = held

    # --- forgetting -----------------------------------------------------------------------------------------------

    def forget(self, vm_uuid: str) -> None:
        """The VM is about to be let loose on its disks."""
        for key in [key for key in self._under if key[0] == vm_uuid]:
            del self._under[key]
        self.book.drop(vm_uuid)

    def _forget(self, vm_uuid: str, target: str) -> None:
        self._under.pop((vm_uuid, target), None)
        self.book.drop(vm_uuid, target)


def _stamp(held: HeldImage) -> Stamp | None:
    """Its stamp; None where the file cannot be asked: then the lock alone proves anything."""
    try:
        return stamp_of(held.fd)
    except OSError:
        return None


def _touched(record: EqualsRecord, now: Stamp | None, *, under_lock: bool) -> str:
    """Why a record does not hold any more, as a sentence; empty where it does.

    Locks bind QEMU alone. So a file that has a stamp must still have it, all of it, even under the lock.
    """
    then = record.stamp
    if under_lock and then is None:
        return ""
    if then is None:
        return (
            f"the lock of {record.path} was lost since (the agent was restarted), and nothing else "
            "tells whether it was written to"
        )
    if now is None:
        return f"{record.path} is another kind of file than it was"
    changed = then.changed_to(now)
    if "boot" in changed:
        return "the lock was lost and the host was started anew since, so that the times of the file prove nothing"
    if changed:
        return f"{record.path} was changed since by somebody else ({', '.join(changed)})"
    return ""
