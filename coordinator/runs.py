"""The operations of the coordinator: what the command line calls, typed, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from coordinator import exclusions, journal, pair_holder, registry, restore_points, takeover
from coordinator.agents import AgentDirectory, open_agents
from coordinator.audit_wait import end_audit, have_audit
from coordinator.called_off import check_word
from coordinator.clock import Clock, SystemClock, Tokens, system_tokens
from coordinator.config import Config
from coordinator.context import RunContext
from coordinator.database import Database
from coordinator.destinations import Sought, seek
from coordinator.duties import DutifulAgents, Duty, owed
from coordinator.engine import Engine
from coordinator.entries import JournalEntry, RunRecord
from coordinator.errors import ExitCode, PairBusy, Refused, UsageError, WrongState
from coordinator.events import Observer, Outcome, unobserved
from coordinator.exclusions import Exclusion
from coordinator.findings import Findings
from coordinator.health import Doctor
from coordinator.hooks import Hooks
from coordinator.limits import LimitsOutcome
from coordinator.lookup import look_up_pair, prove_failover
from coordinator.model import Pair, PairRequest, Rate, RestorePoint, RunLimits, RunOptions, State, SwitchPolicy
from coordinator.pair_memory import remember_pair, seen_epoch
from coordinator.pairlock import is_locked, pair_lock
from coordinator.placed import PlacedAgents
from coordinator.reports import ClosingReport, closing_report
from coordinator.restore_points import RestorePointFacts
from coordinator.rounds import is_pass
from coordinator.runlog import RunLog
from coordinator.samples import take_samples
from coordinator.states import TABLE, Verb, check_verb
from coordinator.status import PairStatus, UndoForecast, forecast, read_status
from coordinator.store import Store
from coordinator.survey import failover_since, survey
from coordinator.switch_order import SwitchOutcome, check_switch_time, switch_words
from coordinator.takeover import Author

RUN_ID_BYTES = 5
REQUEST_POLL_S = 0.3
SWITCH_WAIT_S = 3.0
"""How long `failback switch` waits for the process that works on the run; a pass under way ends first."""
LIMITS_WAIT_S = 10.0
"""How long `failback limit` waits for the pass under way to obey."""


class Coordinator:
    """One process's way into the registry, the journal and the agents.

    Use as ``async with Coordinator(config, actor="root@host") as coordinator``. Every method raises a subclass of
    `coordinator.errors.CoordinatorError` and nothing else on purpose: `UsageError` (no such pair, bad name),
    `WrongState` (with what the state allows), `HostUnreachable`, `AgentRefused`, `DatabaseError`, `PairBusy`.
    Work on a run ends in an `Outcome`, also when it rolled back or stopped; see its ``exit_code`` and ``sentence``.

    Args:
        config: where the database, the certificates, the hooks and the hosts are.
        actor: who asks, for the journal.
        agents: how agents are reached; None: over TLS, as `config` says.
        clock, tokens: time and randomness.
        make_store: how the database is called from trio.
    """

    def __init__(
        self,
        config: Config,
        *,
        actor: str,
        agents: AgentDirectory | None = None,
        clock: Clock | None = None,
        tokens: Tokens = system_tokens,
        make_store: Callable[[Database], Store] = Store,
    ) -> None:
        self.config = config
        self.actor = actor
        self.clock: Clock = clock or SystemClock()
        self.tokens = tokens
        self._make_store = make_store
        self._given_agents = agents
        self._agents: AgentDirectory | None = None  # the same, who are told with each order whose it is
        self._stack = AsyncExitStack()
        self._store: Store | None = None
        self.rebuilds = False  # set before it is entered: a registry that is gone begins anew, to be rebuilt
        self._place = ""
        self._owes = False  # whether an original must be fenced at the first contact with its host

    async def __aenter__(self) -> Self:
        """Open the database (made if there never was one)."""
        opening = partial(Database.open, self.config.database, anew=self.rebuilds)
        database = await trio.to_thread.run_sync(opening)
        self._stack.callback(database.close)
        self._store = self._make_store(database)
        self._place = await trio.to_thread.run_sync(pair_holder.place_of, self.config)
        self._owes = bool(await self._store.read(owed))
        if self._given_agents is None:
            self._given_agents = await self._stack.enter_async_context(open_agents(self.config))
        self._agents = PlacedAgents(self._given_agents, self._place)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close agents' connections and the database."""
        # Closed as if nothing had happened, so that an error of the body stays itself and is not wrapped in a group.
        await self._stack.aclose()

    # --- the registry -------------------------------------------------------------------------------------------

    async def register_pair(self, request: PairRequest) -> Pair:
        """Inspect both VMs, map their disks and take the pair into the registry, in *Ready* (or *Failover*).

        A pair that is known already and has no run is changed: its mapping, what is left out, a VM that was defined
        anew. It stays in its state.

        Raises:
            UsageError: a name, VM or disk that cannot be; `Refused`: `in_failover` was said and is not so;
                `WrongState`: a run of the known pair is under way or not final, or its agents know it already.
        """
        pair = await look_up_pair(self.agents, request)
        if all(known.name != pair.name for known in await self.list_pairs()):
            pair = replace(pair, epoch=await seen_epoch(self.agents, pair))
        author = self._author()
        made = await self._db.write(
            lambda connection: takeover.register(connection, pair, author, in_failover=request.in_failover)
        )
        said = request.replication
        if said is not None:
            await self._db.write(lambda connection: restore_points.say_replication(connection, made, author, said))
        await remember_pair(self.agents, made)
        return made

    async def record_failover(self, pair: str) -> Pair:
        """Ready → Failover, after proving the original off and the replica on. Harmless when repeated.

        Raises:
            Refused: an agent says otherwise.
        """
        with pair_lock(self.config.state_dir, (await self.get_pair(pair)).name):
            found = await self.get_pair(pair)
            if found.state is State.FAILOVER:
                return found
            check_verb(found, Verb.FAILOVER)
            await prove_failover(self.agents, found)
            author = self._author()
            return await self._db.write(lambda connection: takeover.record_failover(connection, pair, author))

    async def list_pairs(self) -> tuple[Pair, ...]:
        """Every pair, by name."""
        return await self._db.read(registry.list_pairs)

    async def left_behind(self) -> tuple[tuple[Duty, ...], tuple[Exclusion, ...]]:
        """What must be fenced at the first contact with its host, and the exclusion list; of every pair."""
        return await self._db.read(lambda connection: (owed(connection), exclusions.listed(connection)))

    async def readmit(self, host: str, vm: str) -> Exclusion:
        """Take a VM (by name or UUID) off the exclusion list; a fence on it stays until somebody lifts it there.

        Raises:
            UsageError: it is not on the list; `WrongState`: its fence is pending, or its pair's run is not final.
        """
        return await self._db.write(lambda connection: exclusions.readmit(connection, host, vm))

    async def get_pair(self, pair: str) -> Pair:
        """The pair of that name; `UsageError` when there is none."""
        return await self._db.read(lambda connection: registry.get_pair(connection, pair))

    async def findings(self, pair: str, *, sampled: bool = False, wanted: Pair | None = None) -> Findings:
        """What `coordinator.plan.make_plan` needs, asked of both agents now; `sampled`: with samples of the disks.
        `wanted`: the pair as a run to another place would make it."""
        found = await self.get_pair(pair) if wanted is None else wanted
        since_s = failover_since(await self.history(pair)) if found.state is State.FAILOVER else None
        findings = await survey(self.agents, found, self.clock, failover_s=since_s)
        if not sampled:
            return findings
        return replace(findings, samples=await take_samples(self.agents, found, seed=int(self.tokens(8), 16)))

    async def take_pair(self, pair: str) -> str:
        """Take the pair from whichever coordinator holds it on the agents, under an epoch above any they have seen;
        a sentence on what was taken. What ran there has ended when this returns.

        Raises:
            PairBusy: a process of this very registry works on the run.
            HostUnreachable, AgentRefused: neither agent could be asked, or one that was asked refused.
        """
        with pair_lock(self.config.state_dir, (await self.get_pair(pair)).name):
            return await pair_holder.take_pair(
                self.agents, self._db, await self.get_pair(pair), self._place, self._author()
            )

    # --- a run --------------------------------------------------------------------------------------------------

    async def check_start(self, pair: str) -> Pair:
        """Raise `WrongState` unless `start` is allowed now; changes nothing."""
        found = await self.get_pair(pair)
        check_verb(found, Verb.START)
        return found

    async def start_run(self, pair: str, options: RunOptions) -> str:
        """Failover → Syncing: make a run (its id is returned), journal its options. Nothing is executed yet.

        The caller has computed the plan and met no refusal.
        """
        await self.check_start(pair)
        if options.switch is SwitchPolicy.AT:
            check_switch_time(options.switch_at_s, self.clock.wall_s())
        run, author = f"r{self.tokens(RUN_ID_BYTES)}", self._author()
        wanted = await self._wanted(pair, options)
        await pair_holder.check_held(self.agents, wanted, self._place)
        with pair_lock(self.config.state_dir, pair):
            await self._db.write(lambda connection: takeover.start(connection, pair, run, options, author, wanted))
        return run

    async def destination(self, pair: str, options: RunOptions) -> Sought:
        """The pair as a run with these options would make it, and what speaks against going there."""
        return await seek(self.agents, self._db, await self.get_pair(pair), options)

    async def _wanted(self, pair: str, options: RunOptions) -> Pair:
        sought = await self.destination(pair, options)
        if sought.pair is None or sought.refusals:
            first = sought.refusals[0]
            raise Refused(f"{pair} cannot go there: {first.sentence}", code=first.code)
        return sought.pair

    async def execute_run(
        self, pair: str, *, observer: Observer = unobserved, stop: trio.Event | None = None
    ) -> Outcome:
        """Work on the pair's unfinished run until it rests: Failback, Failover, Ready, Needs operator, or stopped.

        `stop`, once set, stops at the next safe boundary while Syncing; inside the switchover it is answered with a
        `Notice` and not obeyed. A pair in *Needs operator* is left alone: only `resume` is a person's word.
        """
        found = await self.get_pair(pair)
        if found.state is State.NEEDS_OPERATOR and found.operator is not None:
            return await self._rests(found, ExitCode.NEEDS_OPERATOR, found.operator.sentence)
        return await self._work(pair, Verb.RESUME, observer, stop)

    async def resume(self, pair: str, *, observer: Observer = unobserved, stop: trio.Event | None = None) -> Outcome:
        """Continue the unfinished run of the pair, whatever state it is in, under a new epoch."""
        return await self._work(pair, Verb.RESUME, observer, stop)

    async def cancel(self, pair: str, *, observer: Observer = unobserved, wait_s: float = 600.0) -> Outcome:
        """End the run before the switchover. A process that works on it is asked to; otherwise it is done here.

        Raises:
            WrongState: the switchover has begun, or there is nothing to cancel.
            PairBusy: the process that works on the run did not end it within `wait_s`; it has been asked to.
        """
        asked: int | None = None
        with trio.move_on_after(wait_s):
            while True:
                found = await self.get_pair(pair)
                done = await self._already(found, State.FAILOVER, "cancelled")
                if done is not None:
                    return done
                # A live process that we asked is on its way; one that died on its way has left us the rest.
                verb = Verb.RESUME if found.state is State.CANCELLING else Verb.CANCEL
                if asked is None or verb is Verb.CANCEL:
                    check_verb(found, Verb.CANCEL)
                try:
                    return await self._work(pair, verb, observer, None)
                except PairBusy:
                    asked = await self._ask_cancel(found, asked)
                except WrongState:
                    if asked is None:
                        raise  # else the live process went on since we looked: look again
                await trio.sleep(REQUEST_POLL_S)
        raise PairBusy(
            f"the process that works on {pair} was asked to cancel and has not ended after {wait_s:.0f} s: "
            f"`failback status {pair}` shows what it waits for",
            pair=pair,
        )

    async def _ask_cancel(self, pair: Pair, asked: int | None) -> int:
        run, at_s = pair.run or "", self.clock.wall_s()
        if asked is None:
            return await self._db.write(
                lambda connection: journal.ask(
                    connection, pair=pair.name, run=run, verb="cancel", actor=self.actor, at_s=at_s
                )
            )
        answer = (await self._db.read(lambda connection: journal.get_request(connection, asked))).answer
        now = await self.get_pair(pair.name)
        if answer is not None and TABLE[now.state].unfinished and now.state is not State.CANCELLING:
            raise WrongState(f"`cancel` is not possible: {answer}", pair=pair.name, state=now.state.value)
        return asked

    async def limits(self, pair: str) -> tuple[str, RunLimits] | None:
        """The pair's unfinished run and its limits; None where no run is unfinished."""
        status = await self.pair_status(pair)
        if status.run is None or not TABLE[status.state].unfinished:
            return None
        return status.run, status.limits

    async def set_limits(
        self, pair: str, *, network: Rate | None = None, read: Rate | None = None, wait_s: float = LIMITS_WAIT_S
    ) -> LimitsOutcome:
        """Other limits for this and every later pass of the pair's unfinished run; None: that one stays as it is.

        Durable when it returns. Where a pass works, waits up to `wait_s` for both agents to obey.

        Raises:
            WrongState: no pass of a run is to come.
        """
        author = self._author()
        change = await self._db.write(
            lambda connection: takeover.change_limits(connection, pair, author, network, read)
        )
        in_pass, answer = False, None
        with trio.move_on_after(wait_s):
            while True:
                status = await self.pair_status(pair)
                answer = (await self._db.read(lambda c: journal.get_request(c, change.request))).answer
                in_pass = status.active and status.run == change.run and is_pass(status.step)
                if answer is not None or not in_pass:
                    break
                await trio.sleep(REQUEST_POLL_S)
        return change.outcome(pair, in_pass=in_pass, answer=answer)

    async def switch(self, pair: str, *, at_s: float | None = None, wait_s: float = SWITCH_WAIT_S) -> SwitchOutcome:
        """Switch now, or at that time (seconds since 1970), whatever `start` was told. Harmless when repeated.

        Durable when it returns. Where a process works on the run, waits up to `wait_s` for it to take it up.

        Raises:
            UsageError: the time is past; `WrongState`: no switchover of a run is to come.
        """
        now_s, author = self.clock.wall_s(), self._author()
        check_switch_time(at_s, now_s)
        asked = await self._db.write(lambda connection: takeover.order_switch(connection, pair, author, at_s))
        answered = asked.request is None
        status = await self.pair_status(pair)
        with trio.move_on_after(wait_s):
            while not answered and status.active:
                await trio.sleep(REQUEST_POLL_S)
                answered = await self._db.read(lambda c: journal.is_answered(c, asked.request))
                status = await self.pair_status(pair)
        status = await self.pair_status(pair)
        return SwitchOutcome(
            pair=pair,
            run=asked.run,
            at_s=at_s,
            state=status.state,
            active=status.active,
            taken_up=answered,
            sentence=switch_words(pair, at_s, status, answered=answered),
        )

    async def give_turn(self, pair: str) -> bool:
        """The pair's turn in its plan has come: a run that waits for it may switch. Whether that is new."""
        author = self._author()
        return await self._db.write(lambda connection: takeover.give_turn(connection, pair, author))

    async def commit(
        self,
        pair: str,
        restore_point: RestorePoint,
        *,
        observer: Observer = unobserved,
        stop: trio.Event | None = None,
        wait_audit: bool = True,
    ) -> Outcome:
        """Failback → Ready: final. Harmless when repeated. `wait_audit`: have the audit's result first, from the
        process that audits, or by doing it here, which `stop` ends; otherwise one under way is ended.

        Raises:
            AuditDiffers: it found a difference, which forbids the commit in either case; `AuditMissing`: it could not
                be carried out.
        """
        done = await self._already(await self.get_pair(pair), State.READY, "committed")
        if done is not None:
            return done
        if restore_point is RestorePoint.KEEP:
            known = await self.get_pair(pair)
            await self._db.read(lambda connection: restore_points.check_keep(connection, known))
        if wait_audit:
            await have_audit(self, pair, lambda: self._work(pair, Verb.RESUME, observer, stop), observer)
        return await end_audit(
            self, self._db, pair, lambda: self._work(pair, Verb.COMMIT, observer, None, restore_point)
        )

    async def undo(self, pair: str, *, observer: Observer = unobserved, original_is_off: str | None = None) -> Outcome:
        """Failback (or after the point of no return, Needs operator) → Failover: the replica serves again.

        Harmless when repeated. `original_is_off`: a person's word, with the production host's name, that the original
        is off though that host cannot prove it; it is fenced there at the first contact.

        Raises:
            UsageError: another host was named; `Refused`: that host answers, so that the word is not needed or wrong.
        """
        found = await self.get_pair(pair)
        done = await self._already(found, State.FAILOVER, "undone")
        if done is not None:
            return done
        if original_is_off is not None:
            check_verb(found, Verb.UNDO)
            await check_word(self.agents, found, original_is_off)
            self._owes = True
        called_off = original_is_off is not None
        return await end_audit(
            self, self._db, pair, lambda: self._work(pair, Verb.UNDO, observer, None, called_off=called_off)
        )

    async def forecast_undo(self, pair: str) -> UndoForecast:
        """How long the original has run since the switchover: what undo would leave behind."""
        found = await self.get_pair(pair)
        check_verb(found, Verb.UNDO)
        return forecast(found, RunLog(await self.history(pair, found.run)), self.clock.wall_s())

    async def restore_points(self, pair: str) -> tuple[RestorePointFacts, ...]:
        """The restore points of the pair's replica, the oldest first."""
        return await restore_points.list_restore_points(self.agents, self._db, await self.get_pair(pair))

    async def prune_restore_points(self, pair: str, *, keep: int) -> tuple[str, ...]:
        """Merge the oldest away until `keep` stand; see `coordinator.restore_points.prune`."""
        found = await self.get_pair(pair)
        await pair_holder.check_held(self.agents, found, self._place)
        with pair_lock(self.config.state_dir, found.name):
            return await restore_points.prune(self.agents, self._db, await self.get_pair(pair), self._author(), keep)

    async def backup(self, file: Path) -> None:
        """Copy registry and journal to a new file, as they are at one instant; see `Database.backup`."""
        await self._db.backup(file)

    # --- looking ------------------------------------------------------------------------------------------------

    async def pair_status(self, pair: str) -> PairStatus:
        """What the registry knows now; asks no agent."""
        now_s = self.clock.wall_s()
        active = is_locked(self.config.state_dir, (await self.get_pair(pair)).name)
        return await self._db.read(lambda connection: read_status(connection, pair, active=active, now_s=now_s))

    async def runs(self, pair: str) -> tuple[RunRecord, ...]:
        """Every run of the pair, oldest first."""
        await self.get_pair(pair)
        return await self._db.read(lambda connection: journal.list_runs(connection, pair))

    async def history(self, pair: str, run: str | None = None) -> tuple[JournalEntry, ...]:
        """The journal of the pair (or of one of its runs), oldest first."""
        await self.get_pair(pair)
        return await self._db.read(lambda connection: journal.entries(connection, pair, run))

    async def report(self, pair: str, run: str | None = None) -> ClosingReport:
        """The closing report of a run, the latest by default; `UsageError` when the pair had none."""
        found = await self.get_pair(pair)
        wanted = run or found.run
        if wanted is None:
            raise UsageError(f"{pair} has had no run yet: `failback start {pair}` begins one", code="no-such-run")
        record = await self._db.read(lambda connection: journal.get_run(connection, wanted))
        return closing_report(record, found.disks, RunLog(await self.history(pair, wanted)))

    @property
    def agents(self) -> AgentDirectory:
        """How agents are reached; what `plan` asks through."""
        assert self._agents is not None, "use the coordinator as an async context manager"
        if self._owes:
            return DutifulAgents(self._agents, self._db, self.clock, self.actor)
        return self._agents

    # --- inside -------------------------------------------------------------------------------------------------

    def doctor(self) -> Doctor:
        """Looks at registry, agents and libvirt together, and clears up."""
        return Doctor(self.config, self._db, self.agents, self.clock, self._author())

    @property
    def _db(self) -> Store:
        assert self._store is not None, "use the coordinator as an async context manager"
        return self._store

    def _author(self) -> Author:
        return Author(actor=self.actor, at_s=self.clock.wall_s())

    async def _work(
        self,
        pair: str,
        verb: Verb,
        observer: Observer,
        stop: trio.Event | None,
        restore_point: RestorePoint | None = None,
        *,
        called_off: bool = False,
    ) -> Outcome:
        check_verb(await self.get_pair(pair), verb)
        author = self._author()
        await pair_holder.check_held(self.agents, await self.get_pair(pair), self._place)
        with pair_lock(self.config.state_dir, pair):
            taken = await self._db.write(
                lambda connection: takeover.take_over(
                    connection, pair, verb, author, restore_point, called_off=called_off
                )
            )
            context = RunContext(
                pair=taken.pair,
                run=taken.run,
                epoch=taken.pair.epoch,
                log=taken.log,
                store=self._db,
                directory=self.agents,
                hooks=Hooks(folder=self.config.hooks_dir, timeout_s=self.config.hook_timeout_s),
                clock=self.clock,
                tokens=self.tokens,
                observer=observer,
                actor=self.actor,
            )
            return await Engine(context, stop).work()

    async def _already(self, pair: Pair, state: State, outcome: str) -> Outcome | None:
        """The outcome of a verb that was carried out before, or None."""
        runs = await self.runs(pair.name)
        if pair.state is not state or not runs or runs[-1].outcome != outcome:
            return None
        return await self._rests(pair, ExitCode.DONE, f"{pair.name} is {outcome} already: nothing to do")

    async def _rests(self, pair: Pair, code: ExitCode, sentence: str) -> Outcome:
        return Outcome(
            pair=pair.name,
            run=pair.run,
            state=pair.state,
            exit_code=code,
            sentence=sentence,
            report=None if pair.run is None else await self.report(pair.name),
        )
