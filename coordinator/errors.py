"""The one error root of the coordinator; the exit code of the command stands on the error class."""

from __future__ import annotations

import enum

Fact = str | int


class ExitCode(enum.IntEnum):
    """Exit codes of the ``failback`` command."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    NEEDS_OPERATOR = 4


class CoordinatorError(Exception):
    """Root of everything the coordinator raises on purpose: a stable code, one sentence, plain facts."""

    code = "failed"
    exit_code = ExitCode.FAILED

    def __init__(self, sentence: str, *, code: str | None = None, **facts: Fact) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.facts: dict[str, Fact] = facts
        if code is not None:
            self.code = code


class UsageError(CoordinatorError):
    """A wrong word on the command line or in a configuration file."""

    code = "usage"
    exit_code = ExitCode.USAGE


class WrongState(CoordinatorError):
    """The verb is not allowed in the pair's present state."""

    code = "wrong-state"
    exit_code = ExitCode.REFUSED


class Refused(CoordinatorError):
    """The plan found reasons not to start; nothing was touched."""

    code = "refused"
    exit_code = ExitCode.REFUSED


class NewerRun(CoordinatorError):
    """The run was begun by a newer version, whose journal this one cannot understand; nothing was changed."""

    code = "newer-run"
    exit_code = ExitCode.REFUSED


class PairBusy(CoordinatorError):
    """Another process is working on the pair's run."""

    code = "pair-busy"
    exit_code = ExitCode.REFUSED


class NeedsOperator(CoordinatorError):
    """Something only a person can know; the sentence names the exits."""

    code = "needs-operator"
    exit_code = ExitCode.NEEDS_OPERATOR


class HostUnreachable(CoordinatorError):
    """An agent could not be reached, or the connection to it was lost; what it last did may be unknown."""

    code = "host-unreachable"


TIMED_OUT = "timed-out"
STALE_EPOCH = "stale-epoch"
HELD = "held"


class AgentRefused(CoordinatorError):
    """An agent answered a request with a `protocol.messages.Failure`; its code and facts are kept.

    Three codes mean more than that: `TIMED_OUT`, no answer came in time; `STALE_EPOCH`, another process has taken the
    run over, and `HELD`, another coordinator holds the pair, so that this one must not be started again.
    """

    code = "agent"

    def __init__(self, sentence: str, *, code: str | None = None, **facts: Fact) -> None:
        super().__init__(sentence, code=code, **facts)
        if self.code in (STALE_EPOCH, HELD):
            self.exit_code = ExitCode.REFUSED


def is_silent(error: CoordinatorError) -> bool:
    """Whether the host could not be heard at all, rather than said no."""
    return isinstance(error, HostUnreachable) or error.code == TIMED_OUT


class DatabaseError(CoordinatorError):
    """The registry cannot be opened, read or written."""

    code = "database"


class DatabaseFull(DatabaseError):
    """There is no room on its file system; nothing of the transaction was written."""
