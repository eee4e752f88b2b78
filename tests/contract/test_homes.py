"""VMs made anew and removed again, on the hypervisor in memory and on a libvirtd of its own with real pools."""

from __future__ import annotations

import json
import ssl
import subprocess
import uuid as uuids
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from agent.config import Config, TlsConfig
from agent.errors import DiskFull, HypervisorError, NoSuchDomain
from agent.ledger import Ledger
from agent.service import AgentService
from agent.virt.seam import Hypervisor
from protocol.messages import (
    CreateVm,
    DescribeProvisions,
    Done,
    FenceDescription,
    FenceVm,
    KeepCreated,
    NewVolume,
    Order,
    PassProgress,
    Provisions,
    RemoveCreated,
    Reply,
    Request,
    Side,
    VmCreated,
)
from tests.fakes.hypervisor import FakeHypervisor, FakeMachine
from tests.fakes.provider import FakePool
from tests.lab.private_host import PrivateHost
from tests.unit.agent_house import PEER

UUID = str(uuids.uuid4())
ODD_BYTES = (4 << 20) + 512
ORDER = Order(pair="web", run="r1", epoch=1)
OS = "<os><type arch='x86_64' machine='pc'>hvm</type></os>"
VOLUMES = (
    NewVolume(target="vda", pool="fast", format="qcow2", size_bytes=ODD_BYTES),
    NewVolume(target="vdb", pool="fast", format="raw", size_bytes=ODD_BYTES),
)


def definition(*, name: str = "fresh", uuid: str = UUID, extra: str = "", os: str = OS) -> str:
    disks = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><target dev='{target}' bus='virtio'/></disk>"
        for target in ("vda", "vdb")
    )
    return (
        f"<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='KiB'>65536</memory>"
        f"<vcpu>1</vcpu>{os}<devices>{disks}{extra}</devices></domain>"
    )


CREATE = CreateVm(order=ORDER, vm_uuid=UUID, name="fresh", definition=(definition(),), volumes=VOLUMES)


class Home(Protocol):
    """A host with the pools ``fast``, ``tiny`` (room for one volume) and ``asleep`` (not active)."""

    host: Hypervisor

    def size_bytes(self, path: Path) -> int:
        """Of the disk in that image, as its guest will see it."""

    def files(self, pool: str) -> set[str]:
        """Names of what is in the pool."""


class FakeHome:
    def __init__(self, folder: Path) -> None:
        self.machine = FakeMachine(folder)
        for name, room in (("fast", 1 << 40), ("tiny", 4096), ("asleep", 1 << 40)):
            (folder / name).mkdir()
            self.machine.volumes.pools[name] = FakePool(folder / name, active=name != "asleep", room_bytes=room)
        self.host: Hypervisor = FakeHypervisor(self.machine)
        self._folder = folder

    def size_bytes(self, path: Path) -> int:
        return path.stat().st_size

    def files(self, pool: str) -> set[str]:
        return {path.name for path in (self._folder / pool).iterdir()}


class LibvirtHome:
    def __init__(self, machine: PrivateHost) -> None:
        from agent.virt.libvirt_host import LibvirtHost

        self._machine = machine
        for name in ("fast", "tiny", "asleep"):
            path = machine.images / name
            path.mkdir()
            if name == "tiny":
                mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tiny", str(path)]
                done = machine.run(mount)
                assert done.returncode == 0, done.stderr
            machine.virsh("pool-define-as", name, "dir", "--target", str(path))
            if name != "asleep":
                machine.virsh("pool-start", name)
        self.host: Hypervisor = LibvirtHost(
            machine.uri, scratch_dir=machine.images, lib_dir=machine.folder / "lib/qemu"
        )

    def size_bytes(self, path: Path) -> int:
        told = subprocess.run(["qemu-img", "info", "--output=json", str(path)], check=True, capture_output=True)
        size: int = json.loads(told.stdout)["virtual-size"]
        return size

    def files(self, pool: str) -> set[str]:
        done = self._machine.run(["ls", str(self._machine.images / pool)])
        return set(done.stdout.split())


@pytest.fixture(params=["memory", pytest.param("libvirt", marks=[pytest.mark.real, pytest.mark.root])])
def home(request: pytest.FixtureRequest, lab_folder: Path) -> Iterator[Home]:
    if request.param == "memory":
        yield FakeHome(lab_folder)
        return
    cache: Path = request.getfixturevalue("lab_cache")
    with PrivateHost("homes", lab_folder / "h", "10.77.0.1", cache_dir=cache) as machine:
        real = LibvirtHome(machine)
        try:
            yield real
        finally:
            real.host.close()


@contextmanager
def serving(home: Home, folder: Path) -> Iterator[AgentService]:
    """An agent of that host; its state is in `folder`, and outlives it."""
    nowhere = folder / "none.pem"
    config = Config(
        tls=TlsConfig(ca=nowhere, certificate=nowhere, key=nowhere),
        name="prod",
        state_dir=folder / "state",
        runtime_dir=folder,
    )
    ledger = Ledger.open(config.state_dir)
    service = AgentService(
        config=config,
        fingerprint="22" * 32,
        client_context=ssl.create_default_context(),
        hypervisor=home.host,
        ledger=ledger,
    )
    try:
        yield service
    finally:
        service.fences.close()
        ledger.close()


async def ask(service: AgentService, request: Request) -> Reply:
    async def no_progress(_: PassProgress) -> None:
        return

    return await service.handle(request, PEER, no_progress)


def is_known(home: Home, what: str) -> bool:
    try:
        home.host.find(what)
    except NoSuchDomain:
        return False
    return True


def records(folder: Path) -> list[Path]:
    return list((folder / "state" / "homes").glob("*")) if (folder / "state" / "homes").exists() else []


REMOVE = RemoveCreated(order=ORDER, vm_uuid=UUID)


async def test_a_vm_is_made_of_exact_size_is_fenced_and_goes_without_a_trace(home: Home, tmp_path: Path) -> None:
    with serving(home, tmp_path) as service:
        told = await ask(service, DescribeProvisions(arch="x86_64", virt_type="qemu", machine="pc"))
        assert isinstance(told, Provisions)
        assert "pc" in told.machines
        assert [(pool.name, pool.active) for pool in told.pools] == [("asleep", False), ("fast", True), ("tiny", True)]
        made = await ask(service, CREATE)
        assert isinstance(made, VmCreated)
        assert [home.size_bytes(Path(path)) for path in made.paths] == [ODD_BYTES, ODD_BYTES]
        assert await ask(service, CREATE) == made
        found = home.host.inspect(UUID)
        assert [(disk.target, str(disk.chain[0].path)) for disk in found.disks] == list(
            zip(("vda", "vdb"), made.paths, strict=True)
        )
        fence = await ask(service, FenceVm(order=ORDER, vm_uuid=UUID, side=Side.ORIGINAL, targets=("vda", "vdb")))
        assert isinstance(fence, FenceDescription)
        assert set(fence.locked) == {"vda", "vdb"}
        for _ in range(2):
            assert await ask(service, REMOVE) == Done()
        assert not is_known(home, "fresh")
        assert home.files("fast") == set()
        assert records(tmp_path) == []
        assert service.ledger.fence(UUID) is None


async def test_what_is_kept_for_good_is_not_removed_any_more(home: Home, tmp_path: Path) -> None:
    with serving(home, tmp_path) as service:
        await ask(service, CREATE)
        await ask(service, RemoveCreated(order=replace(ORDER, run="r2", epoch=2), vm_uuid=UUID))
        assert is_known(home, UUID)  # another run's
        for _ in range(2):
            await ask(service, KeepCreated(order=replace(ORDER, epoch=2), vm_uuid=UUID))
        await ask(service, replace(REMOVE, order=replace(ORDER, epoch=2)))
        assert is_known(home, UUID)
        assert len(home.files("fast")) == 2


async def test_a_pool_that_is_full_half_way_leaves_nothing(home: Home, tmp_path: Path) -> None:
    volumes = tuple(replace(volume, pool="tiny", format="qcow2") for volume in VOLUMES)
    with serving(home, tmp_path) as service:
        with pytest.raises(DiskFull, match="The pool tiny has no room for the volume fresh-vdb"):
            await ask(service, replace(CREATE, volumes=volumes))
        assert home.files("tiny") == set()
        assert not is_known(home, "fresh")
        assert records(tmp_path) == []


@pytest.mark.parametrize("pool", ["asleep", "nowhere"])
async def test_a_pool_that_is_not_there_or_not_active(home: Home, tmp_path: Path, pool: str) -> None:
    with serving(home, tmp_path) as service:
        with pytest.raises(HypervisorError, match=pool):
            await ask(service, replace(CREATE, volumes=(VOLUMES[0], replace(VOLUMES[1], pool=pool))))
        assert home.files("fast") == set()


async def test_names_and_uuids_that_are_taken_stay_what_they_are(home: Home, tmp_path: Path) -> None:
    with serving(home, tmp_path) as service:
        made = await ask(service, CREATE)
        other = str(uuids.uuid4())
        order = Order(pair="other", run="r9", epoch=1)
        clash = CreateVm(
            order=order, vm_uuid=other, name="fresh", definition=(definition(uuid=other),), volumes=VOLUMES
        )
        with pytest.raises(HypervisorError, match="has a VM fresh already"):
            await ask(service, clash)
        with pytest.raises(HypervisorError, match="was made here for the run r1"):
            await ask(service, replace(CREATE, order=order))
        assert await ask(service, CREATE) == made
        assert len(home.files("fast")) == 2


class Died(BaseException):
    """The agent's process dies here."""


@pytest.mark.parametrize("at", ["create_volume", "define_new", "state_places"])
@pytest.mark.parametrize("before", [True, False])
async def test_after_a_crash_in_the_middle_it_is_made_whole_or_removed_whole(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, before: bool
) -> None:
    for then in ("made", "removed"):
        real = getattr(home.host, at)

        def dying(*args: object, real=real, **kwargs: object) -> object:  # type: ignore[no-untyped-def]  # noqa: ANN001
            if not before:
                real(*args, **kwargs)
            raise Died

        with serving(home, tmp_path) as service, monkeypatch.context() as patched:
            patched.setattr(home.host, at, dying)
            with pytest.raises(Died):
                service.homes.obey(CREATE)
        with serving(home, tmp_path) as service:
            if then == "made":
                made = await ask(service, CREATE)
                assert isinstance(made, VmCreated)
                assert {Path(path).name for path in made.paths} == home.files("fast")
                assert is_known(home, UUID)
            await ask(service, REMOVE)
        assert home.files("fast") == set()
        assert not is_known(home, "fresh")
        assert records(tmp_path) == []


@pytest.mark.parametrize(
    ("extra", "os", "why"),
    [
        ("<hostdev mode='subsystem' type='usb'/>", OS, "a device <hostdev>"),
        ("<disk device='disk'><source file='/etc/shadow'/><target dev='vdc'/></disk>", OS, "a disk with a source"),
        ("<disk device='disk'><target dev='vdc'/></disk>", OS, "No volume is to be made for the disk vdc"),
        ("<serial type='file'/>", OS, "a <serial> of the type file"),
        ("<interface type='direct'/>", OS, "a NIC of the type direct"),
        ("", "<os><type arch='x86_64'>hvm</type><kernel>/etc/shadow</kernel></os>", "a file /etc/shadow"),
        ("", "<os><type arch='x86_64'>hvm</type><nvram>/etc/shadow</nvram></os>", "a place for its firmware"),
    ],
)
async def test_a_definition_that_names_what_is_the_hosts_own_is_not_taken(
    lab_folder: Path, tmp_path: Path, extra: str, os: str, why: str
) -> None:
    home = FakeHome(lab_folder)
    with serving(home, tmp_path) as service:
        with pytest.raises(HypervisorError, match=why):
            await ask(service, replace(CREATE, definition=(definition(extra=extra, os=os),)))
        assert home.files("fast") == set()
        assert records(tmp_path) == []
