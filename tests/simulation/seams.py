"""Where the simulation takes the place of the machine: the seams of the product, and trio's scheduling.

Trio shuffles each batch of its run queue; with `_ALLOW_DETERMINISTIC_SCHEDULING` it sorts the batch first and takes its
randomness from `_r`, which is seeded here. Both are private: hence the pinned version.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import structlog
import trio
import trio._core._run as trio_run
from trio.testing import MockClock

import agent.disk.bitmaps
import agent.disk.commit
import agent.disk.dirty
import agent.disk.lock
import agent.disk.open
import agent.disk.stamp
import agent.durable
import agent.scratch
import agent.sync.map_file
import protocol.bulk
import protocol.channel
import protocol.control_server
from agent.disk.bitmaps import Bitmap
from agent.disk.dirty import DirtyRanges
from agent.disk.lock import HeldImage
from agent.disk.seam import Disk
from agent.errors import DiskError
from protocol.connection import Speaker
from protocol.errors import ConnectionLost
from tests.fakes.memory_dirty import MemoryDirtyRanges
from tests.fakes.memory_disk import MemoryDisk, MemoryStorage
from tests.simulation.core import Killed, NotYet
from tests.simulation.machines import joined
from tests.simulation.network import BulkEnd, PlainStream, call_bulk, pair
from tests.simulation.storage import MapOs, SimDisk, nonzero_pages

if TYPE_CHECKING:
    from tests.simulation.world import AgentHost, World

TRIO_VERSIONS = ("0.2", "0.3")  # 0.2x and 0.3x


def run_deterministically(seed: int, main: Callable[[], Awaitable[Any]]) -> Any:
    """Run `main` in virtual time, its scheduling decided by `seed` alone."""
    assert trio.__version__.startswith(TRIO_VERSIONS), f"look at the run queue of trio {trio.__version__} first"
    assert hasattr(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING")
    clock, current_time = MockClock(autojump_threshold=0), trio.current_time

    def ticking() -> float:
        # Each look is a little later: a wait for the last 1e-15 s of a time-out would never be over.
        clock.jump(1e-7)
        return current_time()

    with (
        mock.patch.object(trio, "current_time", ticking),
        mock.patch.object(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch.object(trio_run, "_r", Random(seed)),
    ):
        return trio.run(main, clock=clock)


class ViewDisk(MemoryDisk):
    """One disk of a live view: gone with its backup job."""

    def __init__(self, name: str, storage: MemoryStorage, alive: Callable[[], bool]) -> None:
        super().__init__(name, storage, writable=False)
        self._alive = alive

    def _read(self, offset_bytes: int, buffer: memoryview) -> None:
        if not self._alive():
            raise OSError(5, "the NBD server is gone")
        super()._read(offset_bytes, buffer)


class Seams:
    """The product's functions that touch the machine, for one world."""

    def __init__(self, world: World) -> None:
        self.world = world

    def _host(self, path: Path) -> AgentHost:
        found = self.world.host_of(path)
        assert found is not None, path
        return found

    def _storage(self, path: Path) -> Any:
        host = self._host(path)
        return host.storage, host.process

    # --- disks --------------------------------------------------------------------------------------------------------

    def open_target(self, name: str, held: HeldImage, *_: Any, doubtful: bool = False, **__: Any) -> Disk:
        """See `agent.disk.open.open_target`."""
        if not held.exclusive or not held.is_named():
            raise DiskError(f"Disk {name}: not held for writing.", disk=name)
        host = self._host(held.path)
        if doubtful:
            host.storage.state(held.path).evict()
        original = host.world.monitor.original
        look = partial(host.world.monitor.before_target_write, host.machine, original.uuid, name)
        return SimDisk(name, held.path, host.storage, host.process, writable=True, before_write=look)

    def open_source(self, name: str, image: Path, *_: Any, **__: Any) -> Disk:
        """See `agent.disk.open.open_source`."""
        host = self._host(image)
        return SimDisk(name, image, host.storage, host.process, writable=False)

    def open_view(self, name: str, socket: Path, export: str) -> Disk:
        """See `agent.disk.open.open_view`."""
        domain = self._domain(socket)
        job = domain.view
        if job is None:
            raise DiskError(f"Disk {name}: nobody serves it.", disk=name)
        storage = MemoryStorage(len(job.frozen[export]))
        storage.content[:] = job.frozen[export]
        storage.allocated[:] = nonzero_pages(job.frozen[export])
        return ViewDisk(name, storage, lambda: domain.view is job)

    def open_dirty_view(self, name: str, socket: Path, export: str, context: str) -> DirtyRanges:
        """See `agent.disk.dirty.open_dirty_view`."""
        domain = self._domain(socket)
        tag = domain.machine.since[domain.uuid][export]
        return self._dirty(name, domain.disks[export], tag)

    def _domain(self, socket: Path) -> Any:
        host = self._host(socket)
        return next(d for d in host.machine.domains.values() if socket.name.startswith(d.uuid))

    def _dirty(self, name: str, image: Any, tag: str) -> DirtyRanges:
        ranges = image.bitmaps.get(tag)
        if ranges is None:
            raise DiskError(f"Disk {name}: the bitmap {tag} is missing or was not saved.", disk=name)
        size = image.path.stat().st_size
        return MemoryDirtyRanges(size, joined(ranges, size))

    def _image(self, path: Path) -> Any:
        image = self._host(path).machine.image(path)
        if image is None:
            raise DiskError(f"{path.name} is no image.", disk=path.name)
        return image

    def open_dirty_closed(self, name: str, image: Path, _: str, bitmaps: Sequence[str], __: Path) -> DirtyRanges:
        """See `agent.disk.dirty.open_dirty_closed`."""
        return self._dirty(name, self._image(image), bitmaps[0])

    def bitmaps_of(self, image: Path, image_format: str) -> tuple[Bitmap, ...]:
        """See `agent.disk.bitmaps.bitmaps_of`."""
        if image_format != "qcow2":
            return ()
        return tuple(Bitmap(tag, ranges is None, True) for tag, ranges in self._image(image).bitmaps.items())

    def remove_bitmap(self, image: Path, _: str, bitmap: str, **__: Any) -> None:
        """See `agent.disk.bitmaps.remove_bitmap`."""
        self._host(image).process.point(f"removes a bitmap of {image.name}")
        self._image(image).bitmaps.pop(bitmap, None)

    def dirty_bytes(self, name: str, image: Path, _: str, bitmap: str, __: Path) -> int:
        """See `agent.disk.bitmaps.dirty_bytes`."""
        dirty = self._dirty(name, self._image(image), bitmap)
        return sum(length for _, length in dirty.ranges(0, dirty.size_bytes))

    def commit_overlays(self, _: str, overlays: Sequence[Path], base: Path, *__: Any, **___: Any) -> None:
        """See `agent.disk.commit.commit_overlays`."""
        host = self._host(base)
        host.process.point(f"merges into {base.name}")
        self.world.monitor.kept = {}
        storage = host.storage
        storage.write(base, 0, storage.content(overlays[0]))
        storage.state(base).flush()

    # --- the rest -----------------------------------------------------------------------------------------------------

    def replace_whole(self, path: Path, text: str) -> None:
        """See `agent.durable.replace_whole`."""
        storage, process = self._storage(path)
        storage.replace_whole(process, path, text, sync=not self.world.broken.ledger_not_synced)

    def settle(self, folder: Path) -> None:
        """See `agent.durable.settle`."""
        storage, process = self._storage(folder)
        if not self.world.broken.ledger_not_synced:
            storage.settle(process, folder)

    def stamp_of(self, fd: int) -> Any:
        """See `agent.disk.stamp.stamp_of`."""
        path = Path(f"/proc/self/fd/{fd}").resolve()
        return self._host(path).storage.stamp(fd)

    def connect_bulk(
        self, host: str, port: int, *, peer_fingerprint: str, grant: str, target: str, **words: Any
    ) -> Any:
        """See `protocol.bulk.connect_bulk`."""
        peer = self.world.hosts[host]
        link = self.world.links["bulk"]
        caller = self.world.hosts["dr"]
        if link.stalled:
            raise NotYet(link_event(link), 10.0, on_timeout=lambda: ConnectionLost("no answer from the peer"))
        if not link.up or not peer.listening:
            raise ConnectionLost("connection refused")
        here, there = pair(link, caller.process, peer.process)
        wire = BulkEnd(here, Speaker.CALLER, peer.identity)
        theirs = BulkEnd(there, Speaker.LISTENER, caller.identity)
        return call_bulk(
            wire, grant, target, words["digest_seed"], words["attempt"], lambda: peer.spawn(peer.take_bulk, theirs)
        )

    async def open_tcp_stream(self, host: str, port: int, **_: Any) -> Any:
        """See `trio.open_tcp_stream`."""
        await trio.lowlevel.checkpoint()
        return await self.world.connect_control(host)


def link_event(link: Any) -> trio.Event:
    """What is set when something about a link without ends changes: nothing; its time-out decides."""
    return trio.Event()


async def _inline(call: Callable[..., Any], *args: Any, **_: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return call(*args)


def _everywhere(function: Any, stand_in: Any) -> Iterator[tuple[Any, str, Any]]:
    """Wherever a module of the agent has imported it."""
    for module in [module for name, module in sorted(sys.modules.items()) if name.startswith("agent.")]:
        for name, value in vars(module).items():
            if value is function:
                yield module, name, stand_in


@contextlib.contextmanager
def installed(world: World) -> Iterator[Seams]:
    """The product's seams lead to that world."""
    seams = Seams(world)
    numbers = Random(world.seed)
    counter = itertools.count()
    clock = SimpleNamespace(
        time=world.wall_s,
        monotonic=trio.current_time,
        perf_counter=lambda: next(counter) * 0.001,
        sleep=lambda _: None,
    )
    seeded = SimpleNamespace(randbits=numbers.getrandbits, compare_digest=lambda one, other: one == other)
    functions: list[tuple[Any, Any]] = [
        (agent.disk.open.open_target, seams.open_target),
        (agent.disk.open.open_source, seams.open_source),
        (agent.disk.open.open_view, seams.open_view),
        (agent.disk.dirty.open_dirty_view, seams.open_dirty_view),
        (agent.disk.dirty.open_dirty_closed, seams.open_dirty_closed),
        (agent.disk.bitmaps.bitmaps_of, seams.bitmaps_of),
        (agent.disk.bitmaps.remove_bitmap, seams.remove_bitmap),
        (agent.disk.bitmaps.dirty_bytes, seams.dirty_bytes),
        (agent.disk.commit.commit_overlays, seams.commit_overlays),
        (agent.disk.stamp.stamp_of, seams.stamp_of),
        (agent.durable.replace_whole, seams.replace_whole),
        (agent.durable.settle, seams.settle),
        (protocol.bulk.connect_bulk, seams.connect_bulk),
        (time, clock),
        (secrets, seeded),
    ]
    patches: list[tuple[Any, str, Any]] = [
        *itertools.chain.from_iterable(_everywhere(function, stand_in) for function, stand_in in functions),
        (agent.sync.map_file, "os", MapOs(seams._storage)),
        (agent.scratch, "free_bytes", lambda _: 1 << 40),
        (agent.disk.lock, "_processes_with_open", lambda _: []),
        (protocol.channel, "TlsStream", PlainStream),
        (protocol.control_server, "TlsStream", PlainStream),
        (trio, "open_tcp_stream", seams.open_tcp_stream),
        (trio.to_thread, "run_sync", _inline),
        (trio.from_thread, "check_cancelled", lambda: None),
    ]
    config = structlog.get_config()
    with contextlib.ExitStack() as stack:
        for module, name, stand_in in patches:
            stack.enter_context(mock.patch.object(module, name, stand_in))
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
        stack.callback(lambda: structlog.configure(**config))
        yield seams


__all__ = ["Killed", "Seams", "installed", "run_deterministically"]
