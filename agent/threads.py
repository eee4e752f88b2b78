"""Worker threads of the agent: one hop for each blocking call, with a limit for each kind of work.

A thread that trio abandons keeps running, so none that touches a disk or a VM is ever abandoned: cancelling waits for
the call to return, and whoever starts a call that may block for long sees to it that it can be woken (a socket is shut
down, a wait is cut in slices). Only making a connection, which cannot be woken and touches nothing, is let go.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

T = TypeVar("T")


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass
class Threads:
    """Limits for each kind of blocking work, shared by everything the agent does.

    Attributes:
        disk: reading, writing, flushing, reading back.
        compute: hashing, packing, unpacking; as many as there are cores, more would only take turns.
        network: connecting, welcoming, hanging up: calls that end by themselves and wait for nobody here. Sends and
            receives of a pass wait for one another, so each connection has limits of its own (`on_wire`).
        libvirt: calls to the hypervisor.
    """

    disk: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(32))
    compute: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(max(2, cores())))
    network: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(64))
    libvirt: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(16))

    @property
    def packers(self) -> int:
        """How many computations run at the same time."""
        return int(self.compute.total_tokens)

    async def on_disk(self, call: Callable[[], T]) -> T:
        """Run a disk call in a thread."""
        return await trio.to_thread.run_sync(call, limiter=self.disk)

    async def on_compute(self, call: Callable[[], T]) -> T:
        """Run a computation in a thread."""
        return await trio.to_thread.run_sync(call, limiter=self.compute)

    async def on_network(self, call: Callable[[], T]) -> T:
        """Run a short network call in a thread."""
        return await trio.to_thread.run_sync(call, limiter=self.network)

    async def on_wire(self, call: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        """Run a blocking send or receive in a thread, counted by the connection's own limit."""
        return await trio.to_thread.run_sync(call, limiter=limiter)

    async def connecting(
        self, call: Callable[[], T], discard: Callable[[T], object], limiter: trio.CapacityLimiter | None = None
    ) -> T:
        """Make a connection in a thread. Cancelled, this returns at once; a connection that comes about all the same
        is discarded, be it in that thread later."""
        turn = threading.Lock()
        made: list[T] = []
        given_up = False

        def work() -> T:
            connection = call()
            with turn:
                if not given_up:
                    made.append(connection)
                    return connection
            discard(connection)
            return connection

        try:
            return await trio.to_thread.run_sync(work, limiter=limiter or self.network, abandon_on_cancel=True)
        except trio.Cancelled:
            with turn:
                given_up = True
            for connection in made:
                discard(connection)
            raise

    async def on_libvirt(self, call: Callable[[], T]) -> T:
        """Run a hypervisor call in a thread."""
        return await trio.to_thread.run_sync(call, limiter=self.libvirt)

    async def requesting(self, call: Callable[[], T]) -> T:
        """As `on_libvirt`, for a mere request to a guest that writes nothing of ours: cancelled, this returns at once,
        and the thread ends when libvirt answers, at the latest when the guest is killed."""
        return await trio.to_thread.run_sync(call, limiter=self.libvirt, abandon_on_cancel=True)
