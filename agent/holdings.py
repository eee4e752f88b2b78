"""What this agent holds and knows durably, told to whoever asks, and the clearing up of what is left over."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from cryptography import x509

from agent.config import Config
from agent.equals import EqualsBook
from agent.errors import AgentError, DiskError, NoSuchDomain
from agent.fences import Fenced, FenceKeeper, Torn
from agent.ledger import DiskCondition, FenceRecord
from agent.maps import FOLDER, MapDesk
from agent.pair_book import PairBook, PairRecord
from agent.passes import PassDesk
from agent.remnants import RemnantFinder, told_of, vms_of
from agent.sync.map_file import remove_map
from agent.tracking_desk import TrackingDesk
from agent.virt.seam import Hypervisor
from protocol.messages import (
    Cleaned,
    CleanLeftovers,
    Condition,
    ForgetPair,
    HeldCondition,
    HeldDisk,
    HeldFence,
    HeldPair,
    HeldPass,
    HeldServer,
    Holdings,
    Power,
    RememberPair,
    Remnant,
    RemnantKind,
    Side,
)

MAX_ITEMS = 500
"""Of each array of an answer: together they stay well within one frame of the control connection."""

_MAP_NAME = re.compile(r"(?P<vm>.{36})-(?P<target>.+)\.map")
T = TypeVar("T")


class PassRunning(AgentError):
    """A pass of the pair is under way."""

    code = "pass-running"


@dataclass
class HoldingsDesk:
    """Answers for one agent. Its methods block; `passes` is only looked at."""

    config: Config
    software: str
    hypervisor: Hypervisor
    fences: FenceKeeper
    passes: PassDesk
    tracking: TrackingDesk
    maps: MapDesk
    equals: EqualsBook
    book: PairBook = field(init=False)
    remnants: RemnantFinder = field(init=False)

    def __post_init__(self) -> None:
        self.book = PairBook.open(self.fences.ledger.folder)
        self.remnants = RemnantFinder(
            self.hypervisor,
            self.fences.ledger,
            self.tracking.views,
            self.config.libvirt.scratch_dir,
            self.config.runtime_dir,
        )

    def remember(self, request: RememberPair) -> None:
        """Keep what the pair is."""
        order = request.order
        self.book.put(PairRecord(pair=order.pair, run=order.run, side=request.side, mapping=request.mapping))

    # --- telling --------------------------------------------------------------------------------------------------

    def tell(self) -> Holdings:
        """Everything, bounded. What libvirt cannot say now is told as a problem, not raised."""
        ledger = self.fences.ledger.contents
        problems: list[str] = []
        left: list[Remnant] = list(self.remnants.sockets())
        for uuid in sorted(vms_of(ledger) | {record.vm_uuid for record in self.book.pairs})[:MAX_ITEMS]:
            found, problem = told_of(self.remnants, uuid)
            left += found
            if problem and problem not in problems:
                problems.append(problem)
        bounded = _Bounded()
        conditions = (
            HeldCondition(vm_uuid=c.vm_uuid, condition=Condition(c.condition.value), view=c.view)
            for c in ledger.conditions
        )
        return Holdings(
            host=self.config.name,
            software=self.software,
            pairs=bounded.of(tuple(self._pairs())),
            fences=bounded.of(tuple(self._fence(record) for record in ledger.fences)),
            conditions=bounded.of(tuple(conditions)),
            disks=bounded.of(tuple(self._disks())),
            passes=bounded.of(self._passes()),
            remnants=bounded.of(tuple(left)),
            servers=bounded.of(tuple(_servers())),
            certificate_ends_s=_ends_s(self.config.tls.certificate),
            state_free_bytes=shutil.disk_usage(self.config.state_dir).free,
            problems=bounded.of(tuple(problems)),
            left_off=bounded.left_off,
        )

    def _pairs(self) -> Iterator[HeldPair]:
        ledger = self.fences.ledger.contents
        epochs = {record.pair: record.epoch for record in ledger.epochs}
        runs = {record.pair: record.run for record in ledger.fences}
        for known in self.book.pairs:
            run = runs.get(known.pair, known.run)
            epoch = epochs.get(known.pair, 0)
            yield HeldPair(pair=known.pair, epoch=epoch, run=run, side=known.side, mapping=known.mapping)
        told = {known.pair for known in self.book.pairs}
        for pair in sorted({*epochs, *runs} - told):
            yield HeldPair(pair=pair, epoch=epochs.get(pair, 0), run=runs.get(pair, ""), side=None, mapping=None)

    def _fence(self, record: FenceRecord) -> HeldFence:
        name, power, autostart = "", None, None
        with contextlib.suppress(AgentError):  # libvirt away, or the VM: the fence stands all the same
            domain = self.hypervisor.inspect(record.vm_uuid)
            name, power, autostart = domain.name, Power(domain.state.value), domain.autostart
        return HeldFence(
            vm_uuid=record.vm_uuid,
            vm=name,
            power=power,
            pair=record.pair,
            run=record.run,
            side=Side(record.side),
            since_s=record.since_s,
            autostart_before=record.autostart_before,
            autostart=autostart,
            locked=self.fences.locked(record),
            unlocked=self.fences.unlocked(record),
        )

    def _disks(self) -> Iterator[HeldDisk]:
        equals = {(r.vm_uuid, r.target): None if r.torn else r.view for r in self.equals.records}
        sizes = {(vm, target): _allocated(path) for vm, target, path in self._maps()}
        for vm, target in sorted({*equals, *sizes}):
            yield HeldDisk(
                vm_uuid=vm,
                pair=self.book.pair_of(vm),
                target=target,
                equals=equals.get((vm, target)),
                map_bytes=sizes.get((vm, target), 0),
            )

    def _maps(self) -> Iterator[tuple[str, str, Path]]:
        folder = self.config.state_dir / FOLDER
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(folder.iterdir()):
                found = _MAP_NAME.fullmatch(path.name)
                if found is not None:
                    yield unquote(found["vm"]), unquote(found["target"]), path

    def _passes(self) -> tuple[HeldPass, ...]:
        return tuple(
            HeldPass(
                pair=session.order.pair,
                run=session.order.run,
                epoch=session.order.epoch,
                kind=session.grant.kind,
                direction=session.grant.direction,
                running=session.claimed,
            )
            for session in self.passes.sessions
        )

    # --- clearing up ----------------------------------------------------------------------------------------------

    def clean(self, request: CleanLeftovers) -> Cleaned:
        """Remove what no run needs any more.

        Raises:
            PassRunning: a pass of the pair is under way.
            AgentError: something could not be removed; asked again, it is tried again.
        """
        uuid = request.vm_uuid
        if self.passes.is_running(request.order.pair):
            raise PassRunning(
                f"a pass of the pair {request.order.pair} is under way on {self.config.name}: let its run end first"
            )
        before = self.remnants.of(uuid)
        unread = [view for vm, _, view in self.tracking.views.closed_views() if vm == uuid]
        self.tracking.views.close_all_of(uuid)
        with contextlib.suppress(NoSuchDomain):
            self.tracking.views.overlays.settle(uuid)
        self.tracking.end(uuid)
        files = set(self.remnants.remove_files(uuid))
        after = self.remnants.of(uuid)
        still = {(r.kind, r.name) for r in after}
        removed = [_words(r) for r in before if (r.kind, r.name) not in still and r.name not in files]
        removed += [f"view {name}" for name in unread]
        removed += [f"scratch file {name}" for name in sorted(files)]
        removed += [f"socket {name}" for name in self.remnants.remove_sockets()]
        removed += self._collect()
        kept = [f"{_words(r)} (a person's to look at)" for r in after if not r.removable]
        kept += [f"{_words(r)} (still in use)" for r in after if r.removable]
        return Cleaned(removed=tuple(removed[:MAX_ITEMS]), kept=tuple(kept[:MAX_ITEMS]))

    def forget(self, request: ForgetPair) -> Cleaned:
        """As `clean`, and forget the pair's part on this host.

        Raises:
            Fenced: a fence stands on the VM; `Torn`: its disks are torn; others as `clean`.
        """
        pair, uuid = request.order.pair, request.vm_uuid
        fence = self.fences.fence_of(uuid)
        if fence is not None and fence.pair == pair:
            raise Fenced(
                f"the VM {uuid} is fenced for the pair {pair}: `failback doctor {pair}` says why, and how it is lifted"
            )
        if self.fences.condition(uuid) is DiskCondition.TORN:
            raise Torn(f"the disks of {uuid} are torn: let a run verify them before {pair} is forgotten")
        cleaned = self.clean(CleanLeftovers(order=request.order, vm_uuid=uuid))
        removed = [*cleaned.removed, *self._forget_disks(uuid)]
        self.fences.ledger.drop_condition(uuid)
        self.book.drop(pair, uuid)
        return Cleaned(removed=tuple(removed), kept=cleaned.kept)

    def _collect(self) -> list[str]:
        """What is known of disks that no VM of this host has: it was deleted, and nothing keeps its images for it."""
        known = vms_of(self.fences.ledger.contents) | {record.vm_uuid for record in self.book.pairs}
        vms = {vm for vm, _, _ in self._maps()} | {record.vm_uuid for record in self.equals.records}
        gone: list[str] = []
        for vm in sorted(vms - known):
            try:
                self.hypervisor.state(vm)
            except NoSuchDomain:
                gone += self._forget_disks(vm)
        return gone

    def _forget_disks(self, vm_uuid: str) -> list[str]:
        gone: list[str] = []
        for vm, target, path in tuple(self._maps()):
            if vm == vm_uuid:
                try:
                    remove_map(path)
                except OSError as error:
                    raise DiskError(f"the digest map {path} cannot be removed: {error.strerror}") from error
                gone.append(f"digest map of {target} of {vm}")
        if any(record.vm_uuid == vm_uuid for record in self.equals.records):
            self.equals.drop(vm_uuid)
            gone.append(f"record of what the disks of {vm_uuid} equal")
        return gone


@dataclass
class _Bounded:
    left_off: int = 0

    def of(self, items: Sequence[T]) -> tuple[T, ...]:
        """The first of them."""
        self.left_off += max(0, len(items) - MAX_ITEMS)
        return tuple(items[:MAX_ITEMS])


def _words(remnant: Remnant) -> str:
    names = {
        RemnantKind.VIEW: "view",
        RemnantKind.TRACKING: "record of writes since the view",
        RemnantKind.BITMAP: "dirty bitmap",
        RemnantKind.OVERLAY: "live overlay",
        RemnantKind.SNAPSHOT: "protective snapshot",
        RemnantKind.SCRATCH: "scratch file",
        RemnantKind.SOCKET: "socket",
        RemnantKind.THAW: "freeze of",
    }
    return f"{names[remnant.kind]} {remnant.name}"


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _ends_s(certificate: Path) -> float:
    try:
        return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.timestamp()
    except (OSError, ValueError):
        return 0.0


def _servers() -> Iterator[HeldServer]:
    """Our qemu-nbd children (proc(5): the fourth field of ``stat`` is the parent)."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended meanwhile
            continue
        if name == "qemu-nbd" and int(rest.split()[1]) == os.getpid():
            image = next((w.split("filename=")[1].split(",")[0] for w in words if "filename=" in w), words[-2])
            yield HeldServer(pid=int(folder.name), image=image)
