"""Powering off: asked, waited for, forced only when told to, and patient with a libvirtd that is being restarted."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio

from agent import power
from agent.errors import HypervisorError, HypervisorUnreachable, ShutdownTimeout
from agent.threads import Threads
from agent.virt.seam import PowerState
from protocol.messages import OnTimeout, PoweredOff
from tests.fakes.hypervisor import FakeDomain, FakeHypervisor, FakeMachine, GuestBehaviour


class Restarting(FakeHypervisor):
    """A libvirtd that does not answer a few times."""

    def __init__(self, machine: FakeMachine, *, down_for: int) -> None:
        super().__init__(machine)
        self.down_for = down_for

    def wait_off(self, uuid: str, timeout_s: float) -> bool:
        if self.down_for:
            self.down_for -= 1
            raise HypervisorUnreachable("libvirtd is being restarted")
        return super().wait_off(uuid, timeout_s)


@pytest.fixture
def vm(tmp_path: Path) -> tuple[FakeMachine, FakeDomain]:
    machine = FakeMachine(tmp_path)
    image = tmp_path / "a"
    image.write_bytes(bytes(4096))
    domain = machine.define("web", {"vda": (image, "raw")})
    domain.state = PowerState.RUNNING
    return machine, domain


async def _power_off(host: FakeHypervisor, uuid: str, on_timeout: OnTimeout, timeout_s: float = 0.3) -> PoweredOff:
    return await power.power_off(host, Threads(), uuid, timeout_s=timeout_s, on_timeout=on_timeout)


async def test_a_guest_that_obeys_is_not_forced(vm: tuple[FakeMachine, FakeDomain]) -> None:
    answer = await _power_off(FakeHypervisor(vm[0]), vm[1].uuid, OnTimeout.FORCE, 20)
    assert (answer.was_running, answer.forced) == (True, False)
    assert not (await _power_off(FakeHypervisor(vm[0]), vm[1].uuid, OnTimeout.FORCE)).was_running


async def test_a_deaf_guest_goes_on_running_or_is_forced_as_was_told(vm: tuple[FakeMachine, FakeDomain]) -> None:
    machine, domain = vm
    domain.guest = GuestBehaviour.IGNORES
    with pytest.raises(ShutdownTimeout):
        await _power_off(FakeHypervisor(machine), domain.uuid, OnTimeout.ABORT)
    host = FakeHypervisor(machine)
    assert host.state(domain.uuid) is PowerState.RUNNING
    assert (await _power_off(host, domain.uuid, OnTimeout.FORCE)).forced
    assert host.state(domain.uuid) is PowerState.OFF


async def test_bitmaps_are_saved_before_anything_is_killed(vm: tuple[FakeMachine, FakeDomain]) -> None:
    machine, domain = vm
    domain.guest = GuestBehaviour.IGNORES
    domain.disks["vda"].bitmaps["b"] = []
    answer = await _power_off(FakeHypervisor(machine), domain.uuid, OnTimeout.FORCE)
    assert (answer.forced, answer.killed) == (True, False)
    assert domain.disks["vda"].bitmaps == {"b": []}


async def test_qemu_that_does_not_end_is_killed_after_its_time_and_that_is_told(
    vm: tuple[FakeMachine, FakeDomain],
) -> None:
    machine, domain = vm
    domain.guest, domain.qemu_hangs = GuestBehaviour.IGNORES, True
    domain.disks["vda"].bitmaps["b"] = []
    answer = await power.power_off(
        FakeHypervisor(machine), Threads(), domain.uuid, timeout_s=0.1, on_timeout=OnTimeout.FORCE, kill_after_s=0.2
    )
    assert (answer.forced, answer.killed) == (True, True)
    assert answer.elapsed_s >= 0.3
    assert domain.disks["vda"].bitmaps == {"b": None}
    assert domain.state is PowerState.OFF


@pytest.mark.parametrize("state", [PowerState.PAUSED, PowerState.SUSPENDED, PowerState.CRASHED])
async def test_a_guest_that_cannot_answer_is_forced_at_once_if_that_was_told(
    vm: tuple[FakeMachine, FakeDomain], state: PowerState
) -> None:
    machine, domain = vm
    domain.state = state
    with pytest.raises(HypervisorError, match="cannot answer"):
        await _power_off(FakeHypervisor(machine), domain.uuid, OnTimeout.ABORT)
    assert domain.state is state
    assert (await _power_off(FakeHypervisor(machine), domain.uuid, OnTimeout.FORCE, 600)).forced
    assert domain.state is PowerState.OFF


async def test_a_libvirtd_that_comes_back_in_time_is_waited_for(
    vm: tuple[FakeMachine, FakeDomain], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(power, "WAIT_SLICE_S", 0.01)
    vm[1].slow_s = 0.0
    answer = await _power_off(Restarting(vm[0], down_for=5), vm[1].uuid, OnTimeout.ABORT, 20)
    assert not answer.forced


async def test_a_libvirtd_that_stays_away_is_what_is_told_and_nothing_is_forced(
    vm: tuple[FakeMachine, FakeDomain], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(power, "WAIT_SLICE_S", 0.01)
    vm[1].guest = GuestBehaviour.IGNORES
    with pytest.raises(HypervisorUnreachable):
        await _power_off(Restarting(vm[0], down_for=10**9), vm[1].uuid, OnTimeout.FORCE)
    assert vm[1].state is PowerState.RUNNING


class Stuck(FakeHypervisor):
    """A QEMU that hears nothing: libvirt waits for its answer until it is killed."""

    def __init__(self, machine: FakeMachine) -> None:
        super().__init__(machine)
        self.killed = threading.Event()
        self.asked = 0

    def request_shutdown(self, uuid: str) -> None:
        self.asked += 1
        self.killed.wait(30)
        raise HypervisorError("libvirt says: the domain is being destroyed")

    def force_off(self, uuid: str, *, graceful: bool) -> None:
        if graceful:
            raise HypervisorError("failed to terminate process with SIGTERM")
        super().force_off(uuid, graceful=graceful)
        self.killed.set()


async def test_a_qemu_that_never_answers_is_killed_after_its_time(vm: tuple[FakeMachine, FakeDomain]) -> None:
    host = Stuck(vm[0])
    with trio.fail_after(20):
        answer = await power.power_off(
            host, Threads(), vm[1].uuid, timeout_s=0.2, on_timeout=OnTimeout.FORCE, kill_after_s=0.1
        )
    assert (answer.forced, answer.killed, host.asked) == (True, True, 1)


async def test_a_qemu_that_never_answers_is_left_alone_where_forcing_was_not_chosen(
    vm: tuple[FakeMachine, FakeDomain],
) -> None:
    host = Stuck(vm[0])
    with trio.fail_after(20), pytest.raises(ShutdownTimeout):
        await power.power_off(host, Threads(), vm[1].uuid, timeout_s=0.2, on_timeout=OnTimeout.ABORT)
    assert not host.killed.is_set()
    host.killed.set()


class EndsWhileAsked(FakeHypervisor):
    """QEMU goes, and with it its monitor, while libvirt asks it to shut the guest down; or the question just fails."""

    ends = True

    def request_shutdown(self, uuid: str) -> None:
        if self.ends:
            super().request_shutdown(uuid)
        raise HypervisorError("Unable to read from monitor: Connection reset by peer")


async def test_a_guest_that_went_off_while_it_was_asked_did_as_it_was_told(vm: tuple[FakeMachine, FakeDomain]) -> None:
    answer = await _power_off(EndsWhileAsked(vm[0]), vm[1].uuid, OnTimeout.ABORT, 20)
    assert (answer.was_running, answer.forced) == (True, False)


async def test_a_question_that_fails_while_the_guest_stays_on_is_an_error(vm: tuple[FakeMachine, FakeDomain]) -> None:
    host = EndsWhileAsked(vm[0])
    host.ends = False
    with pytest.raises(HypervisorError, match="monitor"):
        await _power_off(host, vm[1].uuid, OnTimeout.ABORT, 20)
