"""Restore points on real hosts: kept in succession, listed, seen by virsh, taken back, merged away."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.lab import console, disks
from tests.lab.site import LabPair, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

KEEP = ("--restore-point", "keep", "--yes")


def _fail_back(site: Site, pair: LabPair) -> None:
    site.failback("start", "--yes", "--foreground", "--no-power-on", "--shutdown-timeout", "60s", pair.name)


def _fail_over(site: Site, pair: LabPair) -> None:
    pair.replica.start()
    console.wait_for_writes(pair.replica.log, "vdb", 1)
    site.failback("failover", pair.name)


def _points(site: Site, pair: LabPair) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = site.failback("restore-points", pair.name)["restore_points"]
    return points


def _snapshots(pair: LabPair) -> set[str]:
    return set(pair.replica.host.virsh("snapshot-list", "--name", pair.replica.name).split())


def _chain(path: Path) -> list[Path]:
    told = subprocess.run(
        ["qemu-img", "info", "-U", "--backing-chain", "--output=json", str(path)], check=True, capture_output=True
    )
    return [Path(image["filename"]) for image in json.loads(told.stdout)]


def _assert_home(pair: LabPair, newest: dict[str, Path], formats: dict[str, disks.Format]) -> None:
    for disk in pair.original.disks:
        disks.assert_same(disk.path, disk.format, newest[disk.target], formats[disk.target], locked=True)


def test_three_are_kept_one_failback_is_undone_and_the_oldest_are_merged_away(site: Site) -> None:
    pair = site.make_pair("points")
    own = pair.replica.sources()
    modes = {path: path.stat().st_mode & 0o777 for path in own.values()}
    newest, formats = own, {disk.target: disk.format for disk in pair.replica.disks}
    for number in range(3):
        _fail_back(site, pair)
        _assert_home(pair, newest, formats)
        site.failback("commit", pair.name, *KEEP)
        assert len(_points(site, pair)) == number + 1
        assert all(path.stat().st_mode & 0o222 == 0 for path in newest.values())
        newest, formats = pair.replica.sources(), dict.fromkeys(newest, "qcow2")
        _fail_over(site, pair)
    points = _points(site, pair)
    assert _snapshots(pair) == {point["name"] for point in points}
    assert {disk["path"] for disk in points[0]["disks"]} == {str(path) for path in own.values()}
    assert all(disk["allocated_bytes"] > 0 for point in points for disk in point["disks"])

    # A failback after three that were kept is taken back: the replica stands where it stood.
    _fail_back(site, pair)
    site.failback("undo", pair.name, "--yes")
    assert pair.replica.sources() == newest
    assert _points(site, pair) == points
    answer = site.failback("restore-points", pair.name, "--prune", "--yes", exit_code=3)
    assert "Failover" in str(answer)

    _fail_back(site, pair)
    _assert_home(pair, newest, formats)
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    gone = site.failback("restore-points", pair.name, "--prune", "--keep", "1", "--yes")["pruned"]
    assert gone == [point["name"] for point in points[:2]]
    assert _snapshots(pair) == {points[2]["name"]}
    assert pair.replica.sources() == newest
    assert all(len(_chain(path)) == 2 for path in newest.values())
    assert all(path.stat().st_mode & 0o222 == 0 for path in own.values())
    _assert_home(pair, newest, formats)

    site.failback("restore-points", pair.name, "--prune", "--keep", "0", "--yes")
    assert _snapshots(pair) == set()
    assert pair.replica.sources() == own
    assert {path: path.stat().st_mode & 0o777 for path in own.values()} == modes
    _assert_home(pair, own, {disk.target: disk.format for disk in pair.replica.disks})
    assert _points(site, pair) == []
    _fail_over(site, pair)
    assert console.found(pair.replica.log)["vda"].consistent


def test_nothing_is_kept_where_a_tool_writes_the_images_by_their_paths(site: Site) -> None:
    pair = site.make_pair("bypath")
    site.failback(
        "register",
        pair.name,
        "--original",
        f"prod/{pair.name}",
        "--replica",
        f"dr/{pair.name}-replica",
        "--replication",
        "path",
    )
    _fail_back(site, pair)
    answer = site.failback("commit", pair.name, *KEEP, exit_code=3)
    assert answer["error"]["code"] == "restore-point-path"
    assert site.failback("status", pair.name)["state"] == "Failback"
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    assert pair.replica.sources() == {disk.target: disk.path for disk in pair.replica.disks}
