"""The guest's own agent (qemu-guest-agent): asked to power the guest off, to freeze and to thaw its file systems.

An agent may be absent, hang, or be gone for good the moment it is asked. Whether something in the guest has its
channel open is seen in the live XML; that it answers is known only when it has.
"""

from __future__ import annotations

import threading
from typing import Any

import libvirt

from agent.errors import GuestAgentMissing
from agent.virt.connection import errors_of
from agent.virt.inspection import facts_now, power_state
from agent.virt.seam import PowerState

ANSWERS_WITHIN_S = 6.0
"""libvirt gives an agent 5 s to say that it is there at all; the shutdown itself it waits for up to a minute."""


class AgentShutdowns:
    """Shutdown requests to guest agents. libvirt's call comes back only when the guest is off or a minute has passed;
    so it is made by a thread of its own, one for a domain at a time, which writes nothing and may be left behind."""

    def __init__(self) -> None:
        self._asking: set[str] = set()
        self._turn = threading.Lock()

    def ask(self, domain: Any) -> bool:
        """Ask the agent; False where none answered, or where an earlier request has got it nowhere yet."""
        uuid = domain.UUIDString()
        with self._turn:
            if uuid in self._asking or not facts_now(domain).agent_connected:
                return False
            self._asking.add(uuid)
        failed: list[libvirt.libvirtError] = []

        def shut_down() -> None:
            try:
                domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)
            except libvirt.libvirtError as error:
                failed.append(error)
            finally:
                with self._turn:
                    self._asking.discard(uuid)

        thread = threading.Thread(target=shut_down, name="guest-agent-shutdown", daemon=True)
        thread.start()
        thread.join(ANSWERS_WITHIN_S)
        return not failed


def freeze(domain: Any) -> None:
    """See `agent.virt.seam.Hypervisor.freeze_guest`."""
    facts = facts_now(domain)
    if not facts.agent_connected:
        raise GuestAgentMissing(
            f"No guest agent listens in the VM {facts.name}: install qemu-guest-agent in the guest and give the VM its "
            "channel.",
            vm=facts.name,
        )
    with errors_of("freezing its file systems", facts.name):
        domain.fsFreeze(None, 0)


def thaw(domain: Any) -> None:
    """See `agent.virt.seam.Hypervisor.thaw_guest`."""
    name = domain.name()
    with errors_of("thawing its file systems", name):
        if power_state(domain) is PowerState.OFF:
            return
        try:
            domain.fsThaw(None, 0)
        except libvirt.libvirtError:
            if power_state(domain) is not PowerState.OFF:
                raise
