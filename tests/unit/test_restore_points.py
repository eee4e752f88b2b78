"""Restore points on one host: the modes of their bases, and which may be merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import HypervisorError
from protocol.messages import FenceVm, KeepRestorePoint, MergeRestorePoint, Protect, Protected, Side, Unprotect
from tests.unit.agent_house import AgentHouse, open_house, order

SNAPSHOT = "failback-web-r1"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[AgentHouse]:
    with open_house(tmp_path) as opened:
        yield opened


async def _protected(house: AgentHouse, snapshot: str = SNAPSHOT) -> Path:
    """The base of the fenced replica's disk, under a protective snapshot that was taken."""
    uuid = house.vm.uuid
    await house.ask(FenceVm(order=order(), vm_uuid=uuid, side=Side.REPLICA, targets=("vda",)))
    told = await house.ask(Protect(order=order(), vm_uuid=uuid, targets=("vda",), snapshot=snapshot))
    assert isinstance(told, Protected)
    return Path(told.disks[0].base)


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def test_a_base_that_is_kept_is_read_only_until_it_is_given_back(house: AgentHouse) -> None:
    base, uuid = await _protected(house), house.vm.uuid
    base.chmod(0o660)
    for _ in range(2):
        await house.ask(KeepRestorePoint(order=order(), vm_uuid=uuid, snapshot=SNAPSHOT))
        assert _mode(base) == 0o440
    await house.ask(Unprotect(order=order(), vm_uuid=uuid, snapshot=SNAPSHOT))
    assert _mode(base) == 0o660


async def test_a_snapshot_that_is_not_known_cannot_be_kept(house: AgentHouse) -> None:
    await _protected(house)
    with pytest.raises(HypervisorError, match="knows of no snapshot other"):
        await house.ask(KeepRestorePoint(order=order(), vm_uuid=house.vm.uuid, snapshot="other"))


async def test_only_the_oldest_is_merged(house: AgentHouse) -> None:
    await _protected(house)
    await _protected(house, "failback-web-r2")
    with pytest.raises(HypervisorError, match="not its oldest"):
        await house.ask(MergeRestorePoint(order=order(), vm_uuid=house.vm.uuid, snapshot="failback-web-r2"))
