"""Hypervisor hosts of the simulation: the fake of `tests.fakes.hypervisor`, with QEMU's image locks, guests that write,
and hosts that lose their power."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from agent.disk import lock
from agent.errors import DiskBusy, HypervisorError
from agent.virt.seam import PowerState
from tests.fakes.hypervisor import FakeDomain, FakeHypervisor, FakeImage, FakeMachine
from tests.simulation.core import NotYet, Process, Violation
from tests.simulation.storage import PAGE, Storage

if TYPE_CHECKING:
    from tests.simulation.monitor import Monitor

USED = (lock._USES_READ, lock._USES_WRITE, lock._USES_RESIZE, lock._KEEPS_WRITE, lock._KEEPS_RESIZE)


@dataclass(eq=False)
class Memory:
    """What a guest knows that it wrote: what its disks must hold.

    Attributes:
        expected: by target.
        older: what a page may hold instead after a power loss, for it was written and not flushed since.
    """

    expected: dict[str, bytearray]
    older: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)

    def wrote(self, target: str, offset: int, data: bytes) -> None:
        """Not flushed yet."""
        held = self.expected[target]
        for page in range(offset // PAGE, -(-(offset + len(data)) // PAGE)):
            self.older.setdefault((target, page), []).append(bytes(held[page * PAGE : (page + 1) * PAGE]))
        held[offset : offset + len(data)] = data

    def flushed(self) -> None:
        """All of it is acknowledged."""
        self.older.clear()

    def after_crash(self, target: str, found: bytes) -> None:
        """What the disk holds after a power loss must be what was acknowledged, or newer."""
        for page in range(len(found) // PAGE):
            held = found[page * PAGE : (page + 1) * PAGE]
            if held == self.expected[target][page * PAGE : (page + 1) * PAGE]:
                continue
            if held not in self.older.get((target, page), []):
                raise Violation(f"I4: page {page} of {target} lost what its guest had flushed")
            self.expected[target][page * PAGE : (page + 1) * PAGE] = held

    def copy(self) -> Memory:
        """The same, apart."""
        return Memory({target: bytearray(held) for target, held in self.expected.items()})


class SimDomain(FakeDomain):
    """A domain whose running QEMU holds the locks of its images, and that saves what is volatile when it ends."""

    def __init__(self, machine: SimMachine, **words: Any) -> None:
        super().__init__(**words)
        self.machine = machine
        self.locks: list[int] = []
        self.memory: Memory | None = None
        self.started_by = ""

    def begin(self, by: str) -> None:
        """Power on. Raises `HypervisorError` where a lock or the hook refuses."""
        if by != "tool" and self.machine.hook and self.machine.is_fenced(self.uuid):
            raise HypervisorError(f"VM {self.name} is refused by the hook.", vm=self.name)
        for top in self.disks.values():
            self._lock(top.path)
        self.state, self.started_by = PowerState.RUNNING, by
        self.machine.monitor.started(self)

    def _lock(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            for byte in USED:
                lock._set_lock(fd, fcntl.F_RDLCK, byte, 1)
            for byte in (lock._KEEPS_WRITE, lock._USES_WRITE):
                if lock._locked_by_another(fd, byte):
                    raise OSError(11, "locked")
        except OSError as error:
            os.close(fd)
            self._unlock()
            raise HypervisorError(f'VM {self.name}: Failed to get "write" lock.', vm=self.name) from error
        self.locks.append(fd)

    def _unlock(self) -> None:
        for fd in self.locks:
            os.close(fd)
        self.locks.clear()

    def end(self, *, killed: bool = False) -> None:
        was_running = self.state is not PowerState.OFF
        FakeDomain.end(self, killed=killed)
        self._unlock()
        if was_running:
            if not self.machine.losing_power:
                # A guest that shuts down flushes; what a killed QEMU had handed over, the kernel writes back.
                for top in self.disks.values():
                    self.machine.storage.state(top.path).flush()
                if self.memory is not None:
                    self.memory.flushed()
            self.machine.monitor.ended(self)


class SimMachine(FakeMachine):
    """A host. `hook`: libvirt's hook refuses to start what is fenced, whoever asks and whether the agent lives."""

    def __init__(self, folder: Path, hostname: str, storage: Storage, monitor: Monitor, *, hook: bool) -> None:
        super().__init__(folder, hostname)
        self.storage, self.monitor, self.hook = storage, monitor, hook
        self.losing_power = False
        self.since: dict[str, dict[str, str]] = {}

    def add(self, name: str, uuid: str, disks: dict[str, tuple[Path, str]], *, autostart: bool) -> SimDomain:
        """A new domain, off."""
        chains = {target: FakeImage(path, kind) for target, (path, kind) in disks.items()}
        domain = SimDomain(self, uuid=uuid, name=name, disks=chains, autostart=autostart)
        self.domains[uuid] = domain
        return domain

    def is_fenced(self, uuid: str) -> bool:
        """By the durable record."""
        return self.monitor.durable_fence(self, uuid)

    def image(self, path: Path) -> FakeImage | None:
        """The image at that path, of whatever domain."""
        for domain in self.domains.values():
            for top in domain.disks.values():
                for image in top.chain():
                    if image.path == path:
                        return image
        return None

    def settle(self) -> None:
        """Guests that were to be off by now are."""
        self.now_s = trio.current_time()
        for domain in self.domains.values():
            if domain.off_at_s is not None and domain.off_at_s <= self.now_s:
                domain.end()

    def lose_power(self) -> None:
        """Everything that ran is gone, and what was not flushed perhaps."""
        self.losing_power = True
        for domain in self.domains.values():
            domain.end(killed=True)
        self.losing_power = False
        self.storage.crash()
        self.monitor.lost_power(self)

    def boot(self) -> None:
        """libvirt starts what is to be started."""
        for domain in self.domains.values():
            assert isinstance(domain, SimDomain)
            if domain.autostart and domain.state is PowerState.OFF:
                with contextlib.suppress(HypervisorError):
                    domain.begin("autostart")


MUTATING = (
    "request_shutdown",
    "force_off",
    "set_autostart",
    "open_view",
    "drop_checkpoints",
    "drop_bitmaps",
    "close_view",
    "protect",
    "unprotect",
    "merge_protection",
)


class SimHypervisor(FakeHypervisor):
    """The hypervisor as one agent process sees it: every change is an event before and after."""

    machine: SimMachine

    def __init__(self, machine: SimMachine, process: Process) -> None:
        super().__init__(machine)
        self._process = process

    def _domain(self, uuid: str) -> Any:
        self.machine.now_s = trio.current_time()
        return super()._domain(uuid)

    def power_on(self, uuid: str) -> None:
        self._before("power_on")
        with self._domain(uuid) as domain:
            if domain.state is PowerState.OFF:
                domain.begin("tool")
        self._process.point("power_on done")

    def wait_off(self, uuid: str, timeout_s: float) -> bool:
        deadline = trio.current_time() + timeout_s

        def look() -> bool:
            with self._domain(uuid) as domain:
                if domain.state is PowerState.OFF:
                    return True
                now = trio.current_time()
                until = deadline if domain.off_at_s is None else min(deadline, domain.off_at_s)
                if until <= now:
                    return False
                raise NotYet(trio.Event(), until - now, then=look)

        return look()

    def _before(self, name: str) -> None:
        self._process.point(name)
        self.machine.monitor.acts(self.machine.hostname, name)


def _wrapped(name: str) -> Callable[..., Any]:
    def method(self: SimHypervisor, *args: Any, **words: Any) -> Any:
        self._before(name)
        if name == "drop_checkpoints":
            keep = args[1] if len(args) > 1 else words.get("keep", ())
            self.machine.monitor.drops(self.machine, set(self.machine.domains[args[0]].checkpoints) - set(keep))
        result = getattr(FakeHypervisor, name)(self, *args, **words)
        if name == "open_view":
            self.machine.since[result.domain_uuid] = dict(result.since)
        self.machine.monitor.overlaid(self.machine.domains[args[0]], name)
        self._process.point(f"{name} done")
        return result

    return method


for _name in MUTATING:
    setattr(SimHypervisor, _name, _wrapped(_name))


async def guest(machine: SimMachine, domain: SimDomain, every_s: float, somebody_works: Callable[[], bool]) -> None:
    """The guest of that domain, for as long as the simulation runs: while it is powered on it writes and flushes; more
    seldom while no coordinator works."""
    chaos = machine.monitor.chaos
    random = chaos.random
    while True:
        await trio.sleep(random.expovariate(1 / every_s) if somebody_works() else 1 + 5 * random.random())
        machine.settle()
        if domain.state is not PowerState.RUNNING or domain.memory is None:
            continue
        if random.random() < 0.3:
            for top in domain.disks.values():
                machine.storage.state(top.path).flush()
            domain.memory.flushed()
            continue
        target = random.choice(sorted(domain.disks))
        size = len(domain.memory.expected[target])
        length = 512 * random.randint(1, 40)
        offset = 512 * random.randrange((size - length) // 512)
        write(machine, domain, target, offset, random.randbytes(length) if random.random() < 0.9 else bytes(length))


def write(machine: SimMachine, domain: SimDomain, target: str, offset: int, data: bytes) -> None:
    """One write of a guest."""
    assert domain.memory is not None
    top = domain.disks[target]
    machine.storage.write(top.path, offset, data)
    for ranges in top.bitmaps.values():
        if ranges is not None:
            ranges.append((offset, len(data)))
    domain.memory.wrote(target, offset, data)


def joined(ranges: Sequence[tuple[int, int]], size: int, grain: int = 65536) -> list[tuple[int, int]]:
    """The ranges in whole grains, rising, neighbours joined: as a bitmap tells them."""
    grains = sorted(
        {g for offset, length in ranges for g in range(offset // grain, (offset + length - 1) // grain + 1)}
    )
    found: list[tuple[int, int]] = []
    for g in grains:
        start, end = g * grain, min(size, (g + 1) * grain)
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], end - found[-1][0])
        else:
            found.append((start, end - start))
    return found


__all__ = ["DiskBusy", "Memory", "SimDomain", "SimHypervisor", "SimMachine", "guest", "joined", "write"]
