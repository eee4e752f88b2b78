"""One granted pass from opening the disks to the report: the seam between orders and `agent.sync`."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import trio

from agent.attempts import Connect
from agent.delta.digest_map import WINDOW_BYTES
from agent.disk.open import open_target
from agent.disk.past_cache import PastCache
from agent.disk.seam import Disk
from agent.errors import AgentError, DiskError, FlushFailed, NoEvidence, SyncError
from agent.evidence import EvidenceDesk
from agent.fences import FenceKeeper
from agent.ledger import ConditionRecord, DiskCondition
from agent.maps import MapDesk
from agent.opened_view import OpenedView
from agent.passes import PassDesk, Progress, Session, set_limits
from agent.progress import Begun, ProgressDesk
from agent.sources import ViewDesk
from agent.sync.conversation import accompanied
from agent.sync.pass_map import PassMap
from agent.sync.proven import Proven
from agent.threads import Threads
from protocol.bulk import BulkSocket, connect_bulk
from protocol.messages import BulkWelcome, Direction, DiskReport, GrantedDisk, PassKind, PassReport, RunPass

RECORD_EVERY_S = 1.0
"""How often what is proven is made durable, where it is more: a small file and an fsync."""


class ViewLost(SyncError):
    """The running VM whose view was being read has stopped."""

    code = "view-lost"


@dataclass
class PassRunner:
    """Carries out `RunPass` on this agent."""

    passes: PassDesk
    views: ViewDesk
    fences: FenceKeeper
    threads: Threads
    client_context: ssl.SSLContext
    runtime_dir: Path
    evidence: EvidenceDesk
    maps: MapDesk
    progress: ProgressDesk
    _verified: dict[str, str] = field(default_factory=dict)

    async def run(self, request: RunPass, session: Session, progress: Progress) -> PassReport:
        """Run the pass of the claimed `session` to its end.

        Raises:
            AgentError, ProtocolError: the pass is not complete.
        """
        started = trio.current_time()
        with self.passes.running(session):
            if not session.limits_changed:
                set_limits(session.limits, request.limit_network, request.limit_read)
            if session.grant.direction is Direction.SEND:
                reports = await self._send(request, session, progress)
            elif session.grant.kind is PassKind.SYNC:
                reports = await self._receive(session, progress)
            else:
                reports = await self._compare(session, progress)
        return PassReport(view=session.grant.view, elapsed_s=trio.current_time() - started, disks=reports)

    def has_verified(self, vm_uuid: str, view: str) -> bool:
        """Whether the last pass this process received for that VM is complete and made its disks equal that view."""
        return self._verified.get(vm_uuid) == view

    async def _send(self, request: RunPass, session: Session, progress: Progress) -> tuple[DiskReport, ...]:
        grant = session.grant
        opened = self.views.opened(grant.vm_uuid, grant.view)
        self._check_sizes(session, opened.disks, {d.target: d.source_size_bytes for d in grant.disks})
        _check_written(opened, grant.disks)
        try:
            return await self.passes.send(
                session, opened.disks, self._connector(request, session), progress, opened.dirty
            )
        except DiskError as error:
            given_up = self.views.given_up(grant.vm_uuid, grant.view)
            if given_up is not None:
                raise given_up from error
            # A view dies with its VM, and then the storage is not to blame.
            if await self.threads.on_libvirt(lambda: self.views.has_died(grant.vm_uuid, grant.view)):
                raise ViewLost(
                    f"the VM {grant.vm_uuid} stopped in the middle of the pass, and the view {grant.view} with it: "
                    "find out why, then try again or cancel",
                    vm=grant.vm_uuid,
                ) from error
            raise

    async def _receive(self, session: Session, progress: Progress) -> tuple[DiskReport, ...]:
        uuid = session.grant.vm_uuid
        self._verified.pop(uuid, None)
        opened: dict[str, Disk] = {}
        maps: dict[str, PassMap] = {}
        begun: dict[str, Begun] = {}
        view: str | None = None
        try:
            try:
                # What is known of the disks is asked before they are opened: a server that may write marks the bitmaps
                # that others keep in an image at once, and the file is another one from then on.
                await self.threads.on_disk(lambda: self._require(session))
                why_not = await self.threads.on_disk(lambda: self._why_compared(session))
                why = await self.threads.on_disk(lambda: self._open_maps(session, maps))
                await self.threads.on_disk(lambda: self._open_targets(session, opened))
                self._check_sizes(session, opened, {d.target: d.target_size_bytes for d in session.grant.disks})
                await self.threads.on_disk(lambda: self._begin(session, opened, maps, begun))
                proven = {target: what.proven for target, what in begun.items()}
                receive = partial(
                    self.passes.receive, session, opened, maps, self._marker(session), progress, why_not, proven
                )
                reports = await self._recorded(uuid, proven, receive)
            except BaseException:
                with trio.CancelScope(shield=True):
                    suspects = await self.threads.on_disk(partial(_not_flushed, opened))
                await self._close(opened, complain=False)
                # What went wrong first is what is told; without this a later pass can prove less.
                with trio.CancelScope(shield=True), contextlib.suppress(AgentError):
                    await self.threads.on_disk(lambda: self.evidence.broken_off(uuid, tuple(opened)))
                with trio.CancelScope(shield=True), contextlib.suppress(AgentError):
                    await self.threads.on_disk(partial(self._break_off, uuid, begun, suspects))
                raise
            await self._close(opened, complain=True)
            with trio.CancelScope(shield=True):
                await self.threads.on_disk(lambda: self.evidence.equals_now(uuid, session.grant.view, tuple(opened)))
                for target in opened:
                    await self.threads.on_disk(partial(self.progress.finished, uuid, target))
            view = session.grant.view
        finally:
            with trio.CancelScope(shield=True):
                await self.threads.on_disk(lambda: self._put_away(uuid, maps, view))
        self._verified[uuid] = session.grant.view
        return tuple(replace(r, why_not_higher=why.get(r.target, r.why_not_higher)) for r in reports)

    def _begin(
        self, session: Session, opened: dict[str, Disk], maps: Mapping[str, PassMap], begun: dict[str, Begun]
    ) -> None:
        """Find out what is proven of each disk, and make durable whatever an earlier pass left in the page cache: what
        is compared from there would never be flushed again."""
        for granted in session.grant.disks:
            what = self.progress.begin(session.grant.vm_uuid, granted, session.grant.view)
            if granted.target in maps:
                what = replace(what, proven=_known_to(maps[granted.target], what.proven))
            begun[granted.target] = what
            if what.suspect:
                opened[granted.target] = PastCache(opened[granted.target])
        for disk in opened.values():
            disk.flush()

    async def _recorded(
        self, vm_uuid: str, proven: dict[str, Proven], receive: Callable[[], Awaitable[tuple[DiskReport, ...]]]
    ) -> tuple[DiskReport, ...]:
        """Carry out `receive` while what is proven is recorded again and again."""
        reports: list[tuple[DiskReport, ...]] = []

        async def work() -> None:
            reports.append(await receive())

        async def record() -> None:
            while True:
                await trio.sleep(RECORD_EVERY_S)
                for target, what in proven.items():
                    await self.threads.on_disk(partial(self.progress.keep, vm_uuid, target, what))

        await accompanied(work, record)
        return reports[0]

    def _break_off(self, vm_uuid: str, begun: dict[str, Begun], suspects: frozenset[str]) -> None:
        for target, what in begun.items():
            self.progress.broken_off(vm_uuid, target, what.proven, suspect=target in suspects)

    def _open_maps(self, session: Session, maps: dict[str, PassMap]) -> dict[str, str]:
        """The digest maps of the disks that are about to be written; for the others, why there is none."""
        why: dict[str, str] = {}
        for granted in session.grant.disks:
            digest_map, sentence = self.maps.begin(session.grant.vm_uuid, granted)
            if digest_map is not None:
                maps[granted.target] = digest_map
            elif granted.digest_seed is not None:
                why[granted.target] = sentence
        return why

    def _put_away(self, vm_uuid: str, maps: dict[str, PassMap], view: str | None) -> None:
        """The disks are closed: what their maps know holds for what they are now."""
        for target, digest_map in maps.items():
            self.maps.end(vm_uuid, target, digest_map, view=view)

    async def _compare(self, session: Session, progress: Progress) -> tuple[DiskReport, ...]:
        """An audit opens no disk: the original may be running. A verification reads the fenced disks."""
        grant = session.grant
        opened: dict[str, Disk] = {}
        maps: dict[str, PassMap] = {}

        def open_all() -> None:
            if grant.kind is PassKind.VERIFY:
                self._require(session)
                self._open_targets(session, opened, writable=False)
                return
            for granted in grant.disks:
                maps[granted.target] = self.maps.for_audit(grant.vm_uuid, granted, grant.view)

        async def nothing_is_written(_: GrantedDisk) -> None:
            raise SyncError(f"the pass {grant.view} only compares, and something was about to be written")

        try:
            await self.threads.on_disk(open_all)
            self._check_sizes(session, opened, {d.target: d.target_size_bytes for d in grant.disks if opened})
            before = await self.threads.on_disk(lambda: self.evidence.before_verifying(grant.vm_uuid, tuple(opened)))
            reports = await self.passes.receive(session, opened, maps, nothing_is_written, progress)
        finally:
            for digest_map in maps.values():
                digest_map.close()
            await self._close(opened, complain=False)
        if opened and not any(report.differing or report.differing_bytes for report in reports):
            await self.threads.on_disk(lambda: self.evidence.verified(grant.vm_uuid, grant.view, before))
        return reports

    def _why_compared(self, session: Session) -> dict[str, str]:
        """Why the disks that are compared are: by what this side knows, if it is for want of that."""
        uuid = session.grant.vm_uuid
        proofs = {d.target: self.evidence.proof(uuid, d.target) for d in session.grant.disks if d.since is None}
        return {
            target: proof.why_not
            or f"this side proves that the disk equals the view {proof.view}; what was written since is not known"
            for target, proof in proofs.items()
        }

    async def _close(self, opened: dict[str, Disk], *, complain: bool) -> None:
        """Close every disk, whatever the others say; then, if `complain`, raise what the first said."""
        said: list[DiskError] = []
        with trio.CancelScope(shield=True):
            for disk in opened.values():
                try:
                    await self.threads.on_disk(disk.close)
                except DiskError as error:
                    said.append(error)
        if said and complain:
            raise said[0]

    def _require(self, session: Session) -> None:
        """Insist on the fence, and on what the grant claims of the disks."""
        self.fences.required(session.grant.vm_uuid, "original", session.order.pair)
        for granted in session.grant.disks:
            self.evidence.require(session.grant.vm_uuid, granted)

    def _open_targets(self, session: Session, opened: dict[str, Disk], *, writable: bool = True) -> None:
        """Open the fenced original's disks, for writing or to be compared, each through the lock that fences it."""
        fence = self.fences.required(session.grant.vm_uuid, "original", session.order.pair)
        torn = self.fences.condition(session.grant.vm_uuid) is DiskCondition.TORN
        for granted in session.grant.disks:
            trio.from_thread.check_cancelled()  # each may take a while
            # What the VM's disk is now stands first.
            image = next((image for image in fence.images if image.target == granted.target), None)
            held = None if image is None else self.fences.held(image.path)
            if image is None or held is None:
                raise SyncError(f"the disk {granted.target} is not covered by the fence of the original: fence it")
            opened[granted.target] = open_target(
                granted.target,
                held,
                image.format,
                self.runtime_dir,
                scattered=granted.since is not None,
                doubtful=torn,
                writable=writable,
            )

    def _check_sizes(self, session: Session, disks: dict[str, Disk], granted: dict[str, int]) -> None:
        for target, size_bytes in granted.items():
            disk = disks.get(target)
            if disk is None:
                raise SyncError(f"the view {session.grant.view} has no disk {target}: plan the run again")
            if disk.size_bytes != size_bytes:
                raise SyncError(
                    f"the disk {target} has {disk.size_bytes} bytes and {size_bytes} were granted: "
                    "it was resized since the plan; plan the run again",
                    disk=target,
                )

    def _connector(self, request: RunPass, session: Session) -> Connect:
        def connect(granted: GrantedDisk, seed: int, attempt: int) -> tuple[BulkSocket, BulkWelcome]:
            return connect_bulk(
                request.peer_host,
                request.peer_port,
                server_name=request.peer_name,
                context=self.client_context,
                peer_fingerprint=session.grant.peer_fingerprint,
                grant=session.grant.grant,
                target=granted.peer_target,
                digest_seed=seed,
                attempt=attempt,
            )

        return connect

    def _marker(self, session: Session) -> Callable[[GrantedDisk], Awaitable[None]]:
        """What marks a disk and the original torn, durably, before the first write to that disk."""
        uuid = session.grant.vm_uuid
        record = ConditionRecord(vm_uuid=uuid, condition=DiskCondition.TORN)
        turn = trio.Lock()

        def write_down(granted: GrantedDisk) -> None:
            self.evidence.before_writing(uuid, granted)
            self.fences.ledger.put_condition(record)

        async def mark(granted: GrantedDisk) -> None:
            async with turn:
                await self.threads.on_disk(lambda: write_down(granted))

        return mark


def _check_written(opened: OpenedView, disks: Iterable[GrantedDisk]) -> None:
    """Raise `NoEvidence` unless it is known what was written to each disk since the view that its grant names."""
    for granted in disks:
        if granted.since is None:
            continue
        dirty, since = opened.dirty.get(granted.target), opened.since.get(granted.target)
        if dirty is None or since != granted.since or dirty.size_bytes != granted.source_size_bytes:
            raise NoEvidence(
                f"disk {granted.target} is granted since the view {granted.since}, and the view {opened.view} does not "
                "tell what was written to it since then: run a pass that compares",
                disk=granted.target,
            )


def _not_flushed(opened: Mapping[str, Disk]) -> frozenset[str]:
    """Make durable what a failed pass has written. Returns the disks of which that cannot be done; one whose flush has
    failed before refuses the next, whatever it was that ended the pass."""
    failed: set[str] = set()
    for target, disk in opened.items():
        try:
            disk.flush()
        except FlushFailed:
            failed.add(target)
        except DiskError:
            continue
    return frozenset(failed)


def _known_to(digest_map: PassMap, proven: Proven) -> Proven:
    """What of the proven stretches the map knows as well, by its windows. What it does not know, it learns only if it
    is looked at once more; without that the original could not be audited."""
    known = Proven()
    for offset, length in proven.runs():
        for start in range(offset, offset + length, WINDOW_BYTES):
            part = min(WINDOW_BYTES, offset + length - start)
            if digest_map.look_up([(start, part)])[1].all() and not digest_map.lost:
                known.add(start, part)
    return known
