"""What `commit` and `undo` do about an audit that another process works on, or that nobody has done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import trio
from sqlalchemy import Connection

from coordinator import journal
from coordinator.audit import END_AUDIT, AuditMissing, AuditState, check_commit
from coordinator.clock import Clock
from coordinator.errors import PairBusy
from coordinator.events import Observer, Outcome, Progressed
from coordinator.model import Pair, State
from coordinator.progress import Progress
from coordinator.status import PairStatus
from coordinator.store import Store

POLL_S = 0.3
ENDS_WITHIN_S = 60.0
"""How long a process that audits may take to end it: it looks several times a second, then closes its view."""
Act = Callable[[], Awaitable[Outcome]]


class Looking(Protocol):
    """The coordinator, as far as it is looked at here."""

    actor: str
    clock: Clock

    async def get_pair(self, pair: str) -> Pair:
        """The pair."""

    async def pair_status(self, pair: str) -> PairStatus:
        """What the registry knows now."""


async def have_audit(coordinator: Looking, pair: str, audit: Act, observer: Observer) -> None:
    """Return when the pair's audit is complete and found nothing, or none is called for.

    Args:
        coordinator: what is looked at.
        pair: its name.
        audit: does it in this process; raises `PairBusy` where another one has the run.
        observer: is shown how far another process is.

    Raises:
        AuditDiffers: it found a difference.
        AuditMissing: it could not be carried out here.
    """
    shown: Progress | None = None
    tried = False
    while True:
        status = await coordinator.pair_status(pair)
        found = status.audit
        if status.state is not State.FAILBACK or found.state in (AuditState.OFF, AuditState.CLEAN):
            return
        check_commit(found, pair)
        if not found.running:
            if tried:
                raise AuditMissing(
                    f"{pair} is not committed: {found.sentence}; mend that and commit again, or commit without it: "
                    f"`failback commit {pair} --no-wait-audit`",
                    pair=pair,
                )
            try:
                await audit()
                tried = True
            except PairBusy:
                await trio.sleep(POLL_S)  # another process was quicker: wait for it
            continue
        if status.progress is not None and status.progress != shown:
            shown = status.progress
            observer(Progressed(progress=shown))
        await trio.sleep(POLL_S)


async def end_audit(coordinator: Looking, store: Store, pair: str, act: Act) -> Outcome:
    """Act on a pair in *Failback*; a process that audits it is asked to end first, and waited for.

    Raises:
        PairBusy: it did not end, or is at something else.
    """
    asked = False
    with trio.move_on_after(ENDS_WITHIN_S):
        while True:
            try:
                return await act()
            except PairBusy:
                if (await coordinator.get_pair(pair)).state is not State.FAILBACK:
                    raise
            if not asked:
                await store.write(partial(_ask, coordinator, await coordinator.get_pair(pair)))
                asked = True
            await trio.sleep(POLL_S)
    raise PairBusy(
        f"the process that audits {pair} was asked to end and has not after {ENDS_WITHIN_S:.0f} s: "
        f"`failback status {pair}` shows what it waits for",
        pair=pair,
    )


def _ask(coordinator: Looking, pair: Pair, connection: Connection) -> None:
    at_s = coordinator.clock.wall_s()
    journal.ask(connection, pair=pair.name, run=pair.run or "", verb=END_AUDIT, actor=coordinator.actor, at_s=at_s)
