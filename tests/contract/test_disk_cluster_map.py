"""Closed qcow2 images read by their cluster map: the same bytes as QEMU's own reading, or QEMU's own reading."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from agent.disk.lock import hold_frozen, image_in_use
from agent.disk.mapped import MappedDisk
from agent.disk.nbd import NbdDisk
from agent.disk.open import open_source
from agent.disk.qemu_nbd import EXPORT, QemuNbd
from agent.disk.seam import Disk, Extent
from agent.errors import DiskError
from tests.contract.disk_backends import MIB, loop_device, need_root, run

SIZE_BYTES = 8 * MIB + 1536
KIB = 1024


def create(image: Path, *options: str, size_bytes: int = SIZE_BYTES) -> Path:
    """An empty qcow2 image."""
    words = [word for option in options for word in ("-o", option)]
    run("qemu-img", "create", "-q", "-f", "qcow2", *words, image, str(size_bytes))
    return image


def scribble(image: Path, seed: int, *, zeroing: bool = True) -> None:
    """Write patterns and zeroes here and there, as a guest would, through QEMU."""
    chance = random.Random(seed)
    commands = []
    for _ in range(24):
        offset = chance.randrange(SIZE_BYTES // 512) * 512
        length = min(chance.choice((512, 4096, 64 * KIB, 200 * KIB)), SIZE_BYTES - offset)
        pattern = chance.randrange(1, 255)
        commands.append(f"write -P {pattern} {offset} {length}")
        if zeroing and chance.random() < 0.3:
            commands.append(f"write -z {'-u ' if chance.random() < 0.5 else ''}{offset} {max(512, length // 2)}")
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", "qcow2", *words, image)


@contextmanager
def served(image: Path) -> Iterator[Disk]:
    """The same image through qemu-nbd."""
    server = QemuNbd.start("vda", image, "qcow2", image.parent)
    disk = NbdDisk.open("vda", server.socket, EXPORT, writable=False, past_cache=True, on_close=server.stop)
    with closing(disk):
        yield disk


def content(disk: Disk) -> bytes:
    buffer = bytearray(b"\xaa" * disk.size_bytes)
    disk.read_into(0, memoryview(buffer))
    return bytes(buffer)


def plain(folder: Path, *options: str) -> Path:
    image = create(folder / "image", *options)
    scribble(image, seed=1, zeroing="compat=0.10" not in options)
    return image


def compressed(folder: Path) -> Path:
    image = create(folder / "image")
    scribble(image, seed=2)
    base = image.rename(folder / "plain")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-c", base, image)
    base.unlink()
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", "-c", "write -P 8 1200k 512", image)
    return image


def on_backing(folder: Path, backing_format: str, backing_bytes: int) -> Path:
    base = folder / "base"
    run("qemu-img", "create", "-q", "-f", backing_format, base, str(backing_bytes))
    run("qemu-io", "-f", backing_format, "-c", "write -P 5 0 2M", "-c", f"write -P 6 {backing_bytes - MIB} 1M", base)
    overlay = create(folder / "image", f"backing_file={base}", f"backing_fmt={backing_format}")
    scribble(overlay, seed=3)
    return overlay


def long_chain(folder: Path) -> Path:
    overlay = on_backing(folder, "qcow2", SIZE_BYTES).rename(folder / "middle")
    top = create(folder / "image", f"backing_file={overlay.name}", "backing_fmt=qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 77 3M 100k", "-c", "write -z 0 64k", top)
    return top


IMAGES: dict[str, Callable[[Path], Path]] = {
    "version 2": lambda folder: plain(folder, "compat=0.10"),
    "version 3": lambda folder: plain(folder, "compat=1.1"),
    "clusters of 512 bytes": lambda folder: plain(folder, "cluster_size=512"),
    "clusters of 4 KiB": lambda folder: plain(folder, "cluster_size=4k"),
    "clusters of 2 MiB": lambda folder: plain(folder, "cluster_size=2M"),
    "extended L2": lambda folder: plain(folder, "extended_l2=on", "cluster_size=128k"),
    "lazy refcounts": lambda folder: plain(folder, "lazy_refcounts=on"),
    "preallocated metadata": lambda folder: plain(folder, "preallocation=metadata"),
    "preallocated in full": lambda folder: plain(folder, "preallocation=full"),
    "compressed": compressed,
    "empty": lambda folder: create(folder / "image"),
    "on raw": lambda folder: on_backing(folder, "raw", SIZE_BYTES),
    "on qcow2": lambda folder: on_backing(folder, "qcow2", SIZE_BYTES),
    "on a smaller backing file": lambda folder: on_backing(folder, "qcow2", 5 * MIB),
    "on a larger backing file": lambda folder: on_backing(folder, "raw", 20 * MIB),
    "three deep": long_chain,
}


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return IMAGES[request.param](tmp_path)


def test_an_image_read_by_its_map_has_the_bytes_that_qemu_reads(image: Path) -> None:
    with served(image) as other:
        expected = content(other)
    with closing(open_source("vda", image, "qcow2", image.parent)) as disk:
        assert disk.access == "cluster map"
        assert disk.size_bytes == len(expected)
        assert disk.readers >= 1
        assert content(disk) == expected
        found = bytearray(len(expected))
        disk.read_back(0, memoryview(found))
        assert found == expected
        chance = random.Random(4)
        runs, at = [], 0
        while at < SIZE_BYTES - 100 * KIB:
            at += chance.randrange(60 * KIB)
            runs.append((at, chance.randrange(40 * KIB)))
            at += runs[-1][1]
        batch = memoryview(bytearray(sum(length for _, length in runs)))
        disk.read_runs(runs, batch)
        assert batch == b"".join(expected[offset : offset + length] for offset, length in runs)


def test_an_image_read_by_its_map_has_the_extents_that_qemu_tells(image: Path) -> None:
    with served(image) as other:
        expected = list(other.extents(0, SIZE_BYTES))
        part = list(other.extents(MIB + 512, 3 * MIB))
    with closing(open_source("vda", image, "qcow2", image.parent)) as disk:
        assert list(disk.extents(0, SIZE_BYTES)) == expected
        assert list(disk.extents(MIB + 512, 3 * MIB)) == part


def test_only_compressed_clusters_start_a_server(tmp_path: Path) -> None:
    image = create(tmp_path / "image")
    run("qemu-io", "-f", "qcow2", "-c", "write -c -P 7 1M 64k", "-c", "write -P 8 2M 1M", image)
    with closing(open_source("vda", image, "qcow2", tmp_path)) as disk:
        disk.read_into(2 * MIB, memoryview(bytearray(MIB)))
        assert disk.access == "cluster map"
        found = bytearray(64 * KIB)
        disk.read_into(MIB, memoryview(found))
        assert found == b"\x07" * 64 * KIB
        assert disk.access == "cluster map, and NBD for compressed clusters"
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_an_image_on_a_block_device_is_read_by_its_map(tmp_path: Path) -> None:
    need_root()
    image = plain(tmp_path)
    with served(image) as other:
        expected = content(other)
    os.truncate(image, 32 * MIB)
    with loop_device(image) as device, closing(open_source("vda", device, "qcow2", tmp_path)) as disk:
        assert disk.access == "cluster map"
        assert content(disk) == expected


def test_image_and_backing_file_are_kept_from_writers_while_they_are_read(tmp_path: Path) -> None:
    overlay = on_backing(tmp_path, "qcow2", SIZE_BYTES)
    disk = open_source("vda", overlay, "qcow2", tmp_path)
    for path in (overlay, tmp_path / "base"):
        with pytest.raises(DiskError), closing(open_for_writing(path)):
            pass
    disk.close()
    for path in (overlay, tmp_path / "base"):
        open_for_writing(path).close()


def open_for_writing(image: Path) -> Disk:
    from agent.disk.lock import hold_exclusive
    from agent.disk.open import open_target

    held = hold_exclusive(image)
    try:
        return open_target("vda", held, "qcow2", image.parent)
    finally:
        held.close()


def test_it_says_why_an_image_is_not_read_by_its_map(tmp_path: Path) -> None:
    dirty = create(tmp_path / "dirty", "lazy_refcounts=on")
    set_incompatible_feature(dirty, 0)
    corrupt = create(tmp_path / "corrupt")
    set_incompatible_feature(corrupt, 1)
    external = create(tmp_path / "external", f"data_file={tmp_path / 'data'}")
    unnamed = create(tmp_path / "unnamed")
    overlay = create(tmp_path / "overlay", f"backing_file={unnamed}", "backing_fmt=qcow2")
    forget_backing_format(overlay)
    reasons = {
        dirty: "the image is dirty",
        corrupt: "the image is corrupt",
        external: "the image has an external data file",
        overlay: "the format of a backing file is not recorded",
    }
    for image, reason in reasons.items():
        with closing(open_source("vda", image, "qcow2", tmp_path)) as disk:
            assert disk.access == f"NBD ({reason})"
            assert content(disk) == bytes(SIZE_BYTES)


def test_another_format_is_left_to_qemu(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "vmdk", tmp_path / "image", "1M")
    with closing(open_source("vda", tmp_path / "image", "vmdk", tmp_path)) as disk:
        assert disk.access == "NBD (format vmdk)"
        assert list(disk.extents(0, MIB)) == [Extent(0, MIB, zero=True)]


def test_an_encrypted_image_is_never_read_by_its_map(tmp_path: Path) -> None:
    # Not LUKS: to make one, qemu-img measures the processor, and gives up where others keep it busy.
    secret = ("--object", "secret,id=key,data=xyzzy", "-o", "encrypt.format=aes,encrypt.key-secret=key")
    run("qemu-img", "create", "-q", "-f", "qcow2", *secret, tmp_path / "image", "1M")
    with pytest.raises(DiskError, match="cannot serve"):  # QEMU asks for the key, which we have not
        open_source("vda", tmp_path / "image", "qcow2", tmp_path)


def test_an_image_whose_file_was_made_smaller_fails_naming_the_place(tmp_path: Path) -> None:
    image = create(tmp_path / "image")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 0 4M", image)
    with closing(open_source("vda", image, "qcow2", tmp_path)) as disk:
        disk.read_into(0, memoryview(bytearray(64 * KIB)))
        os.truncate(image, 2 * MIB)
        with pytest.raises(DiskError, match=r"^Disk vda .*ends before byte \d+: it was made smaller") as caught:
            disk.read_into(MIB, memoryview(bytearray(2 * MIB)))
    assert caught.value.facts["disk"] == "vda"
    assert caught.value.facts["offset_bytes"] == MIB


def test_an_8_tib_image_of_nothing_is_mapped_in_a_few_questions(tmp_path: Path) -> None:
    tib = 1024**4
    image = create(tmp_path / "image", size_bytes=8 * tib)
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 3 {5 * tib} 1M", image)
    with closing(open_source("vda", image, "qcow2", tmp_path)) as disk:
        assert isinstance(disk, MappedDisk)
        assert [extent for extent in disk.extents(0, 8 * tib) if not extent.zero] == [Extent(5 * tib, MIB, zero=False)]
        assert disk.questions <= 6


def test_the_lock_of_a_source_read_by_its_map_ends_with_it(tmp_path: Path) -> None:
    image = create(tmp_path / "image")
    disk = open_source("vda", image, "qcow2", tmp_path)
    hold_frozen(image).close()
    assert not image_in_use(image)
    disk.close()
    disk.close()
    with pytest.raises(DiskError, match="closed"):
        disk.read_into(0, memoryview(bytearray(512)))
    open_for_writing(image).close()


def set_incompatible_feature(image: Path, bit: int) -> None:
    """Set a bit of the header's incompatible features (docs/interop/qcow2.txt: bytes 72 to 79, big-endian)."""
    with image.open("r+b") as file:
        file.seek(79)
        features = file.read(1)[0] | 1 << bit
        file.seek(79)
        file.write(bytes([features]))


def forget_backing_format(image: Path) -> None:
    """Make the header extension that names the backing file's format one that nobody knows."""
    header = image.read_bytes()[: 64 * KIB]
    at = header.index(b"\xe2\x79\x2a\xca")
    with image.open("r+b") as file:
        file.seek(at)
        file.write(b"\x12\x34\x56\x78")
