"""Idle I/O priority of threads and of the processes they start."""

from __future__ import annotations

import subprocess
import threading

import pytest

from agent.disk import priority
from agent.disk.priority import CLASS_IDLE, idle_priority, priority_class
from agent.disk.processes import start_bound


def test_a_thread_is_idle_inside_and_what_it_was_afterwards() -> None:
    before = priority_class()
    others: list[int | None] = []
    with idle_priority():
        assert priority_class() == CLASS_IDLE
        thread = threading.Thread(target=lambda: others.append(priority_class()))
        with idle_priority():
            assert priority_class() == CLASS_IDLE
        assert priority_class() == CLASS_IDLE
    assert priority_class() == before
    thread.start()
    thread.join()
    assert others == [before]


def test_it_is_given_back_after_an_error() -> None:
    before = priority_class()
    with pytest.raises(ZeroDivisionError), idle_priority():
        raise ZeroDivisionError
    assert priority_class() == before


def test_on_an_unknown_architecture_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priority, "_numbers", None)
    with idle_priority():
        assert priority_class() is None


@pytest.mark.parametrize("idle", [False, True])
def test_a_process_is_started_under_it_where_asked_for(idle: bool) -> None:
    process = start_bound(["sleep", "60"], stderr=subprocess.DEVNULL, idle=idle)
    with process:
        found = priority_class(process.pid)
        process.kill()
    assert (found == CLASS_IDLE) is idle
