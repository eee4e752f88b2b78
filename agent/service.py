"""What the agent does when it is asked: one method for each request of `protocol.messages`.

Questions change nothing. Orders come under a pair and an epoch: an order under a lower epoch than the highest seen is
refused, a higher one is acknowledged only when everything running under the lower one has ended (I6). Orders of one
pair are carried out one at a time; a running pass does not block them.
"""

from __future__ import annotations

import shutil
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import TypeVar

import structlog
import trio

from agent import describe, power
from agent.authority import Authority, vm_of
from agent.config import Config
from agent.disk.lock import image_in_use
from agent.equals import EqualsBook
from agent.errors import AgentError, Forbidden, HypervisorError, SilentVm
from agent.evidence import EvidenceDesk
from agent.fence_install import hook_state
from agent.fences import Fenced, FenceKeeper, Torn
from agent.holdings import HoldingsDesk
from agent.home_book import HomeBook
from agent.homes import HomeDesk
from agent.ledger import ConditionRecord, DiskCondition, Ledger, ProtectedImage, ProtectionRecord
from agent.machine import MachineDesk
from agent.machine_book import MachineBook
from agent.maps import MapDesk
from agent.passes import PassDesk
from agent.passrun import PassRunner
from agent.progress import ProgressDesk
from agent.restore_points import RestorePointDesk
from agent.sampling import sample_disk
from agent.scratch import ScratchLimits
from agent.sources import ViewDesk
from agent.threads import Threads
from agent.tracking_desk import TrackingDesk
from agent.virt.seam import Domain, Hypervisor, Overlay, PowerState
from agent.working_snapshot import WorkingSnapshots
from protocol.channel import ProgressSink
from protocol.errors import ProtocolError
from protocol.messages import (
    AllowPass,
    AskAuthority,
    AskEvidence,
    AskHoldings,
    AskPower,
    AskWritten,
    CleanLeftovers,
    CloseView,
    DescribeHost,
    DescribeMachine,
    DescribeProvisions,
    Done,
    DropCheckpoints,
    EndTracking,
    Failure,
    FenceDescription,
    FenceVm,
    ForgetPair,
    HomeOrder,
    HostDescription,
    InspectVm,
    KeepRestorePoint,
    LiftFence,
    MachineOrder,
    MergeProtection,
    MergeRestorePoint,
    OpenView,
    Order,
    OrderRequest,
    Ping,
    Pong,
    PowerAnswer,
    PoweredOff,
    PowerOff,
    PowerOn,
    Protect,
    Protected,
    ProtectedDisk,
    ReadTracking,
    RememberPair,
    RemoveCreated,
    Reply,
    Request,
    RunPass,
    SampleBlocks,
    SetCondition,
    SetLimits,
    Side,
    TakePair,
    Tracking,
    TrackingRead,
    Unprotect,
    ViewOpened,
    VmDescription,
)
from protocol.tls import PeerIdentity

T = TypeVar("T")

log = structlog.get_logger("failback.agent")

SOFTWARE = f"failback {version('failback')}"
TOOLS = {"qemu-img": "qemu-utils", "qemu-nbd": "qemu-utils"}
"""Programs the agent runs, and the Debian package of each."""

ANSWER_S = 20.0
"""How long a question may wait for QEMU, which answers in milliseconds unless it is stopped or stuck."""

ENDS_THE_PASS = (
    LiftFence,
    PowerOn,
    OpenView,
    CloseView,
    EndTracking,
    Protect,
    Unprotect,
    MergeRestorePoint,
    MergeProtection,
    RemoveCreated,
)
"""Orders that take away what a pass works on, or let a VM loose on it: nothing of it may still run by then."""


@dataclass
class AgentService:
    """One host's agent, without its listeners."""

    config: Config
    fingerprint: str
    client_context: ssl.SSLContext
    hypervisor: Hypervisor
    ledger: Ledger
    threads: Threads = field(default_factory=Threads)

    def __post_init__(self) -> None:
        self.fences = FenceKeeper(self.ledger, self.hypervisor)
        self.passes = PassDesk(self.threads, self.authority_is_current)
        scratch = self.config.scratch
        limits = ScratchLimits(used_percent=scratch.used_percent, reserve_bytes=scratch.reserve_mib << 20)
        self.views = ViewDesk(self.hypervisor, self.fences, self.config.runtime_dir, limits)
        self.tracking = TrackingDesk(self.hypervisor, self.fences, self.views, self.config.runtime_dir)
        self.restore_points = RestorePointDesk(self.hypervisor, self.fences, self.ledger)
        self.progress = ProgressDesk(self.config.state_dir, self.fences)
        self.maps = MapDesk(self.config.state_dir, self.fences)
        self.evidence = EvidenceDesk(self.fences, EqualsBook.open(self.ledger.folder), self.maps)
        self.originals = WorkingSnapshots(self.hypervisor, self.fences, self.evidence, self.progress)
        self.holdings = HoldingsDesk(
            self.config,
            SOFTWARE,
            self.hypervisor,
            self.fences,
            self.passes,
            self.tracking,
            self.maps,
            self.evidence.book,
        )
        self.runner = PassRunner(
            self.passes,
            self.views,
            self.fences,
            self.threads,
            self.client_context,
            self.config.runtime_dir,
            self.evidence,
            self.maps,
            self.progress,
        )
        folder = self.ledger.folder / "machines"
        self.machine = MachineDesk(self.hypervisor, self.fences, MachineBook(folder), self.maps, folder / "arriving")
        book = HomeBook(self.ledger.folder / "homes")
        self.homes = HomeDesk(self.hypervisor, self.fences, book, self.maps, self.evidence, self.progress)
        self.authority = Authority(self.config.name, self.ledger, self.passes, self.threads)

    def authority_is_current(self, order: Order) -> bool:
        """Whether the order's epoch is still the highest seen for its pair."""
        return self.ledger.epoch(order.pair) == order.epoch

    async def handle(self, request: Request, peer: PeerIdentity, progress: ProgressSink) -> Reply:
        """Answer one request.

        Raises:
            AgentError, ProtocolError: mapped to `Failure` by `failure_of`.
        """
        match request:
            case Ping():
                return Pong()
            case DescribeHost():
                return await self._describe_host()
            case InspectVm():
                return await self._inspect(request.vm)
            case AskPower():
                return await self._ask_power(request.vm_uuid)
            case DescribeMachine():
                return await self._asked(request.vm_uuid, lambda: self.machine.describe(request.vm_uuid))
            case DescribeProvisions():
                return await self.threads.on_libvirt(lambda: self.homes.describe(request))
            case AskAuthority():
                return self.authority.describe(request, peer)
            case AskEvidence():
                return await self.threads.on_disk(lambda: self.evidence.answer(request.vm_uuid, request.targets))
            case AskWritten():
                uuid, since = request.vm_uuid, request.since
                return TrackingRead(disks=await self._asked(uuid, lambda: self.tracking.written(uuid, since)))
            case SampleBlocks():
                return await self.threads.on_disk(
                    lambda: sample_disk(self.hypervisor, self.config.runtime_dir, request)
                )
            case AskHoldings():
                return await self.threads.on_libvirt(self.holdings.tell)
            case _:
                # Each request is a task of its own: whatever is logged in it from here on says whose it is.
                structlog.contextvars.bind_contextvars(pair=request.order.pair, run=request.order.run)
                reply = await self._carry_out(request, peer, progress)
                log.info("order carried out", order=type(request).__name__)
                return reply

    async def _carry_out(self, request: OrderRequest, peer: PeerIdentity, progress: ProgressSink) -> Reply:
        if isinstance(request, RunPass):
            async with self.authority.of(request.order, peer):
                session = self.passes.claim(request.order, request.grant)
            return await self.runner.run(request, session, progress)
        async with self.authority.of(request.order, peer, take_over=isinstance(request, TakePair)):
            self.authority.check_vm(request, self.fences.fence_of(vm_of(request)))
            if isinstance(request, ENDS_THE_PASS):
                await self.passes.end(request.order.pair)
            if isinstance(request, MachineOrder):
                return await self.threads.on_libvirt(lambda: self.machine.obey(request))
            if isinstance(request, HomeOrder):
                return await self.threads.on_libvirt(lambda: self.homes.obey(request))
            return await self._obey(request)

    async def _obey(self, request: Request) -> Reply:
        """Carry out an order whose authority has been checked."""
        match request:
            case PowerOff():
                return await self._power_off(request)
            case PowerOn():
                return await self._power_on(request)
            case FenceVm():
                return await self._fence(request)
            case LiftFence():
                return await self._lift(request)
            case SetCondition():
                return await self._set_condition(request)
            case OpenView():
                return await self._open_view(request)
            case CloseView():
                await self._blocking(lambda: self.views.close(request.vm_uuid, request.view))
                return Done()
            case DropCheckpoints():
                await self._blocking(lambda: self.tracking.drop(request.vm_uuid, request.keep))
                return Done()
            case ReadTracking():
                pair, uuid, since = request.order.pair, request.vm_uuid, request.since
                return TrackingRead(disks=await self.threads.on_disk(lambda: self.tracking.read(pair, uuid, since)))
            case EndTracking():
                await self._blocking(lambda: self.tracking.end(request.vm_uuid))
                return Done()
            case Protect():
                return await self._protect(request)
            case Unprotect():
                return await self._unprotect(request)
            case KeepRestorePoint():
                return await self._keep_restore_point(request)
            case MergeRestorePoint():
                return await self._merge_restore_point(request)
            case MergeProtection():
                await self._blocking(lambda: self.originals.merge(request.vm_uuid, request.snapshot))
                return Done()
            case AllowPass():
                await self.passes.allow(request.order, request.grant)
                return Done()
            case TakePair():
                return Done()
            case SetLimits():
                self.passes.limit(request.order.pair, request.limit_network, request.limit_read)
                return Done()
            case RememberPair():
                await self._blocking(lambda: self.holdings.remember(request))
                return Done()
            case CleanLeftovers():
                return await self.threads.on_libvirt(lambda: self.holdings.clean(request))
            case ForgetPair():
                return await self.threads.on_libvirt(lambda: self.holdings.forget(request))
            case _:
                raise Forbidden(f"this agent does not take the order {type(request).__name__}")

    async def _blocking(self, call: Callable[[], object]) -> None:
        await self.threads.on_libvirt(call)

    async def stop(self) -> None:
        """End passes and views and let go of the locks; durable fences stay and are taken again at the next start."""
        await self.passes.end_all()
        for error in await self.threads.on_libvirt(self.views.close_all):
            log.error("a view could not be closed", reason=error.sentence)
        self.fences.close()

    # --- questions ------------------------------------------------------------------------------------------------

    async def _describe_host(self) -> HostDescription:
        facts = await self.threads.on_libvirt(self.hypervisor.facts)
        return HostDescription(
            host=self.config.name,
            software=SOFTWARE,
            hypervisor_uri=facts.uri,
            libvirt_version=facts.libvirt_version,
            qemu_version=facts.qemu_version,
            bulk_port=self.config.bulk_port,
            fingerprint=self.fingerprint,
            missing_tools=tuple(f"{tool} ({package})" for tool, package in TOOLS.items() if not shutil.which(tool)),
            clock_s=time.time(),
            state_free_bytes=shutil.disk_usage(self.config.state_dir).free,
            hook=hook_state(self.config),
        )

    async def _inspect(self, name_or_uuid: str) -> VmDescription:
        def inspect() -> VmDescription:
            uuid = self.hypervisor.find(name_or_uuid)
            domain = self.hypervisor.inspect(uuid)
            return describe.vm(
                domain,
                job_is_ours=self.views.is_open(uuid),
                fence=self._fence_description(uuid),
                lifted=self.ledger.lift_of(uuid),
            )

        return await self._asked(name_or_uuid, inspect)

    async def _asked(self, vm: str, question: Callable[[], T]) -> T:
        """Put a question to libvirt that may wait for QEMU, which is not waited for for ever."""
        with trio.move_on_after(ANSWER_S):
            return await self.threads.requesting(question)
        raise SilentVm(
            f"QEMU of the VM {vm} answers nothing for {ANSWER_S:g} s: see why it hangs (storage that is gone, SIGSTOP)",
            vm=vm,
        )

    def _fence_description(self, uuid: str) -> FenceDescription | None:
        record = self.fences.fence_of(uuid)
        if record is None:
            return None
        return describe.fence(
            record,
            locked=self.fences.locked(record),
            unlocked=self.fences.unlocked(record),
            condition=self.ledger.condition(uuid),
        )

    async def _ask_power(self, uuid: str) -> PowerAnswer:
        domain = await self.threads.on_libvirt(lambda: self.hypervisor.inspect(uuid))
        holders = await self.threads.on_disk(lambda: self._holders(domain))
        return PowerAnswer(power=describe.power(domain.state), images_free=not holders, holders=holders)

    def _holders(self, domain: Domain) -> tuple[str, ...]:
        """Targets whose top image another process has locked for writing.

        Raises:
            HypervisorError: the VM is off and it cannot be told, for an image cannot be found or read.
        """
        busy: list[str] = []
        for disk in domain.disks:
            if not disk.chain:
                if disk.problem is not None and domain.state is PowerState.OFF:
                    raise HypervisorError(
                        f"whether anything uses the disk {disk.target} of the VM {domain.name} cannot be told: "
                        f"{disk.problem}",
                        vm=domain.name,
                    )
                continue
            path = disk.chain[0].path
            held = self.fences.held(path)
            if image_in_use(path, () if held is None else (held,)):
                busy.append(disk.target)
        return tuple(busy)

    # --- power ----------------------------------------------------------------------------------------------------

    async def _power_off(self, request: PowerOff) -> PoweredOff:
        return await power.power_off(
            self.hypervisor,
            self.threads,
            request.vm_uuid,
            timeout_s=request.timeout_s,
            on_timeout=request.on_timeout,
            kill_after_s=request.kill_after_s,
        )

    async def _power_on(self, request: PowerOn) -> Done:
        uuid = request.vm_uuid
        fence = self.fences.fence_of(uuid)
        if fence is not None:
            raise Fenced(f"the VM {uuid} is fenced for the pair {fence.pair} as its {fence.side} and must not start")
        if self.fences.condition(uuid) is DiskCondition.TORN:
            raise Fenced(f"the disks of the VM {uuid} are torn and must not boot")

        def power_on() -> None:
            # Its own guest is about to write: the disks stay whole, but equal no view any more. Written down before,
            # for we may die right after.
            if self.ledger.condition(uuid) is not None:
                self.ledger.put_condition(ConditionRecord(vm_uuid=uuid, condition=DiskCondition.INTACT))
            self.evidence.forget(uuid)
            self.progress.forget(uuid)
            self.hypervisor.power_on(uuid)

        await self._blocking(power_on)
        return Done()

    # --- fences, snapshots, views ---------------------------------------------------------------------------------

    async def _fence(self, request: FenceVm) -> FenceDescription:
        order = request.order

        def fence() -> FenceDescription | None:
            if request.side is Side.ORIGINAL:
                self.machine.settle(order, request.vm_uuid)
            self.fences.fence(
                request.vm_uuid, pair=order.pair, run=order.run, side=request.side.value, targets=request.targets
            )
            if request.side is Side.ORIGINAL:
                self.originals.drop_stale(order, request.vm_uuid, f"failback-{order.pair}-{order.run}")
            return self._fence_description(request.vm_uuid)

        description = await self.threads.on_libvirt(fence)
        assert description is not None  # it was made a line above, under the pair's lock
        return description

    async def _lift(self, request: LiftFence) -> Done:
        uuid = request.vm_uuid

        def lift() -> None:
            self.fences.lift(
                uuid,
                pair=request.order.pair,
                restore_autostart=request.restore_autostart,
                autostart=request.autostart,
            )
            # Without the lock a record is worth what the file's stamp is worth; the next fence is a new beginning.
            self.evidence.forget(uuid)
            self.progress.forget(uuid)

        await self._blocking(lift)
        return Done()

    async def _set_condition(self, request: SetCondition) -> Done:
        uuid, condition = request.vm_uuid, DiskCondition(request.condition.value)
        view = request.view if condition is DiskCondition.EQUALS_VIEW else None
        record = ConditionRecord(vm_uuid=uuid, condition=condition, view=view)
        if condition is not DiskCondition.TORN and self.passes.is_writing(request.order.pair):
            raise Torn(f"a pass of the pair {request.order.pair} is still writing: let it end first")

        def put() -> None:
            self.fences.required(uuid, Side.ORIGINAL.value, request.order.pair)
            known = self.ledger.condition(uuid)
            # The coordinator decides, but nobody calls a disk whole that this agent knows to be half-written.
            if condition is DiskCondition.INTACT and known is not None and known.condition is DiskCondition.TORN:
                raise Torn(f"the disks of {uuid} are torn: only a pass that is verified makes them whole")
            if view is not None and known != record and not self.runner.has_verified(uuid, view):
                raise Torn(
                    f"no pass of this agent has verified the disks of {uuid} against the view {view}: run it again"
                )
            self.ledger.put_condition(record)

        await self._blocking(put)
        return Done()

    async def _open_view(self, request: OpenView) -> ViewOpened:
        pair = request.order.pair
        if request.reopen:
            again = partial(self.views.reopen, pair, request.vm_uuid, request.targets, request.view)
            found = await self.threads.on_libvirt(again)
            return ViewOpened(view=request.view, live=found.live, disks=describe.viewed(found))
        opened = await self.threads.on_libvirt(
            lambda: self.views.open(
                pair,
                request.vm_uuid,
                request.targets,
                request.view,
                track=request.track is not Tracking.NONE,
                overlay=request.track is Tracking.OVERLAY,
                since={earlier.target: earlier.view for earlier in request.since},
                freeze_guest=request.freeze_guest,
            )
        )
        return ViewOpened(view=request.view, live=opened.live, disks=describe.viewed(opened))

    async def _protect(self, request: Protect) -> Protected:
        uuid, snapshot = request.vm_uuid, request.snapshot

        def protect() -> tuple[Overlay, ...]:
            if request.side is Side.ORIGINAL:
                return self.originals.take(request.order, uuid, request.targets, snapshot)
            self.fences.required(uuid, Side.REPLICA.value, request.order.pair)
            text = f"made by failback for the pair {request.order.pair}, run {request.order.run}"
            overlays = self.hypervisor.protect(uuid, request.targets, snapshot, text)
            self.ledger.put_protection(
                ProtectionRecord(
                    vm_uuid=uuid,
                    pair=request.order.pair,
                    snapshot=snapshot,
                    images=tuple(
                        ProtectedImage(target=o.target, base=o.base, base_format=o.base_format, overlay=o.overlay)
                        for o in overlays
                    ),
                )
            )
            self.fences.refresh(uuid)
            return overlays

        overlays = await self.threads.on_libvirt(protect)
        return Protected(
            snapshot=snapshot,
            disks=tuple(
                ProtectedDisk(target=o.target, base=str(o.base), base_format=o.base_format, overlay=str(o.overlay))
                for o in overlays
            ),
        )

    async def _unprotect(self, request: Unprotect) -> Done:
        uuid, snapshot = request.vm_uuid, request.snapshot

        def unprotect() -> None:
            if request.side is Side.ORIGINAL:
                self.originals.drop(request.order.pair, uuid, snapshot)
                return
            # Without a record there may still be a snapshot: the agent may have died between taking it and writing it
            # down. The hypervisor then finds the overlays by the snapshot's own metadata.
            record = self.ledger.protection(uuid, snapshot)
            images = () if record is None else record.images
            overlays = [
                Overlay(target=i.target, base=i.base, base_format=i.base_format, overlay=i.overlay) for i in images
            ]
            self.hypervisor.unprotect(uuid, snapshot, overlays)
            self.restore_points.give_back(images)
            self.fences.refresh(uuid)
            self.ledger.drop_protection(uuid, snapshot)

        await self._blocking(unprotect)
        return Done()

    async def _keep_restore_point(self, request: KeepRestorePoint) -> Protected:
        uuid, snapshot = request.vm_uuid, request.snapshot

        def keep() -> ProtectionRecord:
            self.fences.required(uuid, Side.REPLICA.value, request.order.pair)
            return self.restore_points.keep(uuid, snapshot)

        kept = await self.threads.on_libvirt(keep)
        return Protected(
            snapshot=snapshot,
            disks=tuple(
                ProtectedDisk(target=i.target, base=str(i.base), base_format=i.base_format, overlay=str(i.overlay))
                for i in kept.images
            ),
        )

    async def _merge_restore_point(self, request: MergeRestorePoint) -> Done:
        def merge() -> None:
            self.fences.required(request.vm_uuid, Side.REPLICA.value, request.order.pair)
            self.restore_points.merge(request.vm_uuid, request.snapshot)

        await self._blocking(merge)
        return Done()


def failure_of(error: Exception) -> Failure | None:
    """An error as it goes over the wire; None for one that nobody raised on purpose."""
    if isinstance(error, AgentError):
        return Failure(code=error.code, sentence=error.sentence, facts=dict(error.facts))
    if isinstance(error, ProtocolError):
        return Failure(code=error.code, sentence=error.sentence, facts={})
    return None
