"""The limits of a run: what holds now, and passing changes on to both agents while a pass works.

`failback start` sets them, `failback limit` changes them: a note in the journal says what holds from then on, for every
pass of the run to come, and a request beside it makes the process that works on a pass pass it on at once.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import trio
from sqlalchemy import Connection

from coordinator import journal, registry
from coordinator.agents import QUESTION_TIMEOUT_S, Agent, ask
from coordinator.context import RunContext
from coordinator.entries import RunRecord
from coordinator.errors import CoordinatorError, DatabaseError
from coordinator.events import Notice
from coordinator.model import RunLimits
from coordinator.registry import Superseded
from coordinator.runlog import RunLog
from protocol.messages import Done, SetLimits

LIMITS = "limits"
"""Name of the note in the journal."""
VERB = "limit"
"""Of the request that says: there is a new note."""
POLL_S = 0.3
"""How often a pass looks for changes in the database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsChange:
    """New limits that are in the journal of `run`, and the request that passes them on."""

    run: str
    limits: RunLimits
    request: int

    def outcome(self, pair: str, *, in_pass: bool, answer: str | None) -> LimitsOutcome:
        """What to say of it.

        Args:
            in_pass: a pass works now.
            answer: of the process that works on the run: empty, both agents obey; None: it has given none.
        """
        at_work = in_pass and answer == ""
        when = "kept for every pass of this run that is still to come"
        if at_work:
            when = "both agents obey now, and in every later pass of this run"
        elif answer:
            when += f"; not passed on: {answer}"
        elif in_pass and answer is None:
            when += f"; the one under way has not taken them up yet: `failback status {pair}` shows what it waits for"
        sentence = f"the limits of {pair} are: {self.limits.words}; {when}"
        return LimitsOutcome(pair=pair, run=self.run, limits=self.limits, at_work=at_work, sentence=sentence)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsOutcome:
    """What became of a change. `at_work`: a pass obeys it already; `sentence` says it, or why not, for people."""

    pair: str
    run: str
    limits: RunLimits
    at_work: bool
    sentence: str


def in_force(run: RunRecord, log: RunLog) -> RunLimits:
    """The limits of the run: the last word of `failback limit`, else what it was started with."""
    return log.note(LIMITS, RunLimits) or run.options.limits


def read_limits(connection: Connection, run: str) -> RunLimits:
    """The limits of that run, from the journal as it is now."""
    record = journal.get_run(connection, run)
    return in_force(record, RunLog(journal.entries(connection, record.pair, run)))


async def follow_limits(context: RunContext) -> None:
    """While a pass works: take up every change and tell both agents. Runs until it is cancelled.

    A change that cannot be passed on ends no pass; whoever asked for it is told, and the next pass begins with it.
    """
    while True:
        with suppress(DatabaseError):
            try:
                await _take_up(context)
            except Superseded:
                return  # the pass learns of it by itself
        await trio.sleep(POLL_S)


async def _take_up(context: RunContext) -> None:
    pair, run = context.pair.name, context.run.id
    if not await context.store.read(lambda connection: journal.is_asked(connection, pair, run, VERB)):
        return

    def claim(connection: Connection) -> tuple[RunLimits, list[int]]:
        registry.check_epoch(connection, pair, context.epoch)
        requests = list(iter(lambda: journal.claim(connection, pair, run, VERB), None))
        return read_limits(connection, run), [request.id for request in requests]

    limits, requests = await context.store.write(claim)
    told = [await _tell(agent, context, limits) for agent in (context.source, context.target)]
    sentence = "; ".join(failure for failure in told if failure)
    context.observer(Notice(sentence=f"limits: {limits.words}{f' (not passed on: {sentence})' if sentence else ''}"))

    def answer(connection: Connection) -> None:
        for request in requests:
            journal.answer(connection, request, sentence)

    await context.store.write(answer)


async def _tell(agent: Agent, context: RunContext, limits: RunLimits) -> str:
    """Why that agent does not obey the new limits; empty: it does."""
    order = SetLimits(order=context.order, limit_network=limits.network_bytes_s, limit_read=limits.read_bytes_s)
    try:
        await ask(agent, order, Done, timeout_s=QUESTION_TIMEOUT_S)
    except CoordinatorError as error:
        return error.sentence
    return ""
