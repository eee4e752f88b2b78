"""What a step is: *do*, *probe*, *undo*, and a sentence for people; and the orders that several steps give."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass

from coordinator.agents import QUESTION_TIMEOUT_S, Agent, ask
from coordinator.context import RunContext
from coordinator.errors import CoordinatorError, NeedsOperator
from coordinator.findings import held_images
from coordinator.records import FenceRecord, Nothing, Record
from protocol.messages import (
    AskPower,
    Condition,
    Done,
    FenceDescription,
    FenceVm,
    InspectVm,
    Power,
    PowerAnswer,
    SetCondition,
    Side,
    VmDescription,
)

IS_OFF = frozenset({Power.OFF})  # a crashed VM may be preserved, its process holding the disks
"""No process runs; whether a crashed domain's images are free is asked apart."""


class StepFailed(CoordinatorError):
    """A step found that it must not go on; the sentence says why and what to do."""

    code = "step-failed"


class Verdict(enum.Enum):
    """What probing an interrupted step found."""

    DONE = "done"
    NOT_DONE = "not-done"  # do it (again): its orders are harmless when repeated
    UNKNOWN = "unknown"  # only a person can know


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A verdict, with the record of a step that turned out done, or the sentence of one nobody can judge."""

    verdict: Verdict
    record: Record | None = None
    sentence: str = ""


NOT_DONE = Finding(verdict=Verdict.NOT_DONE)


class Step(ABC):
    """One step of a run. Steps keep nothing between calls: what they know is in the context and its journal.

    Attributes:
        name: its name in the journal.
        sentence: what it does, for people, in the imperative; `undo_sentence` for its taking back.
        lasts_until: what the step sets up holds only in the hands of the process that did it: a later process does it
            again unless the step named here is done.
        harmless: of a step that is begun again without a probe: why doing it twice is as good as once.
        interruptible: may be broken off half-way by stop or cancel.
        of_switchover: belongs to one switchover: where the replica came back into service, the next one does it anew.
    """

    name: str
    sentence: str
    undo_sentence: str = ""
    lasts_until: str | None = None
    harmless: str = ""
    interruptible: bool = False
    of_switchover: bool = False

    def applies(self, context: RunContext) -> bool:
        """Whether this run needs the step."""
        return True

    @abstractmethod
    async def do(self, context: RunContext) -> Record:
        """Act; the intent is durable already."""

    async def probe(self, context: RunContext) -> Finding:
        """After a crash or a failure of `do`: did it happen?"""
        return NOT_DONE

    async def undo(self, context: RunContext) -> Record:
        """Take back whatever `do` may have done; harmless when repeated. Only with an `undo_sentence`."""
        return Nothing()


class SwitchStep(Step):
    """A step of the switchover."""

    of_switchover = True


# --- what several steps ask and order -----------------------------------------------------------------------------


async def ask_power(context: RunContext, side: Side) -> PowerAnswer:
    """What that side's VM is doing now."""
    agent, vm = _at(context, side)
    return await ask(agent, AskPower(vm_uuid=vm), PowerAnswer, timeout_s=QUESTION_TIMEOUT_S)


async def inspect(context: RunContext, side: Side) -> VmDescription:
    """Everything about that side's VM."""
    agent, vm = _at(context, side)
    return await ask(agent, InspectVm(vm=vm), VmDescription, timeout_s=QUESTION_TIMEOUT_S)


async def take_fence(context: RunContext, side: Side) -> FenceDescription:
    """Fence that side's VM, or take what its fence is missing.

    Raises:
        StepFailed: the agent could not lock every image.
    """
    agent, vm = _at(context, side)
    targets = context.original_targets if side is Side.ORIGINAL else context.replica_targets
    order = FenceVm(order=context.order, vm_uuid=vm, side=side, targets=targets)
    fence = await ask(agent, order, FenceDescription)
    missing = sorted({*fence.unlocked, *(set(targets) - set(fence.locked))})
    if missing:
        raise StepFailed(
            f"the {side.value} on {agent.host} cannot be fenced: the image of {', '.join(missing)} is not locked; "
            "end whatever uses it, then repeat",
            code="not-fenced",
        )
    return fence


async def prove_off(context: RunContext, side: Side) -> None:
    """Raise `StepFailed` unless that side's VM is off and nobody else holds its images."""
    agent, _ = _at(context, side)
    answer = await ask_power(context, side)
    if answer.power not in IS_OFF:
        raise StepFailed(
            f"the {side.value} on {agent.host} is {answer.power.value} and must be off here: power it off, then repeat",
            code="not-off",
        )
    held = held_images(answer, context.original_targets if side is Side.ORIGINAL else context.replica_targets)
    if held:
        raise StepFailed(
            f"the {side.value} on {agent.host} is off, but another process holds the image of "
            f"{', '.join(held)}: end that process, then repeat",
            code="images-held",
        )


async def settle_flag(
    context: RunContext, before: FenceDescription | None, fence: FenceDescription
) -> tuple[Condition, str | None]:
    """Make registry and agent agree on the flag of the original's disks; the fence stands.

    `before` is the fence as it was found. While it stood, the agent knows best: its receiver marks torn, durably,
    before its first write. Where there was none, the disks were out of our hands: they equal no view any more, and if
    the registry remembers them torn (the agent lost its ledger), they are.
    """
    known = Condition(context.pair.flag.condition)
    said = fence.condition or Condition.INTACT
    if said is Condition.TORN or (before is None and known is Condition.TORN):
        now, view = Condition.TORN, None
    elif before is None:
        now, view = Condition.INTACT, None
    else:
        now, view = said, fence.view
    if (now, view) != (said, fence.view):
        order = SetCondition(order=context.order, vm_uuid=context.pair.original.uuid, condition=now, view=view)
        await ask(context.target, order, Done)
    await context.set_flag(now, view)
    return now, view


def fence_record(fence: FenceDescription, condition: Condition | None = None) -> FenceRecord:
    """What the journal keeps of a fence."""
    said = condition or fence.condition or Condition.INTACT
    return FenceRecord(autostart_before=fence.autostart_before, condition=said.value, view=fence.view)


def unclear(context: RunContext, side: Side, power: Power) -> Finding:
    """Nobody but a person knows what to do with a VM in that state."""
    agent, _ = _at(context, side)
    return Finding(
        verdict=Verdict.UNKNOWN,
        sentence=f"the {side.value} on {agent.host} is {power.value}: find out why, let it run or power it off",
    )


def operator_needed(sentence: str, *exits: str) -> NeedsOperator:
    """The error that puts the pair into *Needs operator* with those verbs as exits."""
    return NeedsOperator(sentence, exits=",".join(exits))


def _at(context: RunContext, side: Side) -> tuple[Agent, str]:
    if side is Side.ORIGINAL:
        return context.target, context.pair.original.uuid
    return context.source, context.pair.replica.uuid
