"""Small jobs done several at a time."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from agent.disk.side_by_side import THREADS, SideBySide


def test_jobs_are_under_way_together() -> None:
    together = threading.Barrier(THREADS, timeout=30)
    with closing(SideBySide()) as side_by_side:
        side_by_side.each(range(THREADS), lambda _: together.wait() and None)


def test_few_jobs_need_no_threads() -> None:
    done: list[tuple[int, int]] = []
    with closing(SideBySide()) as side_by_side:
        side_by_side.each(range(3), lambda job: done.append((job, threading.get_ident())))
        side_by_side.each([], done.append)
    assert done == [(job, threading.get_ident()) for job in range(3)]


def test_the_first_failure_is_told_when_nothing_is_being_done_any_more() -> None:
    doing: set[int] = set()
    together = threading.Barrier(THREADS, timeout=30)

    def fail(job: int) -> None:
        doing.add(job)
        together.wait()
        doing.remove(job)
        raise OSError(job, "broken")

    with closing(SideBySide()) as side_by_side, pytest.raises(OSError, match="broken") as caught:
        side_by_side.each(range(40), fail)
    assert caught.value.errno == 0
    assert not doing


def test_a_fault_of_the_program_is_not_swallowed() -> None:
    with closing(SideBySide()) as side_by_side, pytest.raises(ZeroDivisionError):
        side_by_side.each(range(8), lambda job: 1 // (job % 2) and None)
