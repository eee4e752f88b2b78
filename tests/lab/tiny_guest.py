"""A guest of half a kilobyte that writes and obeys its power button: up in an instant, asleep between two writes.

For tests that power VMs on and off hundreds of times. Its program, with what it does where, is ``tiny-guest.s`` beside
this file; the bytes are kept here so that no assembler is needed. It speaks as the lab's other guest does (README.md):
``FOUND``, ``READY``, ``WROTE``, ``LAST``, with ``ok`` for a checksum. Its record is a count in sector `RECORD_SECTOR`
of both disks; each write fills one of 64 slots behind it first. It flushes nothing: its images must have `GUEST_BYTES`
from `GUEST_OFFSET` on allocated, as `tests.faults.rig` makes them.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from tests.lab.domain import MONITOR, LabDisk, disk_xml

SECTOR_BYTES = 512
RECORD_SECTOR = 2047
GUEST_OFFSET = RECORD_SECTOR * SECTOR_BYTES
GUEST_BYTES = (1 + 64 * 16) * SECTOR_BYTES
"""The part of both disks that it writes to; nothing else is touched."""
MEMORY_MIB = 16
_CODE = (
    "62ZIZHJTAgIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAACMHt4DugIGuAAB7/uzYscG4AP/B7RC6KEAZqEABmaj1AO+igPoqAD+y4D7YXPgvq0D6NgA9LoABu32xAF1XYA+"
    "6AMAdO/+DtEDdenGBtEDBGb/BtQDZqHUA78ABh4HuYAA/Gbzq7NhodQDg+A/weAEBQAIo+ADtEPoPwDHBuAD/we0Q+g0AMcGzwOrA76QA+g9AP7D"
    "gPtids7rmccGzwOoA7NhvpYD6CYA/sOA+2J287oEBrgAIO/06/2I2oDCHzDAvtgDU80TW3NNvr0D6z1WvoAD6DYAXugyAIgengO+mwPoKABmodQD"
    "v6YDuQYAZjHSZr4KAAAAZvf2gMIwiBVP4uy+oQPoBACLNs8DrITAdAa6+APu6/XDRkFJTEJBQ0sgAEZPVU5EAFdST1RFAExBU1QAIHZkYSAAMDAw"
    "MDAwACBvawoARkFJTEJBQ0sgUkVBRFkKAEZBSUxCQUNLIEZBSUwgaW8KAKgDBGaQAAAAABAAAQAABgAA/wcAAAAAAAAB"
)
_START = 0x200
_IMAGE_BYTES = 0x800


def tiny_kernel(*, writes: bool) -> bytes:
    """What QEMU boots; one that does not write only reads its records and answers the power button."""
    code = bytearray(base64.b64decode(_CODE))
    code[-1] = writes
    image = bytearray(_IMAGE_BYTES)
    image[0x1F1] = 1
    image[0x1FE:0x200] = b"\x55\xaa"
    image[_START : _START + len(code)] = code
    return bytes(image)


def tiny_domain_xml(
    name: str, uuid: str, disks: Sequence[LabDisk], kernel: Path, console_log: Path, monitor: Path
) -> str:
    """The XML of a persistent domain that boots `kernel`; see `tests.lab.domain.domain_xml` for the rest.

    Every disk is in the boot order, or the firmware would not give it to the guest.
    """
    return f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{escape(name)}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{MEMORY_MIB}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{escape(str(kernel))}</kernel>
  </os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
{"".join(disk_xml(disk, boot=number) for number, disk in enumerate(disks, 1))}    <controller type='usb' model='none'/>
    <serial type='file'><source path={quoteattr(str(console_log))} append='on'/><target port='0'/></serial>
    <memballoon model='none'/>
  </devices>
{MONITOR.format(path=escape(str(monitor)))}</domain>
"""
