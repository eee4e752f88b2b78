"""Telling the agents what a pair is, so that a registry that was lost can be rebuilt from what they know."""

from __future__ import annotations

from coordinator.agents import QUESTION_TIMEOUT_S, AgentDirectory, ask
from coordinator.errors import STALE_EPOCH, AgentRefused, CoordinatorError, WrongState
from coordinator.model import DiskPair, Pair, VmRef
from protocol.messages import (
    AskHoldings,
    Done,
    HeldPair,
    Holdings,
    MappedDisk,
    Order,
    PairMap,
    RememberPair,
    Side,
    VmName,
)


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


async def seen_epoch(agents: AgentDirectory, pair: Pair) -> int:
    """The highest epoch that the agents have seen of a pair that is registered for the first time: 0, or more where one
    of that name was forgotten; orders under a lower one would be refused.

    Raises:
        WrongState: the agents know the pair from a registry that was lost, or is another's.
    """
    known: list[HeldPair] = []
    fenced = False
    for host in dict.fromkeys((pair.original.host, pair.replica.host)):
        try:
            held = await ask(agents.agent(host), AskHoldings(), Holdings, timeout_s=QUESTION_TIMEOUT_S)
        except CoordinatorError:
            continue  # it has just been asked for its VM; where it cannot answer this, it has remembered nothing
        known += [each for each in held.pairs if each.pair == pair.name]
        fenced = fenced or any(fence.pair == pair.name for fence in held.fences)
    epoch = max((each.epoch for each in known), default=0)
    remembered = [each.mapping for each in known if each.mapping is not None]
    agree = len(remembered) == len(Side) and remembered[0] == remembered[1]
    if fenced or (agree and epoch > 0):
        hosts = " ".join(sorted({pair.original.host, pair.replica.host}))
        raise WrongState(
            f"the agents know the pair {pair.name} already (epoch {epoch}), from a registry that was lost or from "
            f"another coordinator: end that one, then `failback adopt {hosts}` takes it over",
            code="known-pair",
            pair=pair.name,
        )
    return epoch


def _name(ref: VmRef) -> VmName:
    return VmName(host=ref.host, name=ref.name, uuid=ref.uuid)
