"""Two agents and their VMs in memory, which watch the invariants of DESIGN section 7 after every order.

It models what a coordinator can see of `agent.service`: power, fences, epochs, flags, views, passes, protective
snapshots, and what is recorded of writes (`tests.fakes.records`). Disks are short byte strings; a running guest writes
at every order that any agent gets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version

import trio

from coordinator.agents import Agent, ProgressCallback
from coordinator.errors import AgentRefused, HostUnreachable
from protocol.messages import (
    AllowPass,
    AskAuthority,
    AskEvidence,
    AskHoldings,
    AskPower,
    AskWritten,
    Cleaned,
    CleanLeftovers,
    CloseView,
    Condition,
    CreateVm,
    DescribeHost,
    DescribeMachine,
    DescribeProvisions,
    Direction,
    DiskDescription,
    DiskProgress,
    DiskReport,
    Done,
    DropCheckpoints,
    EndTracking,
    Evidence,
    FenceDescription,
    FenceVm,
    ForgetPair,
    Grant,
    HeldCondition,
    HeldFence,
    HeldPair,
    Holdings,
    HomeOrder,
    HostDescription,
    ImageDescription,
    InspectVm,
    KeepCreated,
    KeepRestorePoint,
    LiftDescription,
    LiftFence,
    MachineOrder,
    MergeProtection,
    MergeRestorePoint,
    OnTimeout,
    OpenView,
    OrderRequest,
    PairAuthority,
    PassKind,
    PassProgress,
    PassReport,
    Ping,
    Pong,
    Power,
    PowerAnswer,
    PoweredOff,
    PowerOff,
    PowerOn,
    Protect,
    Protected,
    ProtectedDisk,
    ReadTracking,
    RememberPair,
    Remnant,
    RemnantKind,
    RemoveCreated,
    Reply,
    Request,
    RunPass,
    SampleBlocks,
    SetCondition,
    SetLimits,
    Side,
    SnapshotDescription,
    TakePair,
    Tracking,
    TrackingRead,
    Unprotect,
    ViewOpened,
    VmCreated,
    VmDescription,
)
from tests.fakes.checks import FakeMaps
from tests.fakes.homes import FakeHomes
from tests.fakes.machine import FakeMachine
from tests.fakes.records import FakeView, SourceRecords, TargetRecords
from tests.fakes.samples import FakeSamples

Content = dict[str, bytes]
"""What the disks hold, by target."""


@dataclass
class FakeFence:
    """A fence as the agent's ledger keeps it."""

    side: Side
    autostart_before: bool
    pair: str
    run: str
    targets: tuple[str, ...]


@dataclass
class FakeVm:
    """A VM. `overlay` is what the guest sees once a protective snapshot stands; `disks` are then frozen."""

    uuid: str
    name: str
    host: str
    power: Power
    disks: Content
    autostart: bool = True
    fence: FakeFence | None = None
    lifted: LiftDescription | None = None
    condition: Condition | None = None
    view: str | None = None
    snapshots: dict[str, Content] = field(default_factory=dict)
    ignores_shutdown: bool = False
    fails_to_start: bool = False
    passthrough: tuple[str, ...] = ()
    kinds: dict[str, str] = field(default_factory=dict)  # of disks that are no files
    shareable: tuple[str, ...] = ()
    held: tuple[str, ...] = ()  # disks whose image another process has open
    boots: int = 0
    machine: FakeMachine = field(default_factory=FakeMachine)
    firmware: str = "bios"
    has_tpm: bool = False
    dies_hard: int = 0  # so many times QEMU must be killed: its bitmaps are lost

    @property
    def is_off(self) -> bool:
        return self.power is Power.OFF


def mark_of(place: str) -> str:
    """What tells a registry from others, wherever its folder is by now."""
    return place.rpartition("#")[2]


def _held_fence(vm: FakeVm, fence: FakeFence) -> HeldFence:
    return HeldFence(
        vm_uuid=vm.uuid,
        vm=vm.name,
        power=vm.power,
        pair=fence.pair,
        run=fence.run,
        side=fence.side,
        since_s=0.0,
        autostart_before=fence.autostart_before,
        autostart=vm.autostart,
        locked=fence.targets,
        unlocked=(),
    )


Fault = Callable[[str, Request, str], None]
"""Called with host, request and ``before``, ``midway`` (of a pass) or ``after``; raises what should go wrong there."""


def no_fault(_host: str, _request: Request, _moment: str) -> None:
    """Nothing goes wrong."""


class World:
    """Production host ``prod`` with the original, DR host ``dr`` with the replica, which is in use."""

    def __init__(self, disks: tuple[str, ...] = ("vda", "vdb")) -> None:
        self.original = FakeVm("u-orig", "web", "prod", Power.OFF, {d: b"old-" + d.encode() for d in disks})
        self.former: FakeVm | None = None  # the original that a run moves away from; `original` is its destination
        self.replica = FakeVm("u-repl", "web", "dr", Power.RUNNING, {d: b"old-" + d.encode() for d in disks})
        self.views: dict[str, FakeView] = {}
        self.records = SourceRecords()
        self.proofs = TargetRecords()
        self.knows_evidence = True  # False: agents that refuse the questions and orders of evidence
        self.scratch_disks: int | None = None  # so many disks of a live view fill its scratch files
        self.shutdown_s = 1.0
        self.pass_s = 1.0
        self.grants: dict[tuple[str, str], Grant] = {}
        self.epochs: dict[str, int] = {}
        self.holders: dict[str, str] = {}  # by host, the place of the registry that holds the pair
        self.obeyed: dict[str, str] = {}  # the pair whose orders each host has taken
        self.fault: Fault = no_fault
        self.away: set[str] = set()  # hosts that nobody can reach
        self.orders: list[tuple[str, Request]] = []
        self.frozen: Content | None = None  # the replica's disks since a run powered it off (I3)
        self.last_words: Content = {}  # the newest data when the replica went off
        self.mapping: dict[str, str] = {}  # original's disk to replica's, of the last pass
        self.writes = 0
        self.passes: dict[str, _Meeting] = {}
        self.limits: dict[str, tuple[int | None, int | None]] = {}  # network and read, of each host's last pass
        self.maps = FakeMaps()
        self.homes = FakeHomes()
        self.samples = FakeSamples()
        self.told: dict[tuple[str, Side], tuple[str, RememberPair]] = {}  # what each host was told of its pair
        self.remnants: dict[str, tuple[Remnant, ...]] = {}  # what runs left, by host
        self.pass_hold: trio.Event | None = None  # passes wait for it, so that a test can act in the middle

    # --- what tests look at ---------------------------------------------------------------------------------------

    def agent(self, host: str) -> Agent:
        """See `coordinator.agents.AgentDirectory`."""
        return FakeAgent(self, host)

    def bulk_endpoint(self, host: str) -> tuple[str, int | None]:
        """See `coordinator.agents.AgentDirectory`."""
        return f"bulk-{host}", None

    @property
    def vms(self) -> tuple[FakeVm, ...]:
        """All of them."""
        return (self.original, self.replica, *(() if self.former is None else (self.former,)))

    def vm(self, uuid_or_name: str, host: str) -> FakeVm:
        for vm in self.vms:
            if vm.host == host and uuid_or_name in (vm.uuid, vm.name):
                return vm
        raise AgentRefused(f"no VM {uuid_or_name} on {host}", code="no-such-domain")

    def check(self) -> None:
        """The invariants; called after every order."""
        running = [vm.name for vm in self.vms if not vm.is_off]
        assert len(running) < 2, "I1: two of original, replica and former original run at the same time"
        assert not (not self.original.is_off and self.original.condition is Condition.TORN), "a torn original runs"
        for vm in self.vms:
            assert vm.is_off or vm.fence is None, "a fenced VM runs"
        if self.frozen is not None:
            assert self.replica.disks == self.frozen, "I3: the replica's disks changed while it was off"

    def guests_write(self) -> None:
        """Every running guest writes."""
        self.writes += 1
        for vm in (self.original, self.replica):
            if not vm.is_off:
                first = next(iter(vm.disks))
                vm.disks = {**vm.disks, first: f"{vm.uuid}-{self.writes}".encode()}
                if vm is self.replica:
                    self.records.wrote(first)

    def __deepcopy__(self, memo: dict[int, object]) -> World:
        """Both hosts as they are now, when the coordinator has just died: no pass goes on, nothing is to go wrong."""
        twin = World.__new__(World)
        memo[id(self)] = twin
        lost = {"passes": {}, "fault": no_fault, "pass_hold": None}
        kept = {name: value for name, value in self.__dict__.items() if name not in lost}
        twin.__dict__.update(copy.deepcopy(kept, memo), **lost)
        return twin

    def crash_ends_passes(self) -> None:
        """The coordinator's connections ended: agents cancel what it had asked for."""
        self.passes.clear()

    # --- orders ---------------------------------------------------------------------------------------------------

    async def handle(self, host: str, request: Request, on_progress: ProgressCallback | None) -> Reply:
        if host in self.away:
            raise unreachable(host)
        if isinstance(request, OrderRequest):
            seen = self.epochs.get(host, 0)
            mark, holder = mark_of(request.order.place), self.holders.get(host, "")
            taken = isinstance(request, TakePair) and request.order.epoch > seen
            if holder and mark not in ("", holder) and not taken:
                raise AgentRefused(f"{holder} holds the pair under epoch {seen}", code="held", host=host)
            self.holders[host] = mark or holder
            if request.order.epoch < seen:
                raise AgentRefused(f"epoch {seen} has taken over", code="stale-epoch", host=host)
            self.epochs[host] = request.order.epoch
            self.obeyed[host] = request.order.pair
            if not isinstance(request, RememberPair):  # it touches nothing but the agent's memory
                self.orders.append((host, request))
        match request:
            case Ping():
                return Pong()
            case AskAuthority():
                place, asked = self.holders.get(host, ""), mark_of(request.place)
                return PairAuthority(
                    epoch=self.epochs.get(host, 0), holder=place, is_you=place in ("", asked), run="r", since_s=1.0
                )
            case TakePair():
                return Done()
            case DescribeHost():
                return _host(host)
            case InspectVm():
                return self._describe(self.vm(request.vm, host))
            case AskPower():
                vm = self.vm(request.vm_uuid, host)
                return PowerAnswer(power=vm.power, images_free=not vm.held, holders=vm.held)
            case DescribeMachine():
                vm = self.vm(request.vm_uuid, host)
                return vm.machine.describe(vm.uuid, tuple(vm.disks))
            case AskHoldings():
                return self.holdings(host)
            case RememberPair():
                self.told[host, request.side] = request.order.pair, request
                return Done()
            case CleanLeftovers() | ForgetPair():
                gone = tuple(f"{left.kind.value} {left.name}" for left in self.remnants.pop(host, ()))
                if isinstance(request, ForgetPair):
                    self.told = {key: told for key, told in self.told.items() if key[0] != host}
                return Cleaned(removed=gone, kept=())
            case AllowPass():
                self.grants[host, request.grant.grant] = request.grant
                self._check_grant(request.grant)
                if request.grant.direction is Direction.SEND:
                    self.mapping = {**self.mapping, **{d.peer_target: d.target for d in request.grant.disks}}
                return Done()
            case RunPass():
                self.limits[host] = request.limit_network, request.limit_read
                return await self._run_pass(host, request, on_progress)
            case SetLimits():
                self.limits[host] = request.limit_network, request.limit_read
                return Done()
            case AskEvidence() if self.knows_evidence:
                vm = self.vm(request.vm_uuid, host)
                told = self.proofs.answer(request.targets, vm.disks, held=vm.fence is not None)
                return Evidence(disks=self.maps.told(told))
            case SampleBlocks():
                return self.samples.answer(host, request)
            case AskEvidence():
                raise AgentRefused(f"{host} does not answer {type(request).__name__}", code="forbidden")
            case AskWritten():
                if not self.knows_evidence:
                    raise AgentRefused(f"{host} does not answer {type(request).__name__}", code="forbidden")
                return TrackingRead(disks=tuple(self.records.read(since) for since in request.since))
            case DropCheckpoints() | ReadTracking() | EndTracking() if not self.knows_evidence:
                raise AgentRefused(f"{host} does not obey {type(request).__name__}", code="forbidden")
            case _ if isinstance(request, MachineOrder):
                vm = self.vm(request.vm_uuid, host)
                return vm.machine.obey(request, vm.disks, is_off=vm.is_off, fenced=vm.fence is not None)
            case DescribeProvisions():
                return self.homes.provisions
            case _ if isinstance(request, HomeOrder):
                return self._home(host, request)
            case _:
                return self._obey(self.vm(request.vm_uuid, host), request)

    def _home(self, host: str, request: HomeOrder) -> Reply:
        """From here on the VM that is made is `original`, which passes write to, and what was it is `former`."""
        if isinstance(request, CreateVm):
            known = request.vm_uuid in self.homes.made
            self.homes.create(request)
            if not known:
                disks = {volume.target: b"" for volume in request.volumes}
                made = FakeVm(request.vm_uuid, request.name, host, Power.OFF, disks, autostart=False)
                self.original, self.former = made, self.original
            return VmCreated(paths=tuple(f"/{volume.pool}/{volume.target}" for volume in request.volumes))
        if isinstance(request, RemoveCreated) and self.homes.forget(request.vm_uuid):
            assert self.former is not None
            assert self.original.is_off, "a VM that runs is removed"
            self.original, self.former = self.former, None
        elif isinstance(request, KeepCreated):
            self.homes.forget(request.vm_uuid)
        return Done()

    def holdings(self, host: str) -> Holdings:
        """What the agent of that host holds."""
        vms = [vm for vm in self.vms if vm.host == host]
        pairs = tuple(
            HeldPair(
                pair=pair,
                epoch=self.epochs.get(host, 0),
                run=next((vm.fence.run for vm in vms if vm.fence is not None), told.order.run),
                side=side,
                mapping=told.mapping,
            )
            for (at, side), (pair, told) in self.told.items()
            if at == host
        )
        if not pairs and host in self.obeyed:
            bare = HeldPair(pair=self.obeyed[host], epoch=self.epochs.get(host, 0), run="", side=None, mapping=None)
            pairs = (bare,)
        views = tuple(
            Remnant(kind=RemnantKind.VIEW, vm_uuid=vm.uuid, name=name, recorded=True, in_use=True, removable=True)
            for vm in vms
            if vm is self.replica
            for name in self.views
        )
        snapshots = tuple(
            Remnant(kind=RemnantKind.SNAPSHOT, vm_uuid=vm.uuid, name=name, recorded=True, in_use=True, removable=False)
            for vm in vms
            for name in vm.snapshots
        )
        return Holdings(
            host=host,
            software=f"failback {version('failback')}",
            pairs=pairs,
            fences=tuple(_held_fence(vm, vm.fence) for vm in vms if vm.fence is not None),
            conditions=tuple(
                HeldCondition(vm_uuid=vm.uuid, condition=vm.condition, view=vm.view)
                for vm in vms
                if vm.condition is not None
            ),
            disks=(),
            passes=(),
            remnants=(*views, *snapshots, *self.remnants.get(host, ())),
            servers=(),
            certificate_ends_s=0.0,
            state_free_bytes=1 << 40,
            problems=(),
            left_off=0,
        )

    def _obey(self, vm: FakeVm, request: OrderRequest) -> Reply:
        match request:
            case PowerOff():
                return self._power_off(vm, request)
            case PowerOn():
                return self._power_on(vm)
            case FenceVm():
                return self._fence(vm, request)
            case LiftFence():
                return self._lift(vm, request)
            case SetCondition():
                if vm.fence is None:
                    raise AgentRefused("not fenced", code="not-fenced")
                vm.condition, vm.view = request.condition, request.view
                return Done()
            case OpenView(reopen=True):
                if request.view not in self.views or vm.is_off:
                    raise AgentRefused("no such view", code="no-view")
                return ViewOpened(view=request.view, live=True, disks=self.views[request.view].disks)
            case OpenView():
                assert request.view not in self.views, "a view's name is used twice"
                if vm.is_off and vm.fence is None:
                    raise AgentRefused("not fenced", code="not-fenced")
                return self._open_view(vm, request)
            case CloseView():
                self.views.pop(request.view, None)
                return Done()
            case Protect():
                assert vm.is_off, "snapshot of a running VM"
                assert vm.fence is not None, "snapshot of a VM without a fence"
                if request.side is Side.ORIGINAL and vm.condition is Condition.TORN:
                    raise AgentRefused("torn", code="torn")
                if self.records.checkpoints and vm is self.replica:
                    raise AgentRefused("cannot perform block operations while checkpoint exists", code="hypervisor")
                vm.snapshots.setdefault(request.snapshot, dict(vm.disks))
                if self.records.lost_late and vm is self.replica:
                    self.records.lost_late = False
                    self.records.kill()
                disks = tuple(
                    ProtectedDisk(target=t, base=f"/{t}", base_format="raw", overlay=f"/{t}.o") for t in request.targets
                )
                return Protected(snapshot=request.snapshot, disks=disks)
            case KeepRestorePoint():
                assert vm.is_off, "bases made read-only under a running VM"
                disks = tuple(
                    ProtectedDisk(target=t, base=f"/{t}", base_format="raw", overlay=f"/{t}.o") for t in vm.disks
                )
                return Protected(snapshot=request.snapshot, disks=disks)
            case MergeRestorePoint():
                assert vm.is_off, "merged under a running VM"
                assert vm.fence is not None, "merged without a fence"
                vm.snapshots.pop(request.snapshot, None)
                return Done()
            case Unprotect():
                assert vm.is_off, "snapshot dropped under a running VM"
                before = vm.snapshots.pop(request.snapshot, None)
                if request.side is Side.ORIGINAL and before is not None:
                    assert vm.fence is not None, "an original without a fence is given back"
                    vm.disks, vm.condition, vm.view = before, Condition.INTACT, None
                return Done()
            case MergeProtection():
                vm.snapshots.pop(request.snapshot, None)
                return Done()
            case DropCheckpoints():
                self.records.drop(request.keep, running=not vm.is_off)
                return Done()
            case ReadTracking():
                assert vm.is_off, "records read while the guest writes"
                assert vm.fence is not None, "records read without a fence"
                return TrackingRead(disks=tuple(self.records.read(since) for since in request.since))
            case EndTracking():
                assert vm.is_off or vm.fence is None
                self.records.end()
                return Done()
            case _:
                raise AssertionError(request)

    def _open_view(self, vm: FakeVm, request: OpenView) -> ViewOpened:
        live = not vm.is_off
        tracks = self.knows_evidence and live and request.track is not Tracking.NONE
        disks = tuple(
            self.records.viewed(target, SIZE_BYTES, request.since if self.knows_evidence else (), live=live)
            for target in request.targets
        )
        if tracks:
            disks = self.records.begin(request.view, disks)
        self.views[request.view] = FakeView(
            live=live, content=dict(vm.disks), disks=disks, dirty=self.records.dirty_of(disks)
        )
        return ViewOpened(view=request.view, live=live, disks=disks)

    def _check_grant(self, grant: Grant) -> None:
        """Whoever lets a pass rest on rung 1 must have both proofs, and the map's seed must be the map's."""
        receives = grant.direction is Direction.RECEIVE
        for disk in grant.disks:
            here, there = (disk.target, disk.peer_target) if receives else (disk.peer_target, disk.target)
            proof = self.proofs.of(here, self.original.disks, held=self.original.fence is not None)
            if disk.since is not None:
                assert proof.equals == disk.since, "a tracked grant that the target does not prove"
                viewed = {d.target: d.since for d in self.views[grant.view].disks}
                assert viewed[there] == disk.since, "a tracked grant that the source does not prove"
            if disk.digest_seed is not None:
                assert proof.map_seed == disk.digest_seed, "a grant with the seed of another map"

    def _power_off(self, vm: FakeVm, request: PowerOff) -> PoweredOff:
        if vm.is_off:
            return PoweredOff(was_running=False, forced=False, elapsed_s=0.0)
        if vm.ignores_shutdown and request.on_timeout is OnTimeout.ABORT:
            raise AgentRefused(f"the VM {vm.uuid} still runs", code="shutdown-timeout")
        vm.power = Power.OFF
        killed = vm.dies_hard > 0
        vm.dies_hard -= killed
        if vm is self.replica:
            if killed:
                self.records.kill()
            self.frozen = dict(vm.disks)
            self.last_words = dict(vm.disks)
        forced = vm.ignores_shutdown or killed
        return PoweredOff(was_running=True, forced=forced, elapsed_s=self.shutdown_s, killed=killed)

    def _power_on(self, vm: FakeVm) -> Done:
        if vm.fence is not None or vm.condition is Condition.TORN:
            raise AgentRefused(f"{vm.name} is fenced or torn", code="fenced")
        if vm.fails_to_start:
            raise AgentRefused(f"libvirt cannot start {vm.name}: no such CPU", code="hypervisor")
        if vm.is_off:
            if vm is self.original:
                copied = {here: self.last_words[there] for here, there in self.mapping.items()}
                assert copied, "I2: the original starts and nothing was ever copied to it"
                assert {t: vm.disks[t] for t in copied} == copied, (
                    "I2: the original starts and is not what the replica last held"
                )
            else:
                assert vm.disks == (self.frozen or vm.disks), "I3: the replica starts on other data"
                self.frozen = None
            vm.power = Power.RUNNING
            vm.boots += 1
        if vm.condition is not None:
            vm.condition, vm.view = Condition.INTACT, None
        return Done()

    def _fence(self, vm: FakeVm, request: FenceVm) -> FenceDescription:
        if not vm.is_off:
            raise AgentRefused(f"{vm.name} is {vm.power.value}; power it off first", code="hypervisor")
        if vm.fence is None:
            vm.fence = FakeFence(request.side, vm.autostart, request.order.pair, request.order.run, request.targets)
        vm.fence.targets = request.targets
        vm.autostart = False
        return self._fence_description(vm, vm.fence)

    def _lift(self, vm: FakeVm, request: LiftFence) -> Done:
        if vm.condition is Condition.TORN:
            raise AgentRefused("torn", code="torn")
        if vm.fence is not None:
            if request.restore_autostart:
                vm.autostart = vm.fence.autostart_before if request.autostart is None else request.autostart
            vm.fence = None
        return Done()

    async def _run_pass(self, host: str, request: RunPass, on_progress: ProgressCallback | None) -> PassReport:
        grant = self.grants[host, request.grant]
        sends = grant.direction is Direction.SEND
        meeting = self.passes.setdefault(request.grant, _Meeting())
        if not sends:
            assert not meeting.sender_came, "the sender came before the receiver"
            meeting.receiver_waits = True
            try:
                await meeting.ended.wait()
            finally:
                meeting.receiver_waits = False
            if meeting.failed:
                raise AgentRefused("the source agent gave the pass up", code="peer-failed")
            if grant.kind is not PassKind.SYNC:
                return self.maps.report(grant, self.views[grant.view].content, self.original.disks, sends=False)
            return PassReport(view=grant.view, elapsed_s=self.pass_s, disks=self._reports(grant, sends=False))
        assert request.peer_name == self.original.host, "the sender calls somebody else"
        meeting.sender_came = True
        try:
            return await self._send(host, request, grant, meeting, on_progress)
        except AgentRefused:
            meeting.failed = True
            meeting.ended.set()
            raise

    async def _send(
        self, host: str, request: RunPass, grant: Grant, meeting: _Meeting, on_progress: ProgressCallback | None
    ) -> PassReport:
        if not meeting.receiver_waits:
            raise AgentRefused("the target agent knows no such pass", code="peer-gone")
        progress = tuple(_progress(disk.target, SIZE_BYTES // 2) for disk in grant.disks)
        if on_progress is not None:
            on_progress(PassProgress(disks=progress))
        if grant.kind is not PassKind.SYNC:
            self.fault(host, request, "midway")
            if self.pass_hold is not None:
                await self.pass_hold.wait()
            meeting.ended.set()
            return self.maps.report(grant, self.views[grant.view].content, self.original.disks, sends=True)
        self.original.condition, self.original.view = Condition.TORN, None
        assert self.original.fence is not None, "written without a fence"
        view = self.views.get(grant.view)
        if view is None:
            raise AgentRefused(f"the view {grant.view} is gone", code="sync")
        moved = [disk for disk in grant.disks if disk.since is None or view.dirty[disk.target]]
        for disk in moved:
            self.original.disks = {**self.original.disks, disk.peer_target: b"half"}
            self.proofs.torn(disk.peer_target, b"half", since=disk.since)
        if view.live and self.scratch_disks is not None and len(view.disks) > self.scratch_disks:
            self.views.pop(grant.view)
            raise AgentRefused("the scratch files fill their file system; make room", code="scratch-full")
        self.fault(host, request, "midway")
        if self.pass_hold is not None:
            await self.pass_hold.wait()
        if grant.view not in self.views:
            raise AgentRefused(f"the view {grant.view} is gone", code="sync")
        for disk in moved:
            self.original.disks[disk.peer_target] = view.content[disk.target]
        for disk in grant.disks:
            self.maps.maps[disk.peer_target] = self.original.disks[disk.peer_target]
            self.proofs.equal(disk.peer_target, self.original.disks[disk.peer_target], grant.view)
        meeting.ended.set()
        return PassReport(view=grant.view, elapsed_s=self.pass_s, disks=self._reports(grant, sends=True))

    def _reports(self, grant: Grant, *, sends: bool) -> tuple[DiskReport, ...]:
        return tuple(
            DiskReport(
                target=disk.target,
                size_bytes=disk.source_size_bytes,
                zero_bytes=SIZE_BYTES // 4 if sends and not disk.since else 0,
                compared_bytes=65536 if sends and disk.since else SIZE_BYTES - SIZE_BYTES // 4,
                changed_bytes=4096 if sends else 0,
                wire_bytes=1000 if sends else 0,
                written_bytes=0 if sends else 4096,
                zeroed_bytes=0 if sends else 512,
                verified_bytes=0 if sends else 4608,
                rung="bitmap" if disk.since else "map" if disk.digest_seed is not None else "digests",
                why_not_higher="" if disk.since else "no bitmap",
                past_cache=True,
                frames={"zstd 1": 1} if sends else {},
                stored_bytes=900 if sends else 0,
                lanes=1,
                superblock_bytes=1 << 20 if sends else 0,
                detail_bytes=4096 if sends else 0,
                access="raw",
                unchanged_bytes=SIZE_BYTES - 65536 if disk.since else 0,
            )
            for disk in grant.disks
        )

    def _describe(self, vm: FakeVm) -> VmDescription:
        return VmDescription(
            uuid=vm.uuid,
            name=vm.name,
            power=vm.power,
            persistent=True,
            autostart=vm.autostart,
            managed_save=False,
            on_poweroff="destroy",
            machine="pc",
            firmware=vm.firmware,
            has_tpm=vm.has_tpm,
            passthrough=vm.passthrough,
            disks=tuple(_disk(vm, target) for target in vm.disks),
            snapshots=tuple(SnapshotDescription(name=name, ours=True, external=True) for name in vm.snapshots),
            checkpoints=tuple(sorted(self.records.checkpoints)) if vm is self.replica else (),
            job=None,
            job_is_ours=False,
            fence=None if vm.fence is None else self._fence_description(vm, vm.fence),
            lifted=vm.lifted,
        )

    def _fence_description(self, vm: FakeVm, fence: FakeFence) -> FenceDescription:
        return FenceDescription(
            pair=fence.pair,
            run=fence.run,
            side=fence.side,
            autostart_before=fence.autostart_before,
            locked=fence.targets,
            unlocked=(),
            condition=vm.condition,
            view=vm.view,
        )


SIZE_BYTES = 1 << 20


@dataclass
class _Meeting:
    """Where the two ends of a pass meet."""

    receiver_waits: bool = False
    sender_came: bool = False
    failed: bool = False
    ended: trio.Event = field(default_factory=trio.Event)


class FakeAgent:
    """One of the world's agents."""

    def __init__(self, world: World, host: str) -> None:
        self._world = world
        self._host = host

    @property
    def host(self) -> str:
        """The host's name."""
        return self._host

    async def ask(
        self, request: Request, *, timeout_s: float | None, on_progress: ProgressCallback | None = None
    ) -> Reply:
        """See `coordinator.agents.Agent.ask`."""
        await trio.lowlevel.checkpoint()
        self._world.guests_write()
        self._world.fault(self._host, request, "before")
        reply = await self._world.handle(self._host, request, on_progress)
        self._world.check()
        self._world.fault(self._host, request, "after")
        return reply


def unreachable(host: str) -> HostUnreachable:
    """The error of a host that does not answer."""
    return HostUnreachable(f"the agent on {host} cannot be asked: no answer; check it", host=host)


def _host(host: str) -> HostDescription:
    return HostDescription(
        host=host,
        software="failback 0",
        hypervisor_uri="fake:///",
        libvirt_version="9.0.0",
        qemu_version="7.2.0",
        bulk_port=9861,
        fingerprint=f"fingerprint-{host}",
        missing_tools=(),
    )


def _disk(vm: FakeVm, target: str) -> DiskDescription:
    image = ImageDescription(
        path=f"/{target}",
        format="raw",
        identity=f"{vm.host}:/{target}",  # two machines never share an inode
        virtual_size_bytes=SIZE_BYTES,
        internal_snapshots=0,
        bitmaps=(),
        dirty=False,
        corrupt=False,
        encrypted=False,
        external_data=False,
    )
    return DiskDescription(
        target=target,
        kind=vm.kinds.get(target, "file"),
        chain=() if target in vm.kinds else (image,),
        sector_bytes=512,
        shareable=target in vm.shareable,
        readonly=False,
        problem=None,
        free_bytes=1 << 30,
    )


def _progress(target: str, done_bytes: int) -> DiskProgress:
    return DiskProgress(
        target=target, total_bytes=SIZE_BYTES, done_bytes=done_bytes, zero_bytes=0, changed_bytes=0, wire_bytes=0
    )
