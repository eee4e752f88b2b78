"""Working on a run in this very process: events are shown, signals are obeyed or answered, the terminal may go away."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

import trio

from coordinator.audit import AUDIT
from coordinator.cli.run_view import RunView
from coordinator.errors import CoordinatorError
from coordinator.events import Event, Notice, Observer, Outcome, StateChanged, StepStarted
from coordinator.model import State

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPABLE = frozenset({State.SYNCING, State.READY_TO_SWITCH})
Work = Callable[[Observer, trio.Event], Awaitable[Outcome]]


class Interrupted(CoordinatorError):
    """A second signal ended the process before a safe boundary; the journal knows where to go on."""

    code = "interrupted"


async def conduct(pair: str, state: State, view: RunView, work: Work) -> Outcome:
    """Do the work and show it until it ends.

    The first SIGINT, SIGTERM or SIGHUP while the replica serves, or in an audit, sets the stop event: the work stops at
    its next safe boundary. In any other state the first one is answered, not obeyed. The second one ends the process at
    once, as a crash would: `resume` goes on from the journal.

    Args:
        pair: its name, for the sentences.
        state: the pair's state at the beginning.
        view: shows the events.
        work: takes the observer and the stop event.

    Raises:
        Interrupted: a second signal came.
    """
    stop = trio.Event()
    now = [state]
    answered = interrupted = auditing = False

    def observe(event: Event) -> None:
        nonlocal auditing
        if isinstance(event, StateChanged):
            now[0] = event.state
        if isinstance(event, StepStarted):
            auditing = event.step == AUDIT and not event.undoing
        view.take(event)

    async def listen(scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        nonlocal answered, interrupted
        with trio.open_signal_receiver(*heard_signals()) as arrivals:
            task_status.started()
            async for number in arrivals:
                if answered:
                    interrupted = True
                    scope.cancel()
                    return
                answered = True
                view.take(Notice(sentence=_answer(pair, now[0], signal.Signals(number).name, auditing=auditing)))
                if auditing or now[0] in STOPPABLE:
                    stop.set()

    outcome: Outcome | None = None
    failure: CoordinatorError | None = None
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        await nursery.start(listen, scope)
        with scope:
            try:
                outcome = await work(observe, stop)
            except CoordinatorError as error:
                failure = error  # raised outside the nursery, which would wrap it in a group
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if outcome is None:
        assert interrupted
        raise Interrupted(
            f"stopped at once by a second signal, in {now[0].value}: `failback resume {pair}` goes on from the journal",
            pair=pair,
            state=now[0].value,
        )
    return outcome


def heard_signals() -> tuple[signal.Signals, ...]:
    """The signals to listen to: one that the caller had us ignore (nohup, a shell's background job) stays ignored."""
    return tuple(number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)


def _answer(pair: str, state: State, name: str, *, auditing: bool) -> str:
    if auditing:
        return f"{name}: ending the audit; the failback stands, and `failback commit {pair}` does the audit again"
    if state in STOPPABLE:
        return f"{name}: stopping at the next safe boundary; `failback resume {pair}` goes on later"
    if state is State.SWITCHING:
        return (
            f"{name} is not obeyed: the replica of {pair} is off or going off, and the switchover ends in Failback or "
            f"rolls back by itself; a second signal ends this process, then `failback resume {pair}` is needed"
        )
    return (
        f"{name} is not obeyed while {pair} is {state.value}; a second signal ends this process, then "
        f"`failback resume {pair}` is needed"
    )
