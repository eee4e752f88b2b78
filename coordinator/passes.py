"""One pass, from the grant to two reports that agree."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import trio
from sqlalchemy import Connection

from coordinator import journal
from coordinator.agents import QUESTION_TIMEOUT_S, ask
from coordinator.context import RunContext
from coordinator.errors import STALE_EPOCH, AgentRefused, CoordinatorError, DatabaseError, is_silent
from coordinator.events import Progressed
from coordinator.evidence import Rung, choose_all, fallen, unproven, without
from coordinator.limits import follow_limits, read_limits
from coordinator.progress import Progress, ProgressMeter
from coordinator.records import DiskEvidence, DiskSizes, PassRecord, SurveyRecord, ViewRecord
from coordinator.rounds import latest_evidence
from protocol.messages import (
    AllowPass,
    AskEvidence,
    Condition,
    Direction,
    Done,
    Evidence,
    Grant,
    GrantedDisk,
    PassKind,
    PassProgress,
    PassReport,
    Ping,
    Pong,
    RunPass,
    SetCondition,
    TargetEvidence,
)

GRANT_BYTES = 16
UNPROVEN = "evidence"
"""Code of an agent that does not accept a grant's evidence."""
BOTH_FAIL_WITHIN_S = 3.0
"""When one side gives a pass up, how long the other has to say so itself before it is told to stop."""
ECHOES = frozenset({"peer-failed", "connection-lost", "peer-ended", "cancelled"})
"""Codes by which a side says no more than that the other one ended the pass."""


class PassDisagrees(CoordinatorError):
    """Both agents call the pass complete, but their books do not agree: it proves nothing."""

    code = "pass-disagrees"


async def run_pass(context: RunContext, step: str, opened: ViewRecord) -> PassRecord:
    """Make the original's disks equal what the view shows of them, on the cheapest evidence that both sides prove.

    Torn from here on; where the view shows every disk, equal to it at the end, in registry and at the agent.

    Raises:
        AgentRefused, HostUnreachable: a side failed; the original stays torn if anything was written.
        PassDisagrees: the reports contradict each other.
    """
    disks = tuple(disk for disk in context.survey.disks if disk.replica in {d.target for d in opened.disks})
    targets = await ask_evidence(context)
    evidence = choose_all(disks, opened.disks, targets)
    await _tell_falls(context, evidence)
    await context.set_flag(Condition.TORN)
    try:
        source, target = await _granted(context, step, opened.view, disks, evidence)
    except AgentRefused as error:
        if error.code != UNPROVEN or all(disk.rung == Rung.DIGESTS.value for disk in evidence):
            raise
        # What was proven when it was asked is not any more: full digests need no proof.
        evidence = without(evidence, error.sentence.rstrip("."))
        await _tell_falls(context, evidence)
        source, target = await _granted(context, step, opened.view, disks, evidence)
    tracked = {disk.replica for disk in evidence if disk.since is not None}
    check_reports(disks, opened.view, source, target, tracked)
    if len(disks) == len(context.pair.disks):
        equal = SetCondition(
            order=context.order, vm_uuid=context.pair.original.uuid, condition=Condition.EQUALS_VIEW, view=opened.view
        )
        await ask(context.target, equal, Done)
        await context.set_flag(Condition.EQUALS_VIEW, opened.view)
    return PassRecord(view=opened.view, source=source, target=target, evidence=evidence)


async def ask_evidence(context: RunContext) -> tuple[TargetEvidence, ...]:
    """What the target proves of the original's disks; nothing, with the reason, where its agent will not say.

    Raises:
        HostUnreachable, AgentRefused: it does not answer at all.
    """
    question = AskEvidence(vm_uuid=context.pair.original.uuid, targets=context.original_targets)
    try:
        return (await ask(context.target, question, Evidence, timeout_s=QUESTION_TIMEOUT_S)).disks
    except AgentRefused as error:
        if is_silent(error) or error.code == STALE_EPOCH:
            raise
        return unproven(context.original_targets, error.sentence.rstrip("."))


async def _tell_falls(context: RunContext, evidence: Sequence[DiskEvidence]) -> None:
    """Say of which disks the evidence fell since their pass before, and why."""
    for disk in fallen(latest_evidence(context.log), evidence):
        await context.notice(
            f"disk {disk.replica}: this pass rests on {disk.rung}, lower than the one before ({disk.why_not_higher})"
        )


async def _granted(
    context: RunContext, step: str, view: str, disks: tuple[DiskSizes, ...], evidence: Sequence[DiskEvidence]
) -> tuple[PassReport, PassReport]:
    """Tell both agents what the pass may do, and let them."""
    grant = context.tokens(GRANT_BYTES)
    since = {disk.original: disk.since for disk in evidence if disk.since is not None}
    seeds = {disk.original: disk.map_seed for disk in evidence if disk.map_seed is not None}
    for agent, direction in ((context.target, Direction.RECEIVE), (context.source, Direction.SEND)):
        allowed = grant_of(context, grant, view, direction, disks, since=since, seeds=seeds)
        await ask(agent, AllowPass(order=context.order, grant=allowed), Done, timeout_s=QUESTION_TIMEOUT_S)
    return await both_sides(context, step, grant, context.survey)


def grant_of(
    context: RunContext,
    grant: str,
    view: str,
    direction: Direction,
    disks: Sequence[DiskSizes],
    *,
    kind: PassKind = PassKind.SYNC,
    since: Mapping[str, str] | None = None,
    seeds: Mapping[str, int] | None = None,
) -> Grant:
    """What one side of a pass is told.

    Args:
        grant: the random name of the pass.
        view: what the target is made equal to, or compared with.
        direction: which side it is for.
        disks: of the pass.
        kind: what the pass is for.
        since: by the original's target, the view that both sides prove it equals.
        seeds: by the original's target, the seed of its digest map.
    """
    survey, sends = context.survey, direction is Direction.SEND
    return Grant(
        grant=grant,
        vm_uuid=context.pair.replica.uuid if sends else context.pair.original.uuid,
        direction=direction,
        peer_fingerprint=survey.original_fingerprint if sends else survey.replica_fingerprint,
        view=view,
        disks=tuple(
            GrantedDisk(
                target=disk.replica if sends else disk.original,
                peer_target=disk.original if sends else disk.replica,
                source_size_bytes=disk.source_size_bytes,
                target_size_bytes=disk.target_size_bytes,
                since=(since or {}).get(disk.original),
                digest_seed=(seeds or {}).get(disk.original),
            )
            for disk in disks
        ),
        kind=kind,
    )


async def _orders(context: RunContext, grant: str, survey: SurveyRecord) -> dict[Direction, RunPass]:
    """What each side is told, with the limits as they are now; a later change is passed on by `follow_limits`."""
    limits = await context.store.read(lambda connection: read_limits(connection, context.run.id))
    address, port = context.directory.bulk_endpoint(context.pair.original.host)
    receive = RunPass(
        order=context.order,
        grant=grant,
        peer_name="",
        peer_host="",
        peer_port=0,
        limit_network=limits.network_bytes_s,
        limit_read=limits.read_bytes_s,
    )
    send = replace(
        receive,
        peer_name=context.pair.original.host,
        peer_host=address,
        peer_port=port or survey.bulk_port,
    )
    return {Direction.RECEIVE: receive, Direction.SEND: send}


async def both_sides(context: RunContext, step: str, grant: str, survey: SurveyRecord) -> tuple[PassReport, PassReport]:
    """Let both agents carry the pass out, the receiver first. Raises the failure that tells why."""
    reports: dict[Direction, PassReport] = {}
    failures: list[CoordinatorError] = []
    pictures, latest = trio.open_memory_channel[Progress](1)
    meter = ProgressMeter(run=context.run.id, step=step, started_s=context.clock.monotonic_s())

    def progressed(message: PassProgress) -> None:
        now = context.clock.monotonic_s()
        picture = meter.take(message.disks, monotonic_s=now, wall_s=context.clock.wall_s())
        context.observer(Progressed(progress=picture))
        # Where the database is behind, the next picture is as good.
        with suppress(trio.WouldBlock):
            pictures.send_nowait(picture)

    orders = await _orders(context, grant, survey)
    following = trio.CancelScope()

    async def side(direction: Direction) -> None:
        receives = direction is Direction.RECEIVE
        try:
            reports[direction] = await ask(
                context.target if receives else context.source,
                orders[direction],
                PassReport,
                timeout_s=None,  # as long as it takes: the channel notices an agent that falls silent
                on_progress=None if receives else progressed,
            )
        except CoordinatorError as error:
            failures.append(error)
            nursery.cancel_scope.deadline = min(nursery.cancel_scope.deadline, trio.current_time() + BOTH_FAIL_WITHIN_S)
        finally:
            if len(reports) + len(failures) == len(Direction):
                pictures.close()
                following.cancel()

    async def follow() -> None:
        with following:
            await follow_limits(context)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_save, context, latest)
            nursery.start_soon(side, Direction.RECEIVE)
            # Answered after RunPass was read, on the same connection: the receiver waits before the sender calls.
            await trio.lowlevel.checkpoint()
            try:
                await ask(context.target, Ping(), Pong, timeout_s=QUESTION_TIMEOUT_S)
            except CoordinatorError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()
            nursery.start_soon(side, Direction.SEND)
            nursery.start_soon(follow)
    finally:
        with trio.CancelScope(shield=True), suppress(DatabaseError):
            await context.store.write(lambda connection: journal.clear_progress(connection, context.pair.name))
    if failures:
        raise _cause(failures)
    return reports[Direction.SEND], reports[Direction.RECEIVE]


def _cause(failures: Sequence[CoordinatorError]) -> CoordinatorError:
    """The failure that tells why: the first that is not merely the echo of the other side's."""
    return next((failure for failure in failures if failure.code not in ECHOES), failures[0])


async def _save(context: RunContext, latest: trio.MemoryReceiveChannel[Progress]) -> None:
    """Keep the newest picture in the database. One that cannot be kept is no reason to end a pass: nobody needs it."""
    async with latest:
        async for picture in latest:

            def keep(connection: Connection, picture: Progress = picture) -> None:
                journal.save_progress(connection, context.pair.name, picture)

            with suppress(DatabaseError):
                await context.store.write(keep)


def check_reports(
    disks: Sequence[DiskSizes],
    view: str,
    source: PassReport,
    target: PassReport,
    since: Collection[str] = (),
) -> None:
    """Raise `PassDisagrees` unless both reports speak of the same view and disks, cover every byte and balance.

    `since`: the replica's disks of which only what was written since an earlier view was to be looked at.
    """
    if {source.view, target.view} != {view}:
        raise _disagrees(f"view {view} was asked for, reported were {source.view} and {target.view}")
    sent = {report.target: report for report in source.disks}
    received = {report.target: report for report in target.disks}
    if set(sent) != {d.replica for d in disks} or set(received) != {d.original for d in disks}:
        raise _disagrees(f"the disks reported are {sorted(sent)} and {sorted(received)}")
    for disk in disks:
        here, there = sent[disk.replica], received[disk.original]
        if (here.size_bytes, there.size_bytes) != (disk.source_size_bytes, disk.source_size_bytes):
            raise _disagrees(
                f"disk {disk.replica} has {disk.source_size_bytes} bytes, reported were {here.size_bytes} "
                f"and {there.size_bytes}"
            )
        known = here.zero_bytes + here.compared_bytes + here.unchanged_bytes + here.resumed_bytes
        if known != disk.source_size_bytes:
            raise _disagrees(
                f"of the {disk.source_size_bytes} bytes of disk {disk.replica} only {known} are accounted for"
            )
        if here.unchanged_bytes and disk.replica not in since:
            raise _disagrees(
                f"{here.unchanged_bytes} bytes of disk {disk.replica} were told to be unchanged, and the pass was to "
                "look at all of it"
            )
        if here.unchanged_bytes != there.unchanged_bytes:
            raise _disagrees(
                f"{here.unchanged_bytes} bytes of disk {disk.replica} were told to be unchanged, "
                f"{there.unchanged_bytes} were taken as such"
            )
        if here.resumed_bytes != there.resumed_bytes:
            raise _disagrees(
                f"{here.resumed_bytes} bytes of disk {disk.replica} were left out as proven before, "
                f"{there.resumed_bytes} were proven"
            )
        if here.changed_bytes != there.written_bytes:
            raise _disagrees(
                f"{here.changed_bytes} bytes of disk {disk.replica} were sent, {there.written_bytes} written"
            )
        if there.verified_bytes != there.written_bytes + there.zeroed_bytes:
            raise _disagrees(
                f"{there.written_bytes + there.zeroed_bytes} bytes were written to disk {disk.original}, "
                f"{there.verified_bytes} verified"
            )


def _disagrees(what: str) -> PassDisagrees:
    return PassDisagrees(f"the two agents' books of the pass do not agree ({what}): run the pass again")
