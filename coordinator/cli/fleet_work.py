"""The work on the runs of a plan: each in a task of this process, or in its unit; signals stop at safe boundaries."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial

import trio

from coordinator.cli.conduct import Interrupted, heard_signals
from coordinator.cli.fleet_view import plan_view
from coordinator.cli.follow import Ending, follow
from coordinator.cli.run_view import SilentView
from coordinator.cli.service import unit_of
from coordinator.cli.session import Session, actor, first_cause
from coordinator.errors import CoordinatorError
from coordinator.events import Event, Notice
from coordinator.fleet import FleetPlan
from coordinator.fleet_run import Explain, FleetView, Leader
from coordinator.fleet_standing import Picture
from coordinator.runs import Coordinator
from coordinator.timing import turn_words


class RunLost(CoordinatorError):
    """A run that was handed over has nobody who works on it."""

    code = "run-lost"


async def lead_here(
    session: Session,
    coordinator: Coordinator,
    plan: FleetPlan,
    queued: frozenset[str],
    *,
    why_here: str | None,
    file: str,
    explain: Explain,
) -> Picture:
    """Lead the runs of these pairs until none goes on by itself.

    Args:
        why_here: None: each run is handed over to its unit and watched here; else it works in this process.
        file: the plan's, for sentences.
        explain: a sentence on an error that the work on a pair ended with.

    Raises:
        Interrupted: a second signal ended the work in this process before a safe boundary.
    """
    stop = trio.Event()
    picture: Picture | None = None
    with plan_view(session.output) as view:
        work = partial(_work_unit, session, stop) if why_here is None else partial(_work_here, session, view, stop)
        leader = Leader(coordinator, plan, work=work, explain=explain, view=view, stop=stop, poll_s=session.poll_s)

        def answer(name: str) -> None:
            view.notice(_answer(name, file, here=why_here is not None))

        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            await nursery.start(listen_for_stop, stop, answer, scope)
            with scope:
                picture = await leader.lead(queued)
            nursery.cancel_scope.cancel()
    if picture is None:
        raise Interrupted(
            f"stopped at once by a second signal: `failback resume --plan {file}` goes on from the journals", file=file
        )
    return picture


async def listen_for_stop(
    stop: trio.Event,
    answer: Callable[[str], None],
    scope: trio.CancelScope | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """The first signal is answered and sets `stop`, the second one cancels `scope`, where there is one."""
    with trio.open_signal_receiver(*heard_signals()) as arrivals:
        task_status.started()
        async for number in arrivals:
            if not stop.is_set():
                answer(signal.Signals(number).name)
                stop.set()
            elif scope is not None:
                scope.cancel()
                return


async def _work_here(session: Session, view: FleetView, stop: trio.Event, pair: str) -> None:
    """In this process, with a coordinator of its own: connections and database of one run are no other's."""

    def observe(event: Event) -> None:
        if isinstance(event, Notice) and event.sentence != turn_words(pair):
            view.notice(f"{pair}: {event.sentence}")

    async with session.opener(session.config(), actor()) as coordinator:
        await coordinator.execute_run(pair, observer=observe, stop=stop)


async def _work_unit(session: Session, stop: trio.Event, pair: str) -> None:
    """In its unit; this task watches it until it rests, or `stop`."""
    await trio.to_thread.run_sync(session.systemd.start, pair)
    async with session.opener(session.config(), actor()) as coordinator, trio.open_nursery() as nursery:

        async def leave() -> None:
            await stop.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(leave)
        followed = await follow(
            coordinator, pair, SilentView(), poll_s=session.poll_s, grace_s=session.grace_s, audit=False
        )
        nursery.cancel_scope.cancel()
        if followed.ending is Ending.NOBODY:
            raise RunLost(
                f"no process works on its run, which {unit_of(pair)} was given: `journalctl -u {unit_of(pair)}` says "
                "why",
                pair=pair,
            )


def explain_error(session: Session, keep: Explain) -> Explain:
    """A sentence on what ended the work on a pair; `keep` keeps the trace of an error that nobody foresaw."""

    def explain(pair: str, error: Exception) -> str:
        cause = first_cause(error) if isinstance(error, BaseExceptionGroup) else error
        return cause.sentence if isinstance(cause, CoordinatorError) else keep(pair, error)

    return explain


def _answer(name: str, file: str, *, here: bool) -> str:
    if here:
        return (
            f"{name}: every run stops at its next safe boundary, one that is switching over ends that first; "
            f"`failback resume --plan {file}` goes on later, a second signal ends this process at once"
        )
    return (
        f"{name}: the watching ends, runs under way go on, but nobody gives the later ones their turn: "
        f"`failback resume --plan {file}` does"
    )
