"""Telling the agents what a pair is, so that a registry that was lost can be rebuilt from what they know."""

from __future__ import annotations

from coordinator.agents import QUESTION_TIMEOUT_S, AgentDirectory, ask
from coordinator.errors import STALE_EPOCH, AgentRefused, CoordinatorError
from coordinator.model import DiskPair, Pair, VmRef
from protocol.messages import Done, MappedDisk, Order, PairMap, RememberPair, Side, VmName


def pair_map(pair: Pair) -> PairMap:
    """What the pair is, as agents are told."""
    return PairMap(
        original=_name(pair.original),
        replica=_name(pair.replica),
        disks=tuple(MappedDisk(original=disk.original, replica=disk.replica) for disk in pair.disks),
        excluded=pair.excluded,
    )


def refs_of(mapping: PairMap) -> tuple[VmRef, VmRef, tuple[DiskPair, ...]]:
    """Original, replica and disks, as the registry keeps them."""
    original, replica = (VmRef(host=vm.host, name=vm.name, uuid=vm.uuid) for vm in (mapping.original, mapping.replica))
    return original, replica, tuple(DiskPair(original=disk.original, replica=disk.replica) for disk in mapping.disks)


async def remember_pair(agents: AgentDirectory, pair: Pair, run: str = "") -> tuple[CoordinatorError, ...]:
    """Tell both agents; what went wrong is returned: nothing that is done to a VM rests on it.

    Raises:
        AgentRefused: an agent has seen a higher epoch of the pair: this one is not in charge.
    """
    failed: list[CoordinatorError] = []
    for side, ref in ((Side.ORIGINAL, pair.original), (Side.REPLICA, pair.replica)):
        order = Order(pair=pair.name, run=run, epoch=pair.epoch)
        request = RememberPair(order=order, side=side, mapping=pair_map(pair))
        try:
            await ask(agents.agent(ref.host), request, Done, timeout_s=QUESTION_TIMEOUT_S)
        except CoordinatorError as error:
            if isinstance(error, AgentRefused) and error.code == STALE_EPOCH:
                raise
            failed.append(error)
    return tuple(failed)


def _name(ref: VmRef) -> VmName:
    return VmName(host=ref.host, name=ref.name, uuid=ref.uuid)
