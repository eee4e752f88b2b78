"""What tests of live overlays need beside the rigs: the agent's part of it on either machine, and eyes of their own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agent.fences import FenceKeeper
from agent.ledger import Ledger, ProtectedImage, ProtectionRecord
from agent.overlay_chain import FrozenDisk
from agent.overlays import OverlayTracking
from agent.virt.seam import Hypervisor, Overlay
from tests.contract.hypervisor_rigs import FakeRig, Rig, Vm
from tests.fakes.hypervisor import FakeMachine

BLOCK_BYTES = 64 * 1024
PAIR = "web"


class Died(BaseException):
    """The agent was killed here."""


class Life:
    """The agent that tracks, from its start to its death; `die_at` counts its acts, from 0; None: it lives on.

    What is durable is in `folder`, what runs is the rig's machine; nothing else is handed from life to life.
    """

    def __init__(self, rig: Rig, folder: Path, die_at: int | None = None) -> None:
        self._left = die_at
        self.mortal = die_at is not None
        """Whether acts count; a test may set it aside for a while."""
        host: Any = _Mortal(rig.fresh(), self._act)
        ledger = Ledger.open(folder)
        self._ledger, write = ledger, ledger._write
        ledger._write = lambda contents: self._act(partial(write, contents))  # type: ignore[method-assign]
        self.fences = FenceKeeper(ledger, host)
        self.fences.restore()
        self.tracking = OverlayTracking(host, self.fences)
        if isinstance(rig, FakeRig):
            self.tracking.allocated = partial(_differing, rig.machine)
            self.tracking.commit = _copy_down
            self.tracking.stand_on = lambda *_, **__: None
        for name in ("commit", "stand_on"):
            act = getattr(self.tracking, name)
            setattr(self.tracking, name, lambda *a, _act=act, **k: self._act(partial(_act, *a, **k)))

    def _act(self, act: Callable[[], Any]) -> Any:
        if self._left is not None and self.mortal:
            self._left -= 1
            if self._left < 0:
                raise Died
        return act()

    @property
    def died(self) -> bool:
        return self._left is not None and self._left < 0

    @property
    def records(self) -> int:
        return len(self._ledger.contents.overlays)

    def open(self, vm: Vm, view: str, since: str | None = None) -> FrozenDisk:
        asked = {} if since is None else {"vdb": since}
        return self.tracking.open(PAIR, vm.uuid, ["vdb"], view, f"failback-{view}", asked)["vdb"]

    def protect(self, vm: Vm, snapshot: str) -> tuple[Overlay, ...]:
        """The protective snapshot, as the agent takes it."""
        overlays = self.fences.hypervisor.protect(vm.uuid, list(vm.disks), snapshot, "made by failback")
        images = tuple(
            ProtectedImage(target=o.target, base=o.base, base_format=o.base_format, overlay=o.overlay) for o in overlays
        )
        self._ledger.put_protection(ProtectionRecord(vm_uuid=vm.uuid, pair=PAIR, snapshot=snapshot, images=images))
        self.fences.refresh(vm.uuid)
        return overlays

    def release(self, vm: Vm) -> None:
        """The fence is lifted, and the snapshot's record goes."""
        self._ledger.drop_protection(vm.uuid, "failback-web-r1")
        self.fences.lift(vm.uuid, pair=PAIR, restore_autostart=True)

    def end(self) -> None:
        self.fences.close()
        self._ledger.close()


class _Mortal:
    """A hypervisor whose caller may die before each call that changes something."""

    _CHANGES = ("begin_overlays", "merge_overlays", "forget_overlays", "protect", "unprotect")

    def __init__(self, host: Hypervisor, act: Callable[[Callable[[], Any]], Any]) -> None:
        self._host, self._act = host, act

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._host, name)
        if name not in type(self)._CHANGES:
            return call
        return lambda *a, **k: self._act(partial(call, *a, **k))


def _differing(machine: FakeMachine, _name: str, image: Path, layers: int) -> Iterator[tuple[int, int]]:
    """In memory every image is whole: what an overlay holds is where it differs from what it stands on."""
    tops = [top for domain in machine.domains.values() for top in domain.disks.values()]
    found = next((member for top in tops for member in top.chain() if member.path == image), None)
    if found is None:
        return
    below = list(found.chain())[layers]
    yield from differences(image.read_bytes(), below.path.read_bytes())


def _copy_down(_name: str, overlays: Sequence[Path], into: Path, _format: str, *, timeout_s: float) -> None:
    assert timeout_s > 0
    shutil.copyfile(overlays[0], into)


def differences(one: bytes, other: bytes) -> list[tuple[int, int]]:
    """Blocks where two disks differ."""
    assert len(one) == len(other)
    starts = range(0, len(one), BLOCK_BYTES)
    return [
        (start, min(BLOCK_BYTES, len(one) - start))
        for start in starts
        if one[start : start + BLOCK_BYTES] != other[start : start + BLOCK_BYTES]
    ]


def covered(ranges: Sequence[tuple[int, int]], by: Sequence[tuple[int, int]]) -> bool:
    """Whether each of `ranges` lies in one of `by`."""
    return all(any(s <= start and start + length <= s + n for s, n in by) for start, length in ranges)


def content(rig: Rig, path: Path, image_format: str) -> bytes:
    """The bytes of the disk in that image and everything it stands on."""
    if isinstance(rig, FakeRig):
        return path.read_bytes()
    raw = path.with_name("content.raw")
    # The fence may hold it against everybody's tools; reading does no harm.
    options = f"driver={image_format},file.driver=file,file.filename={path},file.locking=off"
    command = ["qemu-img", "convert", "-U", "--image-opts", options, "-O", "raw", str(raw)]
    subprocess.run(command, check=True)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def disk_content(rig: Rig, vm: Vm, target: str = "vdb") -> bytes:
    """What the VM, which is off, would read from its disk."""
    top = next(disk for disk in rig.host.inspect(vm.uuid).disks if disk.target == target).chain[0]
    return content(rig, top.path, top.format)


def chain(rig: Rig, vm: Vm, target: str = "vdb") -> list[Path]:
    """The images of the disk, top first."""
    disk = next(disk for disk in rig.host.inspect(vm.uuid).disks if disk.target == target)
    assert disk.problem is None
    return [image.path for image in disk.chain]
