"""Reading and merging closed overlays with QEMU's own tools."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from agent.disk.allocated import allocated_ranges
from agent.disk.commit import commit_overlays, stand_on
from agent.disk.lock import hold_frozen
from agent.errors import DiskError

pytestmark = pytest.mark.real

SIZE_BYTES = 4 * 1024 * 1024 + 512
KIB = 1024


def qemu_io(path: Path, *commands: str) -> None:
    asked = [part for command in commands for part in ("-c", command)]
    image_format = "raw" if path.suffix == ".raw" else "qcow2"
    options = f"driver={image_format},file.driver=file,file.filename={str(path).replace(',', ',,')}"
    subprocess.run(["qemu-io", "--image-opts", *asked, options], check=True, stdout=subprocess.DEVNULL)


def overlay(path: Path, below: Path) -> Path:
    image_format = "raw" if below.suffix == ".raw" else "qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(below), "-F", image_format, str(path)]
    subprocess.run(command, check=True)
    return path


def content(path: Path) -> bytes:
    raw = path.with_name("content.raw")
    options = f"driver=qcow2,file.driver=file,file.filename={str(path).replace(',', ',,')}"
    subprocess.run(["qemu-img", "convert", "--image-opts", "-O", "raw", options, str(raw)], check=True)
    return raw.read_bytes()


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Two overlays over a raw image, the topmost first, in a folder whose name is an option's end to careless tools."""
    folder = tmp_path / "a,b=c"
    folder.mkdir()
    base = folder / "base.raw"
    with base.open("wb") as file:
        file.truncate(SIZE_BYTES)
    qemu_io(base, "write -P 1 0 1M")
    lower = overlay(folder / "lower.qcow2", base)
    qemu_io(lower, "write -P 2 100k 50k", "write -z -u 512k 128k", "discard 0 64k")
    upper = overlay(folder / "upper.qcow2", lower)
    qemu_io(upper, "write -P 3 2M 50k")
    return upper, lower, base


def test_what_overlays_hold_is_told_whole_zeroes_and_discards_too(chain: tuple[Path, Path, Path]) -> None:
    upper, lower, _ = chain
    of_upper = [(2048 * KIB, 64 * KIB)]
    of_lower = [(0, 192 * KIB), (512 * KIB, 128 * KIB)]
    assert list(allocated_ranges("vda", upper, 1)) == of_upper
    assert list(allocated_ranges("vda", lower, 1)) == of_lower
    assert list(allocated_ranges("vda", upper, 2)) == of_lower + of_upper


def test_what_overlays_hold_is_told_while_they_are_frozen(chain: tuple[Path, Path, Path]) -> None:
    locks = [hold_frozen(path) for path in chain]
    assert len(list(allocated_ranges("vda", chain[0], 2))) == 3
    for lock in locks:
        lock.close()


def test_more_layers_than_there_are_is_an_error(chain: tuple[Path, Path, Path]) -> None:
    with pytest.raises(DiskError, match="not 3 overlays"):
        list(allocated_ranges("vda", chain[0], 3))


def test_corrupt_overlay_is_not_believed(chain: tuple[Path, Path, Path]) -> None:
    with chain[0].open("r+b") as file:
        file.seek(72)  # incompatible features, big endian; bit 1: corrupt (QEMU, docs/interop/qcow2.txt)
        file.write((2).to_bytes(8, "big"))
    with pytest.raises(DiskError, match="corrupt"):
        list(allocated_ranges("vda", chain[0], 1))


def test_merged_overlays_leave_the_base_as_the_guest_saw_the_disk(chain: tuple[Path, Path, Path]) -> None:
    upper, lower, base = chain
    top = overlay(upper.with_name("top.qcow2"), upper)
    before = content(top)
    locks = [hold_frozen(path) for path in (top, *chain)]
    for _ in range(2):  # a merge that was cut short is done again
        commit_overlays("vda", [upper, lower], base, "raw", timeout_s=60)
        assert base.read_bytes() == before
    stand_on("vda", top, base, "raw", timeout_s=60)
    for lock in locks:
        lock.close()
    upper.unlink()
    lower.unlink()
    assert content(top) == before


def test_merge_that_fails_says_why_and_loses_nothing(chain: tuple[Path, Path, Path]) -> None:
    upper, lower, base = chain
    before = content(upper)
    with pytest.raises(DiskError, match="nothing is lost"):
        commit_overlays("vda", [upper, base], lower, "raw", timeout_s=60)
    assert content(upper) == before
