"""What was written on the original after the failover, as far as it can be told: a failback would destroy it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from coordinator.findings import Case
from protocol.messages import Power, Side

Objection = tuple[str, str]
CLOCK_SLACK_S = 2.0
"""Asking a host for its clock takes a moment, and file times are a little older than they seem."""


def written_since_failover(case: Case) -> Iterator[Objection]:
    """Each disk of the original that is off and whose image was written after the failover was recorded: (thing,
    sentence). The file's time is that of the original's host; what its clock is off by has been asked for."""
    vm, since_s = case.vm(Side.ORIGINAL), case.findings.failover_s
    if vm is None or since_s is None or vm.vm.power is Power.RUNNING:
        return
    ahead_s = case.findings.original_ahead_s
    for disk in case.mapped(Side.ORIGINAL):
        for image in disk.disk.chain[:1]:
            written_s = image.modified_s - (ahead_s or 0.0)
            if image.modified_s and written_s > since_s + CLOCK_SLACK_S:
                clock = f"by the clock of {vm.ref.host}"
                if ahead_s is not None and abs(ahead_s) > CLOCK_SLACK_S:
                    clock += f", which is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} this host's"
                yield (
                    f"{vm.ref.name} {disk.disk.target}",
                    f"{disk.title[0].upper()}{disk.title[1:]} was written to at {_moment(image.modified_s)} ({clock}), "
                    f"after the failover, which was recorded at {_moment(since_s)} by this host's",
                )


def diverged(case: Case) -> Iterator[Objection]:
    """The refusal, until somebody says that those writes may be lost."""
    if case.options.discard_divergence:
        return
    for about, sentence in written_since_failover(case):
        yield (
            about,
            f"{sentence}: it ran again or was changed by hand, and what was written then would be overwritten; save "
            "what you need of it (a mere check, resize or copy of the image needs nothing), then plan again with "
            "--discard-divergence (--yes does not imply it).",
        )


def divergence_notes(case: Case) -> Iterator[str]:
    """The same as notes, where the loss was agreed to; and what cannot be told."""
    if case.options.discard_divergence:
        for _, sentence in written_since_failover(case):
            yield f"DIVERGENCE: {sentence}. What was written then is lost (--discard-divergence)."
    for disk in case.mapped(Side.ORIGINAL):
        if disk.disk.kind == "block" and case.findings.failover_s is not None:
            yield (
                f"Whether {disk.title} was written to after the failover cannot be told: a block device has no time of "
                "its last write."
            )


def _moment(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
