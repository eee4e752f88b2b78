"""Fences by hand: what is fenced on this host, and lifting a fence at a person's word, with an agent or without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from agent.config import Config
from agent.equals import EqualsBook
from agent.errors import AgentError
from agent.evidence import EvidenceDesk
from agent.fences import FenceKeeper, NotFenced
from agent.ledger import FenceRecord, Ledger
from agent.lift_record import LiftRecord
from agent.maps import MapDesk
from agent.virt.libvirt_host import LibvirtHost


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedFence:
    """A fence as a person sees it.

    Attributes:
        vm_uuid, vm_name: the VM; the name is empty where an older agent fenced it.
        pair, run, side, since_s: whose fence it is, since when (seconds since 1970, 0: not known).
        condition: the flag of its disks.
        unlocked: targets whose images this agent does not hold.
        autostart_before: what autostart goes back to.
    """

    vm_uuid: str
    vm_name: str
    pair: str
    run: str
    side: str
    since_s: float
    condition: str
    unlocked: tuple[str, ...]
    autostart_before: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What is fenced on this host, and what was lifted by hand. `agent_runs`: else nobody holds an image."""

    agent_runs: bool
    fences: tuple[ListedFence, ...] = ()
    lifts: tuple[LiftRecord, ...] = ()


def listing(keeper: FenceKeeper, *, agent_runs: bool) -> Listing:
    """Everything that is fenced."""
    contents = keeper.ledger.contents
    return Listing(
        agent_runs=agent_runs,
        fences=tuple(
            ListedFence(
                vm_uuid=fence.vm_uuid,
                vm_name=fence.vm_name,
                pair=fence.pair,
                run=fence.run,
                side=fence.side,
                since_s=fence.since_s,
                condition=keeper.condition(fence.vm_uuid).value,
                unlocked=keeper.unlocked(fence),
                autostart_before=fence.autostart_before,
            )
            for fence in contents.fences
        ),
        lifts=contents.lifts,
    )


def fence_named(keeper: FenceKeeper, vm: str) -> FenceRecord:
    """The fence on the VM of that name or UUID. The ledger knows both, so that libvirt need not answer.

    Raises:
        NotFenced: there is none.
    """
    fences = keeper.ledger.contents.fences
    for fence in fences:
        if vm in (fence.vm_uuid, fence.vm_name):
            return fence
    if any(not fence.vm_name for fence in fences):  # fenced by an older agent, which kept no names
        try:
            uuid = keeper.hypervisor.find(vm)
        except AgentError:
            uuid = vm
        known = keeper.fence_of(uuid)
        if known is not None:
            return known
    lifted = next((r for r in keeper.ledger.contents.lifts if vm in (r.vm_uuid, r.vm_name)), None)
    if lifted is not None:
        raise NotFenced(f"the VM {vm} is not fenced: {lifted.by} lifted its fence already ({lifted.reason})")
    raise NotFenced(f"no VM {vm} is fenced on this host: `failback-agent fence list` shows those that are")


def lift(keeper: FenceKeeper, evidence: EvidenceDesk, vm: str, *, by: str, reason: str) -> LiftRecord:
    """Lift its fence, all of it. From here on nothing is known of what its disks equal.

    Raises:
        NotFenced: there is none; `HypervisorError`: autostart cannot be given back, and nothing was changed.
    """
    fence = fence_named(keeper, vm)
    evidence.forget(fence.vm_uuid)
    return keeper.lift_by_hand(fence, by=by, reason=reason)


@contextmanager
def without_agent(config: Config) -> Iterator[tuple[FenceKeeper, EvidenceDesk]]:
    """This host's fences where no agent runs; none can start meanwhile.

    Raises:
        LedgerBusy: one runs.
    """
    ledger = Ledger.open(config.state_dir)
    try:
        hypervisor = LibvirtHost(config.libvirt.uri, scratch_dir=config.libvirt.scratch_dir)
        try:
            keeper = FenceKeeper(ledger, hypervisor)
            yield keeper, EvidenceDesk(keeper, EqualsBook.open(ledger.folder), MapDesk(config.state_dir, keeper))
        finally:
            hypervisor.close()
    finally:
        ledger.close()
