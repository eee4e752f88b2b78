"""What the agent does when it is asked: one method for each request of `protocol.messages`.

Questions change nothing. Orders come under a pair and an epoch: an order under a lower epoch than the highest seen is
refused, a higher one is acknowledged only when everything running under the lower one has ended (I6). Orders of one
pair are carried out one at a time; a running pass does not block them.
"""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version

import trio

from agent import describe, power
from agent.config import Config
from agent.disk.lock import image_in_use
from agent.errors import AgentError, Forbidden, StaleEpoch
from agent.fences import Fenced, FenceKeeper
from agent.ledger import ConditionRecord, DiskCondition, Ledger, ProtectedImage, ProtectionRecord
from agent.passes import PassDesk
from agent.passrun import PassRunner
from agent.sources import ViewDesk
from agent.threads import Threads
from agent.virt.seam import Domain, Hypervisor, Overlay
from protocol.channel import ProgressSink
from protocol.errors import ProtocolError
from protocol.messages import (
    AllowPass,
    AskPower,
    CloseView,
    Condition,
    DescribeHost,
    Done,
    Failure,
    FenceDescription,
    FenceVm,
    HostDescription,
    InspectVm,
    LiftFence,
    OpenView,
    Order,
    Ping,
    Pong,
    PowerAnswer,
    PoweredOff,
    PowerOff,
    PowerOn,
    Protect,
    Protected,
    ProtectedDisk,
    Reply,
    Request,
    RunPass,
    SetCondition,
    Side,
    TargetSize,
    Unprotect,
    ViewOpened,
    VmDescription,
)
from protocol.tls import PeerIdentity

SOFTWARE = f"failback {version('failback')}"
TOOLS = {"qemu-img": "qemu-utils", "qemu-nbd": "qemu-utils"}
"""Programs the agent runs, and the Debian package of each."""


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
        self.passes = PassDesk(self.threads)
        self.views = ViewDesk(self.hypervisor, self.fences, self.config.runtime_dir)
        self.runner = PassRunner(
            self.passes, self.views, self.fences, self.threads, self.client_context, self.config.runtime_dir
        )
        self._pair_locks: dict[str, trio.Lock] = {}

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
            case RunPass():
                async with self._authorised(request.order):
                    session = self.passes.session(request.order, request.grant)
                return await self.runner.run(request, session, progress)
            case _:
                async with self._authorised(request.order):
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
                lift = partial(self.fences.lift, request.vm_uuid, restore_autostart=request.restore_autostart)
                await self._blocking(partial(lift, autostart=request.autostart))
                return Done()
            case SetCondition():
                return await self._set_condition(request)
            case OpenView():
                return await self._open_view(request)
            case CloseView():
                await self.passes.end(request.order.pair)
                await self._blocking(lambda: self.views.close(request.vm_uuid, request.view))
                return Done()
            case Protect():
                return await self._protect(request)
            case Unprotect():
                return await self._unprotect(request)
            case AllowPass():
                await self.passes.allow(request.order, request.grant)
                return Done()
            case _:
                raise Forbidden(f"this agent does not take the order {type(request).__name__}")

    # --- authority ------------------------------------------------------------------------------------------------

    def _authorised(self, order: Order) -> _Authority:
        return _Authority(self, order)

    async def admit(self, order: Order) -> None:
        """Check the order's epoch against the highest seen, and make a higher one the new highest.

        Raises:
            StaleEpoch: another coordinator took the pair over.
        """
        seen = self.ledger.epoch(order.pair)
        if order.epoch < seen:
            raise StaleEpoch(
                f"the order for the pair {order.pair} comes under epoch {order.epoch}, but epoch {seen} has taken over "
                f"on {self.config.name}: end this process, the newer one is in charge",
                seen=seen,
            )
        if order.epoch > seen:
            await self.passes.end(order.pair)
            await self._blocking(lambda: self.ledger.raise_epoch(order.pair, order.epoch))

    def pair_lock(self, pair: str) -> trio.Lock:
        """Orders of one pair take turns."""
        return self._pair_locks.setdefault(pair, trio.Lock())

    async def _blocking(self, call: Callable[[], object]) -> None:
        await self.threads.on_libvirt(call)

    async def stop(self) -> None:
        """End passes and views and let go of the locks; durable fences stay and are taken again at the next start."""
        for pair in tuple(self._pair_locks):
            await self.passes.end(pair)
        await self._blocking(self.views.close_all)
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
        )

    async def _inspect(self, name_or_uuid: str) -> VmDescription:
        uuid = await self.threads.on_libvirt(lambda: self.hypervisor.find(name_or_uuid))
        domain = await self.threads.on_libvirt(lambda: self.hypervisor.inspect(uuid))
        return describe.vm(domain, job_is_ours=self.views.is_open(uuid), fence=self._fence_description(uuid))

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
        """Targets whose top image another process has locked for writing."""
        return tuple(
            disk.target
            for disk in domain.disks
            if disk.chain and self.fences.held(disk.chain[0].path) is None and image_in_use(disk.chain[0].path)
        )

    # --- power ----------------------------------------------------------------------------------------------------

    async def _power_off(self, request: PowerOff) -> PoweredOff:
        return await power.power_off(
            self.hypervisor, self.threads, request.vm_uuid, timeout_s=request.timeout_s, on_timeout=request.on_timeout
        )

    async def _power_on(self, request: PowerOn) -> Done:
        uuid = request.vm_uuid
        fence = self.fences.fence_of(uuid)
        if fence is not None:
            raise Fenced(f"the VM {uuid} is fenced for the pair {fence.pair} as its {fence.side} and must not start")
        if self.fences.condition(uuid) is DiskCondition.TORN:
            raise Fenced(f"the disks of the VM {uuid} are torn and must not boot")
        await self._blocking(lambda: self.hypervisor.power_on(uuid))
        # From here on its own guest writes: the disks are whole, but equal no view any more.
        if self.ledger.condition(uuid) is not None:
            record = ConditionRecord(vm_uuid=uuid, condition=DiskCondition.INTACT)
            await self._blocking(lambda: self.ledger.put_condition(record))
        return Done()

    # --- fences, snapshots, views ---------------------------------------------------------------------------------

    async def _fence(self, request: FenceVm) -> FenceDescription:
        order = request.order
        await self._blocking(
            lambda: self.fences.fence(
                request.vm_uuid, pair=order.pair, run=order.run, side=request.side.value, targets=request.targets
            )
        )
        description = self._fence_description(request.vm_uuid)
        assert description is not None  # it was made a line above, under the pair's lock
        return description

    async def _set_condition(self, request: SetCondition) -> Done:
        self.fences.required(request.vm_uuid, Side.ORIGINAL.value)
        record = ConditionRecord(
            vm_uuid=request.vm_uuid,
            condition=DiskCondition(request.condition.value),
            view=request.view if request.condition is Condition.EQUALS_VIEW else None,
        )
        await self._blocking(lambda: self.ledger.put_condition(record))
        return Done()

    async def _open_view(self, request: OpenView) -> ViewOpened:
        opened = await self.threads.on_libvirt(lambda: self.views.open(request.vm_uuid, request.targets, request.view))
        sizes = tuple(TargetSize(target=target, size_bytes=size) for target, size in opened.sizes.items())
        return ViewOpened(view=request.view, live=opened.live, disks=sizes)

    async def _protect(self, request: Protect) -> Protected:
        uuid, snapshot = request.vm_uuid, request.snapshot
        self.fences.required(uuid, Side.REPLICA.value)

        def protect() -> tuple[Overlay, ...]:
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
            self.fences.cover(uuid, overlays)
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
            # Without a record there may still be a snapshot: the agent may have died between taking it and writing it
            # down. The hypervisor then finds the overlays by the snapshot's own metadata.
            record = self.ledger.protection(uuid, snapshot)
            images = () if record is None else record.images
            self.fences.uncover(uuid, [image.overlay for image in images])
            overlays = [
                Overlay(target=i.target, base=i.base, base_format=i.base_format, overlay=i.overlay) for i in images
            ]
            self.hypervisor.unprotect(uuid, snapshot, overlays)
            self.ledger.drop_protection(uuid, snapshot)

        await self._blocking(unprotect)
        return Done()


class _Authority:
    """An async context: the pair's turn, with the order's epoch checked."""

    def __init__(self, service: AgentService, order: Order) -> None:
        self._service, self._order = service, order
        self._lock = service.pair_lock(order.pair)

    async def __aenter__(self) -> None:
        await self._lock.acquire()
        try:
            await self._service.admit(self._order)
        except BaseException:
            self._lock.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


def failure_of(error: Exception) -> Failure | None:
    """An error as it goes over the wire; None for one that nobody raised on purpose."""
    if isinstance(error, AgentError):
        return Failure(code=error.code, sentence=error.sentence, facts=dict(error.facts))
    if isinstance(error, ProtocolError):
        return Failure(code=error.code, sentence=error.sentence, facts={})
    return None
