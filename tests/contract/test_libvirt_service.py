"""The real hypervisor as production has it: libvirtd in a process of its own that may restart, QEMU not as root."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import uuid as uuids
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from agent.disk.bitmaps import bitmaps_of, dirty_bytes, remove_bitmap
from agent.disk.lock import hold_frozen
from agent.errors import HypervisorError
from agent.virt.libvirt_host import LibvirtHost
from agent.virt.seam import EarlierView, PowerState, View
from tests.lab import console
from tests.lab.domain import LabDisk, domain_xml
from tests.lab.guest import Guest
from tests.lab.private_host import PrivateHost

pytestmark = [pytest.mark.real, pytest.mark.root]

DISKS: dict[str, Literal["qcow2", "raw"]] = {"vda": "qcow2", "vdb": "raw"}
UUID = str(uuids.uuid4())
OFF_TIMEOUT_S = 60.0
V1, V2 = "failback-000000000001", "failback-000000000002"


@pytest.fixture
def machine(lab_folder: Path, lab_cache: Path, guest: Guest) -> Iterator[PrivateHost]:
    """A host whose QEMU runs as libvirt's own user, with one VM that is off."""
    with PrivateHost("service", lab_folder / "h", "10.77.0.1", qemu_user="libvirt-qemu", cache_dir=lab_cache) as host:
        disks = []
        for target, image_format in DISKS.items():
            path = host.images / f"disk-{target}"
            subprocess.run(["qemu-img", "create", "-q", "-f", image_format, str(path), "4194816"], check=True)
            disks.append(LabDisk(target, path, image_format))
        host.define(domain_xml("service", UUID, disks, host.adopt(guest), host.images / "console.log"))
        yield host


def _host(machine: PrivateHost) -> LibvirtHost:
    # The domain directories by a path that means the same outside the host, where this test is, and inside.
    return LibvirtHost(machine.uri, scratch_dir=machine.images, lib_dir=machine.folder / "lib/qemu")


def _digest_of(view: View, target: str) -> str:
    handle: Any = importlib.import_module("nbd").NBD()
    handle.set_export_name(view.exports[target])
    handle.connect_unix(str(view.socket))
    try:
        return hashlib.blake2b(handle.pread(handle.get_size(), 0)).hexdigest()
    finally:
        handle.shutdown()


def test_unprivileged_qemu_and_libvirtd_that_restarts(machine: PrivateHost) -> None:
    log = machine.images / "console.log"
    files = {path.name for path in machine.images.iterdir()} | {log.name}
    host = _host(machine)
    host.power_on(UUID)
    console.wait_ready(log, 120)
    for target in DISKS:
        console.wait_for_writes(log, target, 1)
    view = host.open_view(UUID, list(DISKS), "v1")
    frozen = {target: _digest_of(view, target) for target in DISKS}

    machine.stop_libvirtd(kill=True)
    with pytest.raises(HypervisorError, match="libvirt"):
        host.state(UUID)
    with pytest.raises(HypervisorError, match="Cannot connect to libvirt"):
        host.state(UUID)
    machine.start_libvirtd()
    assert host.state(UUID) is PowerState.RUNNING
    for target in DISKS:
        console.wait_for_writes(log, target, 1)
    assert {target: _digest_of(view, target) for target in DISKS} == frozen
    assert host.inspect(UUID).job == "backup"

    restarted = _host(machine)
    restarted.close_view(UUID, "v1")
    assert restarted.inspect(UUID).job is None
    assert {path.name for path in machine.images.iterdir()} == files
    restarted.close()

    host.request_shutdown(UUID)
    assert host.wait_off(UUID, OFF_TIMEOUT_S)
    overlays = host.protect(UUID, list(DISKS), "failback-a", "made by failback")
    host.power_on(UUID)
    host.force_off(UUID, graceful=True)
    host.unprotect(UUID, "failback-a", overlays)
    assert {path.name for path in machine.images.iterdir()} == files
    host.power_on(UUID)
    host.force_off(UUID, graceful=False)
    host.close()


def test_records_outlive_libvirtd_the_view_and_a_graceful_end(machine: PrivateHost) -> None:
    """With QEMU as libvirt's own user, and libvirtd killed while a tracked view is open."""
    log = machine.images / "console.log"
    host = _host(machine)
    host.power_on(UUID)
    console.wait_ready(log, 120)
    first = host.open_view(UUID, list(DISKS), V1, checkpoint=True)
    assert first.tracked == frozenset({"vda"})
    machine.stop_libvirtd(kill=True)
    machine.start_libvirtd()
    console.wait_for_writes(log, "vda", 2)
    host = _host(machine)
    host.close_view(UUID, V1)
    image = first.images["vda"]
    since = {"vda": EarlierView(tag=V1, path=image.path, identity=image.identity)}
    second = host.open_view(UUID, list(DISKS), V2, checkpoint=True, since=since)
    assert (second.since, second.tracked) == ({"vda": V1}, frozenset({"vda"}))
    assert second.scratch["vda"].exists()
    console.wait_for_writes(log, "vda", 1)
    host.close_view(UUID, V2)
    host.drop_checkpoints(UUID, [V2])
    host.request_shutdown(UUID)
    assert host.wait_off(UUID, OFF_TIMEOUT_S)
    (bitmap,) = bitmaps_of(image.path, "qcow2")
    assert (bitmap.name, bitmap.in_use, bitmap.enabled) == (V2, False, True)
    host.drop_checkpoints(UUID)
    held = hold_frozen(image.path)
    counted = dirty_bytes("vda", image.path, "qcow2", V2, machine.folder)
    assert 0 < counted <= image.virtual_size_bytes
    remove_bitmap(image.path, "qcow2", V2, locked_by_us=True)
    assert bitmaps_of(image.path, "qcow2") == ()
    held.close()
    host.close()


def test_libvirtd_that_restarts_between_two_calls_is_not_noticed(machine: PrivateHost) -> None:
    host = _host(machine)
    assert host.state(UUID) is PowerState.OFF
    machine.stop_libvirtd()
    machine.start_libvirtd()
    assert host.set_autostart(UUID, True) is False
    assert host.inspect(UUID).autostart
    host.close()


def test_domain_that_ends_by_itself_wakes_the_waiter(machine: PrivateHost) -> None:
    """Events come from libvirtd, so that a wait ends with the guest and not with the next look."""
    host = _host(machine)
    host.power_on(UUID)
    console.wait_ready(machine.images / "console.log", 120)
    before = host._connection.watch.count(UUID)
    machine.virsh("shutdown", "service", "--mode", "acpi")
    assert host.wait_off(UUID, OFF_TIMEOUT_S)
    assert host._connection.watch.wait_beyond(UUID, before, OFF_TIMEOUT_S)
    host.close()
