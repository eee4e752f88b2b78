"""Failback to an entirely new location on real hosts: the VM is made on the production host, in pools of libvirt's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.test_whole_machine import TPM, change_variables, machine_pair, nvram_of, take_over, tpm_state
from tests.lab import console, disks
from tests.lab.domain import LabDisk
from tests.lab.private_host import HostError
from tests.lab.site import LabPair, LabVm, Site

pytestmark = [pytest.mark.real, pytest.mark.root]

TWIN_OS = "<os><type arch='x86_64'>hvm</type></os>"
START = ("start", "--yes", "--foreground", "--shutdown-timeout", "60s")


@pytest.fixture
def pool(site: Site) -> Iterator[Path]:
    """The pool ``new`` of the production host, in a folder of its own: VMs that were committed before keep theirs."""
    images = site.production.images
    path = images / f"new-{len(list(images.glob('new-*')))}"
    path.mkdir()
    site.production.virsh("pool-define-as", "new", "dir", "--target", str(path))
    site.production.virsh("pool-start", "new")
    yield path
    site.production.virsh("pool-destroy", "new")
    site.production.virsh("pool-undefine", "new")


def to_new(site: Site, name: str, *more: str) -> tuple[str, ...]:
    """The words for a VM of that name in the pool ``new``, which boots from what the host's own VMs boot from."""
    files = zip(_boot_files(site.dr.images), _boot_files(site.production.images), strict=True)
    kernels = (f"firmware:{there}={here}" for there, here in files)
    words = (f"name={name}", "pool:vda=new", "pool:vdb=new", *more, *kernels)
    said = [word for each in words for word in ("--map", each)]
    return ("--to", "host", "prod", *said)


def _boot_files(images: Path) -> tuple[Path, Path]:
    return images / "kernel", images / "initrd"


def made(site: Site, pair: LabPair, name: str) -> LabPair:
    """The pair with the VM that was made as its original."""
    listed = site.production.virsh("domblklist", name).splitlines()[2:]
    paths = dict(line.split(None, 1) for line in listed if line.strip())
    images = tuple(
        LabDisk(disk.target, Path(paths[disk.target]), disk.format, disk.contents) for disk in pair.replica.disks
    )
    return replace(pair, original=LabVm(site.production, name, images, site.production.images / f"{name}.console"))


def known(site: Site) -> set[str]:
    return set(site.production.virsh("list", "--all", "--name").split())


def checksums(vm: LabVm) -> dict[Path, str]:
    return {disk.path: hashlib.blake2b(disk.path.read_bytes()).hexdigest() for disk in vm.disks}


def test_the_new_vm_holds_everything_and_commit_keeps_it(site: Site, pool: Path) -> None:
    pair = site.make_pair("fresh")
    old = checksums(pair.original)
    to = to_new(site, "fresh-new")
    plan = site.failback("plan", "--no-estimate", *to, pair.name)["plan"]
    assert plan["refusals"] == []
    site.failback(*START, "--no-power-on", *to, pair.name)
    new = made(site, pair, "fresh-new")
    new.assert_same_disks()
    assert {disk.path.parent for disk in new.original.disks} == {pool}
    with pytest.raises(HostError):
        pair.original.host.virsh("start", "fresh")  # the former original is fenced
    site.failback("commit", pair.name, "--restore-point", "drop", "--yes")
    assert checksums(pair.original) == old
    (left,) = [each for each in site.failback("pairs")["excluded"] if each["pair"] == pair.name]
    assert (left["vm"]["name"], left["why"]) == ("fresh", "former")
    site.production.virsh("start", "fresh-new")
    assert new.original.is_running()
    site.production.virsh("destroy", "fresh-new")


def test_undo_after_it_ran_leaves_neither_volume_nor_domain(site: Site, pool: Path) -> None:
    pair = site.make_pair("freshback", formats=("raw", "qcow2"))
    before, old = known(site), checksums(pair.original)
    site.failback(*START, "--power-on", *to_new(site, "freshback-new"), pair.name)
    assert made(site, pair, "freshback-new").original.is_running()
    assert len(list(pool.iterdir())) == 2
    left = console.last(pair.replica.log)
    site.failback("undo", pair.name, "--yes")
    console.wait_ready(pair.replica.log, after=console.read(pair.replica.log).index("FAILBACK LAST"))
    assert console.found(pair.replica.log) == left
    assert known(site) == before
    assert list(pool.iterdir()) == []
    assert checksums(pair.original) == old
    status = site.failback("status", pair.name)
    assert (status["state"], status["original"]["name"], status["former"]) == ("Failover", "freshback", None)
    assert pair.name not in [each["pair"] for each in site.failback("pairs")["excluded"]]
    # In place works as ever afterwards.
    site.failback(*START, "--no-power-on", pair.name)
    pair.assert_same_disks()
    site.failback("undo", pair.name, "--yes")


@pytest.mark.long
def test_a_run_that_is_killed_in_its_first_pass_is_cancelled_without_a_trace(site: Site, pool: Path) -> None:
    pair = site.make_pair("freshkill")
    before = known(site)
    with site.bulk_stalled():
        run = site.spawn(*START, *to_new(site, "freshkill-new"), pair.name)
        site.wait_for_status(pair.name, lambda status: status["step"] == "pass:1" and bool(status["progress"]), run)
        assert len(list(pool.iterdir())) == 2
        run.kill()
        run.wait(60)
    site.failback("cancel", pair.name)
    assert known(site) == before
    assert list(pool.iterdir()) == []
    assert pair.replica.is_running()


def test_what_the_host_lacks_is_refused_with_what_it_has(site: Site, pool: Path) -> None:
    pair = site.make_pair("freshno", failed_over=True)
    told = site.failback("plan", "--no-estimate", "--to", "host", "prod", pair.name, exit_code=3)
    found = {refusal["code"]: refusal["sentence"] for refusal in told["plan"]["refusals"]}
    assert found.keys() >= {"name-clash", "firmware-missing"}, found
    assert str(site.production.images / "kernel") in found["firmware-missing"]
    missing = to_new(site, "freshno-new", "pool:vdb=nowhere")
    told = site.failback("plan", "--no-estimate", *missing, pair.name, exit_code=3)
    (refusal,) = told["plan"]["refusals"]
    assert refusal["code"] == "pool-missing"
    assert "it can use: new" in refusal["sentence"]

    site.dr.virsh("attach-interface", pair.replica.name, "bridge", "br-gone", "--config")
    told = site.failback("plan", "--no-estimate", *to_new(site, "freshno-new"), pair.name, exit_code=3)
    (refusal,) = told["plan"]["refusals"]
    assert refusal["code"] == "network-missing"
    assert "has no bridge br-gone" in refusal["sentence"]
    uuid = pair.original.host.virsh("domuuid", pair.original.name)
    site.dr.define(f"<domain type='qemu'><name>twin</name><uuid>{uuid}</uuid><memory>65536</memory>{TWIN_OS}</domain>")
    words = ("--to", "host", "dr", "--former-original-gone")
    told = site.failback("plan", "--no-estimate", *words, pair.name, exit_code=3)
    found = {refusal["code"]: refusal["sentence"] for refusal in told["plan"]["refusals"]}
    assert f"with that UUID already (twin, {uuid})" in found["uuid-clash"]


def tiny_pool(site: Site, name: str, size: str) -> Path:
    """A pool of the production host on a tmpfs of its own, in the host's own view of the file system alone."""
    path = site.production.images / name
    path.mkdir()
    done = site.production.run(["mount", "-t", "tmpfs", "-o", size, name, str(path)])
    assert done.returncode == 0, done.stderr
    site.production.virsh("pool-define-as", name, "dir", "--target", str(path))
    site.production.virsh("pool-start", name)
    return path


def test_a_pool_without_room_is_refused_and_one_that_is_full_half_way_is_left_empty(site: Site, pool: Path) -> None:
    pair = site.make_pair("freshfull", formats=("qcow2", "qcow2"))
    before = known(site)
    tiny_pool(site, "tiny", "size=300k")
    to = to_new(site, "freshfull-new", "pool:vda=tiny", "pool:vdb=tiny")
    told = site.failback("plan", "--no-estimate", *to, pair.name, exit_code=3)
    assert [refusal["code"] for refusal in told["plan"]["refusals"]] == ["pool-full"], told
    # Room in bytes, and for one file: the second volume is where it turns out.
    half = tiny_pool(site, "half", "size=400m,nr_inodes=2")
    to = to_new(site, "freshfull-new", "pool:vda=half", "pool:vdb=half")
    failed = site.failback(*START, *to, pair.name, exit_code=1)
    assert "The pool half has no room for the volume freshfull-new-vdb" in str(failed)
    assert site.production.run(["ls", str(half)]).stdout.split() == []
    assert known(site) == before
    site.failback("cancel", pair.name)
    assert site.failback("status", pair.name)["state"] == "Failover"
    assert pair.replica.is_running()


@pytest.mark.long
def test_raw_disks_become_raw_volumes_of_the_very_size(site: Site, pool: Path) -> None:
    pair = site.make_pair("freshraw", formats=("raw", "raw"), size_bytes=(48 << 20) + 512)
    site.failback(*START, "--no-power-on", *to_new(site, "freshraw-new"), pair.name)
    for new, old in zip(made(site, pair, "freshraw-new").original.disks, pair.replica.disks, strict=True):
        assert new.path.stat().st_size == old.path.stat().st_size
        disks.assert_same(new.path, "raw", old.path, "raw", locked=True)
    site.failback("undo", pair.name, "--yes")
    assert list(pool.iterdir()) == []


@pytest.mark.long
def test_firmware_variables_and_a_tpms_state_come_with_a_uefi_guest(site: Site, pool: Path) -> None:
    pair = machine_pair(site, "freshuefi", TPM)
    take_over(site, pair)
    new = change_variables(pair.replica, b"boot entry of the failover")
    assert b"boot entry of the failover" in new
    before = known(site)
    to = to_new(site, "freshuefi-new")
    site.failback(*START, "--no-audit", "--no-power-on", *to, pair.name)
    vm = made(site, pair, "freshuefi-new").original
    assert nvram_of(vm).read_bytes() == nvram_of(pair.replica).read_bytes()
    assert b"boot entry of the failover" in nvram_of(vm).read_bytes()
    assert tpm_state(vm) == tpm_state(pair.replica)
    vm.host.virsh("start", vm.name)
    site.failback("undo", pair.name, "--yes")
    assert known(site) == before
    assert not nvram_of(vm).exists()
    assert list(pool.iterdir()) == []
