"""Small files that no crash may take back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agent import durable
from agent.disk.stamp import Stamp

STAMP = Stamp(device=1, inode=2, size_bytes=3, mtime_ns=4, ctime_ns=5, boot="a")


def test_a_folder_is_durable_before_anything_is_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(durable, "_sync", synced.append)
    durable.make_folder(tmp_path / "machines")
    assert synced == [tmp_path]
    durable.make_folder(tmp_path / "machines")
    assert synced == [tmp_path]


@pytest.mark.parametrize(
    ("now", "changed"),
    [
        (STAMP, False),
        (replace(STAMP, ctime_ns=6), False),
        (replace(STAMP, boot="b"), False),
        (replace(STAMP, ctime_ns=6, mtime_ns=7), True),
        (replace(STAMP, inode=9), True),
        (replace(STAMP, size_bytes=9, boot="b"), True),
    ],
)
def test_another_owner_or_boot_is_no_other_content(now: Stamp, changed: bool) -> None:
    assert STAMP.content_changed_to(now) is changed
