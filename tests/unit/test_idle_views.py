"""Views of shut-off VMs whose reader was killed, as an audit may be: nothing of them stays for ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import sources
from agent.disk.raw import RawDisk
from agent.errors import HypervisorUnreachable
from agent.idle_views import IdleViews
from agent.sources import UNCLAIMED_FOR_S
from agent.virt.seam import PowerState
from protocol.messages import Cleaned, CleanLeftovers, OpenView, Side
from tests.unit.agent_house import AgentHouse, open_house, order


@pytest.fixture
def house(tmp_path: Path) -> Iterator[AgentHouse]:
    with open_house(tmp_path) as opened:
        yield opened


class Watch:
    """The agent's look at its views, with a clock that the test sets."""

    def __init__(self, house: AgentHouse) -> None:
        self.now_s, self.granted = 100.0, set[str]()
        self.idle = IdleViews(house.service.views, self.granted.__contains__, lambda: self.now_s)

    def look(self, after_s: float = 0.0) -> list[str]:
        """Look that much later; what went wrong."""
        self.now_s += after_s
        return [error.sentence for error in self.idle.close()]


async def _audited(house: AgentHouse) -> Watch:
    """The view that an audit opened, whose coordinator is killed then."""
    await house.fence(Side.REPLICA)
    await house.ask(OpenView(order=order(), vm_uuid=house.vm.uuid, targets=("vda",), view="r1-2"))
    assert house.service.views.closed_views() == ((house.vm.uuid, "web", "r1-2"),)
    return Watch(house)


async def test_a_view_that_nobody_reads_is_closed_after_a_while_without_any_order(house: AgentHouse) -> None:
    watch = await _audited(house)
    disk = house.service.views.disks(house.vm.uuid, "r1-2")["vda"]
    assert watch.look() == []
    assert watch.look(UNCLAIMED_FOR_S - 1) == []
    assert house.service.views.closed_views()
    assert watch.look(2) == []
    assert house.service.views.closed_views() == ()
    with pytest.raises(Exception, match="the disk is closed"):
        disk.read_into(0, memoryview(bytearray(512)))


async def test_one_that_a_pass_reads_or_may_read_stays(house: AgentHouse) -> None:
    watch = await _audited(house)
    watch.granted.add("web")
    watch.look()
    watch.look(10 * UNCLAIMED_FOR_S)
    watch.granted.clear()
    watch.look(UNCLAIMED_FOR_S - 1)
    assert house.service.views.closed_views(), "it is idle from the end of the pass on"
    watch.look(2)
    assert house.service.views.closed_views() == ()


async def test_a_view_opened_anew_is_as_young_as_that(house: AgentHouse) -> None:
    watch = await _audited(house)
    watch.look()
    house.service.views.close_of(house.vm.uuid)
    watch.look(UNCLAIMED_FOR_S)
    await house.ask(OpenView(order=order(), vm_uuid=house.vm.uuid, targets=("vda",), view="r1-2"))
    watch.look(UNCLAIMED_FOR_S)
    assert house.service.views.closed_views()


async def test_one_that_cannot_be_closed_yet_is_told_and_nothing_of_it_is_read(
    house: AgentHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = await _audited(house)

    def down(uuid: str, tag: str) -> None:
        raise HypervisorUnreachable("no libvirt")

    monkeypatch.setattr(house.service.views.hypervisor, "close_view", down)
    watch.look()
    assert watch.look(UNCLAIMED_FOR_S + 1) == ["no libvirt"]
    assert house.service.views.closed_views() == ()


async def test_a_view_of_a_running_vm_is_not_looked_at(house: AgentHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_file(target: str, *_: object) -> RawDisk:
        return RawDisk.open(target, house.image, writable=False)

    monkeypatch.setattr(sources, "open_view", from_file)
    house.vm.state = PowerState.RUNNING
    house.service.views.open("web", house.vm.uuid, ("vda",), "r1-1")
    watch = Watch(house)
    watch.look()
    watch.look(2 * UNCLAIMED_FOR_S)
    assert house.service.views.is_open(house.vm.uuid)


async def test_clean_closes_it_at_once_and_says_so(house: AgentHouse) -> None:
    await _audited(house)
    answer = await house.ask(CleanLeftovers(order=order(2), vm_uuid=house.vm.uuid))
    assert isinstance(answer, Cleaned)
    assert "view r1-2" in answer.removed
    assert house.service.views.closed_views() == ()
