"""What an agent tells of itself, and what it removes when it is told to clean up: its own leftovers, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.config import Config
from agent.equals import EqualsRecord
from agent.errors import AgentError
from agent.ledger import ProtectedImage, ProtectionRecord, TrackingRecord, ViewRecord
from agent.pair_book import PairBook
from agent.tags import tag_of
from agent.virt.seam import PowerState
from protocol.messages import (
    AskHoldings,
    Cleaned,
    CleanLeftovers,
    Condition,
    Direction,
    Done,
    ForgetPair,
    Holdings,
    LiftFence,
    MappedDisk,
    PairMap,
    RememberPair,
    Remnant,
    RemnantKind,
    SetCondition,
    Side,
    VmName,
)
from tests.unit.agent_house import AgentHouse, open_house, order

OTHER = "11111111-2222-3333-4444-555555555555"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[AgentHouse]:
    with open_house(tmp_path) as opened:
        # The lab's folder stands for the one where scratch files of block devices go.
        yield opened


async def told(house: AgentHouse) -> Holdings:
    answer = await house.ask(AskHoldings())
    assert isinstance(answer, Holdings)
    return answer


async def cleaned(house: AgentHouse, *, epoch: int = 2) -> Cleaned:
    answer = await house.ask(CleanLeftovers(order=order(epoch), vm_uuid=house.vm.uuid))
    assert isinstance(answer, Cleaned)
    return answer


def mapping(house: AgentHouse) -> PairMap:
    return PairMap(
        original=VmName(host="prod", name="web", uuid=house.vm.uuid),
        replica=VmName(host="dr", name="web", uuid=OTHER),
        disks=(MappedDisk(original="vda", replica="sda"),),
    )


async def remember(house: AgentHouse, *, epoch: int = 1) -> None:
    request = RememberPair(order=order(epoch), side=Side.ORIGINAL, mapping=mapping(house))
    assert isinstance(await house.ask(request), Done)


def kinds(remnants: tuple[Remnant, ...]) -> set[RemnantKind]:
    return {remnant.kind for remnant in remnants}


async def test_a_new_agent_holds_nothing(house: AgentHouse) -> None:
    answer = await told(house)
    assert (answer.host, answer.pairs, answer.fences, answer.remnants) == ("prod", (), (), ())
    assert answer.state_free_bytes > 0
    assert answer.certificate_ends_s == 0.0  # it has none


async def test_a_pair_is_remembered_with_its_epoch_over_a_restart(house: AgentHouse) -> None:
    await remember(house, epoch=7)
    (pair,) = (await told(house)).pairs
    assert (pair.pair, pair.epoch, pair.run, pair.side, pair.mapping) == ("web", 7, "r1", Side.ORIGINAL, mapping(house))
    again = PairBook.open(house.service.config.state_dir)
    assert [(r.pair, r.side, r.mapping, r.vm_uuid) for r in again.pairs] == [
        ("web", Side.ORIGINAL, mapping(house), house.vm.uuid)
    ]


async def test_a_lower_epoch_cannot_change_what_is_remembered(house: AgentHouse) -> None:
    await remember(house, epoch=7)
    with pytest.raises(AgentError, match="epoch 7"):
        await remember(house, epoch=6)


def test_a_damaged_pair_book_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text("{")
    assert PairBook.open(tmp_path).pairs == ()


async def test_fence_and_flag_are_told_with_power_autostart_and_locks(house: AgentHouse) -> None:
    house.vm.autostart = True
    await house.fence()
    await house.ask(SetCondition(order=order(), vm_uuid=house.vm.uuid, condition=Condition.TORN, view=None))
    answer = await told(house)
    (fence,) = answer.fences
    assert (fence.pair, fence.run, fence.side, fence.locked, fence.unlocked) == (
        "web",
        "r1",
        Side.ORIGINAL,
        ("vda",),
        (),
    )
    assert (fence.autostart_before, fence.autostart, fence.vm) == (True, False, "web")
    assert fence.since_s > 0
    assert [(c.vm_uuid, c.condition) for c in answer.conditions] == [(house.vm.uuid, Condition.TORN)]
    # An agent that was never told what the pair is still says that there is one, and of which run.
    assert [(p.pair, p.epoch, p.run, p.mapping) for p in answer.pairs] == [("web", 1, "r1", None)]


async def test_a_fence_taken_again_keeps_the_time_it_stands_since(house: AgentHouse) -> None:
    await house.fence()
    since_s = (await told(house)).fences[0].since_s
    await house.fence(epoch=2)
    assert (await told(house)).fences[0].since_s == since_s


async def test_a_granted_pass_is_told_and_whether_it_runs(house: AgentHouse) -> None:
    await house.allow()
    (held,) = (await told(house)).passes
    assert (held.pair, held.run, held.epoch, held.direction, held.running) == (
        "web",
        "r1",
        1,
        Direction.RECEIVE,
        False,
    )


async def test_libvirt_that_does_not_answer_is_a_problem_told_and_no_error(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.fence()

    def away(_: str) -> None:
        raise AgentError("libvirt does not answer")

    monkeypatch.setattr(house.service.hypervisor, "inspect", away)
    answer = await told(house)
    assert answer.problems == ("libvirt does not answer",)
    assert [(f.vm, f.power, f.autostart) for f in answer.fences] == [("", None, None)]


async def test_clean_removes_views_records_bitmaps_and_scratch_files_and_nothing_of_others(house: AgentHouse) -> None:
    ledger, uuid = house.service.ledger, house.vm.uuid
    image = house.vm.disks["vda"]
    image.bitmaps = {tag_of("r1-1"): [], "nightly": []}
    ledger.put_view(ViewRecord(vm_uuid=uuid, view="r1-1"))
    ledger.put_tracking(TrackingRecord(vm_uuid=uuid, view="r1-1", images=()))
    house.vm.state = PowerState.RUNNING
    scratch = house.folder / f"failback-{uuid}-vda-{tag_of('r1-1')}.scratch"
    theirs = [house.folder / "failback-notes.scratch", house.folder / f"failback-{OTHER}-vda-x.scratch"]
    overlay = house.folder / f"vda.failback-track-{uuid}-vda-abc.qcow2"
    socket = house.service.config.runtime_dir / "nbd-1-1"
    for path in (scratch, overlay, socket, *theirs):
        path.touch()
    found = (await told(house)).remnants
    assert kinds(found) >= {
        RemnantKind.VIEW,
        RemnantKind.TRACKING,
        RemnantKind.BITMAP,
        RemnantKind.SCRATCH,
        RemnantKind.SOCKET,
    }
    answer = await cleaned(house)
    assert not scratch.exists()
    assert not socket.exists()
    assert all(path.exists() for path in theirs)
    assert overlay.exists()  # it may hold what a guest wrote: a person's to look at
    assert any(str(overlay) in what for what in answer.kept)
    assert image.bitmaps == {"nightly": []}
    assert ledger.contents.views == ()
    assert ledger.contents.trackings == ()
    assert any("view r1-1" in what for what in answer.removed)
    assert (await cleaned(house)).removed == ()


async def test_clean_leaves_a_protective_snapshot_where_it_is(house: AgentHouse) -> None:
    house.service.ledger.put_protection(
        ProtectionRecord(
            vm_uuid=house.vm.uuid,
            pair="web",
            snapshot="failback-web-r1",
            images=(
                ProtectedImage(target="vda", base=house.image, base_format="raw", overlay=house.folder / "o.qcow2"),
            ),
        )
    )
    answer = await cleaned(house)
    assert answer.removed == ()
    assert house.service.ledger.protection(house.vm.uuid, "failback-web-r1") is not None
    assert any("failback-web-r1" in what for what in answer.kept)


def map_of(house: AgentHouse, vm: str) -> Path:
    path = house.service.maps.path_of(vm, "vda")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x" * 4096)
    return path


async def test_maps_of_vms_that_are_gone_are_collected_and_those_of_a_pair_are_kept(house: AgentHouse) -> None:
    await remember(house)
    mine, gone = map_of(house, house.vm.uuid), map_of(house, OTHER)
    told_disks = {(d.vm_uuid, d.pair): d.map_bytes for d in (await told(house)).disks}
    assert set(told_disks) == {(house.vm.uuid, "web"), (OTHER, "")}
    answer = await cleaned(house)
    assert mine.exists()
    assert not gone.exists()
    assert answer.removed == (f"digest map of vda of {OTHER}",)


async def test_forget_drops_maps_records_flag_and_memory_but_not_the_epoch(house: AgentHouse) -> None:
    await remember(house)
    await house.fence()
    await house.ask(LiftFence(order=order(), vm_uuid=house.vm.uuid, restore_autostart=False))
    path = map_of(house, house.vm.uuid)
    house.service.evidence.book.put(
        EqualsRecord(vm_uuid=house.vm.uuid, target="vda", path=str(house.image), view="v", torn=False, stamp=None)
    )
    await house.ask(ForgetPair(order=order(5), vm_uuid=house.vm.uuid))
    assert not path.exists()
    answer = await told(house)
    assert (answer.disks, answer.conditions) == ((), ())
    assert [(p.pair, p.epoch, p.mapping) for p in answer.pairs] == [("web", 5, None)]


async def test_a_fenced_pair_is_not_forgotten(house: AgentHouse) -> None:
    await remember(house)
    await house.fence()
    with pytest.raises(AgentError) as refused:
        await house.ask(ForgetPair(order=order(2), vm_uuid=house.vm.uuid))
    assert refused.value.code == "fenced"
    assert (await told(house)).pairs[0].mapping is not None


def test_the_pair_book_names_its_file_beside_the_ledger(house: AgentHouse) -> None:
    config: Config = house.service.config
    assert house.service.holdings.book.path == config.state_dir / "pairs.json"
