"""Two hosts with their agents, a coordinator, the network between them: everything that one seed sets in motion."""

from __future__ import annotations

import contextlib
import sqlite3
import uuid as uuids
from collections.abc import Awaitable, Callable
from contextlib import closing
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import trio

from agent.config import Config as AgentConfig
from agent.config import TlsConfig
from agent.daemon import _keep_promises, _mend
from agent.errors import AgentError
from agent.ledger import Ledger
from agent.service import AgentService, failure_of
from agent.sync.conversation import Unforeseen
from coordinator.agents import AgentLink
from coordinator.config import Config
from coordinator.database import Database
from coordinator.errors import CoordinatorError
from coordinator.runs import Coordinator
from coordinator.store import Store, Work
from protocol.control_server import _Server
from protocol.errors import ProtocolError
from protocol.messages import (
    Failure,
    FenceVm,
    LiftFence,
    PassProgress,
    PowerOff,
    PowerOn,
    Reply,
    Request,
    Role,
    Unprotect,
)
from protocol.tls import PeerIdentity
from tests.simulation.core import HOST, ORDER, REQUEST, Chaos, InlineThreads, Process, Violation, only_killed
from tests.simulation.machines import Memory, SimDomain, SimHypervisor, SimMachine, guest
from tests.simulation.monitor import PAIR, Monitor
from tests.simulation.network import BulkEnd, ControlEnd, Link, pair
from tests.simulation.storage import Storage

T = TypeVar("T")
CALLER: ContextVar[Process | None] = ContextVar("CALLER", default=None)
NOWHERE = Path("/nonexistent/none.pem")


@dataclass(frozen=True)
class Broken:
    """Faults built into the simulation's own stand-ins, for the tests of the simulation."""

    ledger_not_synced: bool = False


@dataclass(eq=False)
class AgentHost:
    """A hypervisor host and its agent, which is started again when it has died."""

    world: World
    name: str
    machine: SimMachine
    storage: Storage
    fingerprint: str
    process: Process = field(init=False)
    service: AgentService | None = None
    listening: bool = False
    powered: bool = True
    nursery: trio.Nursery | None = None
    orders: list[LiftFence | PowerOn | PowerOff | FenceVm | Unprotect] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.process = Process(self.name, self.world.chaos)

    @property
    def identity(self) -> PeerIdentity:
        """What its certificate says."""
        return PeerIdentity(role=Role.AGENT, names=(self.name,), fingerprint=self.fingerprint)

    def spawn(self, task: Callable[..., Awaitable[None]], *args: Any) -> None:
        """A task of this agent's process, if it lives."""
        if self.listening and self.nursery is not None:
            self.nursery.start_soon(task, *args)

    async def live(self) -> None:
        """Agents one after the other, as systemd starts them."""
        random = self.world.chaos.random
        while True:
            await self._life()
            await trio.sleep(1 + random.random() * 9)
            while not self.powered:  # noqa: ASYNC110 - virtual time
                await trio.sleep(1)

    async def lose_power(self) -> None:
        """The power goes, and comes back after a while."""
        await trio.sleep(5 + self.world.chaos.random.random() * 60)
        self.machine.boot()
        self.powered = True

    def power_fails(self) -> None:
        """Now."""
        if not self.powered:
            return
        self.powered = False
        self.process.kill()
        self._let_go()
        self.machine.lose_power()
        self.world.nursery.start_soon(self.lose_power)

    def _let_go(self) -> None:
        """What the kernel does with the locks of a process that is gone."""
        self.listening = False
        self.world.monitor.guarding.discard(self.name)
        service, self.service = self.service, None
        if service is not None:
            service.fences.close()
            for opened in service.views._open.values():
                for lock in opened.locks:
                    lock.close()
            service.ledger.close()

    async def _life(self) -> None:
        self.process = Process(self.name, self.world.chaos)
        self.world.chaos.say(f"*** agent {self.name} starts")
        try:
            with self.process.scope:
                await self._serve()
        except BaseException as error:
            if isinstance(error, AgentError):
                self.world.chaos.say(f"*** agent {self.name} cannot start: {error.code}")
            elif not only_killed(error):
                raise
        finally:
            self.process.dead = True
            self._let_go()
        self.world.chaos.say(f"*** agent {self.name} is gone")

    async def _serve(self) -> None:
        HOST.set(self.name)
        tls = TlsConfig(ca=NOWHERE, certificate=NOWHERE, key=NOWHERE)
        folder = self.machine.folder
        config = AgentConfig(tls=tls, name=self.name, state_dir=folder / "state", runtime_dir=folder / "run")
        ledger = Ledger.open(config.state_dir)
        service = self.service = AgentService(
            config=config,
            fingerprint=self.fingerprint,
            client_context=None,  # type: ignore[arg-type]
            hypervisor=SimHypervisor(self.machine, self.process),
            ledger=ledger,
            threads=InlineThreads(process=self.process),
        )
        service.views.scratch._thread = self  # type: ignore[assignment] # it has one already: none is started
        self.world.monitor.began(self.name, ledger.epoch(PAIR))
        told = await _mend(service, service.fences.restore, frozenset())
        async with trio.open_nursery() as nursery:
            self.nursery, self.listening = nursery, True
            self.world.monitor.guarding.add(self.name)
            nursery.start_soon(_keep_promises, service, told)
            await trio.sleep_forever()

    async def take_control(self, end: ControlEnd) -> None:
        """A control connection."""
        assert self.service is not None
        HOST.set(self.name)
        ORDER.set(None)
        server = _Server(
            context=None,  # type: ignore[arg-type]
            handler=self._handle,
            host=self.name,
            map_error=self._mapped,
            max_connections=16,
            handshake_timeout_s=10.0,
            silent_after_s=30.0,
        )
        await server.serve(end)  # type: ignore[arg-type]

    async def take_bulk(self, wire: BulkEnd) -> None:
        """A bulk connection."""
        HOST.set(self.name)
        ORDER.set(None)
        service = self.service
        if service is None:
            return
        try:
            hello, _ = await service.threads.on_network(wire.receive)
            await service.passes.arrive(wire, hello)  # type: ignore[arg-type]
        except ProtocolError:
            wire.close()

    async def _handle(self, request: Request, peer: PeerIdentity, progress: Callable[[PassProgress], Any]) -> Reply:
        service, process = self.service, self.process
        assert service is not None
        name = type(request).__name__
        ORDER.set(getattr(request, "order", None))
        REQUEST.set(name)
        if isinstance(request, LiftFence | PowerOn | PowerOff | FenceVm | Unprotect):
            self.orders.append(request)
        self.world.monitor.asked(request)
        process.point(f"is asked {name}")
        reply = await service.handle(request, peer, progress)
        process.check()
        self.world.monitor.answered(self.name, request, reply)
        process.point(f"has done {name}")
        return reply

    async def hear_stale(self, number: int) -> None:
        """A coordinator that was thought dead wakes up and gives an order of its time."""
        stale = [order for order in self.orders if order.order.epoch < self.world.monitor.acked.get(self.name, 0)]
        if not stale or self.service is None:
            return
        request = stale[number % len(stale)]
        self.world.chaos.say(f"    a stale coordinator orders {type(request).__name__}")
        HOST.set(self.name)
        ORDER.set(request.order)
        REQUEST.set(type(request).__name__)
        try:
            await self.service.handle(request, self.identity, _unheard)
        except AgentError as error:
            self.world.chaos.say(f"    and is refused: {error.code}")

    def _mapped(self, error: Exception) -> Failure | None:
        failure = failure_of(error)
        if failure is None or isinstance(error, Unforeseen):
            raise Violation(f"{self.name} failed in a way nobody foresaw: {error!r}") from error
        self.world.chaos.say(f"    {self.name} refuses: {failure.code}: {self.world.anonymous(failure.sentence)}")
        return failure


async def _unheard(_: PassProgress) -> None:
    return


class SimStore(Store):
    """The coordinator's database: its process may die just before or just after a write."""

    def __init__(self, database: Database, process: Process) -> None:
        super().__init__(database, inline=True)
        self._process = process

    async def write(self, work: Work[T]) -> T:
        """See `Store.write`."""
        self._process.point("writes to its database")
        await self._process.awake()
        result = await super().write(work)
        self._process.point("has written to its database")
        await self._process.awake()
        return result


class SimAgents:
    """The agents as one coordinator process reaches them, by the real `AgentLink`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._links: dict[str, AgentLink] = {}

    def agent(self, host: str) -> AgentLink:
        """See `AgentDirectory.agent`."""
        if host not in self._links:
            self._links[host] = AgentLink(
                host,
                address=host,
                port=1,
                context=lambda: None,  # type: ignore[arg-type,return-value]
                nursery=self._nursery,
            )
        return self._links[host]

    def bulk_endpoint(self, host: str) -> tuple[str, int | None]:
        """See `AgentDirectory.bulk_endpoint`."""
        return host, 2


class VirtualClock:
    """Trio's time, and a wall clock that jumps."""

    def __init__(self, world: World) -> None:
        self._world = world

    def wall_s(self) -> float:
        """See `coordinator.clock.Clock`."""
        return self._world.wall_s()

    def monotonic_s(self) -> float:
        """See `coordinator.clock.Clock`."""
        return trio.current_time()


@dataclass(eq=False)
class World:
    """Everything."""

    folder: Path
    seed: int
    chaos: Chaos
    broken: Broken = field(default_factory=Broken)
    hosts: dict[str, AgentHost] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    coordinator: Process | None = None
    lies: bool = False
    jumped_s: dict[str, float] = field(default_factory=dict)
    must_take: bool = False
    abandoned: trio.Event | None = None
    taken: trio.Event | None = None

    def __post_init__(self) -> None:
        random = self.random = self.chaos.random
        self.numbers = Random(self.seed ^ 0xC0FFEE)
        self.monitor = Monitor(self.chaos)
        self.chaos.after.append(self.monitor.look)
        self.nursery: trio.Nursery = None  # type: ignore[assignment] # set before anything runs
        self.links = {name: Link(name) for name in ("dr", "prod", "bulk")}
        self.config = Config(state_dir=self._registry("ctl"), hooks_dir=self.folder / "hooks.d")
        for name, fingerprint in (("dr", "d0" * 32), ("prod", "f0" * 32)):
            folder = self.folder / name
            (folder / "run").mkdir(parents=True)
            storage = Storage(folder, Random(self.seed ^ len(name)))
            machine = SimMachine(folder, name, storage, self.monitor, hook=random.random() < 0.5)
            self.hosts[name] = AgentHost(self, name, machine, storage, fingerprint)
        self._define(random)

    def _registry(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        (folder / "registry.mark").write_text(f"{self.seed} {name}\n", encoding="ascii")
        return folder

    def _define(self, random: Random) -> None:
        targets = ["vda", "vdb"][: random.choice((1, 1, 2))]
        sizes = {target: (1 << 20) + 65536 * random.randint(0, 8) for target in targets}
        kind = random.choice(("qcow2", "qcow2", "raw"))
        contents = {}
        for name in ("dr", "prod"):
            disks = {}
            for target, size in sizes.items():
                path = self.hosts[name].machine.folder / f"{target}.{kind}"
                if name == "dr":
                    contents[target] = bytearray(size)
                    for _ in range(random.randint(4, 30)):
                        at, length = 4096 * random.randrange(size // 4096), 4096 * random.randint(1, 8)
                        contents[target][at : at + length] = random.randbytes(length)[: size - at]
                    data = bytes(contents[target])
                else:
                    data = bytes(contents[target])
                    for _ in range(random.randint(0, 6)):
                        at = 4096 * random.randrange(size // 4096)
                        data = data[:at] + random.randbytes(4096) + data[at + 4096 :]
                path.write_bytes(data)
                disks[target] = (path, kind)
            number = uuids.UUID(int=self.numbers.getrandbits(128), version=4)
            domain = self.hosts[name].machine.add("web", str(number), disks, autostart=random.random() < 0.7)
            if name == "dr":
                self.monitor.replica = domain
                domain.memory = Memory(contents)
            else:
                self.monitor.original = domain

    @property
    def original(self) -> SimDomain:
        """On prod."""
        return self.monitor.original

    @property
    def replica(self) -> SimDomain:
        """On dr."""
        return self.monitor.replica

    def wall_s(self) -> float:
        """What the clock of the host says on which the running task runs."""
        return 1.7e9 + trio.current_time() + self.jumped_s.get(HOST.get(), 0.0)

    def host_of(self, path: Path) -> AgentHost | None:
        """The host whose storage has that path."""
        for host in self.hosts.values():
            if path.is_relative_to(host.machine.folder):
                return host
        return None

    def anonymous(self, text: str) -> str:
        """Without the folder's name, which is another in each run."""
        return text.replace(str(self.folder), "")

    def tokens(self, length_bytes: int) -> str:
        """Random, of the seed."""
        return f"{self.numbers.getrandbits(8 * length_bytes):0{2 * length_bytes}x}"

    async def start(self, nursery: trio.Nursery) -> None:
        """Switch everything on: the pair is in Failover."""
        self.nursery = nursery
        self.replica.begin("hand")
        self.replica.started_by = "tool"
        every_s = self.random.choice((0.03, 0.1, 0.5))
        for name in ("dr", "prod"):
            host = self.hosts[name]
            nursery.start_soon(host.live)
        for domain in (self.replica, self.original):
            nursery.start_soon(guest, domain.machine, domain, every_s, lambda: self.coordinator is not None)
        while not all(host.listening for host in self.hosts.values()):  # noqa: ASYNC110 - virtual time
            await trio.sleep(0.01)

    async def connect_control(self, name: str) -> ControlEnd:
        """A coordinator calls an agent."""
        host, link, caller = self.hosts[name], self.links[name], CALLER.get()
        assert caller is not None
        caller.check()
        if link.stalled:
            await trio.sleep(60)
        if not link.up or not host.listening:
            raise OSError(111, "Connection refused")
        here, there = pair(link, caller, host.process)
        coordinator = PeerIdentity(role=Role.COORDINATOR, names=("coordinator",), fingerprint="c0" * 32)
        host.spawn(host.take_control, ControlEnd(there, coordinator))
        return ControlEnd(here, host.identity)

    def take_for_dead(self) -> None:
        """The coordinator's process stands still; another one, with a copy of its database, is to go on. Once."""
        process = self.coordinator
        if process is None or self.taken is not None or not self.config.database.exists():
            return
        first, self.config = self.config, replace(self.config, state_dir=self._registry("ctl2"))
        with closing(sqlite3.connect(first.database)) as old, closing(sqlite3.connect(self.config.database)) as new:
            old.backup(new)
        process.asleep, self.taken, self.must_take = trio.Event(), trio.Event(), True
        self.coordinator = None
        self.nursery.start_soon(self._wake, process, first)
        assert self.abandoned is not None
        self.abandoned.set()

    async def _wake(self, process: Process, first: Config) -> None:
        """Some time after it was taken for dead the first coordinator goes on where it stood, and tries once more."""
        assert self.taken is not None
        await self.taken.wait()
        await trio.sleep(self.random.random() * 20)
        self.chaos.say("    the first coordinator wakes up")
        process.wake()
        for _ in range(3):
            await trio.sleep(5 + 20 * self.random.random())
            try:
                await self._run(Process("old", self.chaos), lambda c: c.resume(PAIR), first)
            except CoordinatorError as error:
                self.chaos.say(f"    the first coordinator is told: {error.code}")

    async def coordinate(self, act: Callable[[Coordinator], Awaitable[T]]) -> T | None:
        """One process of the coordinator does `act`; None where it was killed, or taken for dead. Raises what `act`
        raises."""
        process = self.coordinator = Process("ctl", self.chaos)
        abandoned = self.abandoned = trio.Event()
        failure: Exception | None = None
        result: T | None = None

        async def whole() -> None:
            nonlocal result, failure
            try:
                result = await self._run(process, act, self.config)
            except CoordinatorError as error:
                failure = error
            finally:
                if self.coordinator is process:
                    self.coordinator = None
                abandoned.set()

        self.nursery.start_soon(whole)
        await abandoned.wait()
        if failure is not None:
            raise failure
        return result

    async def _run(self, process: Process, act: Callable[[Coordinator], Awaitable[T]], config: Config) -> T | None:
        failure: Exception | None = None
        result: T | None = None

        async def body() -> None:
            nonlocal result, failure
            CALLER.set(process)
            with process.scope:
                async with trio.open_nursery() as nursery:
                    try:
                        async with Coordinator(
                            config,
                            actor="root@sim",
                            agents=SimAgents(nursery),
                            clock=VirtualClock(self),
                            tokens=self.tokens,
                            make_store=lambda database: SimStore(database, process),
                        ) as coordinator:
                            result = await act(coordinator)
                    except Exception as error:  # noqa: BLE001 - raised below, outside the nursery
                        failure = error
                    nursery.cancel_scope.cancel()

        try:
            await body()
        except BaseException as error:
            if not process.dead or not only_killed(error):
                raise
        finally:
            dead, process.dead = process.dead, True
        if dead:
            return None
        if failure is not None:
            raise failure
        return result

    def close(self) -> None:
        """Let go of everything."""
        for host in self.hosts.values():
            host._let_go()
            for domain in host.machine.domains.values():
                with contextlib.suppress(Violation):
                    domain._unlock()  # type: ignore[attr-defined]
