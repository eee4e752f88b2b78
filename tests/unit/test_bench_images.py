"""The benchmarks' disks: the same on any machine, full and compressible like a server's, changed as asked."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import numpy as np
import pytest
import zstandard

from bench import images
from bench.content import fill
from bench.images import BLOCK_BYTES, Kind
from bench.placement import Image, stretched

SIZE = 32 << 20


def image_of(path: Path, size_bytes: int = SIZE) -> Image:
    return Image.of(path, "raw", images.make(path, size_bytes, seed=1))


def changed_blocks(a: Path, b: Path) -> set[int]:
    ours, theirs = (np.fromfile(path, dtype=np.uint8).reshape(-1, BLOCK_BYTES) for path in (a, b))
    return set(np.flatnonzero((ours != theirs).any(axis=1)).tolist())


def test_same_seed_makes_the_same_bytes_on_any_machine(tmp_path: Path) -> None:
    images.make(tmp_path / "disk", SIZE, seed=1)
    digest = hashlib.blake2b((tmp_path / "disk").read_bytes(), digest_size=8).hexdigest()
    assert digest == "da5188148cbbbe9d"


def test_large_disk_holds_about_two_thirds_of_data_in_runs_of_all_kinds() -> None:
    plan = images.layout(8 << 30, seed=1)
    assert 5.5e9 < plan.data_bytes < 6.0e9
    assert set(np.unique(plan.kinds).tolist()) == {int(kind) for kind in Kind}
    assert len(plan.files) > 20_000


def test_layout_names_every_page_of_data_once(tmp_path: Path) -> None:
    plan = image_of(tmp_path / "disk").plan
    named = np.zeros(len(plan.kinds), dtype=int)
    for first, pages in plan.files.tolist():
        named[first : first + pages] += 1
    assert (named[plan.kinds == Kind.METADATA] == 0).all()
    assert (named == (plan.kinds > Kind.METADATA)).all()


def test_free_pages_are_holes(tmp_path: Path) -> None:
    image = image_of(tmp_path / "disk")
    assert image.path.stat().st_blocks * 512 == pytest.approx(image.plan.data_bytes, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "least", "most"), [(Kind.TEXT, 2.0, 4.0), (Kind.CODE, 1.5, 2.5), (Kind.PACKED, 0.99, 1.01)]
)
def test_each_kind_compresses_as_its_like_does(kind: Kind, least: float, most: float) -> None:
    content = fill(np.full(256, kind, dtype=np.uint8), [1])
    ratio = content.nbytes / len(zstandard.ZstdCompressor(level=3).compress(content.tobytes()))
    assert least < ratio < most


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_as_many_blocks_change_as_asked_for(tmp_path: Path, share: float) -> None:
    image = image_of(tmp_path / "disk")
    before = image.copy_to(tmp_path / "before")
    changed = image.change(share=share, seed=5)
    wanted = round(len(image.plan.data_blocks) * share)
    differ = changed_blocks(image.path, before.path)
    assert differ <= set(image.plan.data_blocks.tolist())
    # A moved block may come from one with the same content, seldom.
    assert wanted * 0.98 <= len(differ) <= wanted
    assert changed.block_bytes == wanted * BLOCK_BYTES
    assert changed.page_bytes <= changed.block_bytes


def test_same_change_makes_two_copies_equal_and_another_does_not(tmp_path: Path) -> None:
    a = image_of(tmp_path / "a")
    b = a.copy_to(tmp_path / "b")
    a.change(share=0.1, seed=5)
    b.change(share=0.1, seed=5)
    assert not changed_blocks(a.path, b.path)
    b.change(share=0.1, seed=6)
    assert changed_blocks(a.path, b.path)


def test_share_beyond_the_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="is no share"):
        list(images.changes(images.layout(SIZE, seed=1), share=1.5, seed=1))


def test_size_off_the_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 16 MiB"):
        images.layout(SIZE + 1, seed=1)


@pytest.mark.real
def test_change_of_a_qcow2_image_is_the_change_of_the_raw_one(tmp_path: Path) -> None:
    raw = image_of(tmp_path / "disk.raw")
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw.path), str(tmp_path / "disk.qcow2")]
    subprocess.run(convert, check=True)
    qcow2 = Image.of(tmp_path / "disk.qcow2", "qcow2", raw.plan)
    raw.change(share=0.3, seed=5)
    qcow2.change(share=0.3, seed=5)
    back = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(qcow2.path), str(tmp_path / "back.raw")]
    subprocess.run(back, check=True)
    assert not changed_blocks(raw.path, tmp_path / "back.raw")


def test_sparse_disk_holds_its_data_in_pieces_from_end_to_end(tmp_path: Path) -> None:
    plan = images.layout(16 << 20, seed=1, free_share=0.0)
    image = stretched(tmp_path / "disk", 1 << 40, plan)
    assert image.path.stat().st_size == 1 << 40
    assert image.path.stat().st_blocks * 512 == pytest.approx(16 << 20, rel=0.02)
    with image.path.open("rb") as file:
        file.seek((1 << 40) // 16 * 15)
        assert any(file.read(1 << 20))
