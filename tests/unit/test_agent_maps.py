"""Digest maps as two agents use them: when what a map knows is believed, and what is done where it is not."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent import maps
from agent.errors import AgentError, SyncError
from agent.maps import MapDesk
from protocol.errors import ProtocolError
from protocol.messages import ByteRange, Condition, PassKind, SetCondition
from tests.unit.agent_house import SIZE_BYTES, order
from tests.unit.two_agents import TwoAgents, open_two_agents

B = 64 << 10
NOISE = random.Random(4).randbytes(SIZE_BYTES // 2) + bytes(SIZE_BYTES // 2)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[TwoAgents]:
    """Two agents; the replica's disk is half full."""
    async with open_two_agents(tmp_path) as opened:
        opened.source.image.write_bytes(NOISE)
        yield opened


def overwrite(path: Path, at: int, data: bytes) -> None:
    """Write past every lock."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


async def first_pass(pair: TwoAgents) -> int:
    """A pass that fills the map; its seed."""
    told = await pair.evidence()
    assert told.map_known_bytes == 0
    assert "no digest map of the disk yet" in told.why_no_map
    assert told.map_seed is not None
    _, there = await pair.must(seed=told.map_seed)
    assert there.disks[0].rung == "digests"
    assert pair.target.image.read_bytes() == pair.source.image.read_bytes()
    return told.map_seed


def only_map(pair: TwoAgents) -> Path:
    """The file of the only map."""
    (path,) = (pair.target.folder / "state" / maps.FOLDER).iterdir()
    return path


# --- believed ---------------------------------------------------------------------------------------------------------


async def test_the_second_pass_goes_by_the_map(pair: TwoAgents) -> None:
    seed = await first_pass(pair)
    told = await pair.evidence()
    assert (told.map_seed, told.map_known_bytes, told.why_no_map) == (seed, SIZE_BYTES, "")
    assert told.equals == "r1-1"
    overwrite(pair.source.image, 3 * B + 5, b"changed")
    here, there = await pair.must(seed=seed)
    assert there.disks[0].rung == "map"
    assert "what was written since is not known" in there.disks[0].why_not_higher
    assert here.disks[0].compared_bytes >= SIZE_BYTES // 2
    assert there.disks[0].compared_bytes <= 4 << 20
    assert pair.target.image.read_bytes() == pair.source.image.read_bytes()
    assert (await pair.evidence()).map_known_bytes == SIZE_BYTES


async def test_an_unchanged_file_is_believed_though_its_lock_was_let_go(pair: TwoAgents) -> None:
    seed = await first_pass(pair)
    desk = MapDesk(pair.target.folder / "state", pair.target.service.fences)
    pair.target.service.maps = pair.target.service.runner.maps = pair.target.service.evidence.maps = desk
    assert (await pair.evidence()).map_known_bytes == SIZE_BYTES
    _, there = await pair.must(seed=seed)
    assert there.disks[0].compared_bytes == 0


async def test_a_lock_that_was_held_all_the_time_is_not_believed_where_the_inode_changed(pair: TwoAgents) -> None:
    await first_pass(pair)
    pair.target.image.chmod(0o640)
    assert (await pair.evidence()).map_known_bytes == 0  # a write whose time was set back looks the same


async def test_a_file_written_under_its_lock_makes_the_map_worthless(pair: TwoAgents) -> None:
    await first_pass(pair)
    overwrite(pair.target.image, 7, b"a plain write minds no lock")
    told = await pair.evidence()
    assert (told.map_known_bytes, told.equals) == (0, None)


# --- not believed -----------------------------------------------------------------------------------------------------


async def test_a_file_that_was_changed_while_its_lock_was_let_go_makes_the_map_worthless(pair: TwoAgents) -> None:
    seed = await first_pass(pair)
    uuid = pair.target.vm.uuid
    await pair.target.ask(
        SetCondition(order=order(), vm_uuid=uuid, condition=Condition.EQUALS_VIEW, view=f"r1-{pair.views}")
    )
    await pair.refence()
    overwrite(pair.target.image, 7, b"the original ran")
    told = await pair.evidence()
    assert told.map_known_bytes == 0
    assert "was changed, or may have been" in told.why_no_map
    assert told.map_seed == seed  # an audit against what it stood for may still be to come
    _, there = await pair.must(seed=seed)
    assert there.disks[0].rung == "digests"
    assert pair.target.image.read_bytes() == pair.source.image.read_bytes()
    assert (await pair.evidence()).map_known_bytes == SIZE_BYTES


async def test_a_pass_granted_without_the_seed_removes_the_map(pair: TwoAgents) -> None:
    await first_pass(pair)
    path = only_map(pair)
    await pair.must(seed=None)
    assert not path.exists()
    assert (await pair.evidence()).map_known_bytes == 0


async def test_a_map_that_could_not_be_removed_is_not_believed_under_the_same_lock(
    pair: TwoAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(maps, "stamp_of", lambda _: None)  # as of a block device: the lock alone proves anything
    seed = await first_pass(pair)
    overwrite(pair.source.image, 0, bytes(B))
    with monkeypatch.context() as patch:
        patch.setattr(maps, "remove_map", fails)
        await pair.must(seed=seed + 1)
    assert pair.target.image.read_bytes() == pair.source.image.read_bytes()
    assert (await pair.evidence()).map_known_bytes == 0


async def test_without_room_for_a_map_the_pass_goes_on_and_says_so(
    pair: TwoAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "SPARE_BYTES", 1 << 60)
    _, there = await pair.must(seed=5)
    assert "may need" in there.disks[0].why_not_higher
    assert pair.target.image.read_bytes() == pair.source.image.read_bytes()


async def test_a_damaged_map_is_made_anew(pair: TwoAgents) -> None:
    seed = await first_pass(pair)
    overwrite(only_map(pair), 30, b"?")
    told = await pair.evidence()
    assert told.map_known_bytes == 0
    assert "is damaged" in told.why_no_map
    _, there = await pair.must(seed=told.map_seed)
    assert there.disks[0].rung == "digests"
    assert told.map_seed != seed
    assert (await pair.evidence()).map_known_bytes == SIZE_BYTES


async def test_digests_with_another_seed_than_the_granted_one_are_refused(pair: TwoAgents) -> None:
    here, there = await pair.run_pass(seed=5, source_seed=6)
    assert isinstance(here.error, ProtocolError)
    assert "seed of its digest map" in str(here.error)
    assert isinstance(there.error, AgentError)
    assert pair.target.image.read_bytes() == bytes(SIZE_BYTES)


# --- audit and verification -------------------------------------------------------------------------------------------


async def test_an_audit_opens_no_disk_of_the_original_and_catches_what_no_pass_was_told_of(pair: TwoAgents) -> None:
    seed = await first_pass(pair)
    view = f"r1-{pair.views}"
    uuid = pair.target.vm.uuid
    await pair.target.ask(SetCondition(order=order(), vm_uuid=uuid, condition=Condition.EQUALS_VIEW, view=view))
    pair.target.service.fences.lift(uuid, pair="web", restore_autostart=False)
    overwrite(pair.target.image, 0, b"the original runs and writes")
    frozen = only_map(pair).read_bytes()
    here, there = await pair.must(kind=PassKind.AUDIT, view=view, seed=seed)
    assert here.disks[0].differing_bytes == there.disks[0].differing_bytes == 0
    assert here.disks[0].compared_bytes == SIZE_BYTES
    overwrite(pair.source.image, SIZE_BYTES - 3, b"!")
    for report in await pair.must(kind=PassKind.AUDIT, view=view, seed=seed):
        assert report.disks[0].differing == (ByteRange(offset_bytes=SIZE_BYTES - B, length_bytes=B),)
        assert report.disks[0].written_bytes == 0
    assert only_map(pair).read_bytes() == frozen


async def test_an_audit_of_another_view_or_seed_is_refused(pair: TwoAgents) -> None:
    seed = await first_pass(pair)
    for words in ({"view": "r1-99", "seed": seed}, {"view": "r1-1", "seed": seed ^ 1}):
        _, there = await pair.run_pass(kind=PassKind.AUDIT, **words)  # type: ignore[arg-type]
        assert isinstance(there.error, SyncError)
        assert "cannot be audited" in there.error.sentence


async def test_a_verification_reads_both_disks_and_leaves_the_map_and_the_proof_alone(pair: TwoAgents) -> None:
    seed = await first_pass(pair)
    view, uuid = f"r1-{pair.views}", pair.target.vm.uuid
    here, there = await pair.must(kind=PassKind.VERIFY, view=view, seed=seed)
    assert here.disks[0].compared_bytes == there.disks[0].compared_bytes == SIZE_BYTES
    assert there.disks[0].differing == ()
    overwrite(pair.target.image, 9 * B, b"rot")
    here, there = await pair.must(kind=PassKind.VERIFY, view=view)
    assert here.disks[0].differing == there.disks[0].differing == (ByteRange(offset_bytes=9 * B, length_bytes=B),)
    assert pair.target.service.runner.has_verified(uuid, view)
    assert only_map(pair).exists()
