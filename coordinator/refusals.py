"""Every reason why a plan says no, one small function each, in one table.

A rule looks at the whole case and yields what it objects to as (thing, sentence); the sentence names the thing, the
cause and the cure. All rules run; nothing stops at the first objection. The rules about the VMs stand in
`coordinator.refusals_vm` and `coordinator.refusals_machine`, those about single disks in `coordinator.refusals_disk`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from coordinator import divergence, refusals_disk, refusals_machine, refusals_vm, rooms
from coordinator.findings import SIDES, VERSION, Case, Problem, clause
from coordinator.model import Refusal, State
from coordinator.states import TABLE

Objection = tuple[str, str]
NOT_OF_A_DESTINATION = frozenset({"same-vm", "both-running", "diverged", "original-not-off"})
"""Codes of what is asked of an original that is overwritten in place; of a destination `coordinator.destinations` asks
other things: it was not the original yet when the replica took over."""
Check = Callable[[Case], Iterator[Objection]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One refusal: its stable code and the function that finds it."""

    code: str
    check: Check


def find_refusals(case: Case) -> tuple[Refusal, ...]:
    """Everything that speaks against starting, in the order of the table."""
    return tuple(
        Refusal(code=rule.code, about=about, sentence=sentence)
        for rule in RULES
        if case.pair.former is None or rule.code not in NOT_OF_A_DESTINATION
        for about, sentence in rule.check(case)
    )


# --- the pair -------------------------------------------------------------------------------------------------


def not_in_failover(case: Case) -> Iterator[Objection]:
    pair = case.pair
    if pair.state is State.READY:
        yield (
            pair.name,
            f"Pair {pair.name} is in Ready, so there is nothing to bring home; if the replica took over, record "
            "it first "
            f"with `failback failover {pair.name}`.",
        )
    elif pair.state is State.FAILBACK:
        yield (
            pair.name,
            f"Pair {pair.name} is in Failback, its last run is not final; end it first with "
            f"`failback commit {pair.name}` or `failback undo {pair.name}`.",
        )
    elif pair.state is State.NEEDS_OPERATOR:
        yield (
            pair.name,
            f"Pair {pair.name} waits for an operator; `failback status {pair.name}` names the exits, take one of "
            "them first.",
        )


def run_unfinished(case: Case) -> Iterator[Objection]:
    pair = case.pair
    if TABLE[pair.state].unfinished and pair.state is not State.NEEDS_OPERATOR:
        yield (
            pair.name,
            f"Run {pair.run or '(unnamed)'} of pair {pair.name} is unfinished (state {pair.state.value}); follow "
            "it with "
            f"`failback watch {pair.name}` or go on with `failback resume {pair.name}`.",
        )


# --- the hosts ------------------------------------------------------------------------------------------------


def host_unreachable(case: Case) -> Iterator[Objection]:
    """The error's own sentence names agent, cause and cure already."""
    for side in SIDES:
        host = case.host(side)
        if isinstance(host, Problem) and host.code != VERSION:
            sentence = clause(host.sentence)
            yield case.ref(side).host, f"{sentence[:1].upper()}{sentence[1:]}."


def agent_version(case: Case) -> Iterator[Objection]:
    for side in SIDES:
        host = case.host(side)
        if isinstance(host, Problem) and host.code == VERSION:
            name = case.ref(side).host
            yield (
                name,
                f"The agent of host {name} ({side.value}) and this coordinator speak no common protocol version: "
                f"{clause(host.sentence)}; install the same failback release on both.",
            )


def tool_missing(case: Case) -> Iterator[Objection]:
    for side in SIDES:
        host = case.host(side)
        if not isinstance(host, Problem):
            for tool in host.missing_tools:
                yield (
                    host.host,
                    f"Host {host.host} ({side.value}) lacks {tool}; install the package named in brackets there.",
                )


RULES: tuple[Rule, ...] = (
    Rule("not-in-failover", not_in_failover),
    Rule("run-unfinished", run_unfinished),
    Rule("host-unreachable", host_unreachable),
    Rule("agent-version", agent_version),
    Rule("tool-missing", tool_missing),
    Rule("vm-gone", refusals_vm.vm_gone),
    Rule("vm-unreadable", refusals_vm.vm_unreadable),
    Rule("vm-redefined", refusals_vm.vm_redefined),
    Rule("same-vm", refusals_vm.same_vm),
    Rule("both-running", refusals_vm.both_running),
    Rule("diverged", divergence.diverged),
    Rule("original-not-off", refusals_vm.original_not_off),
    Rule("replica-not-serving", refusals_vm.replica_not_serving),
    Rule("managed-save", refusals_vm.managed_save),
    Rule("transient-vm", refusals_vm.transient),
    Rule("restarts-on-poweroff", refusals_vm.restarts_on_poweroff),
    Rule("foreign-job", refusals_vm.foreign_job),
    Rule("foreign-checkpoint", refusals_vm.foreign_checkpoint),
    Rule("user-snapshot", refusals_vm.user_snapshot),
    Rule("passthrough", refusals_vm.passthrough),
    Rule("machine-not-told", refusals_machine.machine_not_told),
    Rule("firmware-differs", refusals_machine.firmware_differs),
    Rule("tpm-differs", refusals_machine.tpm_differs),
    Rule("state-not-carried", refusals_machine.state_not_carried),
    Rule("machine-tool-missing", refusals_machine.machine_tool_missing),
    Rule("network-missing", refusals_machine.network_missing),
    Rule("fenced-elsewhere", refusals_vm.fenced_elsewhere),
    Rule("image-held", refusals_vm.image_held),
    Rule("lock-lost", refusals_vm.lock_lost),
    Rule("disk-missing", refusals_disk.disk_missing),
    Rule("disk-not-mapped", refusals_disk.disk_not_mapped),
    Rule("cannot-create-disk", refusals_machine.cannot_create_disk),
    Rule("disk-shared-between-sides", refusals_disk.chains_share_an_image),
    Rule("disk-kind", refusals_disk.kind_not_supported),
    Rule("disk-shareable", refusals_disk.shareable),
    Rule("disk-readonly", refusals_disk.readonly),
    Rule("disk-unreadable", refusals_disk.unreadable),
    Rule("format-not-supported", refusals_disk.format_not_supported),
    Rule("image-encrypted", refusals_disk.encrypted),
    Rule("image-corrupt", refusals_disk.corrupt),
    Rule("image-dirty", refusals_disk.dirty),
    Rule("image-external-data", refusals_disk.external_data),
    Rule("internal-snapshot", refusals_disk.internal_snapshot),
    Rule("backing-chain", refusals_disk.backing_chain_on_original),
    Rule("target-smaller", refusals_disk.target_smaller),
    Rule("target-larger", refusals_disk.target_larger),
    Rule("size-not-of-sectors", refusals_disk.size_not_of_sectors),
    Rule("sector-differs", refusals_disk.sector_differs),
    Rule("no-room", rooms.no_room),
)
