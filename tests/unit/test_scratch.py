"""When a view is given up for want of room: by values, and on a file system that really is small."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from agent import scratch
from agent.errors import HypervisorError
from agent.scratch import LOOKS_OF_ROOM, Room, ScratchFull, ScratchLimits, ScratchWatch, free_bytes

MIB = 1 << 20
LIMITS = ScratchLimits(used_percent=85, reserve_bytes=64 * MIB)


def test_the_share_of_what_was_free_counts_where_there_was_much() -> None:
    room = Room(LIMITS, 1000 * MIB)
    for free in range(990, 149, -10):
        assert not room.is_short(free * MIB)
    assert room.is_short(149 * MIB)


def test_the_reserve_counts_where_there_was_little() -> None:
    room = Room(LIMITS, 100 * MIB)
    assert not room.is_short(90 * MIB)
    assert not room.is_short(80 * MIB)
    assert room.is_short(63 * MIB)


def test_a_guest_that_writes_fast_is_given_the_room_it_needs() -> None:
    room = Room(LIMITS, 1000 * MIB)
    assert not room.is_short(900 * MIB)
    assert room.steepest_bytes == 100 * MIB
    assert room.kept_bytes == LOOKS_OF_ROOM * 100 * MIB
    assert room.is_short(399 * MIB)


class Ended:
    """Stands for the hypervisor: remembers which views were ended."""

    def __init__(self, fails: int = 0) -> None:
        self.views: list[tuple[str, str]] = []
        self.happened = threading.Event()
        self._fails = fails

    def __call__(self, vm_uuid: str, view: str) -> None:
        if self._fails:
            self._fails -= 1
            raise HypervisorError("libvirtd is being restarted")
        self.views.append((vm_uuid, view))
        self.happened.set()


def test_a_view_that_has_too_little_room_from_the_start_is_refused(tmp_path: Path) -> None:
    limits = ScratchLimits(reserve_bytes=free_bytes(tmp_path) * 2)
    watch = ScratchWatch(limits, Ended(), lambda _: False)
    with pytest.raises(ScratchFull, match="must stay free") as caught:
        watch.begin("vm", "r1-1", [tmp_path / "a.scratch"], 1000)
    needed = caught.value.facts["needed_bytes"]
    assert isinstance(needed, int)
    assert needed > limits.reserve_bytes
    assert watch.reason("vm", "r1-1") is None


def test_a_view_is_given_up_by_the_watch_itself_and_tells_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = {"free": 1000 * MIB}
    monkeypatch.setattr(scratch, "free_bytes", lambda _: room["free"])
    ended = Ended(fails=1)
    watch = ScratchWatch(LIMITS, ended, lambda _: False)
    watch.begin("vm", "r1-1", [tmp_path / "a.scratch"], 1000)
    room["free"] = 10 * MIB
    assert ended.happened.wait(20)
    watch.look()
    assert ended.views == [("vm", "r1-1")]
    reason = watch.reason("vm", "r1-1")
    assert reason is not None
    assert reason.facts["free_bytes"] == 10 * MIB
    assert watch.reason("vm", "r1-2") is None
    watch.end("vm")
    assert watch.reason("vm", "r1-1") is None


def test_a_guest_that_is_paused_all_the_same_goes_on_without_the_view(tmp_path: Path) -> None:
    ended = Ended()
    watch = ScratchWatch(ScratchLimits(reserve_bytes=1), ended, lambda _: True)
    watch.begin("vm", "r1-1", [tmp_path / "a.scratch"], 1000)
    assert ended.happened.wait(20)
    watch.end("vm")
    assert ended.views == [("vm", "r1-1")]
