"""What an image's own version says of it, asked of qemu-img."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from agent.virt.images import backing_chain


@pytest.mark.parametrize(("compat", "keeps"), [("0.10", False), ("1.1", True)])
def test_only_qcow2_from_version_3_on_keeps_dirty_bitmaps(tmp_path: Path, compat: str, keeps: bool) -> None:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat={compat}", str(path), "8M"], check=True)
    (image,) = backing_chain(path, "qcow2")
    assert image.keeps_bitmaps is keeps
