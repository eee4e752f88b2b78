"""What must hold, told by the guests' own consoles, by files and by /proc: never by failback itself."""

from __future__ import annotations

import json
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.demo.hosts import DemoHost
from tests.lab import console
from tests.lab.console import Record
from tests.lab.domain import LabDisk

SHOWN = 8  # characters of a checksum that are shown; all are compared


@dataclass(frozen=True, slots=True)
class Proof:
    """One claim, whether it holds, and what was seen."""

    claim: str
    holds: bool
    seen: str


def left_by(host: DemoHost) -> dict[str, Record]:
    """The last record on each disk, as the guest said when it powered off."""
    return console.last(host.console)


def clean_end(host: DemoHost, left: dict[str, Record], disks: Sequence[LabDisk]) -> Proof:
    """The guest powered off by itself, its last words name its last write on each disk, and it never complained."""
    wrote = console.wrote(host.console)
    complaints = console.failures(host.console)
    holds = (
        not complaints
        and set(left) == {disk.target for disk in disks}
        and all(record.consistent and record.sequence == wrote.get(disk) for disk, record in left.items())
    )
    return Proof(f"{host.vm} powered off by itself after its last write", holds, "; ".join(complaints) or _told(left))


def same_history(host: DemoHost, left: dict[str, Record], claim: str) -> Proof:
    """The last boot of the guest found on each disk exactly the record in `left`: number and chained checksum."""
    found = console.found(host.console)
    holds = bool(left) and found == left and all(record.consistent for record in left.values())
    seen = _told(found) if holds else f"found {_told(found)}; must be {_told(left)}"
    return Proof(claim, holds, seen)


def newer(left: dict[str, Record], stale: dict[str, Record], original: DemoHost) -> Proof:
    """Every disk's last record is newer than what the original had at the disaster: nothing else could prove much."""
    holds = bool(stale) and set(left) == set(stale) and all(left[d].sequence > stale[d].sequence for d in stale)
    return Proof(f"that is newer than what {original.vm} had when {original.name} was lost", holds, _told(stale))


def works(host: DemoHost, left: dict[str, Record]) -> Proof:
    """The guest goes on with the history: its next writes follow the record in `left`."""
    host.wait_for_work(2)
    wrote = console.wrote(host.console)
    holds = all(wrote.get(disk, 0) > record.sequence for disk, record in left.items())
    return Proof(f"{host.vm} goes on from there", holds, f"wrote {_numbers(wrote)}")


def only_runs(host: DemoHost, other: DemoHost) -> Proof:
    """A QEMU process on one host, none on the other."""
    seen = f"{host.guests} QEMU on {host.name}, {other.guests} on {other.name}"
    return Proof(f"{host.vm} runs, {other.vm} is off", (host.guests, other.guests) == (1, 0), seen)


def on_its_own_disks(host: DemoHost, disks: Sequence[LabDisk]) -> Proof:
    """The VM's definition names its own images, they have no backing file, and there is no other image, no snapshot."""
    images = {disk.target: disk.path for disk in disks}
    strangers = sorted(path.name for path in host.images.iterdir() if path not in images.values())
    snapshots = [path.stem for path in (host.root / "lib/qemu/snapshot" / host.vm).glob("*.xml")]
    backed = [disk.target for disk in disks if _has_backing_file(disk)]
    holds = _defined(host) == images and not (strangers or snapshots or backed)
    seen = ", ".join(path.name for path in images.values())
    if not holds:
        seen = f"defined {_defined(host)}, other files {strangers}, snapshots {snapshots}, with backing file {backed}"
    return Proof(f"{host.vm} is on its own disks, without snapshot or overlay", holds, seen)


def _defined(host: DemoHost) -> dict[str, Path]:
    """Images by target in the definition that libvirt keeps on disk."""
    definition = ElementTree.parse(host.root / "etc/qemu" / f"{host.vm}.xml")
    found = {}
    for disk in definition.iterfind("devices/disk"):
        source, target = disk.find("source"), disk.find("target")
        assert source is not None
        assert target is not None
        found[target.get("dev", "")] = Path(source.get("file", ""))
    return found


def _has_backing_file(disk: LabDisk) -> bool:
    done = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", "-f", disk.format, str(disk.path)],
        capture_output=True,
        check=True,
        timeout=60,
    )
    return "backing-filename" in json.loads(done.stdout)


def _told(records: dict[str, Record]) -> str:
    return ", ".join(f"{disk} {r.sequence} {r.checksum[:SHOWN]}" for disk, r in sorted(records.items())) or "nothing"


def _numbers(records: dict[str, Record] | dict[str, int]) -> str:
    numbers = {disk: value if isinstance(value, int) else value.sequence for disk, value in records.items()}
    return ", ".join(f"{disk} {number}" for disk, number in sorted(numbers.items()))
