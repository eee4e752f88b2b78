"""The disks of the demo: an original's, and how the replica's came to differ from them."""

from __future__ import annotations

import random
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.lab import disks
from tests.lab.disks import MIB, ODD_BYTES, SECTOR_BYTES
from tests.lab.domain import LabDisk

SYSTEM_BYTES = 512 * MIB
SYSTEM_CONTENT_BYTES = 320 * MIB
DATA_BYTES = 192 * MIB + ODD_BYTES
DATA_CONTENT_BYTES = 120 * MIB
NEW_FILES = 12
NEW_FILE_BYTES = 2 * MIB
GAPS = 15  # the guest's 16 slots are spread evenly over a bare disk (tests/lab/README.md)
DEBUGFS = "/sbin/debugfs"


def make_original(folder: Path) -> list[LabDisk]:
    """``vda``: qcow2 with an ext4 file system; ``vdb``: raw, without one, of a size that no block divides."""
    system = LabDisk("vda", folder / "vda.qcow2", "qcow2", "ext4")
    data = LabDisk("vdb", folder / "vdb.raw", "raw", "raw")
    disks.make_ext4(system.path, system.format, SYSTEM_BYTES, seed=1, content_bytes=SYSTEM_CONTENT_BYTES)
    disks.make_blank(data.path, data.format, DATA_BYTES, seed=2, content_bytes=DATA_CONTENT_BYTES)
    return [system, data]


def make_replica(original: Sequence[LabDisk], folder: Path) -> list[LabDisk]:
    """What became of the original's disks on the DR host: equal at first, then changed as work goes on."""
    system, data = (replace(disk, path=folder / disk.path.name) for disk in original)
    _copy_with_other_files(original[0], system)
    disks.copy(original[1].path, original[1].format, data.path, data.format)
    _change_blocks(data)
    return [system, data]


def _copy_with_other_files(disk: LabDisk, twin: LabDisk) -> None:
    """Copy an ext4 disk; in the copy, new files come and one goes, by e2fsprogs' ``debugfs``."""
    with tempfile.TemporaryDirectory(dir=twin.path.parent) as scratch:
        image = Path(scratch) / "image"
        disks.copy(disk.path, disk.format, image, "raw")
        orders = ["rm file0"]
        for number in range(NEW_FILES):
            content = Path(scratch) / f"new{number}"
            content.write_bytes(random.Random(100 + number).randbytes(NEW_FILE_BYTES))
            orders.append(f"write {content} new{number}")
        script = Path(scratch) / "orders"
        script.write_text("".join(f"{order}\n" for order in orders))
        done = subprocess.run(
            [DEBUGFS, "-w", "-f", str(script), str(image)], capture_output=True, text=True, timeout=120, check=True
        )
        failed = [line for line in done.stderr.splitlines() if not line.startswith("debugfs 1.")]
        assert not failed, f"debugfs on {image}: {failed}"
        disks.copy(image, "raw", twin.path, twin.format)


def _change_blocks(disk: LabDisk) -> None:
    """Data, zeroes and discards on a closed bare disk, clear of what the guest keeps there."""
    dice = random.Random(7)
    gap = disks.virtual_size(disk.path, disk.format) // GAPS
    orders = []
    for number in range(GAPS):
        length = dice.randrange(1, 2 * MIB // SECTOR_BYTES) * SECTOR_BYTES
        offset = (number * gap + gap // 4) // SECTOR_BYTES * SECTOR_BYTES
        change = dice.choices([f"write -P {dice.randrange(1, 256)}", "write -z", "discard"], [4, 1, 1])[0]
        orders.append(f"{change} {offset} {length}")
    disks.scatter_writes(disk.path, disk.format, orders)
