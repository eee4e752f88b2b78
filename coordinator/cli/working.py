"""What `start`, `resume` and `watch` share: working on a run here or handing it over, following it, and how it ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from coordinator.audit import AuditState
from coordinator.cli.conduct import conduct
from coordinator.cli.follow import Ending, Followed, follow
from coordinator.cli.report_view import show_report
from coordinator.cli.run_view import run_view
from coordinator.cli.service import unit_of
from coordinator.cli.session import Session
from coordinator.errors import ExitCode, UsageError
from coordinator.events import Observer, Outcome
from coordinator.model import State
from coordinator.reports import ClosingReport
from coordinator.runs import Coordinator
from coordinator.states import TABLE

Operation = Callable[[Observer, trio.Event], Awaitable[Outcome]]

WELL_ENDED = frozenset({"committed", "undone", "cancelled"})


async def work_here(session: Session, pair: str, coordinator: Coordinator, operation: Operation) -> Outcome:
    """Do it in this process, shown as it goes."""
    state = (await coordinator.get_pair(pair)).state
    with run_view(session.output) as view:
        return await conduct(pair, state, view, operation)


def close(session: Session, verb: str, outcome: Outcome, **more: Any) -> int:
    """Show how an operation ended; the exit code."""
    output = session.output
    if outcome.report is not None:
        show_report(output, outcome.report)
    output.say()
    output.say(outcome.sentence, style="" if outcome.exit_code is ExitCode.DONE else "bold red")
    output.finish({"verb": verb, **outcome_object(outcome), **more})
    return outcome.exit_code


def outcome_object(outcome: Outcome) -> dict[str, Any]:
    """The JSON form of an outcome; one that is not well has an ``error`` too."""
    value: dict[str, Any] = {
        "pair": outcome.pair,
        "run": outcome.run,
        "state": outcome.state,
        "exit_code": int(outcome.exit_code),
        "sentence": outcome.sentence,
        "report": outcome.report,
    }
    if outcome.exit_code is not ExitCode.DONE:
        code = "needs-operator" if outcome.exit_code is ExitCode.NEEDS_OPERATOR else "failed"
        value["error"] = {"code": code, "sentence": outcome.sentence, "facts": {"pair": outcome.pair}}
    return value


def watch_run(session: Session, verb: str, pair: str, *, wanted: State | None, more: Mapping[str, Any]) -> int:
    """Follow the pair's run from the database until it rests; Ctrl-C ends the watching, not the run.

    Args:
        wanted: the state this verb was called for; resting in another one is a failure. None: any well-ended run.
    """
    output = session.output

    async def watching(coordinator: Coordinator) -> tuple[Followed, ClosingReport | None]:
        with run_view(output, json_lines=verb == "watch") as view:
            followed = await follow(
                coordinator, pair, view, poll_s=session.poll_s, grace_s=session.grace_s, audit=verb == "watch"
            )
        try:
            report = await coordinator.report(pair) if followed.status.run is not None else None
        except UsageError:
            report = None
        return followed, report

    try:
        followed, report = session.run(watching)
    except KeyboardInterrupt:
        return _left(session, verb, pair, more)
    return close(session, verb, outcome_of(followed, report, wanted), **more)


def _left(session: Session, verb: str, pair: str, more: Mapping[str, Any]) -> int:
    sentence = f"the watching ended, the run of {pair} goes on: `failback watch {pair}` shows it again"
    session.output.say()
    session.output.say(sentence)
    error = {"code": "watching-ended", "sentence": sentence, "facts": {"pair": pair}}
    session.output.finish({"verb": verb, "pair": pair, "error": error, **more})
    return ExitCode.FAILED


def outcome_of(followed: Followed, report: ClosingReport | None, wanted: State | None) -> Outcome:
    """How a followed run ended, judged from the registry."""
    status = followed.status
    pair = status.pair.name
    code, sentence = ExitCode.DONE, f"{pair} is in {status.state.value}: {TABLE[status.state].means}"
    if followed.ending is Ending.NOBODY:
        code = ExitCode.FAILED
        sentence = (
            f"{pair} is in {status.state.value} and no process works on its run"
            f"{f' (last failure: {status.last_failure})' if status.last_failure else ''}: "
            f"go on with `failback resume {pair}`; if {unit_of(pair)} had it, `journalctl -u {unit_of(pair)}` says why"
        )
    elif status.state is State.NEEDS_OPERATOR:
        code = ExitCode.NEEDS_OPERATOR
        if status.operator is not None:
            sentence = status.operator.sentence
    elif wanted is not None and status.state is not wanted:
        code = ExitCode.FAILED
        reason = report.reason if report is not None and report.reason else status.last_failure
        sentence = f"the run ended without success, {pair} is in {status.state.value}{f': {reason}' if reason else ''}"
    elif wanted is None and report is not None and report.outcome not in (None, *WELL_ENDED):
        code = ExitCode.FAILED
        sentence = f"the last run of {pair} ended {report.outcome}: {report.reason or sentence}"
    elif status.state is State.FAILBACK:
        sentence = (
            f"{pair} is in Failback, the original is in use: `failback commit {pair}` makes it final, "
            f"`failback undo {pair}` takes it back"
        )
        if status.audit.state is AuditState.DIFFERS:
            code = ExitCode.FAILED
        if status.audit.state is not AuditState.OFF:
            sentence += f"; {status.audit.sentence}"
    return Outcome(pair=pair, run=status.run, state=status.state, exit_code=code, sentence=sentence, report=report)
