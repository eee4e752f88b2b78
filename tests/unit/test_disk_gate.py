"""The gate that every request to a disk passes."""

from __future__ import annotations

import errno
import threading

import pytest

from agent.disk.gate import Gate, storage_error
from agent.errors import DiskError, DiskFull


def gate() -> Gate:
    return Gate("vdb", "/images/vdb.raw", 1000, writable=True)


def test_a_request_names_disk_place_and_bytes_when_the_system_call_fails() -> None:
    with pytest.raises(DiskError) as caught, gate().request("writing", 10, 20, writes=True):
        raise OSError(errno.EIO, "Input/output error")
    assert caught.value.sentence == (
        "Disk vdb (/images/vdb.raw): writing 20 bytes at 10 failed: Input/output error; "
        "look at the storage under it (dmesg names the device), then try again."
    )
    assert caught.value.facts == {"disk": "vdb", "errno": "EIO", "offset_bytes": 10, "length_bytes": 20}
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_is_an_error_of_its_own(number: int) -> None:
    assert isinstance(storage_error("vda", "here", "writing", number), DiskFull)


def test_an_error_without_a_number_keeps_its_words() -> None:
    with (
        pytest.raises(DiskError, match="failed: the storage ends before byte 5; look"),
        gate().request("reading", 0, 9),
    ):
        raise OSError(0, "the storage ends before byte 5")


def test_other_errors_pass_the_gate_as_they_are() -> None:
    guard = gate()
    with pytest.raises(ZeroDivisionError), guard.request("reading", 0, 1):
        raise ZeroDivisionError
    guard.close()  # and nobody is left inside


def test_closing_waits_for_who_is_inside_and_lets_nobody_in() -> None:
    guard = gate()
    inside, leave, closed = threading.Event(), threading.Event(), threading.Event()

    def stay() -> None:
        with guard.request("writing", 0, 1, writes=True):
            inside.set()
            leave.wait(20)

    def close() -> None:
        assert guard.close()
        closed.set()

    threads = [threading.Thread(target=stay), threading.Thread(target=close)]
    threads[0].start()
    assert inside.wait(20)
    threads[1].start()
    while not guard.closed:
        threading.Event().wait(0.001)
    with pytest.raises(DiskError, match="the disk is closed; open it again"), guard.request("reading", 0, 1):
        pytest.fail("a closed gate let somebody in")
    assert not closed.is_set()
    leave.set()
    assert closed.wait(20)
    for thread in threads:
        thread.join(20)


def test_only_the_first_who_closes_releases() -> None:
    guard = gate()
    assert guard.close()
    assert not guard.close()


def test_the_first_poison_is_the_one_that_is_told() -> None:
    guard = gate()
    guard.poison("an earlier flush failed")
    guard.poison("something else")
    with pytest.raises(
        DiskError, match="writing 1 bytes at 0 refused: an earlier flush failed; what was written before"
    ):
        guard.check("writing", 0, 1, writes=True)
    guard.check("reading", 0, 1)
