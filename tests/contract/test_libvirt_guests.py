"""Guests that are asked through their agent, frozen for a view, or that write faster than a small scratch can take."""

from __future__ import annotations

import subprocess
import uuid as uuids
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import libvirt
import pytest

from agent.errors import DiskError
from agent.fences import FenceKeeper
from agent.ledger import Ledger
from agent.power import power_off
from agent.scratch import ScratchFull, ScratchLimits
from agent.sources import ViewDesk
from agent.threads import Threads
from agent.virt.libvirt_host import LibvirtHost
from agent.virt.seam import PowerState
from protocol.messages import OnTimeout
from tests.lab import console
from tests.lab.domain import GUEST_AGENT, LabDisk, Role, domain_xml
from tests.lab.guest import Guest

pytestmark = [pytest.mark.real]

MIB = 1 << 20
TAG = "failback-000000000001"


@dataclass
class Machine:
    """A VM with libvirt's hands on it, and ours."""

    host: LibvirtHost
    domain: Any
    uuid: str
    log: Path
    folder: Path

    def boot(self) -> None:
        self.host.power_on(self.uuid)
        console.wait_ready(self.log, 120)


class Machines:
    """Makes VMs, and removes them."""

    def __init__(self, administrator: Any, guest: Guest, folder: Path) -> None:
        self._administrator, self._guest, self._folder = administrator, guest, folder
        self._made: list[Machine] = []

    def make(
        self,
        disks: list[LabDisk],
        *,
        role: Role = "writer",
        rate: float | Literal["max"] = 4,
        ignore_acpi: bool = False,
        agent: bool = False,
    ) -> Machine:
        uuid = str(uuids.uuid4())
        log = self._folder / "console.log"
        extra = GUEST_AGENT if agent else ""
        xml = domain_xml(
            f"guests-{uuid[:8]}",
            uuid,
            disks,
            self._guest,
            log,
            role=role,
            rate=rate,
            ignore_acpi=ignore_acpi,
            extra_devices=extra,
        )
        domain = self._administrator.defineXML(xml)
        host = LibvirtHost(self._administrator.getURI(), scratch_dir=self._folder / "scratch")
        self._made.append(Machine(host, domain, uuid, log, self._folder))
        return self._made[-1]

    def close(self) -> None:
        for machine in self._made:
            if machine.domain.isActive():
                machine.domain.destroy()
            machine.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
            machine.host.close()


@pytest.fixture
def machines(administrator: Any, guest: Guest, lab_folder: Path) -> Iterator[Machines]:
    made = Machines(administrator, guest, lab_folder)
    try:
        yield made
    finally:
        made.close()


def _ext4(folder: Path) -> LabDisk:
    path = folder / "vda.qcow2"
    raw = folder / "vda.raw"
    subprocess.run(["truncate", "-s", "16M", str(raw)], check=True)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(raw)], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(path)], check=True)
    raw.unlink()
    return LabDisk("vda", path, "qcow2", "ext4")


def test_a_guest_deaf_to_acpi_is_shut_down_by_its_agent(machines: Machines, lab_folder: Path) -> None:
    machine = machines.make([_ext4(lab_folder)], ignore_acpi=True, agent=True)
    machine.boot()
    console.wait_for_writes(machine.log, "vda", 1)
    machine.host.request_shutdown(machine.uuid)
    assert machine.host.wait_off(machine.uuid, 60)
    assert "FAILBACK AGENT shutdown" in console.read(machine.log)
    assert set(console.last(machine.log)) == {"vda"}


def test_file_systems_are_frozen_for_the_view_and_write_again_after_it(machines: Machines, lab_folder: Path) -> None:
    machine = machines.make([_ext4(lab_folder)], agent=True)
    machine.boot()
    console.wait_for_writes(machine.log, "vda", 1)
    machine.host.freeze_guest(machine.uuid)
    machine.host.open_view(machine.uuid, ["vda"], TAG, checkpoint=True)
    machine.host.thaw_guest(machine.uuid)
    machine.host.thaw_guest(machine.uuid)
    console.wait_for_writes(machine.log, "vda", 2)
    said = console.read(machine.log)
    assert said.index("FAILBACK AGENT frozen") < said.index("FAILBACK AGENT thawed")
    machine.host.close_view(machine.uuid, TAG)


async def test_a_guest_that_hears_nothing_is_ended_so_that_its_bitmaps_are_saved(
    machines: Machines, lab_folder: Path
) -> None:
    machine = machines.make([_ext4(lab_folder)], ignore_acpi=True)
    machine.boot()
    machine.host.open_view(machine.uuid, ["vda"], TAG, checkpoint=True)
    machine.host.close_view(machine.uuid, TAG)
    answer = await power_off(
        machine.host, Threads(), machine.uuid, timeout_s=2, on_timeout=OnTimeout.FORCE, kill_after_s=60
    )
    assert (answer.was_running, answer.forced, answer.killed) == (True, True, False)
    (image,) = machine.host.inspect(machine.uuid).disks[0].chain
    assert image.bitmaps == (TAG,)
    assert not image.dirty


@pytest.fixture
def small(lab_folder: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = lab_folder / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
@pytest.mark.parametrize(("reserve_bytes", "rate"), [(4 * MIB, 4), (1, "max")], ids=["reserve", "no-reserve"])
def test_a_small_scratch_never_leaves_the_guest_paused(
    machines: Machines, lab_folder: Path, small: Path, reserve_bytes: int, rate: float | Literal["max"]
) -> None:
    """With a reserve the view is given up before the guest could be paused: it writes at most 2 MiB/s, so that the
    watch may come two seconds late. Without one a guest that fills the scratch in one go may be paused, and then goes
    on by itself; it may do so before the watch begins, and then no view is opened."""
    disk = lab_folder / "vda.raw"
    disk.write_bytes(b"x" * 32 * MIB)
    (small / "vda.raw").symlink_to(disk)  # scratch files go beside the disk as the domain names it
    machine = machines.make([LabDisk("vda", small / "vda.raw", "raw")], role="filler", rate=rate)
    events: list[int] = []

    def on_event(_connection: Any, _domain: Any, event: int, _detail: int, _opaque: object) -> None:
        events.append(event)

    connection = machine.domain.connect()
    watching = connection.domainEventRegisterAny(machine.domain, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_event, None)
    machine.boot()
    ledger = Ledger.open(lab_folder / "state")
    limits = ScratchLimits(used_percent=85 if reserve_bytes > 1 else 99, reserve_bytes=reserve_bytes)
    desk = ViewDesk(machine.host, FenceKeeper(ledger, machine.host), lab_folder, limits)
    try:
        try:
            opened = desk.open("web", machine.uuid, ["vda"], "r1-1")
        except ScratchFull:
            assert reserve_bytes == 1, "a slow guest filled the scratch before the watch began"
        else:
            _read_until_it_breaks(opened.disks["vda"])
            reason = desk.given_up(machine.uuid, "r1-1")
            assert reason is not None
            assert reason.code == "scratch-full"
            with pytest.raises(ScratchFull, match="given up"):
                desk.disks(machine.uuid, "r1-1")
        console.wait_for_line(machine.log, "FAILBACK FILLED vda", 60, after=len(console.read(machine.log)))
        assert machine.host.state(machine.uuid) is PowerState.RUNNING
        desk.close(machine.uuid, "r1-1")
        assert [path.name for path in small.iterdir()] == ["vda.raw"]
        pauses = events.count(libvirt.VIR_DOMAIN_EVENT_SUSPENDED)
        assert pauses <= events.count(libvirt.VIR_DOMAIN_EVENT_RESUMED)
        if reserve_bytes > 1:
            assert pauses == 0
    finally:
        connection.domainEventDeregisterAny(watching)
        desk.close_all()
        ledger.close()


def _read_until_it_breaks(disk: Any) -> None:
    buffer = memoryview(bytearray(64 * 1024))

    def read() -> None:
        for _ in range(100_000):
            disk.read_into(0, buffer)

    with pytest.raises(DiskError):
        read()
