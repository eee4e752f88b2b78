"""What was written on the original after the failover, as far as it can be told: a failback would destroy it. Pure.

Three things tell: the log that its host keeps of its starts and stops, the times of its image files, and what the agent
has on record of disks that an earlier run left under its fence. None of them sees a write to a block device by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from coordinator.findings import Case, DiskCase, VmCase, clause
from protocol.messages import Power, Side

Objection = tuple[str, str]
CLOCK_SLACK_S = 2.0
"""Asking a host for its clock takes a moment, and file times are a little older than they seem."""


def since_when(case: Case) -> str:
    """Since when both VMs run, as a clause: by their processes, and by the journal."""
    told = []
    failover = case.findings.failover_since
    if failover is not None:
        told.append(f"the replica took over at {failover}")
    for side in (Side.ORIGINAL, Side.REPLICA):
        vm = case.vm(side)
        if vm is None or vm.vm.power is Power.OFF:
            continue
        at_s = vm.vm.running_since_s
        told.append(
            f"the {side.value} runs since {_moment(at_s)} {_clock(case, vm)}"
            if at_s
            else f"since when the {side.value} runs is not known"
        )
    return ", ".join(told)


def written_since_failover(case: Case) -> Iterator[Objection]:
    """What tells that the original, which is off, was written to after the failover was recorded: (thing, sentence)."""
    vm = case.vm(Side.ORIGINAL)
    if vm is None or vm.vm.power is Power.RUNNING:
        return
    yield from _ran(case, vm)
    for disk in case.mapped(Side.ORIGINAL):
        yield from _touched(case, disk)
        yield from _file_written(case, disk)


def _ran(case: Case, vm: VmCase) -> Iterator[Objection]:
    """Its host's log tells of a start or a stop after the failover."""
    started, stopped = _is_after(case, vm.vm.last_started_s), _is_after(case, vm.vm.last_stopped_s)
    if not started and not stopped:
        return
    did = [f"started at {_moment(vm.vm.last_started_s)}"] if started else []
    did += [f"stopped at {_moment(vm.vm.last_stopped_s)}"] if stopped else []
    yield (
        vm.ref.name,
        f"The {vm.title} was {' and '.join(did)} ({_clock(case, vm)}, and its log there), after {_failover(case)}",
    )


def _touched(case: Case, disk: DiskCase) -> Iterator[Objection]:
    """An earlier run left the disk under its fence, and it is not what was left."""
    for known in case.findings.original.evidence:
        if known.target == disk.disk.target and known.touched:
            yield (
                f"{disk.vm.ref.name} {disk.disk.target}",
                f"{_upper(disk.title)} is not what the run before left under its fence: {clause(known.why_not)}",
            )


def _file_written(case: Case, disk: DiskCase) -> Iterator[Objection]:
    """The file's time is that of the original's host; what its clock is off by has been asked for."""
    for image in disk.disk.chain[:1]:
        if _is_after(case, image.modified_s):
            yield (
                f"{disk.vm.ref.name} {disk.disk.target}",
                f"{_upper(disk.title)} was written to at {_moment(image.modified_s)} ({_clock(case, disk.vm)}), "
                f"after {_failover(case)}",
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
                f"its last write. {_started_words(case, disk.vm)}"
            )


def _started_words(case: Case, vm: VmCase) -> str:
    if not vm.vm.last_started_s:
        return f"Nor does {vm.ref.host} keep a log of the starts of {vm.ref.name}."
    if vm.vm.power is Power.RUNNING or _is_after(case, vm.vm.last_started_s) or _is_after(case, vm.vm.last_stopped_s):
        return f"{_upper(vm.ref.name)} ran after it."
    return (
        f"By its log there, {vm.ref.name} was not started after {_moment(vm.vm.last_started_s)}; what was done by hand "
        "leaves no trace."
    )


def _is_after(case: Case, at_s: float) -> bool:
    """Whether that moment, by the clock of the original's host, was after the failover; 0 is no moment."""
    since_s = case.findings.failover_s
    return (
        bool(at_s) and since_s is not None and at_s - (case.findings.original_ahead_s or 0.0) > since_s + CLOCK_SLACK_S
    )


def _clock(case: Case, vm: VmCase) -> str:
    """Whose clock that is, and what it is off by."""
    original = vm.side is Side.ORIGINAL
    ahead_s = case.findings.original_ahead_s if original else case.findings.replica_ahead_s
    clock = f"by the clock of {vm.ref.host}"
    if ahead_s is not None and abs(ahead_s) > CLOCK_SLACK_S:
        clock += f", which is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} this host's"
    return clock


def _failover(case: Case) -> str:
    assert case.findings.failover_s is not None  # something was found to be after it
    return f"the failover, which was recorded at {_moment(case.findings.failover_s)} by this host's"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _moment(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
