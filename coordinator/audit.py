"""What the audit of a run came to, read from its journal, and what that means for commit. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.entries import EntryKind
from coordinator.errors import CoordinatorError, ExitCode
from coordinator.model import RunOptions, State
from coordinator.records import CheckRecord
from coordinator.runlog import RunLog
from protocol.messages import ByteRange

RANGES_NAMED = 3
"""So many ranges of a disk stand in a sentence; the journal has as many as the agents told."""
AUDIT = "audit"
"""Name of the step."""
END_AUDIT = "end-audit"
"""Request to the process that audits: stop, for somebody commits without waiting, or undoes."""


class AuditState(enum.Enum):
    """How far the audit of a run is."""

    OFF = "off"  # not chosen, or the run is not so far
    DUE = "due"  # to be done: not begun, or broken off
    FAILED = "failed"  # could not be carried out; nothing is known
    CLEAN = "clean"  # everything matched (xxh3-128)
    DIFFERS = "differs"  # something did not: commit is forbidden


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditStatus:
    """The audit of a run.

    Attributes:
        state: how far it is; `running`: a process works on it now.
        sentence: for people.
        record: of the last complete one.
    """

    state: AuditState
    running: bool
    sentence: str
    record: CheckRecord | None = None


class AuditDiffers(CoordinatorError):
    """The audit found that the original did not start from what the replica holds: the run must not become final."""

    code = "audit-differs"
    exit_code = ExitCode.REFUSED


class AuditMissing(CoordinatorError):
    """Commit waits for an audit that cannot be carried out."""

    code = "audit-missing"


def audit_status(pair: str, options: RunOptions, log: RunLog, *, running: bool = False) -> AuditStatus:
    """What the journal of the run says of its audit.

    Args:
        pair: its name, for sentences.
        options: of the run.
        log: of the run.
        running: some process works on the run in *Failback*.
    """
    last = log.last(AUDIT)
    if log.moved(State.FAILBACK.value) is None or (not options.audit and last is None):
        return AuditStatus(state=AuditState.OFF, running=False, sentence="no audit")
    record = log.result(AUDIT, CheckRecord)
    if last is not None and last.kind is EntryKind.DONE and record is not None:
        return AuditStatus(
            state=AuditState.DIFFERS if record.differs else AuditState.CLEAN,
            running=False,
            sentence=_found(pair, record),
            record=record,
        )
    if running:
        return AuditStatus(state=AuditState.DUE, running=True, sentence="the audit reads the frozen replica whole")
    if last is not None and last.kind is EntryKind.FAILED:
        return AuditStatus(
            state=AuditState.FAILED,
            running=False,
            sentence=f"the audit could not be carried out: {last.sentence.rstrip('.')}",
        )
    sentence = "the audit is not complete" if last is not None else "the audit is still to be done"
    return AuditStatus(
        state=AuditState.DUE,
        running=False,
        sentence=f"{sentence}: `failback resume {pair}` or `failback commit {pair}` does it",
    )


def check_commit(status: AuditStatus, pair: str) -> None:
    """Raise `AuditDiffers` where the audit forbids the commit, whatever else was said."""
    if status.state is AuditState.DIFFERS:
        raise AuditDiffers(
            f"{pair} is not committed: {status.sentence}", pair=pair, disks=",".join(_differing(status.record))
        )


def differences(record: CheckRecord) -> str:
    """What differs, for people: ``disk vda in 512 bytes (512 bytes at 0)``; empty where nothing does."""
    return "; ".join(
        f"disk {disk.original} in {disk.differing_bytes} bytes{_places(disk.differing)}"
        for disk in record.disks
        if disk.differing_bytes
    )


def _places(ranges: Sequence[ByteRange]) -> str:
    if not ranges:
        return ""
    named = ", ".join(f"{one.length_bytes} bytes at {one.offset_bytes}" for one in ranges[:RANGES_NAMED])
    more = f" and in {len(ranges) - RANGES_NAMED} more places" if len(ranges) > RANGES_NAMED else ""
    return f" ({named}{more})"


def _differing(record: CheckRecord | None) -> tuple[str, ...]:
    return () if record is None else tuple(disk.original for disk in record.disks if disk.differing_bytes)


def _found(pair: str, record: CheckRecord) -> str:
    if not record.differs:
        size = sum(disk.size_bytes for disk in record.disks)
        return f"the audit found no difference in {size / (1 << 20):.0f} MiB, read whole (matched, xxh3-128)"
    return (
        f"the audit found that the original did not start from what the replica holds: {differences(record)}; "
        f"`failback undo {pair}` puts the replica, which is whole, back into service; `failback resume {pair}` audits "
        "once more"
    )


def failback_words(pair: str, options: RunOptions, log: RunLog) -> tuple[ExitCode, str]:
    """How a run that rests in *Failback* ended: only a difference is a failure."""
    power = "runs" if options.power_on else "is verified and off"
    found = audit_status(pair, options, log)
    if found.state is AuditState.DIFFERS:
        return ExitCode.FAILED, f"{pair} has failed back, the original {power}, but {found.sentence}"
    sentence = f"{pair} has failed back: the original {power}; `failback commit {pair}` or `failback undo {pair}`"
    if found.state is AuditState.OFF:
        return ExitCode.DONE, sentence
    return ExitCode.DONE, f"{sentence}; {found.sentence}"
