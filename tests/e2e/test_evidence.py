"""Evidence on real QEMU: what each rung copies, what makes it invalid, and that nothing of ours is left.

The replicas' guests are idle here: what is written is written through QEMU's own block layer by the test, run by run,
so that every byte of a last pass is known.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.lab import disks
from tests.lab.site import LabPair, LabVm, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

MIB = 1 << 20
BLOCK = 64 << 10
OPTIONS = ("--yes", "--foreground", "--shutdown-timeout", "60s", "--background-interval", "1h", "--no-power-on")
OURS = ("failback-",)


@contextmanager
def _ready(site: Site, pair: LabPair, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run of the pair that waits for the word to switch; what comes of it is the caller's."""
    run = site.spawn("start", *OPTIONS, "--switch", "manual", *words, pair.name)
    try:
        site.wait_for_status(pair.name, lambda status: status["state"] == "Ready to switch", run)
        yield run
    finally:
        if run.poll() is None:
            run.kill()
        run.wait(60)


def _switch(site: Site, pair: LabPair, run: subprocess.Popen[bytes], *, exit_code: int = 0) -> dict[str, Any]:
    """Give the word, wait for the end of the run; its report."""
    site.failback("switch", pair.name)
    assert run.wait(120) == exit_code, (site.folder / "failback.log").read_text()
    report = site.failback("history", pair.name, "--report")["report"]
    assert isinstance(report, dict)
    return report


def _last_pass(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The last pass's line of each disk, by the original's target."""
    return {line["original"]: line for line in report["disks"] if line["pass_name"] == "last_pass"}


def _reasons(lines: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {target: f"{line['rung']}: {line['why_not_higher']}" for target, line in lines.items()}


def _idle_pair(site: Site, name: str, *formats: disks.Format) -> LabPair:
    return site.make_pair(name, formats=formats, replica_role="idle")


def _write(vm: LabVm, *runs: tuple[int, int, int]) -> None:
    """Write runs (disk number, offset, length in bytes) to a running VM."""
    with vm.monitor() as monitor:
        for number, (disk, offset, length) in enumerate(runs):
            monitor.write(disk, offset, length, pattern=number + 1)


def _image_info(path: Path) -> dict[str, Any]:
    words = ["qemu-img", "info", "-U", "--output=json", str(path)]
    info: dict[str, Any] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return info


def _bitmaps(path: Path) -> list[str]:
    data = _image_info(path).get("format-specific", {}).get("data", {})
    return [bitmap["name"] for bitmap in data.get("bitmaps", [])]


def _assert_nothing_left(pair: LabPair) -> None:
    """No checkpoint, bitmap, job, overlay, scratch file, socket of ours on the replica's host; its chain as before."""
    vm = pair.replica
    assert vm.host.virsh("checkpoint-list", vm.name, "--name").split() == []
    assert vm.sources() == {disk.target: disk.path for disk in vm.disks}
    for disk in vm.disks:
        if disk.format == "qcow2":
            assert _bitmaps(disk.path) == []
    if vm.is_running():
        assert vm.host.virsh("domjobinfo", vm.name).split() == ["Job", "type:", "None"]
    assert [path for path in vm.disks[0].path.parent.iterdir() if "failback-" in path.name] == []
    assert [path for path in (vm.host.folder / "lib").rglob("failback-*") if vm.name in str(path)] == []


# --- what each rung copies --------------------------------------------------------------------------------------------


def test_a_qcow2_replica_costs_the_downtime_only_what_was_written_since_the_last_view(site: Site) -> None:
    pair = _idle_pair(site, "bitmap", "qcow2", "qcow2")
    with _ready(site, pair) as run:
        _write(pair.replica, (0, 4 * MIB, MIB), (0, 20 * MIB, 4096), (1, 0, MIB), (1, 47 * MIB, MIB))
        report = _switch(site, pair, run)
    lines = _last_pass(report)
    assert {line["rung"] for line in lines.values()} == {"bitmap"}, _reasons(lines)
    assert lines["vda"]["compared_bytes"] + lines["vdb"]["compared_bytes"] <= 4 * MIB + 8 * BLOCK
    assert not pair.replica.is_running()
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    assert pair.replica.is_running()
    _assert_nothing_left(pair)


def test_a_raw_replica_is_read_whole_but_its_original_is_not(site: Site) -> None:
    pair = _idle_pair(site, "untracked", "raw")
    with _ready(site, pair) as run:
        _write(pair.replica, (0, 8 * MIB, MIB))
        report = _switch(site, pair, run)
    line = _last_pass(report)["vda"]
    assert line["rung"] == "map"
    assert line["changed_bytes"] <= MIB + BLOCK
    pair.assert_same_disks()
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    _assert_nothing_left(pair)


def test_an_overlay_tracks_what_a_raw_replica_writes(site: Site) -> None:
    pair = _idle_pair(site, "overlay", "raw", "qcow2")
    with _ready(site, pair, "--track", "overlay") as run:
        _write(pair.replica, (0, 8 * MIB, MIB), (1, 8 * MIB, MIB))
        report = _switch(site, pair, run)
    lines = _last_pass(report)
    assert (lines["vda"]["rung"], lines["vdb"]["rung"]) == ("overlay", "bitmap"), _reasons(lines)
    assert lines["vda"]["compared_bytes"] + lines["vda"]["changed_bytes"] <= 4 * MIB
    site.failback("undo", pair.name, "--yes")
    _assert_nothing_left(pair)
    with _ready(site, pair, "--track", "overlay") as run:
        site.failback("cancel", pair.name)
        assert run.wait(120) == 1
    assert pair.replica.is_running()
    _assert_nothing_left(pair)


def test_cancel_leaves_no_checkpoint(site: Site) -> None:
    pair = _idle_pair(site, "cancelled", "qcow2", "raw")
    with _ready(site, pair) as run:
        assert pair.replica.host.virsh("checkpoint-list", pair.replica.name, "--name").split() != []
        site.failback("cancel", pair.name)
        assert run.wait(120) == 1
    assert pair.replica.is_running()
    _assert_nothing_left(pair)


# --- what makes it invalid --------------------------------------------------------------------------------------------


def test_a_checkpoint_deleted_behind_our_back_costs_a_rung_and_nothing_else(site: Site) -> None:
    pair = _idle_pair(site, "deleted", "qcow2")
    with _ready(site, pair, "--late-evidence", "proceed") as run:
        for name in pair.replica.host.virsh("checkpoint-list", pair.replica.name, "--name").split():
            pair.replica.host.virsh("checkpoint-delete", pair.replica.name, name)
        _write(pair.replica, (0, 8 * MIB, MIB))
        report = _switch(site, pair, run)
    line = _last_pass(report)["vda"]
    assert line["rung"] in ("map", "digests")
    assert line["why_not_higher"]
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    _assert_nothing_left(pair)


def test_a_killed_qemu_loses_its_bitmaps_and_the_operator_is_asked(site: Site) -> None:
    pair = _idle_pair(site, "killed", "qcow2")
    with _ready(site, pair, "--late-evidence", "proceed") as run:
        _write(pair.replica, (0, 8 * MIB, MIB))
        pair.replica.host.kill_qemu(pair.replica.name)
        site.failback("switch", pair.name)
        assert run.wait(120) in (0, 4)
    if site.failback("status", pair.name)["state"] == "Needs operator":
        site.failback("resume", "--foreground", pair.name)
    assert site.failback("status", pair.name)["state"] == "Failback"
    line = _last_pass(site.failback("history", pair.name, "--report")["report"])["vda"]
    assert line["rung"] in ("map", "digests")
    assert line["why_not_higher"]
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    _assert_nothing_left(pair)


def test_an_image_put_in_the_place_of_the_recorded_one_is_not_believed(site: Site) -> None:
    pair = _idle_pair(site, "replaced", "qcow2")
    image = pair.replica.disks[0].path
    with _ready(site, pair, "--late-evidence", "proceed") as run:
        pair.replica.host.virsh("shutdown", pair.replica.name)
        while pair.replica.is_running():
            pass
        disks.wait_unlocked(image, "qcow2")  # whoever looks at it because it went off has let go by then
        other = image.with_suffix(".other")
        disks.copy(image, "qcow2", other, "qcow2")
        disks.scatter_writes(other, "qcow2", ["write -P 7 8M 1M"])
        other.replace(image)
        site.failback("switch", pair.name)
        assert run.wait(120) in (0, 4)
    if site.failback("status", pair.name)["state"] == "Needs operator":
        site.failback("resume", "--foreground", pair.name)
    line = _last_pass(site.failback("history", pair.name, "--report")["report"])["vda"]
    assert line["rung"] in ("map", "digests")
    assert line["why_not_higher"]
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    _assert_nothing_left(pair)


def test_a_bitmap_that_misses_what_was_written_is_caught_by_the_audit(site: Site) -> None:
    pair = _idle_pair(site, "cleared", "qcow2")
    with _ready(site, pair) as run:
        _write(pair.replica, (0, 8 * MIB, MIB))
        with pair.replica.monitor() as monitor:
            for node in monitor.ask("query-named-block-nodes"):
                for bitmap in node.get("dirty-bitmaps", []):
                    if bitmap["name"].startswith(OURS):
                        monitor.ask("block-dirty-bitmap-clear", node=node["node-name"], name=bitmap["name"])
        site.failback("switch", pair.name)
        run.wait(120)
    status = site.failback("status", pair.name)
    assert status["state"] == "Failback"
    answer = site.failback("commit", pair.name, "--restore-point", "keep", "--yes", exit_code=3)
    assert "vda" in json.dumps(answer)
    site.failback("undo", pair.name, "--yes")
    assert pair.replica.is_running()
    _assert_nothing_left(pair)


def test_an_original_edited_between_passes_is_no_proof_any_more(site: Site) -> None:
    pair = _idle_pair(site, "edited", "qcow2")
    with _ready(site, pair) as run:
        path = pair.original.disks[0].path
        with path.open("r+b") as file:  # a plain write minds no lock
            file.seek(path.stat().st_size - 4096)
            last = file.read(4096)
            file.seek(-4096, 2)
            file.write(bytes(byte ^ 0xFF for byte in last))
        _write(pair.replica, (0, 8 * MIB, MIB))
        report = _switch(site, pair, run)
    line = _last_pass(report)["vda"]
    assert line["rung"] == "digests"
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    _assert_nothing_left(pair)


def test_the_target_agent_killed_in_the_middle_of_a_pass_costs_a_comparison(site: Site) -> None:
    pair = _idle_pair(site, "target-killed", "qcow2", "raw")
    with _ready(site, pair) as run:
        _write(pair.replica, (0, 8 * MIB, 8 * MIB), (1, 8 * MIB, 8 * MIB))
        run.kill()
        run.wait(60)
    agent = site.agents["prod"]
    agent.kill9()
    agent.start()
    site.failback("switch", pair.name)
    site.failback("resume", "--foreground", pair.name)
    assert site.failback("status", pair.name)["state"] == "Failback"
    pair.assert_same_disks()
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    _assert_nothing_left(pair)


# --- powering off -----------------------------------------------------------------------------------------------------


def test_a_guest_that_ignores_its_button_is_ended_gracefully_so_that_its_bitmap_survives(site: Site) -> None:
    pair = site.make_pair("deaf", formats=("qcow2",), replica_role="idle", ignore_acpi=True)
    words = ("--shutdown-timeout", "2s", "--shutdown-policy", "force")
    with _ready(site, pair, *words) as run:
        _write(pair.replica, (0, 8 * MIB, MIB))
        report = _switch(site, pair, run)
    lines = _last_pass(report)
    assert lines["vda"]["rung"] == "bitmap", _reasons(lines)
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")
    _assert_nothing_left(pair)


# --- proof ------------------------------------------------------------------------------------------------------------


def test_verify_full_reads_both_sides_before_the_original_may_start(site: Site) -> None:
    pair = _idle_pair(site, "verified", "qcow2", "raw")
    site.failback("start", *OPTIONS, "--verify", "full", pair.name)
    assert site.failback("status", pair.name)["state"] == "Failback"
    pair.assert_same_disks()
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    _assert_nothing_left(pair)


def test_bitmaps_of_others_survive_a_verification_in_full(site: Site) -> None:
    pair = _idle_pair(site, "kept", "qcow2")
    original = pair.original.disks[0].path
    subprocess.run(["qemu-img", "bitmap", "-f", "qcow2", "--add", str(original), "of-a-backup"], check=True)
    site.failback("start", *OPTIONS, "--verify", "full", pair.name)
    assert site.failback("status", pair.name)["state"] == "Failback"
    pair.assert_same_disks()
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    told = _image_info(original)["format-specific"]["data"]["bitmaps"]
    assert [(bitmap["name"], bitmap["flags"]) for bitmap in told] == [("of-a-backup", ["auto"])]
