"""The states of a pair, in one table: what each means, what may follow, which verbs it allows.

Everything that moves a pair asks `check_move`; everything a person asks for goes through `check_verb`. What is not
listed here raises `WrongState`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from coordinator.errors import WrongState
from coordinator.model import Pair, State


class Verb(enum.Enum):
    """What a person may ask of a pair."""

    FAILOVER = "failover"
    START = "start"
    CANCEL = "cancel"
    COMMIT = "commit"
    UNDO = "undo"
    RESUME = "resume"
    LIMIT = "limit"
    SWITCH = "switch"


IN_PASSING = frozenset({Verb.LIMIT, Verb.SWITCH})
"""Verbs that change something about the run and leave the pair in its state: no way on, and no way out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One state. `means` completes "PAIR is in STATE: …". `follows`: states that may come next. `verbs`: what may be
    asked for; questions (`pairs`, `status`, `watch`, `history`, `plan`) are allowed everywhere. `unfinished`: a run
    is under way."""

    means: str
    follows: frozenset[State]
    verbs: frozenset[Verb]
    unfinished: bool = False


def _row(means: str, follows: tuple[State, ...], verbs: tuple[Verb, ...], *, unfinished: bool = False) -> Row:
    return Row(means=means, follows=frozenset(follows), verbs=frozenset(verbs), unfinished=unfinished)


TABLE: Mapping[State, Row] = MappingProxyType(
    {
        State.READY: _row(
            "the original is in use, the replica stands by",
            (State.FAILOVER,),
            (Verb.FAILOVER,),
        ),
        State.FAILOVER: _row(
            "the replica is in use",
            (State.SYNCING,),
            (Verb.START,),
        ),
        State.SYNCING: _row(
            "the original is being brought up to date while the replica serves",
            (State.READY_TO_SWITCH, State.CANCELLING, State.NEEDS_OPERATOR),
            (Verb.RESUME, Verb.CANCEL, Verb.LIMIT, Verb.SWITCH),
            unfinished=True,
        ),
        State.READY_TO_SWITCH: _row(
            "little is left to copy, the replica still serves",
            (State.SWITCHING, State.SYNCING, State.CANCELLING, State.NEEDS_OPERATOR),
            (Verb.RESUME, Verb.CANCEL, Verb.LIMIT, Verb.SWITCH),
            unfinished=True,
        ),
        State.SWITCHING: _row(
            "the replica goes off and the last changes are copied",
            (State.FAILBACK, State.SYNCING, State.ROLLING_BACK, State.NEEDS_OPERATOR),
            (Verb.RESUME, Verb.LIMIT),
            unfinished=True,
        ),
        State.FAILBACK: _row(
            "the original is in use again, not yet final",
            (State.COMMITTING, State.UNDOING),
            (Verb.COMMIT, Verb.UNDO, Verb.RESUME),
        ),
        State.ROLLING_BACK: _row(
            "the switchover failed and the replica is being put back into service",
            (State.FAILOVER, State.NEEDS_OPERATOR),
            (Verb.RESUME,),
            unfinished=True,
        ),
        State.CANCELLING: _row(
            "the run is being taken back; the replica serves",
            (State.FAILOVER, State.NEEDS_OPERATOR),
            (Verb.RESUME,),
            unfinished=True,
        ),
        State.UNDOING: _row(
            "the original goes off and the replica is being put back into service",
            (State.FAILOVER, State.NEEDS_OPERATOR),
            (Verb.RESUME,),
            unfinished=True,
        ),
        State.COMMITTING: _row(
            "the failback is being made final",
            (State.READY, State.NEEDS_OPERATOR),
            (Verb.RESUME,),
            unfinished=True,
        ),
        # What leads out of Needs operator is what the call names (`OperatorCall.exits`), within these bounds.
        State.NEEDS_OPERATOR: _row(
            "only a person can know how to go on",
            (
                State.SYNCING,
                State.READY_TO_SWITCH,
                State.SWITCHING,
                State.ROLLING_BACK,
                State.CANCELLING,
                State.UNDOING,
                State.COMMITTING,
            ),
            (Verb.RESUME, Verb.CANCEL, Verb.UNDO, Verb.LIMIT),
            unfinished=True,
        ),
    }
)


def allowed_verbs(pair: Pair) -> frozenset[Verb]:
    """The verbs the pair's state allows; in *Needs operator* those its call names, and those that lead nowhere else
    (`IN_PASSING`) where the state before allowed them."""
    verbs = TABLE[pair.state].verbs
    if pair.state is State.NEEDS_OPERATOR and pair.operator is not None:
        kept = TABLE[pair.operator.before].verbs & IN_PASSING
        return frozenset(verb for verb in verbs | kept if verb.value in pair.operator.exits or verb in kept)
    return verbs


def ways_on(pair: Pair) -> list[str]:
    """The verbs to tell a person of, that lead on or out, in order. In *Failback* `resume` does no more than an audit
    that is due, which commit does as well: there is no need to name it."""
    verbs = allowed_verbs(pair) - IN_PASSING
    if not TABLE[pair.state].unfinished:
        verbs -= {Verb.RESUME}
    return sorted(verb.value for verb in verbs)


def describe(pair: Pair) -> str:
    """One sentence: the state, what it means and what it allows."""
    allowed = allowed_verbs(pair)
    means = TABLE[pair.state].means
    if pair.state is State.NEEDS_OPERATOR and pair.operator is not None:
        means = pair.operator.sentence
    ways = " or ".join(f"`failback {verb} {pair.name}`" for verb in ways_on(pair))
    beside = " and ".join(f"`failback {verb} {pair.name}`" for verb in sorted(v.value for v in allowed & IN_PASSING))
    ways += f" (and {beside})" if beside else ""
    return f"{pair.name} is in {pair.state.value} ({means}): {ways} is what that state allows"


def check_verb(pair: Pair, verb: Verb) -> None:
    """Raise `WrongState` unless the pair's state allows `verb`."""
    if verb not in allowed_verbs(pair):
        raise WrongState(f"`{verb.value}` is not possible: {describe(pair)}", pair=pair.name, state=pair.state.value)


def check_move(pair: Pair, to: State) -> None:
    """Raise `WrongState` unless `to` may follow the pair's state."""
    row = TABLE[pair.state]
    if to not in row.follows:
        listed = ", ".join(sorted(state.value for state in row.follows))
        raise WrongState(
            f"{pair.name} cannot go from {pair.state.value} to {to.value}: only {listed} may follow",
            pair=pair.name,
            state=pair.state.value,
        )
