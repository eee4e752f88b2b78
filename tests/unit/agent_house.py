"""An agent without its listeners: real images and locks, a hypervisor in memory, orders as a coordinator gives them."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from agent.config import Config, TlsConfig
from agent.disk.lock import hold_exclusive
from agent.errors import DiskBusy
from agent.ledger import Ledger
from agent.service import AgentService
from protocol.messages import (
    AllowPass,
    Direction,
    FenceVm,
    Grant,
    GrantedDisk,
    Order,
    PassProgress,
    Reply,
    Request,
    RunPass,
    Side,
)
from protocol.messages import Role as PeerRole
from protocol.tls import PeerIdentity
from tests.fakes.hypervisor import FakeDomain, FakeHypervisor, FakeMachine

SIZE_BYTES = 1 << 20
GRANT = "ab" * 16
PEER = PeerIdentity(role=PeerRole.COORDINATOR, names=("coordinator",), fingerprint="00" * 32)


def order(epoch: int = 1, *, pair: str = "web", run: str = "r1") -> Order:
    """Authority for one order."""
    return Order(pair=pair, run=run, epoch=epoch)


def is_locked(path: Path) -> bool:
    """Whether anybody holds the image."""
    try:
        hold_exclusive(path).close()
    except DiskBusy:
        return True
    return False


@dataclass
class AgentHouse:
    """A machine with the VM ``web`` (off, one raw disk) and its agent."""

    folder: Path
    machine: FakeMachine
    vm: FakeDomain
    service: AgentService

    @property
    def image(self) -> Path:
        """The VM's disk."""
        return self.folder / "vda.raw"

    async def ask(self, request: Request) -> Reply:
        """The agent's answer; raises what it raises."""

        async def no_progress(_: PassProgress) -> None:
            return

        return await self.service.handle(request, PEER, no_progress)

    async def fence(self, side: Side = Side.ORIGINAL, *, epoch: int = 1) -> Reply:
        """Fence the VM."""
        return await self.ask(FenceVm(order=order(epoch), vm_uuid=self.vm.uuid, side=side, targets=("vda",)))

    async def allow(self, *, epoch: int = 1, view: str = "r1-1", since: str | None = None) -> None:
        """Grant a pass that receives."""
        disk = GrantedDisk(
            target="vda",
            peer_target="vda",
            source_size_bytes=SIZE_BYTES,
            target_size_bytes=SIZE_BYTES,
            since=since,
        )
        grant = Grant(
            grant=GRANT,
            vm_uuid=self.vm.uuid,
            direction=Direction.RECEIVE,
            peer_fingerprint="11" * 32,
            view=view,
            disks=(disk,),
        )
        await self.ask(AllowPass(order=order(epoch), grant=grant))

    def run_pass(self, *, epoch: int = 1) -> RunPass:
        """The request that carries that grant out."""
        return RunPass(order=order(epoch), grant=GRANT, peer_name="", peer_host="", peer_port=0)


@dataclass
class Outcome:
    """What became of a request in the background."""

    reply: Reply | None = None
    error: Exception | None = None
    over: bool = False

    async def watch(self, ask: Callable[[], Awaitable[Reply]]) -> None:
        """Wait for the answer."""
        try:
            self.reply = await ask()
        except Exception as error:  # noqa: BLE001 - kept for the test to look at
            self.error = error
        finally:
            self.over = True


@contextmanager
def open_house(folder: Path) -> Iterator[AgentHouse]:
    """An agent with its VM; locks and ledger are let go of at the end."""
    machine = FakeMachine(folder)
    image = folder / "vda.raw"
    image.write_bytes(bytes(SIZE_BYTES))
    vm = machine.define("web", {"vda": (image, "raw")})
    runtime = folder / "run"
    runtime.mkdir()
    nowhere = folder / "none.pem"
    config = Config(
        tls=TlsConfig(ca=nowhere, certificate=nowhere, key=nowhere),
        name="prod",
        state_dir=folder / "state",
        runtime_dir=runtime,
    )
    ledger = Ledger.open(config.state_dir)
    service = AgentService(
        config=config,
        fingerprint="22" * 32,
        client_context=ssl.create_default_context(),
        hypervisor=FakeHypervisor(machine),
        ledger=ledger,
    )
    yield AgentHouse(folder, machine, vm, service)
    service.fences.close()
    ledger.close()


def descriptors() -> int:
    """How many file descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(reached: Callable[[], bool]) -> None:
    """Wait for something that other tasks and threads bring about."""
    with trio.fail_after(20):
        while not reached():  # noqa: ASYNC110 - threads have no trio event to set
            await trio.sleep(0.005)
