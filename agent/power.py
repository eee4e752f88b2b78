"""Powering a guest off: asked, asked again, waited for, and only then, if so told, forced."""

from __future__ import annotations

from functools import partial

import structlog
import trio

from agent.errors import HypervisorError, HypervisorUnreachable, ShutdownTimeout
from agent.threads import Threads
from agent.virt.seam import Hypervisor, PowerState
from protocol.messages import OnTimeout, PoweredOff

log = structlog.get_logger("failback.agent")

KILL_AFTER_S = 60.0
ASK_AGAIN_S = 5.0
"""A guest that is still booting drops the request; asking again costs nothing (libvirt's own tools do the same)."""
WAIT_SLICE_S = 1.0
"""Waits are cut in slices so that a cancelled order ends soon although no thread is ever abandoned."""
CANNOT_ANSWER = frozenset({PowerState.PAUSED, PowerState.SUSPENDED, PowerState.CRASHED})
"""A guest that executes nothing will not power itself off however long it is waited for."""


def is_off(state: PowerState) -> bool:
    """Whether no process of the VM holds its disks."""
    return state is PowerState.OFF


async def power_off(
    hypervisor: Hypervisor,
    threads: Threads,
    uuid: str,
    *,
    timeout_s: float,
    on_timeout: OnTimeout,
    kill_after_s: float = KILL_AFTER_S,
) -> PoweredOff:
    """Power the VM off; no-op when it is off.

    With `on_timeout` FORCE, QEMU is asked to end after `timeout_s`, so that it saves its dirty bitmaps, and killed
    when it has not done so `kill_after_s` later.

    Raises:
        ShutdownTimeout: it still runs after `timeout_s` and `on_timeout` is ABORT.
        HypervisorError: as libvirt says.
    """
    started = trio.current_time()
    deadline = started + timeout_s
    if is_off(await threads.on_libvirt(lambda: hypervisor.state(uuid))):
        return PoweredOff(was_running=False, forced=False, elapsed_s=0.0)
    try:
        if await _shut_down(hypervisor, threads, uuid, deadline):
            return PoweredOff(was_running=True, forced=False, elapsed_s=trio.current_time() - started)
    except HypervisorUnreachable:
        raise
    except HypervisorError:
        state = await threads.on_libvirt(lambda: hypervisor.state(uuid))
        if on_timeout is OnTimeout.ABORT or state not in CANNOT_ANSWER:
            raise
    if on_timeout is OnTimeout.ABORT:
        raise ShutdownTimeout(
            f"the VM {uuid} did not power off within {timeout_s:g} s and still runs: "
            "shut it down from inside, or choose a longer time or to force it",
            vm=uuid,
        )
    killed = not await _end_gracefully(hypervisor, threads, uuid, kill_after_s)
    if killed:
        await threads.on_libvirt(lambda: hypervisor.force_off(uuid, graceful=False))
    return PoweredOff(was_running=True, forced=True, elapsed_s=trio.current_time() - started, killed=killed)


async def _end_gracefully(hypervisor: Hypervisor, threads: Threads, uuid: str, kill_after_s: float) -> bool:
    """End QEMU without killing it, so that it saves what it holds; False when it still runs `kill_after_s` later."""
    deadline = trio.current_time() + kill_after_s
    while True:
        try:
            await threads.on_libvirt(lambda: hypervisor.force_off(uuid, graceful=True))
            return True
        except HypervisorUnreachable:
            raise
        except HypervisorError as error:
            left = deadline - trio.current_time()
            log.warning("QEMU does not end when asked to", vm=uuid, reason=error.sentence, kill_in_s=max(0.0, left))
        # It may still be flushing: libvirt waits 10 s for it, we as long as we were told.
        if await threads.on_libvirt(partial(hypervisor.wait_off, uuid, min(max(left, 0.0), WAIT_SLICE_S))):
            return True
        if left <= 0:
            return False


async def _shut_down(hypervisor: Hypervisor, threads: Threads, uuid: str, deadline: float) -> bool:
    """Ask until the guest is off; False at the deadline. A libvirtd that is being restarted takes no guest down and
    says nothing about one: it is waited for as the guest is."""
    lost: HypervisorUnreachable | None = None
    hears = True
    while trio.current_time() < deadline:
        try:
            if hears:
                hears = await _request(hypervisor, threads, uuid, min(deadline, trio.current_time() + ASK_AGAIN_S))
            ask_again = min(deadline, trio.current_time() + ASK_AGAIN_S)
            while (left := ask_again - trio.current_time()) > 0:
                if await threads.on_libvirt(partial(hypervisor.wait_off, uuid, min(left, WAIT_SLICE_S))):
                    return True
                lost = None
        except HypervisorUnreachable as error:
            lost = error
            await trio.sleep(min(WAIT_SLICE_S, max(0.0, deadline - trio.current_time())))
    if lost is not None:
        raise lost
    return False


async def _request(hypervisor: Hypervisor, threads: Threads, uuid: str, until: float) -> bool:
    """Ask the guest once; False where no answer came by then. libvirt asks QEMU and waits for it, for ever where that
    is stopped or stuck in the kernel, so that asking again would only stop one more thread."""
    with trio.move_on_at(until):
        try:
            await threads.requesting(lambda: hypervisor.request_shutdown(uuid))
        except HypervisorUnreachable:
            raise
        except HypervisorError:
            # A QEMU that ends while it is asked fails the question: "Unable to read from monitor".
            if not await threads.on_libvirt(partial(hypervisor.wait_off, uuid, WAIT_SLICE_S)):
                raise
        return True
    log.warning("QEMU does not answer when it is asked to shut its guest down", vm=uuid)
    return False
