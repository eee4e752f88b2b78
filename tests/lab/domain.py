"""Domain XML of lab guests: software emulation, direct kernel boot, serial console into a file, no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

from tests.lab.guest import Guest

Role = Literal["writer", "reader", "idle", "filler"]

# ACPI: without `acpi` in the machine there is no power button. The rest makes software emulation boot sooner.
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check random.trust_cpu=on"


@dataclass(frozen=True, slots=True)
class LabDisk:
    """One disk of a lab domain.

    Attributes:
        target: name on the virtio bus: ``vda``, ``vdb`` …
        path: image file or block device.
        format: ``raw`` or ``qcow2``.
        contents: what the guest keeps its journal in: an ``ext4`` file system that is already there, ``raw`` sectors,
            or ``none`` to leave the disk alone.
        cache: QEMU's cache mode; ``none`` wants a raw size that is a multiple of the file system's 4 KiB.
    """

    target: str
    path: Path
    format: Literal["raw", "qcow2"]
    contents: Literal["ext4", "raw", "none"] = "raw"
    cache: str = "writeback"


def domain_xml(
    name: str,
    uuid: str,
    disks: Sequence[LabDisk],
    guest: Guest,
    console_log: Path,
    *,
    role: Role = "writer",
    rate: float | Literal["max"] = 4,
    ignore_acpi: bool = False,
    memory_mib: int = 128,
    machine: str = "pc",
    on_poweroff: str = "destroy",
    extra_devices: str = "",
    monitor: Path | None = None,
) -> str:
    """The XML of a persistent lab domain.

    Args:
        name: the domain's name.
        uuid: its UUID.
        disks: in the order of the bus; see `LabDisk`.
        guest: what boots.
        console_log: file that the guest's console is appended to.
        role: ``writer`` writes all the time; ``reader`` says what it finds and writes nothing of its own (though
            mounting may write); ``idle`` does not touch its disks; ``filler`` overwrites them whole, all the time.
        rate: rounds of writes per second (each disk once per round), for ``filler`` halves of a MiB; or ``max``.
        ignore_acpi: the guest ignores a shutdown request.
        memory_mib: memory of the guest.
        machine: QEMU's machine type.
        on_poweroff: libvirt's ``<on_poweroff>``.
        extra_devices: XML put into ``<devices>`` as it is.
        monitor: where QEMU shall offer a monitor of ours, for `tests.lab.monitor`; none without.
    """
    journal = "" if role == "idle" else ",".join(f"{d.target}:{d.contents}" for d in disks if d.contents != "none")
    arguments = [KERNEL_ARGUMENTS, f"failback.role={role}", f"failback.disks={journal}", f"failback.rate={rate}"]
    if ignore_acpi:
        arguments.append("failback.acpi=ignore")
    ours = "" if monitor is None else MONITOR.format(path=escape(str(monitor)))
    return f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{escape(name)}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine={quoteattr(machine)}>hvm</type>
    <kernel>{escape(str(guest.kernel))}</kernel>
    <initrd>{escape(str(guest.initrd))}</initrd>
    <cmdline>{escape(" ".join(arguments))}</cmdline>
  </os>
  <features><acpi/></features>
  <on_poweroff>{on_poweroff}</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
{"".join(disk_xml(disk) for disk in disks)}    <controller type='usb' model='none'/>
    <serial type='file'><source path={quoteattr(str(console_log))} append='on'/><target port='0'/></serial>
    <memballoon model='none'/>
{extra_devices}  </devices>
{ours}</domain>
"""


MONITOR = """  <qemu:commandline>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:{path},server=on,wait=off'/>
  </qemu:commandline>
"""


GUEST_AGENT = "    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\n"
"""Give the guest its agent's channel (`domain_xml`, `extra_devices`): it then answers as qemu-guest-agent would."""


def disk_xml(disk: LabDisk, *, boot: int | None = None) -> str:
    """A disk's part of the XML. `boot`: its place in the boot order; firmware leaves disks without one alone."""
    kind, attribute = ("block", "dev") if disk.path.is_block_device() else ("file", "file")
    return f"""    <disk type='{kind}' device='disk'>
      <driver name='qemu' type='{disk.format}' cache='{disk.cache}' discard='unmap'/>
      <source {attribute}={quoteattr(str(disk.path))}/>
      <target dev='{disk.target}' bus='virtio'/>{"" if boot is None else f"<boot order='{boot}'/>"}
    </disk>
"""
