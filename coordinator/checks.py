"""Passes that only compare: the frozen replica with what the original's map says, or with the original's storage.

Nothing is written on either side. `verify_full` runs before the original may start, the audit after the switchover.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import trio

from coordinator.agents import QUESTION_TIMEOUT_S, ask
from coordinator.context import RunContext
from coordinator.errors import CoordinatorError
from coordinator.passes import GRANT_BYTES, PassDisagrees, both_sides, grant_of
from coordinator.records import CheckedDisk, CheckRecord, DiskSizes
from coordinator.steps import StepFailed
from protocol.messages import (
    AllowPass,
    CloseView,
    Direction,
    Done,
    OpenView,
    PassKind,
    PassReport,
    ViewOpened,
)

CLOSE_WITHIN_S = 30.0


async def run_check(
    context: RunContext, step: str, view: str, kind: PassKind, seeds: Mapping[str, int] | None = None
) -> CheckRecord:
    """Compare every disk of that view of the shut-off replica; the view is open afterwards.

    Args:
        step: whose progress it is.
        view: the view the original was made equal to; opened again, for the replica is frozen.
        kind: AUDIT or VERIFY.
        seeds: of the original's digest maps, by its targets; for AUDIT.

    Raises:
        AgentRefused, HostUnreachable: a side failed; nothing is known then.
        PassDisagrees: the reports are not of this check, or do not cover the disks.
        StepFailed: the replica runs.
    """
    survey = context.survey
    started_s = context.clock.monotonic_s()
    await open_frozen(context, view)
    grant = context.tokens(GRANT_BYTES)
    for agent, direction in ((context.target, Direction.RECEIVE), (context.source, Direction.SEND)):
        allowed = grant_of(context, grant, view, direction, survey.disks, kind=kind, seeds=seeds)
        await ask(agent, AllowPass(order=context.order, grant=allowed), Done, timeout_s=QUESTION_TIMEOUT_S)
    source, target = await both_sides(context, step, grant, survey)
    disks = checked_disks(survey.disks, view, source, target)
    return CheckRecord(view=view, kind=kind, elapsed_s=context.clock.monotonic_s() - started_s, disks=disks)


async def open_frozen(context: RunContext, view: str) -> None:
    """Open that view of the shut-off replica (again): whatever an earlier process left of it goes first."""
    await ask(context.source, _close(context, view), Done)
    order = OpenView(order=context.order, vm_uuid=context.pair.replica.uuid, targets=context.replica_targets, view=view)
    opened = await ask(context.source, order, ViewOpened)
    if opened.live:
        raise StepFailed(
            f"the replica on {context.source.host} runs and must be off here: power it off, then repeat",
            code="not-off",
        )


async def close_frozen(context: RunContext, view: str) -> None:
    """Close it, also while the run is being stopped; one that cannot be closed now is closed with the run's end."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_WITHIN_S), suppress(CoordinatorError):
        await ask(context.source, _close(context, view), Done, timeout_s=CLOSE_WITHIN_S)


def _close(context: RunContext, view: str) -> CloseView:
    return CloseView(order=context.order, vm_uuid=context.pair.replica.uuid, view=view)


def checked_disks(
    disks: Sequence[DiskSizes], view: str, source: PassReport, target: PassReport
) -> tuple[CheckedDisk, ...]:
    """What both sides found, disk by disk. Whichever side compares tells what differs; where both do, more counts.

    Raises:
        PassDisagrees: the reports are of another view or other disks, or do not cover them whole.
    """
    sent = {report.target: report for report in source.disks}
    received = {report.target: report for report in target.disks}
    if {source.view, target.view} != {view} or len(sent) != len(disks) or len(received) != len(disks):
        raise PassDisagrees("the two agents' reports are not of the comparison that was asked for: run it again")
    found: list[CheckedDisk] = []
    for disk in disks:
        here, there = sent.get(disk.replica), received.get(disk.original)
        if here is None or there is None or here.zero_bytes + here.compared_bytes != disk.source_size_bytes:
            raise PassDisagrees(
                f"disk {disk.replica} was not compared whole ({disk.source_size_bytes} bytes): run the comparison again"
            )
        told = max((here, there), key=lambda report: (report.differing_bytes, len(report.differing)))
        found.append(
            CheckedDisk(
                original=disk.original,
                replica=disk.replica,
                size_bytes=disk.source_size_bytes,
                differing_bytes=max(told.differing_bytes, sum(one.length_bytes for one in told.differing)),
                differing=told.differing,
            )
        )
    return tuple(found)
