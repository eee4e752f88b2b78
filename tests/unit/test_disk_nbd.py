"""What an `NbdDisk` has under way at one time, and what it does when an answer is an error."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from agent.disk import nbd
from agent.disk.nbd import REQUEST_BYTES, NbdDisk
from agent.errors import DiskError

MIB = 1024 * 1024


class Server:
    """Stands in for a connection: remembers what is under way, answers in the order asked for."""

    def __init__(self) -> None:
        self.handle = self
        self.under_way: dict[int, int] = {}
        self.most_requests = 0
        self.most_bytes = 0
        self.sent: list[tuple[int, int]] = []
        self.failing: set[int] = set()
        self.broken = False
        self._failed: set[int] = set()
        self._cookies = itertools.count(1)

    def aio_pwrite(self, buffer: Any, offset_bytes: int) -> int:
        cookie = next(self._cookies)
        self.under_way[cookie] = buffer.size()
        self.sent.append((offset_bytes, buffer.size()))
        self.most_requests = max(self.most_requests, len(self.under_way))
        self.most_bytes = max(self.most_bytes, sum(self.under_way.values()))
        if offset_bytes in self.failing:
            self._failed.add(cookie)
        return cookie

    def finish(self, cookies: Iterable[int]) -> None:
        for cookie in cookies:
            del self.under_way[cookie]
            if cookie in self._failed:
                raise OSError(errno.EIO, "Input/output error")

    def can_zero(self) -> bool:
        return True

    def can_meta_context(self, _name: str) -> bool:
        return True

    def can_flush(self) -> bool:
        return True

    def can_multi_conn(self) -> bool:
        return True

    def is_read_only(self) -> bool:
        return False

    def get_size(self) -> int:
        return 64 * MIB

    def close(self) -> None:
        pass


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def disk(server: Server, monkeypatch: pytest.MonkeyPatch) -> NbdDisk:
    monkeypatch.setattr(nbd, "Connection", lambda *_: server)
    return NbdDisk.open("vda", Path("nowhere"), "", writable=True, past_cache=True)


def test_small_writes_are_under_way_together_up_to_a_bound(disk: NbdDisk, server: Server) -> None:
    runs = [(offset, 4096) for offset in range(0, 8 * MIB, 8192)]
    disk.write_runs(runs, memoryview(bytes(4096 * len(runs))))
    assert server.sent == runs
    assert server.most_requests == 32
    assert not server.under_way


def test_large_writes_are_cut_and_bounded_in_bytes(disk: NbdDisk, server: Server) -> None:
    disk.write_runs([(5, 24 * MIB)], memoryview(bytes(24 * MIB)))
    assert {length for _, length in server.sent} == {REQUEST_BYTES}
    assert server.most_bytes == 8 * MIB


def test_adjoining_runs_travel_as_one_request(disk: NbdDisk, server: Server) -> None:
    disk.write_runs([(offset, 4096) for offset in range(0, MIB, 4096)], memoryview(bytes(MIB)))
    assert server.sent == [(0, MIB)]


def test_the_first_failure_is_told_when_nothing_is_under_way_any_more(disk: NbdDisk, server: Server) -> None:
    runs = [(offset, 4096) for offset in range(0, MIB, 8192)]
    server.failing = {10 * 8192, 20 * 8192}
    with pytest.raises(DiskError, match="Input/output error") as caught:
        disk.write_runs(runs, memoryview(bytes(4096 * len(runs))))
    assert not server.under_way
    assert len(server.sent) < len(runs)
    assert caught.value.facts["offset_bytes"] == 10 * 8192
    assert caught.value.facts["length_bytes"] == 4096
