"""Samples of real images, while another process writes to them and while a VM runs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from xxhash import xxh3_128_digest

from agent.disk.lock import hold_exclusive
from agent.disk.open import open_shared
from agent.errors import DiskBusy
from agent.sampling import sample, sample_disk
from protocol.messages import SampleBlocks
from tests.contract.disk_backends import run
from tests.contract.hypervisor_rigs import SIZE_BYTES, LibvirtRig, Rig

BLOCK = 64 * 1024
MIB = 1 << 20
SEED = 5


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """8 MiB, of which the third MiB is filled with 0x2a."""
    path = tmp_path / f"image.{request.param}"
    run("qemu-img", "create", "-q", "-f", request.param, path, "8M")
    run("qemu-io", "-f", request.param, "-c", "write -P 42 2M 1M", path)
    return path


@contextmanager
def in_use(image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU process that has the image open for writing."""
    command = ["qemu-io", "-f", image.suffix[1:], str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(len("qemu-io> ")) == b"qemu-io> "
            with pytest.raises(DiskBusy):
                hold_exclusive(image)
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()  # at the end of its input it closes the image and ends
            process.wait(20)


def question(*offsets: int, choose: int = 0) -> SampleBlocks:
    return SampleBlocks(vm_uuid="u", target="vda", seed=SEED, offsets=offsets, choose=choose)


def digest(byte: int) -> bytes:
    return xxh3_128_digest(bytes([byte]) * BLOCK, SEED)


def test_an_image_that_a_process_writes_to_is_sampled_and_not_touched(image: Path) -> None:
    with in_use(image):
        before = (image.stat().st_mtime_ns, image.read_bytes())
        with closing(open_shared("vda", image, image.suffix[1:], image.parent)) as disk:
            answer = sample(disk, question(0, 2 * MIB))
            chosen = sample(disk, question(choose=4096))
        assert (image.stat().st_mtime_ns, image.read_bytes()) == before
    assert answer.digests == digest(0) + digest(42)
    # qemu-img gives a raw image its first page, so that its alignment can be probed.
    assert answer.data_bytes - MIB in (0, 4096)
    assert sorted(set(chosen.offsets) - {0}) == list(range(2 * MIB, 3 * MIB, BLOCK))


def test_somebody_may_begin_to_write_while_samples_are_taken(image: Path) -> None:
    with closing(open_shared("vda", image, image.suffix[1:], image.parent)), in_use(image):
        pass  # `in_use` itself waits until QEMU has its locks, which it gets


def test_an_image_under_our_own_fence_is_sampled(image: Path) -> None:
    with closing(hold_exclusive(image)), closing(open_shared("vda", image, image.suffix[1:], image.parent)) as disk:
        assert sample(disk, question(2 * MIB)).digests == digest(42)


def test_a_chain_is_read_whole_though_its_base_is_in_use(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 42 2M 1M", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    with in_use(base), closing(open_shared("vda", top, "qcow2", tmp_path)) as disk:
        assert sample(disk, question(2 * MIB)).digests == digest(42)


def test_no_server_and_no_socket_stays(image: Path) -> None:
    with closing(open_shared("vda", image, image.suffix[1:], image.parent)) as disk:
        sample(disk, question(choose=8))
    assert [path.name for path in image.parent.iterdir()] == [image.name]
    hold_exclusive(image).close()


@pytest.mark.real
@pytest.mark.parametrize("rig", ["libvirt"], indirect=True)
def test_a_running_vm_is_sampled_and_goes_on_writing(rig: Rig, tmp_path: Path) -> None:
    assert isinstance(rig, LibvirtRig)
    vm = rig.vm()
    rig.boot(vm)
    for target in ("vda", "vdb"):
        asked = SampleBlocks(vm_uuid=vm.uuid, target=target, seed=SEED, offsets=tuple(range(0, SIZE_BYTES, BLOCK)))
        answer = sample_disk(rig.host, tmp_path, asked)
        assert len(answer.digests) == 16 * len(asked.offsets)
    rig.let_guest_write(vm)
    assert list(tmp_path.iterdir()) == []
