"""The demo's proofs can fail: each is given what it must accept and what it must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.demo import proofs
from tests.demo.hosts import DemoHost
from tests.lab.console import Record
from tests.lab.domain import LabDisk

LEFT = {"vda": Record(5, "a" * 32), "vdb": Record(4, "b" * 32)}
DEFINITION = "<domain><devices>{}</devices></domain>"
DISK = "<disk><source file='{}'/><target dev='{}'/></disk>"


def boot(found: dict[str, Record], *more: str) -> str:
    """What a guest says that finds this and goes on."""
    lines = [f"FOUND {disk} {record.sequence} {record.checksum}" for disk, record in found.items()]
    return "".join(f"FAILBACK {line}\n" for line in [*lines, "READY", *more])


@pytest.fixture
def host(tmp_path: Path) -> DemoHost:
    return DemoHost("dr1", "web-replica", tmp_path / "dr1", "127.0.0.1", tmp_path / "pki")


@pytest.mark.parametrize(
    "found",
    [
        {**LEFT, "vdb": Record(3, "b" * 32)},
        {**LEFT, "vdb": Record(4, "c" * 32)},
        {**LEFT, "vdb": Record(4, "corrupt-slot-2")},
        {"vda": LEFT["vda"]},
        {},
    ],
    ids=["a record short", "another history", "corrupt", "a disk missing", "silent"],
)
def test_a_guest_that_found_anything_else_proves_nothing(host: DemoHost, found: dict[str, Record]) -> None:
    host.console.write_text(boot(LEFT))
    assert proofs.same_history(host, LEFT, "").holds
    assert not proofs.same_history(host, {}, "").holds
    host.console.write_text(boot(found))
    assert not proofs.same_history(host, LEFT, "").holds


def test_an_older_boot_that_found_it_does_not_count(host: DemoHost) -> None:
    host.console.write_text(boot(LEFT) + boot({disk: Record(1, "d" * 32) for disk in LEFT}))
    assert not proofs.same_history(host, LEFT, "").holds


@pytest.mark.parametrize(
    ("said", "holds"),
    [
        (("WROTE vda 5", "WROTE vdb 4", "LAST vda 5 a", "LAST vdb 4 b"), True),
        (("WROTE vda 5", "WROTE vdb 5", "LAST vda 5 a", "LAST vdb 4 b"), False),
        (("WROTE vda 5", "WROTE vdb 4"), False),
        (("FAIL vdb write 4", "WROTE vda 5", "WROTE vdb 4", "LAST vda 5 a", "LAST vdb 4 b"), False),
    ],
    ids=["clean", "a write after the last words", "no last words", "a complaint"],
)
def test_a_clean_end_needs_last_words_that_match_the_writes(host: DemoHost, said: tuple[str, ...], holds: bool) -> None:
    host.console.write_text(boot(LEFT, *said))
    disks = [LabDisk(target, host.images / target, "raw") for target in LEFT]
    assert proofs.clean_end(host, proofs.left_by(host), disks).holds is holds


def test_newer_means_newer_on_every_disk(host: DemoHost) -> None:
    older = {disk: Record(1, "d") for disk in LEFT}
    assert proofs.newer(LEFT, older, host).holds
    assert not proofs.newer(LEFT, {**older, "vdb": Record(4, "d")}, host).holds
    assert not proofs.newer(LEFT, {}, host).holds


def _overlay(host: DemoHost) -> None:
    (host.images / "vda.failback-1.qcow2").touch()


def _snapshot(host: DemoHost) -> None:
    folder = host.root / "lib/qemu/snapshot" / host.vm
    folder.mkdir(parents=True)
    (folder / "failback-1.xml").touch()


def _redefined(host: DemoHost) -> None:
    (host.root / "etc/qemu/web-replica.xml").write_text(DEFINITION.format(DISK.format("/elsewhere", "vda")))


@pytest.mark.parametrize("spoil", [_overlay, _snapshot, _redefined])
def test_a_vm_is_on_its_own_disks_only_without_overlay_snapshot_or_other_image(
    host: DemoHost, spoil: Callable[[DemoHost], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "_has_backing_file", lambda _disk: False)  # asks qemu-img, which the demo itself runs
    disk = LabDisk("vda", host.images / "vda.raw", "raw")
    disk.path.touch()
    (host.root / "etc/qemu").mkdir()
    (host.root / "etc/qemu/web-replica.xml").write_text(DEFINITION.format(DISK.format(disk.path, "vda")))
    assert proofs.on_its_own_disks(host, [disk]).holds
    spoil(host)
    assert not proofs.on_its_own_disks(host, [disk]).holds


def test_a_vm_that_runs_nowhere_does_not_run(host: DemoHost) -> None:
    assert not proofs.only_runs(host, host).holds
