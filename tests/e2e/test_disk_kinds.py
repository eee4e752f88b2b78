"""Every source kind onto every target kind, through whole failbacks on real hosts, compared by ``qemu-img compare``.

One pair of VMs carries several cells at once, a disk each; vda's guest writes all the while.
"""

from __future__ import annotations

import contextlib
import shutil
import string
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.lab import console, disks
from tests.lab.domain import LabDisk
from tests.lab.kinds import SOURCE_KINDS, TARGET_KINDS, disk_of, format_of
from tests.lab.site import LabPair, LabVm, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

SIZE_BYTES = 8 * disks.MIB
CELLS = [(source, target) for source in SOURCE_KINDS for target in TARGET_KINDS]
AT_ONCE = 15
"""Disks of one VM: what fits on the machine's PCI bus, and some room."""
GROUPS = [CELLS[first::6] for first in range(6)]


@contextlib.contextmanager
def kinds_pair(site: Site, name: str, cells: Sequence[tuple[str, str]]) -> Iterator[LabPair]:
    """A registered pair, failed over, with one disk for each cell (source kind, target kind)."""
    assert len(cells) <= AT_ONCE
    with contextlib.ExitStack() as stack:
        sides: list[list[LabDisk]] = [[], []]
        folders = [host.images / name for host in (site.production, site.dr)]
        for folder in folders:
            folder.mkdir()
            folder.chmod(0o777)
        for number, (source, target) in enumerate(cells):
            letter = f"vd{string.ascii_lowercase[number]}"
            before, after = folders[1] / f"{letter}.before", folders[1] / f"{letter}.after"
            # No multiple of a cluster; of a sector of 4096 bytes it must be one.
            disks.make_blank(before, "raw", SIZE_BYTES + 4096 * number, seed=number, content_bytes=3 * disks.MIB)
            shutil.copy(before, after)
            disks.diverge(after, "raw", seed=number)
            for side, (kind, content) in enumerate(((target, before), (source, after))):
                path = stack.enter_context(disk_of(kind, content, folders[side], letter))
                sides[side].append(LabDisk(letter, path, format_of(kind), "none" if number else "raw"))
        # A monitor's socket stands beside the first disk: a file, not a device.
        original = site.define(site.production, name, sides[0], role="reader")
        replica = site.define(site.dr, f"{name}-replica", sides[1], role="writer")
        site.failback("register", name, "--original", f"prod/{name}", "--replica", f"dr/{name}-replica")
        replica.start()
        console.wait_for_writes(replica.log, "vda", 2)
        site.failback("failover", name)
        yield LabPair(name, original, replica)
        for vm in (original, replica):
            if vm.is_running():
                vm.host.virsh("destroy", vm.name)


def _standing(vms: Sequence[LabVm]) -> dict[Path, tuple[int, int, int]]:
    """Owner, group and mode of every image."""
    found = [disk.path.stat() for vm in vms for disk in vm.disks]
    paths = [disk.path for vm in vms for disk in vm.disks]
    return {path: (stat.st_uid, stat.st_gid, stat.st_mode) for path, stat in zip(paths, found, strict=True)}


@pytest.mark.parametrize("group", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, len(GROUPS)))])
def test_every_source_kind_goes_home_to_every_target_kind(site: Site, group: int) -> None:
    with kinds_pair(site, f"kinds-{group}", GROUPS[group]) as pair:
        pair.original.disks[0].path.stat()
        site.failback("start", "--yes", "--foreground", "--no-power-on", "--shutdown-timeout", "60s", pair.name)
        for cell, a, b in zip(GROUPS[group], pair.original.disks, pair.replica.disks, strict=True):
            try:
                disks.assert_same(a.path, a.format, b.path, b.format, locked=True)
            except AssertionError as error:
                raise AssertionError(f"{cell[0]} onto {cell[1]}: {error}") from error
        site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
        assert pair.replica.sources() == {disk.target: disk.path for disk in pair.replica.disks}
        for disk in pair.original.disks:
            if disk.format == "qcow2":
                subprocess.run(["qemu-img", "check", "-q", str(disk.path)], check=True, timeout=60)


def test_owner_and_mode_of_every_image_are_what_they_were(site: Site) -> None:
    with kinds_pair(site, "owners", [("raw", "qcow2-v3"), ("qcow2-v3", "raw"), ("chain", "raw")]) as pair:
        for number, vm in enumerate((pair.original, pair.replica)):
            for disk in vm.disks:
                disk.path.chmod(0o640 if number else 0o660)
        before = _standing([pair.original, pair.replica])
        for ending in (("undo",), ("commit", "--restore-point", "drop")):
            site.failback("start", "--yes", "--foreground", "--no-power-on", "--shutdown-timeout", "60s", pair.name)
            site.failback(ending[0], pair.name, *ending[1:], "--yes")
            assert _standing([pair.original, pair.replica]) == before
