"""Views of shut-off VMs that nobody reads any more: the process that asked for one was killed, as an audit may be.

Such a view has no backup job and no record; it is files kept open, their locks, and perhaps a disk server. A process
that is killed takes them along. Where the agent lives on and its coordinator does not, nobody would ever close it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from agent.errors import AgentError
from agent.sources import UNCLAIMED_FOR_S, ViewDesk

log = structlog.get_logger("failback.agent")


@dataclass
class IdleViews:
    """Closes them. Its methods block.

    Attributes:
        is_granted: whether a pass of that pair runs or may begin.
        now_s: seconds that only ever grow.
    """

    views: ViewDesk
    is_granted: Callable[[str], bool]
    now_s: Callable[[], float] = time.monotonic
    _since_s: dict[tuple[str, str], float] = field(default_factory=dict)

    def close(self) -> tuple[AgentError, ...]:
        """Close the views of shut-off VMs for which no pass was granted for `UNCLAIMED_FOR_S`. A run that still wants
        one opens it again: every process does, before it reads. Returns what went wrong; asked again, it tries again.
        """
        closed = {(vm_uuid, view): pair for vm_uuid, pair, view in self.views.closed_views()}
        self._since_s = {key: since_s for key, since_s in self._since_s.items() if key in closed}
        failed: list[AgentError] = []
        for (vm_uuid, view), pair in closed.items():
            since_s = self._since_s.setdefault((vm_uuid, view), self.now_s())
            if self.is_granted(pair):
                self._since_s[vm_uuid, view] = self.now_s()
            elif self.now_s() - since_s > UNCLAIMED_FOR_S:
                log.info("a view that nobody reads is closed", vm=vm_uuid, view=view)
                try:
                    self.views.close(vm_uuid, view)
                except AgentError as error:
                    failed.append(error)
        return tuple(failed)
