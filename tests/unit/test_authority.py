"""One coordinator for each pair: the second is refused and told who holds it, until a person takes the pair over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from agent.errors import Held, StaleEpoch
from agent.ledger import Ledger
from protocol.bulk import BulkSocket
from protocol.messages import (
    AskAuthority,
    BulkHello,
    Done,
    FenceVm,
    Order,
    PairAuthority,
    Reply,
    Request,
    Role,
    Side,
    TakePair,
)
from protocol.tls import PeerIdentity
from tests.unit.agent_house import GRANT, AgentHouse, open_house

ONE = PeerIdentity(role=Role.COORDINATOR, names=("coordinator",), fingerprint="01" * 32)
OTHER = PeerIdentity(role=Role.COORDINATOR, names=("other",), fingerprint="02" * 32)
HERE, THERE = "desk:/var/lib/failback #aa", "laptop:/home/x #bb"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[AgentHouse]:
    with open_house(tmp_path) as opened:
        yield opened


async def _ask(house: AgentHouse, request: Request, peer: PeerIdentity = ONE) -> Reply:
    async def no_progress(_: object) -> None:
        return

    return await house.service.handle(request, peer, no_progress)


def _fence(house: AgentHouse, epoch: int, place: str = HERE, *, pair: str = "web") -> FenceVm:
    order = Order(pair=pair, run="r1", epoch=epoch, place=place)
    return FenceVm(order=order, vm_uuid=house.vm.uuid, side=Side.ORIGINAL, targets=("vda",))


def _take(epoch: int, place: str = THERE) -> TakePair:
    return TakePair(order=Order(pair="web", run="r2", epoch=epoch, place=place))


@pytest.mark.parametrize("epoch", [4, 5, 6, 99])
async def test_another_registry_is_refused_under_any_epoch_and_told_who_holds_the_pair(
    house: AgentHouse, epoch: int
) -> None:
    await _ask(house, _fence(house, 5))
    with pytest.raises(Held) as caught:
        await _ask(house, _fence(house, epoch, THERE))
    for words in ("coordinator coordinator", HERE, "run r1", "epoch 5", "--take-over"):
        assert words in caught.value.sentence
    assert caught.value.facts["seen"] == 5
    assert house.service.ledger.epoch("web") == 5


async def test_two_certificates_without_places_are_two_coordinators(house: AgentHouse) -> None:
    await _ask(house, _fence(house, 1, ""), ONE)
    await _ask(house, _fence(house, 2, ""), ONE)
    with pytest.raises(Held):
        await _ask(house, _fence(house, 3, ""), OTHER)


async def test_a_new_certificate_or_a_moved_folder_is_the_same_coordinator(house: AgentHouse) -> None:
    await _ask(house, _fence(house, 1))
    await _ask(house, _fence(house, 1, "desk:/srv/failback #aa"), OTHER)
    await _ask(house, _fence(house, 2), OTHER)
    with pytest.raises(StaleEpoch, match=r"run r1.*--take-over"):
        await _ask(house, _fence(house, 1))


async def test_taking_over_needs_a_higher_epoch_and_then_the_former_holder_is_the_one_refused(
    house: AgentHouse,
) -> None:
    await _ask(house, _fence(house, 5))
    for low in (4, 5):
        with pytest.raises(Held):
            await _ask(house, _take(low), OTHER)
    assert isinstance(await _ask(house, _take(6), OTHER), Done)
    with pytest.raises(Held, match="coordinator other"):
        await _ask(house, _fence(house, 7))
    await _ask(house, _fence(house, 6, THERE), OTHER)


async def test_who_holds_a_pair_is_durable_and_told(house: AgentHouse) -> None:
    told = await _ask(house, AskAuthority(pair="web", place=HERE))
    assert isinstance(told, PairAuthority)
    assert (told.epoch, told.is_you) == (0, True)
    await _ask(house, _fence(house, 3))
    await _ask(house, _fence(house, 4))
    house.service.fences.close()
    house.service.ledger.close()
    ledger = Ledger.open(house.folder / "state")
    record = ledger.authority("web")
    assert (record.epoch, record.holder, record.place, record.run) == (4, "coordinator", HERE, "r1")
    assert record.since_s > 0
    ledger.close()
    for peer, place, is_you in ((ONE, HERE, True), (ONE, THERE, False), (OTHER, "", False)):
        told = await _ask(house, AskAuthority(pair="web", place=place), peer)
        assert isinstance(told, PairAuthority)
        assert (told.epoch, told.is_you, told.run) == (4, is_you, "r1")


async def test_a_vm_that_is_fenced_for_one_pair_obeys_no_other(house: AgentHouse) -> None:
    await _ask(house, _fence(house, 1))
    with pytest.raises(Held, match="fenced for the pair web") as caught:
        await _ask(house, _fence(house, 1, THERE, pair="web-again"), OTHER)
    assert caught.value.code == "held"


class _Arriving:
    """A bulk connection of the granted source, as far as it is looked at."""

    def __init__(self) -> None:
        self.peer = PeerIdentity(role=Role.AGENT, names=("dr",), fingerprint="11" * 32)
        self.refused: list[str] = []

    def refuse(self, code: str, _sentence: str) -> None:
        self.refused.append(code)

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize(("raised_to", "refused"), [(1, []), (2, ["stale-epoch"])])
async def test_a_bulk_connection_for_a_grant_of_a_lower_epoch_is_refused(
    house: AgentHouse, raised_to: int, refused: list[str]
) -> None:
    await house.fence()
    await house.allow()
    house.service.ledger.raise_epoch("web", raised_to)
    hello = BulkHello(versions=(2,), software="x", grant=GRANT, target="vda", digest_seed=1)
    arriving = _Arriving()
    await house.service.passes.arrive(cast("BulkSocket", arriving), hello)
    assert arriving.refused == refused
    await house.service.passes.end_all()
