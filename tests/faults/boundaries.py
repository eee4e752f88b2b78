"""Every boundary of every step, read from the coordinator's own tables: where a fault may strike."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.context import CREATE_HOME
from coordinator.entries import EntryKind, Phase
from coordinator.steps import Step
from coordinator.steps_check import AUDIT_STEP
from coordinator.steps_commit import COMMIT_STEPS
from coordinator.steps_machine import APPLY_CONFIG, CARRY_STATE, CREATE_MISSING, MAP_MISSING
from coordinator.steps_round import round_steps
from coordinator.steps_switch import SWITCH_STEPS
from coordinator.steps_sync import SYNC_STEPS
from tests.faults.paced import Stop


class Way(enum.Enum):
    """How a step is come to: the verb, and what is done before it. The order is that of docs/FAULTS.md."""

    RUN = "start"
    COMMIT = "commit"
    UNDO = "undo"
    CANCEL = "cancel"
    ROLL_BACK = "roll back"


@dataclass(frozen=True, slots=True)
class Boundary:
    """One side of one step: its intent is durable and nothing was done, or all was done and is durable."""

    way: Way
    step: str
    phase: Phase
    kind: EntryKind

    @property
    def stop(self) -> Stop:
        """As `tests.faults.paced` wants it."""
        return self.step, self.phase.value, self.kind.value

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.way.value}: {self.side} `{self.step}`"

    @property
    def side(self) -> str:
        """``before`` or ``after``."""
        return "before" if self.kind is EntryKind.INTENT else "after"


WHOLE_MACHINE = frozenset((MAP_MISSING, CREATE_MISSING, APPLY_CONFIG, CARRY_STATE, "keep_machine"))
"""Steps that a pair with BIOS, equal definitions and equal disks does not need: ``tests/unit/test_machine_runs.py``
strikes at both sides of them."""
OF_A_MOVE = frozenset(("fence_former", "keep_former_off", CREATE_HOME, "keep_home"))
"""Steps of a failback to another VM than the original: ``tests/unit/test_moves.py`` and ``tests/unit/test_new_home.py``
strike all along such runs."""
OF_ANOTHER_PAIR = WHOLE_MACHINE | OF_A_MOVE


def of_the_pair(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Those that the matrix's pair comes through."""
    return tuple(step for step in steps if step.name not in OF_ANOTHER_PAIR)


RUN_STEPS: tuple[Step, ...] = of_the_pair((*SYNC_STEPS, *round_steps(1), *SWITCH_STEPS, AUDIT_STEP))
SERVING_STEPS: tuple[Step, ...] = of_the_pair((*SYNC_STEPS, *round_steps(1)))


def taken_back(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Those that have something to take back, in the engine's order."""
    return tuple(step for step in reversed(steps) if step.undo_sentence)


STEPS: dict[Way, tuple[Step, ...]] = {
    Way.RUN: RUN_STEPS,
    Way.COMMIT: of_the_pair(COMMIT_STEPS),
    Way.UNDO: taken_back(RUN_STEPS),
    Way.CANCEL: taken_back(SERVING_STEPS),
    Way.ROLL_BACK: tuple(step for step in taken_back(RUN_STEPS) if step.name not in ("audit", "lift_original_fence")),
}
"""What each way leads through. A roll-back begins before the point of no return: what comes after was never begun."""


def boundaries(*ways: Way) -> tuple[Boundary, ...]:
    """Both sides of every step on those ways."""
    found: list[Boundary] = []
    for way in ways or tuple(Way):
        phase = Phase.DO if way in (Way.RUN, Way.COMMIT) else Phase.UNDO
        for step in STEPS[way]:
            found += [Boundary(way, step.name, phase, kind) for kind in (EntryKind.INTENT, EntryKind.DONE)]
    return tuple(found)
