"""The steps that only a run to another place has: the former original is kept off."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import Connection

from coordinator import duties, registry
from coordinator.agents import QUESTION_TIMEOUT_S, Agent, NamingAgent, ask
from coordinator.context import RunContext
from coordinator.errors import AgentRefused, CoordinatorError, HostUnreachable, is_silent
from coordinator.findings import NO_VM
from coordinator.model import FormerOriginal, Pair
from coordinator.records import FormerRecord, Record, ReleaseRecord
from coordinator.steps import IS_OFF, Step, StepFailed
from protocol.messages import (
    AskPower,
    Condition,
    Done,
    FenceDescription,
    FenceVm,
    InspectVm,
    LiftFence,
    OnTimeout,
    PowerAnswer,
    PoweredOff,
    PowerOff,
    Side,
    VmDescription,
)

POWER_OFF_GRACE_S = 120.0
"""On top of the guest's own deadline: forcing a VM off, and the answer's way back."""


class _AboutFormer(Step):
    """A step about the former original."""

    harmless = "what is off stays off, and a fence that stands stays"

    def applies(self, context: RunContext) -> bool:
        """Only where the run moves the pair."""
        return context.pair.former is not None

    async def do(self, context: RunContext) -> FormerRecord:
        """Prove it off and fence it; where its host does not answer, owe that."""
        former = _former(context)
        try:
            await _make_off(context, former)
            fence = await _fence(context, former)
        except (HostUnreachable, AgentRefused) as error:
            return await _unproven(context, former, error)
        before = fence.autostart_before if former.autostart is None else former.autostart
        await _remember(context, replace(former, autostart=before, fenced=True, gone=False))
        return FormerRecord(fenced=True, gone=False)


class FenceFormer(_AboutFormer):
    """From here on the former original cannot come up beside the VM that takes its place (I1)."""

    name = "fence_former"
    sentence = "make sure the former original is off, and fence it"
    undo_sentence = "release the former original if it is whole, keep it fenced if it is torn"
    lasts_until = "verify"

    async def undo(self, context: RunContext) -> Record:
        """As it was found: a torn one stays fenced, a whole one may be started by hand, its autostart stays off."""
        former = _former(context)
        condition = former.flag.condition
        if condition == Condition.TORN.value:
            return ReleaseRecord(kept=True, condition=condition, why="torn")
        lift = LiftFence(order=context.order, vm_uuid=former.vm.uuid, restore_autostart=False)
        try:
            await ask(_agent(context, former), lift, Done)
        except (HostUnreachable, AgentRefused) as error:
            if not is_silent(error) and error.code not in (NO_VM, Condition.TORN.value):
                raise
            await context.notice(f"a fence of {former.vm.name} stays as it is: {error.sentence}")
            return ReleaseRecord(kept=True, condition=condition, why=error.code)
        return ReleaseRecord(kept=False, condition=condition, why="given back to the pair")


class KeepFormerOff(_AboutFormer):
    """At commit, before the pair forgets that it ever had another original."""

    name = "keep_former_off"
    sentence = "prove the former original off and fenced, for good"


def _former(context: RunContext) -> FormerOriginal:
    former = context.pair.former
    assert former is not None  # `applies`, and only a pair that moved has the step in its journal
    return former


def _agent(context: RunContext, former: FormerOriginal) -> Agent:
    return NamingAgent(context.directory.agent(former.vm.host), former.vm)


async def _make_off(context: RunContext, former: FormerOriginal) -> None:
    vm, agent, options = former.vm, _agent(context, former), context.options
    power = (await ask(agent, AskPower(vm_uuid=vm.uuid), PowerAnswer, timeout_s=QUESTION_TIMEOUT_S)).power
    if power in IS_OFF:
        return
    if not options.power_off_original:
        name = context.pair.name
        raise StepFailed(
            f"the former original {vm.name} on {vm.host} is {power.value}: power it off and `failback resume {name}`",
            code="former-runs",
        )
    order = PowerOff(
        order=context.order,
        vm_uuid=vm.uuid,
        timeout_s=options.shutdown_timeout_s,
        on_timeout=OnTimeout.FORCE,
        kill_after_s=options.kill_after_s,
    )
    within_s = options.shutdown_timeout_s + options.kill_after_s + POWER_OFF_GRACE_S
    await ask(agent, order, PoweredOff, timeout_s=within_s)


async def _fence(context: RunContext, former: FormerOriginal) -> FenceDescription:
    """Its disks that can be read are locked; what is left of the VM cannot start in any case."""
    vm, agent = former.vm, _agent(context, former)
    found = await ask(agent, InspectVm(vm=vm.uuid), VmDescription, timeout_s=QUESTION_TIMEOUT_S)
    readable = {disk.target for disk in found.disks if disk.chain}
    targets = tuple(disk.original for disk in former.disks if disk.original in readable)
    order = FenceVm(order=context.order, vm_uuid=vm.uuid, side=Side.ORIGINAL, targets=targets)
    fence = await ask(agent, order, FenceDescription)
    missing = sorted({*fence.unlocked, *(set(targets) - set(fence.locked))})
    if missing:
        raise StepFailed(
            f"the former original {vm.name} on {vm.host} cannot be fenced: the image of {', '.join(missing)} is not "
            "locked; end whatever uses it, then repeat",
            code="not-fenced",
        )
    return fence


async def _unproven(context: RunContext, former: FormerOriginal, error: CoordinatorError) -> FormerRecord:
    """No such VM: nothing to fence. No such host: the fence is owed. Raises `error` otherwise."""
    vm = former.vm
    if error.code == NO_VM:
        await _remember(context, replace(former, fenced=True, gone=True))
        await context.notice(f"{vm.host} no longer knows the former original {vm.name}: there is nothing to fence")
        return FormerRecord(fenced=True, gone=True)
    if not is_silent(error):
        raise error
    duty = duties.Duty(
        id=0,
        pair=context.pair.name,
        run=context.run.id,
        epoch=context.epoch,
        vm=vm,
        targets=tuple(disk.original for disk in former.disks),
        actor=context.actor,
        said_s=context.clock.wall_s(),
        former=True,
    )
    await _remember(context, replace(former, fenced=False), duty)
    await context.notice(duty.sentence)
    return FormerRecord(fenced=False, gone=False)


async def _remember(context: RunContext, former: FormerOriginal, duty: duties.Duty | None = None) -> None:
    def work(connection: Connection) -> Pair:
        registry.set_former(connection, context.pair.name, context.epoch, former)
        if duty is not None:
            duties.add(connection, duty)
        return registry.get_pair(connection, context.pair.name)

    context.pair = await context.store.write(work)
