"""Digest maps of passes that fail, agents that die, files that are full and disks that say something else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from agent.delta.blocks import BLOCK_BYTES, PAGE_BYTES
from agent.delta.digest_map import WINDOW_BYTES
from agent.delta.granularity import Granularity
from agent.errors import DiskError
from agent.sync.map_answers import MapContradicted
from agent.sync.map_file import GROUP_WINDOWS, map_bytes
from protocol.messages import BlockData
from tests.unit.map_house import SIZE, MapHouse, disks, noise

B, P, MIB, TIB = BLOCK_BYTES, PAGE_BYTES, 1 << 20, 1 << 40


@pytest.fixture
def house(tmp_path: Path) -> MapHouse:
    """The map of a small disk."""
    return MapHouse(tmp_path / "a.map", SIZE)


# --- ends that are not the planned one --------------------------------------------------------------------------------


async def test_a_pass_that_fails_leaves_unknown_what_it_wrote_and_did_not_prove(house: MapHouse) -> None:
    source, target = noise(1, SIZE), noise(1, SIZE)
    await house.run(*disks(source, target))
    source.content[5 * B : 5 * B + P] = bytes(P)
    target.fail_next("flushing")
    run = await house.run(*disks(source, target))
    assert isinstance(run.target_failure, DiskError)
    assert target.content == source.content  # written, never proven
    assert house.known_bytes == SIZE // B * B  # all blocks but one
    assert house.agrees_with(bytes(target.content))
    assert house.header.view is None
    again = await house.run(*disks(source, target))
    assert again.complete
    assert again.target.compared_bytes == B
    assert house.known_bytes == SIZE


async def test_an_agent_that_dies_in_the_middle_of_a_window_leaves_nothing_known_that_is_not_so(
    house: MapHouse,
) -> None:
    source, target = noise(1, SIZE), noise(1, SIZE)
    await house.run(*disks(source, target))
    dying = house.begin()
    dying.about_to_write(np.array([(5 * B, P)], dtype=np.uint64))
    target.content[5 * B] ^= 1
    dying._file.close()  # the process is gone
    assert house.known_bytes == 0
    assert house.header.view is None
    run = await house.run(*disks(source, target))
    assert run.complete
    assert house.known_bytes == SIZE
    assert house.agrees_with(bytes(source.content))


def test_it_is_durable_that_nothing_is_known_before_anything_is_written(house: MapHouse) -> None:
    first = house.begin()
    first.enter_zeroes([(0, SIZE)])
    first.settle("v1", None)
    second = house.begin()
    second.about_to_write(np.array([(B, P), (8 * B, B)], dtype=np.uint64))
    assert house.known_bytes == 0  # as another process would find it now
    second.proven([B], np.array([1, 8]), [bytes(16), bytes(16)])
    assert house.known_bytes == 0
    second.settle("v2", None)
    assert house.known_bytes == SIZE
    assert house.header.view == "v2"


def test_a_block_counts_only_when_everything_that_was_written_to_it_is_proven(house: MapHouse) -> None:
    digest_map = house.begin()
    digest_map.about_to_write(np.array([(3 * B, P)], dtype=np.uint64))
    digest_map.about_to_write(np.array([(3 * B + P, P), (5 * B, B)], dtype=np.uint64))
    digest_map.proven([3 * B], np.array([3]), [b"early and stale!"])
    assert not digest_map.look_up([(3 * B, B)])[1].any()
    digest_map.proven([3 * B + P], np.array([5, 3]), [b"five" * 4, b"the last of it!!"])
    entries, known = digest_map.look_up([(3 * B, 3 * B)])
    assert known.tolist() == [True, False, True]
    assert entries[0].tobytes() == b"the last of it!!"


@pytest.mark.parametrize("call", ["fdatasync", "pwrite"])
async def test_a_map_whose_file_fails_is_given_up_and_the_pass_goes_on(
    house: MapHouse, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    source, target = noise(1, SIZE), noise(2, SIZE)
    digest_map = house.begin()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        run = await house.run(*disks(source, target), digest_map=digest_map)
    assert run.complete
    assert target.content == source.content
    assert not house.path.exists()
    assert "No space left" in digest_map.lost
    assert "No space left" in run.target.report().why_not_higher
    assert run.target.report().rung == "digests"


async def test_a_disk_that_contradicts_its_map_ends_the_pass_and_the_map(house: MapHouse) -> None:
    source, target = noise(1, SIZE), noise(1, SIZE)
    await house.run(*disks(source, target))
    target.content[6 * B + 9] ^= 1  # past every lock
    source.content[6 * B + 2 * P] ^= 1
    run = await house.run(*disks(source, target), granularity=Granularity(B, P))
    assert isinstance(run.target_failure, MapContradicted)
    assert run.target_failure.facts["offset_bytes"] == 6 * B
    assert run.sent(BlockData) == 0
    assert not house.path.exists()
    again = await house.run(*disks(source, target))
    assert again.complete
    assert target.content == source.content


async def test_the_first_write_to_each_gib_costs_one_sync_of_the_map_and_no_write_costs_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * GROUP_WINDOWS * WINDOW_BYTES
    digest_map = MapHouse(tmp_path / "a.map", size).begin()
    synced: list[int] = []
    real = os.fdatasync

    def counted(fd: int) -> None:
        synced.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    for at in range(0, size, 16 * MIB):
        digest_map.about_to_write(np.array([(at, P)], dtype=np.uint64))
    assert len(synced) == 4


def test_a_map_takes_16_bytes_for_each_block_and_little_more() -> None:
    assert map_bytes(TIB) - TIB // B * 16 <= 5 * MIB
