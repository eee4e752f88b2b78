"""Worker threads of the agent: one hop for each blocking call, with a limit for each kind of work.

A thread that trio abandons keeps running, so none is ever abandoned: cancelling waits for the call to return, and
whoever starts a call that may block for long sees to it that it can be woken (a socket is shut down, a wait is cut in
slices).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

T = TypeVar("T")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass
class Threads:
    """Limits for each kind of blocking work, shared by everything the agent does.

    Attributes:
        disk: reading, writing, flushing, reading back.
        compute: hashing, packing, unpacking; as many as there are cores, more would only take turns.
        network: blocking sends and receives of bulk connections, two for each.
        libvirt: calls to the hypervisor.
    """

    disk: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(32))
    compute: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(max(2, _cores())))
    network: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(256))
    libvirt: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(16))

    async def on_disk(self, call: Callable[[], T]) -> T:
        """Run a disk call in a thread."""
        return await trio.to_thread.run_sync(call, limiter=self.disk)

    async def on_compute(self, call: Callable[[], T]) -> T:
        """Run a computation in a thread."""
        return await trio.to_thread.run_sync(call, limiter=self.compute)

    async def on_network(self, call: Callable[[], T]) -> T:
        """Run a blocking send or receive in a thread."""
        return await trio.to_thread.run_sync(call, limiter=self.network)

    async def on_libvirt(self, call: Callable[[], T]) -> T:
        """Run a hypervisor call in a thread."""
        return await trio.to_thread.run_sync(call, limiter=self.libvirt)
