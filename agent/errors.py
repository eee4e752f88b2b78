"""The one error root of the agent.

An error carries a stable ``code``, a sentence that names the thing, the cause and the cure, and its facts
as plain strings and numbers, so that it crosses the wire whole (`protocol.messages.Failure`).
"""

from __future__ import annotations

Fact = str | int


class AgentError(Exception):
    """Root of everything the agent raises on purpose.

    Args:
        sentence: one sentence for the administrator: the thing, the cause, the cure.
        facts: plain values behind the sentence (names, offsets in bytes, sizes in bytes).
    """

    code = "agent"

    def __init__(self, sentence: str, **facts: Fact) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.facts: dict[str, Fact] = facts


class ConfigError(AgentError):
    """The configuration file is missing, is not TOML, or says something it must not."""

    code = "config"


class DiskError(AgentError):
    """A disk could not be opened, read, written, flushed or closed."""

    code = "disk"


class DiskBusy(DiskError):
    """Another process holds the image lock of a disk."""

    code = "disk-busy"


class DiskFull(DiskError):
    """The storage under a disk has no room for what was to be written."""

    code = "disk-full"


class FlushFailed(DiskError):
    """What was written since the last flush may be lost, though the page cache still shows it: it counts as unknown,
    and no flush of the same open file tells more (fsync(2) reports such an error once)."""


class HypervisorError(AgentError):
    """libvirt refused or failed a call."""

    code = "hypervisor"


class HypervisorUnreachable(HypervisorError):
    """There is no connection to libvirt, or it was lost in the middle of a call, whose outcome is unknown then."""

    code = "hypervisor-unreachable"


class NoSuchDomain(HypervisorError):
    """No domain of that name or UUID is known to this host's libvirt."""

    code = "no-such-domain"


class ShutdownTimeout(HypervisorError):
    """A guest did not power off within its deadline; it is still running."""

    code = "shutdown-timeout"


class GuestAgentMissing(HypervisorError):
    """No guest agent listens in the guest."""

    code = "guest-agent-missing"


class SyncError(AgentError):
    """A pass could not be completed; it may be run again."""

    code = "sync"


class VerificationFailed(SyncError):
    """What was read back from the target is not what the source sent."""

    code = "verification-failed"


class DamagedFrame(SyncError):
    """Blocks arrived that are not what was sent, or that claim to be what they cannot be; nothing of them was used."""

    code = "damaged-frame"


class NoEvidence(SyncError):
    """A pass was to rest on evidence that this side does not have; a pass that compares needs none."""

    code = "evidence"


class Forbidden(AgentError):
    """The caller's certificate, epoch or grant does not allow what it asked for."""

    code = "forbidden"


class Held(Forbidden):
    """Another coordinator holds the pair, or the VM is fenced for another pair."""

    code = "held"


class StaleEpoch(Forbidden):
    """A request came under a lower fencing epoch than this agent has seen for the pair."""

    code = "stale-epoch"
