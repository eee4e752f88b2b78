"""What only the hypervisor in memory can promise: guests that misbehave on order, and time that costs none."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.errors import HypervisorError
from agent.virt.seam import PowerState
from tests.contract.hypervisor_rigs import FakeRig
from tests.fakes.hypervisor import GuestBehaviour


def test_slow_guest_of_the_fake_takes_its_time_without_sleeping(lab_folder: Path) -> None:
    rig = FakeRig(lab_folder)
    vm = rig.vm()
    domain = rig.machine.domains[vm.uuid]
    domain.guest, domain.slow_s = GuestBehaviour.SLOW, 30.0
    rig.boot(vm)
    rig.host.request_shutdown(vm.uuid)
    assert not rig.host.wait_off(vm.uuid, 20)
    rig.host.request_shutdown(vm.uuid)  # asking again does not start anew
    assert rig.host.wait_off(vm.uuid, 20)
    assert rig.machine.now_s == 30.0


def test_hanging_qemu_of_the_fake_needs_the_hard_way(lab_folder: Path) -> None:
    rig = FakeRig(lab_folder)
    vm = rig.vm()
    rig.machine.domains[vm.uuid].qemu_hangs = True
    rig.boot(vm)
    with pytest.raises(HypervisorError, match="does not end"):
        rig.host.force_off(vm.uuid, graceful=True)
    rig.host.force_off(vm.uuid, graceful=False)
    assert rig.host.state(vm.uuid) is PowerState.OFF
