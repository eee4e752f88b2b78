"""What of a VM is no disk, as every hypervisor tells it and lets it be changed."""

from __future__ import annotations

import pytest

from agent.errors import HypervisorError, NoSuchDomain
from agent.virt.definition_edit import add_disk, apply_changes, remove_disk
from agent.virt.domain_xml import parse_domain
from agent.virt.names import ImageRef
from agent.virt.seam import StateRole
from tests.contract.hypervisor_rigs import Rig

NOBODY = "00000000-0000-4000-8000-000000000000"
PASSWORD = "a2UtdGhp"  # no more than 8 characters
NIC = "<interface type='user'><mac address='52:54:00:00:00:01'/><model type='virtio'/></interface>"


def test_a_definition_names_the_vm_and_its_disks(rig: Rig) -> None:
    vm = rig.vm()
    facts = parse_domain(rig.host.definition(vm.uuid))
    assert (facts.uuid, facts.name) == (vm.uuid, vm.name)
    assert {disk.target: disk.image.path for disk in facts.disks if disk.image} == {
        target: path for target, (path, _) in vm.disks.items()
    }


def test_secrets_are_told_only_where_they_are_asked_for_and_outlive_a_change(rig: Rig) -> None:
    vm = rig.vm()
    rig.set_console_password(vm, PASSWORD)
    assert PASSWORD not in rig.host.definition(vm.uuid)
    whole = rig.host.definition(vm.uuid, secrets=True)
    assert PASSWORD in whole
    changed = rig.host.define(vm.uuid, apply_changes(whole, ["<memory unit='KiB'>163840</memory>"]))
    assert PASSWORD in changed


def test_what_was_changed_is_so_and_the_old_definition_comes_back_to_the_letter(rig: Rig) -> None:
    vm = rig.vm()
    before = rig.host.definition(vm.uuid, secrets=True)
    elements = ["<memory unit='KiB'>163840</memory>", "<currentMemory unit='KiB'>163840</currentMemory>"]
    after = rig.host.define(vm.uuid, apply_changes(before, [*elements, "<vcpu>2</vcpu>", NIC]))
    assert after == rig.host.definition(vm.uuid, secrets=True) != before
    assert "163840" in after
    assert "52:54:00:00:00:01" in after
    assert rig.host.define(vm.uuid, before) == before


def test_a_disk_is_added_to_a_definition_and_taken_out_again(rig: Rig) -> None:
    vm = rig.vm()
    before = rig.host.definition(vm.uuid, secrets=True)
    path = vm.folder / "new.raw"
    path.write_bytes(bytes(1 << 20))
    rig.host.define(
        vm.uuid, add_disk(before, "vdc", ImageRef(path=path, format="raw"), "<disk><target bus='virtio'/></disk>")
    )
    added = next(disk for disk in rig.host.inspect(vm.uuid).disks if disk.target == "vdc")
    assert [(image.path, image.format) for image in added.chain] == [(path, "raw")]
    without = remove_disk(rig.host.definition(vm.uuid, secrets=True), "vdc", path)
    assert without is not None
    rig.host.define(vm.uuid, without)
    assert {disk.target for disk in rig.host.inspect(vm.uuid).disks} == set(vm.disks)


def test_a_running_vms_definition_is_not_changed(rig: Rig) -> None:
    vm = rig.vm()
    before = rig.host.definition(vm.uuid, secrets=True)
    rig.boot(vm)
    with pytest.raises(HypervisorError, match=r"off"):
        rig.host.define(vm.uuid, before)
    rig.host.force_off(vm.uuid, graceful=True)


def test_another_vms_definition_is_refused(rig: Rig) -> None:
    vm = rig.vm()
    other = rig.host.definition(vm.uuid, secrets=True).replace(vm.uuid, NOBODY)
    with pytest.raises(HypervisorError):
        rig.host.define(vm.uuid, other)
    with pytest.raises(NoSuchDomain):
        rig.host.find(NOBODY)


def test_a_vm_with_bios_and_no_tpm_has_no_state_beside_its_disks(rig: Rig) -> None:
    assert rig.host.state_places(rig.vm().uuid) == ()


def test_firmware_variables_and_tpm_state_are_found_where_the_vm_keeps_them(rig: Rig) -> None:
    vm = rig.vm()
    rig.give_state(vm)
    domain = rig.host.inspect(vm.uuid)
    assert (domain.firmware, domain.has_tpm) == ("uefi", True)
    places = {place.role: place for place in rig.host.state_places(vm.uuid)}
    assert set(places) == set(StateRole)
    rig.host.power_on(vm.uuid)
    rig.host.force_off(vm.uuid, graceful=True)
    nvram, tpm = places[StateRole.NVRAM], places[StateRole.TPM]
    assert (nvram.format, nvram.problem, tpm.format, tpm.problem) == ("raw", "", "2.0", "")
    assert nvram.path.stat().st_size > 0
    assert any(not path.name.startswith(".") for path in tpm.path.iterdir())


def test_networks_are_named_with_their_kind(rig: Rig) -> None:
    assert all(name.partition(":")[0] in ("network", "bridge") for name in rig.host.networks())
