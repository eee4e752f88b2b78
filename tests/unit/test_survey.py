"""What a plan asks both agents, and what becomes of agents that do not answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.errors import HostUnreachable, UsageError
from coordinator.findings import NO_VM, VERSION, Problem
from coordinator.model import RunOptions
from coordinator.plan import make_plan
from coordinator.survey import survey
from protocol.errors import PeerEnded
from protocol.messages import HostDescription, InspectVm, Request, VmDescription
from tests.fakes.agent import World, unreachable
from tests.unit.plan_cases import PAIR

REGISTERED = replace(
    PAIR,
    original=replace(PAIR.original, host="prod", name="web", uuid="u-orig"),
    replica=replace(PAIR.replica, host="dr", name="web", uuid="u-repl"),
)


async def test_both_sides_are_described_and_nothing_is_ordered() -> None:
    world = World()
    findings = await survey(world, REGISTERED)
    assert isinstance(findings.original.host, HostDescription)
    assert isinstance(findings.replica.vm, VmDescription)
    assert findings.replica.power is not None
    assert world.orders == []
    assert make_plan(REGISTERED, findings, RunOptions()).refusals == ()


async def test_both_hosts_that_do_not_answer_are_told_at_once() -> None:
    world = World()

    def nobody(host: str, _request: Request, _moment: str) -> None:
        raise unreachable(host)

    world.fault = nobody
    plan = make_plan(REGISTERED, await survey(world, REGISTERED), RunOptions())
    assert [(refusal.code, refusal.about) for refusal in plan.refusals] == [
        ("host-unreachable", "prod"),
        ("host-unreachable", "dr"),
    ]


async def test_a_vm_that_is_gone_and_one_that_was_redefined_are_told_apart() -> None:
    world = World()
    world.original.uuid = "u-other"
    plan = make_plan(REGISTERED, await survey(world, REGISTERED), RunOptions())
    assert [refusal.code for refusal in plan.refusals] == ["vm-redefined"]
    world.original.name = "renamed"
    findings = await survey(world, REGISTERED)
    assert isinstance(findings.original.vm, Problem)
    assert findings.original.vm.code == NO_VM
    plan = make_plan(REGISTERED, findings, RunOptions())
    assert [refusal.code for refusal in plan.refusals] == ["vm-gone"]


async def test_an_agent_of_another_version_is_told_as_that() -> None:
    world = World()

    def old_agent(host: str, _request: Request, _moment: str) -> None:
        if host == "dr":
            said = PeerEnded("it speaks protocol version 7, we speak 1", goodbye_code=VERSION)
            raise HostUnreachable("the agent on dr cannot be asked", host=host) from said

    world.fault = old_agent
    plan = make_plan(REGISTERED, await survey(world, REGISTERED), RunOptions())
    assert [(refusal.code, refusal.about) for refusal in plan.refusals] == [("agent-version", "dr")]


async def test_an_inspection_that_fails_is_a_finding() -> None:
    world = World()

    def hanging(host: str, request: Request, _moment: str) -> None:
        if host == "prod" and isinstance(request, InspectVm):
            raise unreachable(host)

    world.fault = hanging
    findings = await survey(world, REGISTERED)
    assert isinstance(findings.original.host, HostDescription)
    assert isinstance(findings.original.vm, Problem)


async def test_our_own_unreadable_certificate_is_an_error_and_no_finding() -> None:
    world = World()

    def unreadable(_host: str, _request: Request, _moment: str) -> None:
        raise UsageError("the key cannot be read")

    world.fault = unreadable
    with pytest.raises(UsageError, match="the key cannot be read"):
        await survey(world, REGISTERED)
