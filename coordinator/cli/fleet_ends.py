"""`commit` and `undo` with ``--plan FILE``: the whole plan, in its order or backwards, one failure no other's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence, Set
from pathlib import Path
from typing import Any

import trio

from coordinator.cli.bugs import bug_sentence
from coordinator.cli.fleet import Declined
from coordinator.cli.fleet_view import ShownPlan, picture_object, plan_view, show_picture
from coordinator.cli.fleet_work import explain_error, listen_for_stop
from coordinator.cli.plan_file import load_plan
from coordinator.cli.session import Session, actor
from coordinator.errors import ExitCode
from coordinator.events import Event, Notice, Outcome
from coordinator.fleet import FleetPlan
from coordinator.fleet_standing import Looker, Picture
from coordinator.model import RestorePoint, State
from coordinator.runs import Coordinator
from coordinator.states import TABLE

DONE_WORDS = {"commit": "final", "undo": "back on their replicas"}
CANCELLABLE = frozenset({State.SYNCING, State.READY_TO_SWITCH})
Act = Callable[[Coordinator, str, Callable[[Event], None], trio.Event], Awaitable[Outcome]]


def commit_fleet(session: Session, file: Path, *, restore_point: RestorePoint, wait_audit: bool, yes: bool) -> int:
    """Make the failback of every pair that is home final, in the plan's order."""
    plan = load_plan(file)
    ready = _in(session, plan, {State.FAILBACK, State.COMMITTING})
    session.output.say(_list("Final would be", ready))
    question = f"Make the failback of {_count(ready)} final? It cannot be undone then."
    if ready and not session.confirm(question, yes=yes, action="commit"):
        raise Declined("not committed, nothing was touched", file=str(file))

    async def act(coordinator: Coordinator, pair: str, observe: Callable[[Event], None], stop: trio.Event) -> Outcome:
        if (await coordinator.get_pair(pair)).state is State.COMMITTING:
            return await coordinator.resume(pair, observer=observe, stop=stop)
        return await coordinator.commit(pair, restore_point, observer=observe, stop=stop, wait_audit=wait_audit)

    return _end_all(session, "commit", plan, file, ready, act, wanted=State.READY)


def undo_fleet(session: Session, file: Path, *, yes: bool) -> int:
    """Take every failback of the plan back, the last group first; runs that have not switched yet are cancelled."""
    plan = load_plan(file)
    undone = _in(session, plan, {State.FAILBACK, State.UNDOING})[::-1]
    cancelled = _in(session, plan, CANCELLABLE | {State.CANCELLING})[::-1]
    session.output.say(_list("Undone would be", undone))
    if cancelled:
        session.output.say(_list("Cancelled would be", cancelled))
    for sentence in session.run(lambda coordinator: _forecasts(coordinator, undone)):
        session.output.item("  *", sentence)
    both = [*undone, *cancelled]
    if both and not session.confirm(f"Take back {_count(both)}?", yes=yes, action="undo"):
        raise Declined("not undone, nothing was touched", file=str(file))

    async def act(coordinator: Coordinator, pair: str, observe: Callable[[Event], None], stop: trio.Event) -> Outcome:
        state = (await coordinator.get_pair(pair)).state
        if state in CANCELLABLE:
            return await coordinator.cancel(pair, observer=observe)
        if TABLE[state].unfinished:
            return await coordinator.resume(pair, observer=observe, stop=stop)
        return await coordinator.undo(pair, observer=observe)

    return _end_all(session, "undo", plan, file, both, act, wanted=State.FAILOVER)


def _in(session: Session, plan: FleetPlan, states: Set[State]) -> list[str]:
    """The pairs of the plan in one of these states, in its order."""

    async def look(coordinator: Coordinator) -> list[str]:
        return [pair for pair in plan.pairs if (await coordinator.get_pair(pair)).state in states]

    return session.run(look)


async def _forecasts(coordinator: Coordinator, pairs: Sequence[str]) -> list[str]:
    """What undoing would leave behind, a sentence for each pair that can be undone now."""
    sentences = []
    for pair in pairs:
        if (await coordinator.get_pair(pair)).state is State.FAILBACK:
            sentences.append(f"{pair}: {(await coordinator.forecast_undo(pair)).sentence}.")
    return sentences


def _end_all(
    session: Session, verb: str, plan: FleetPlan, file: Path, pairs: Sequence[str], act: Act, *, wanted: State
) -> int:
    """Act on the pairs, group by group, and show what became of all."""
    explain = explain_error(session, lambda _pair, error: bug_sentence(session, error))
    groups = [group for group in plan.in_order() if set(group.pairs) & set(pairs)]
    if verb == "undo":
        groups.reverse()
    errors: dict[str, str] = {}

    async def one(view: ShownPlan, limiter: trio.CapacityLimiter, stop: trio.Event, pair: str) -> None:
        def observe(event: Event) -> None:
            if isinstance(event, Notice):
                view.notice(f"{pair}: {event.sentence}")

        async with limiter:
            if stop.is_set():
                errors[pair] = "left as it was, for a signal came first"
                return
            try:
                async with session.opener(session.config(), actor()) as coordinator:
                    outcome = await act(coordinator, pair, observe, stop)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is this pair's alone
                errors[pair] = explain(pair, error)
            else:
                if outcome.exit_code is not ExitCode.DONE and outcome.state is not wanted:
                    errors[pair] = outcome.sentence
            view.notice((errors.get(pair) and f"{pair}: {errors[pair]}") or f"{pair}: {DONE_WORDS[verb]}")

    async def work(coordinator: Coordinator) -> Picture:
        stop = trio.Event()
        limiter = trio.CapacityLimiter(plan.parallel)
        looker = Looker(coordinator, plan)
        with plan_view(session.output) as view:
            async with trio.open_nursery() as outer:
                await outer.start(listen_for_stop, stop, lambda name: view.notice(_answer(name, verb, file)))
                for group in groups:
                    async with trio.open_nursery() as nursery:
                        for pair in group.pairs:
                            if pair in pairs:
                                nursery.start_soon(one, view, limiter, stop, pair)
                outer.cancel_scope.cancel()
        return await looker.look()

    return _close(session, verb, plan, file, session.run(work), errors, wanted)


def _answer(name: str, verb: str, file: Path) -> str:
    return (
        f"{name}: what is under way for a pair is ended, no other one is begun; `failback {verb} --plan {file}` goes "
        "on later"
    )


def _close(
    session: Session, verb: str, plan: FleetPlan, file: Path, picture: Picture, errors: dict[str, str], wanted: State
) -> int:
    output = session.output
    missed = [row for row in picture.rows if row.status.state is not wanted]
    for row in missed:
        errors.setdefault(row.standing.pair, f"is in {row.status.state.value}: {TABLE[row.status.state].means}")
    output.say()
    show_picture(output, picture)
    if missed:
        output.say()
    for row in missed:
        output.item("  !", f"{row.standing.pair}: {errors[row.standing.pair]}")
    reached = len(picture.rows) - len(missed)
    code = ExitCode.FAILED if missed else ExitCode.DONE
    if any(row.status.state is State.NEEDS_OPERATOR for row in missed):
        code = ExitCode.NEEDS_OPERATOR
    sentence = f"{reached} of {len(plan.pairs)} pairs are {DONE_WORDS[verb]}"
    output.say()
    output.say(sentence, style="" if code is ExitCode.DONE else "bold red")
    value: dict[str, Any] = {
        "verb": verb,
        "file": str(file),
        "pairs": picture_object(picture),
        "errors": {row.standing.pair: errors[row.standing.pair] for row in missed},
        "exit_code": int(code),
        "sentence": sentence,
    }
    if missed:
        name = "needs-operator" if code is ExitCode.NEEDS_OPERATOR else "failed"
        value["error"] = {"code": name, "sentence": sentence, "facts": {"file": str(file)}}
    output.finish(value)
    return code


def _list(what: str, pairs: Sequence[str]) -> str:
    return f"{what}: {', '.join(pairs) if pairs else 'none'}."


def _count(pairs: Sequence[str]) -> str:
    return f"{len(pairs)} pair{'s' if len(pairs) != 1 else ''}"
