"""Two hosts and one pair that fails back again and again: what a cell of the matrix strikes at, and how it is judged.

Nothing here asks failback how things are but for the pair's state: VMs are judged by their QEMU processes and consoles,
disks by ``qemu-img`` and by what the test itself has written.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.verbs import Verbs
from tests.lab import console, disks
from tests.lab.agent_process import AgentProcess
from tests.lab.domain import LabDisk
from tests.lab.guest import Guest
from tests.lab.site import LabPair, LabVm, Site, monitor_of, open_site
from tests.lab.tiny_guest import GUEST_BYTES, GUEST_OFFSET, tiny_domain_xml, tiny_kernel

MIB = 1 << 20
SIZES = {"vda": 12 * MIB, "vdb": 8 * MIB}
FORMATS: dict[str, disks.Format] = {"vda": "qcow2", "vdb": "raw"}
WRITES, WRITE_BYTES = 6, 128 << 10
WAIT_S = 60.0
WATCH_S = 0.02
OF_AGENTS = ("local.sock",)
"""What an agent keeps in its runtime folder as long as it runs."""


class Watch(threading.Thread):
    """Sees whether both VMs of the pair ever run at once (I1), by the PID files of their QEMUs.

    `excused`: while set, a person has started a VM by hand, and what follows from that is theirs.
    """

    def __init__(self, rig: Rig) -> None:
        super().__init__(daemon=True)
        self._rig = rig
        self._over = threading.Event()
        self.both = 0
        self.excused = False

    def run(self) -> None:
        """Look until `end`."""
        while not self._over.wait(WATCH_S):
            if self._rig.runs(self._rig.pair.original) and self._rig.runs(self._rig.pair.replica) and not self.excused:
                self.both += 1

    def end(self) -> None:
        """Stop looking."""
        self._over.set()
        self.join()


class Rig:
    """One pair on two hosts, *Failover* at first. Use `open_rig`.

    Attributes:
        pair: the present one; `renew` puts a fresh one in its place.
        expected: by the replica's target, what the newest side must hold outside the guest's own part.
    """

    def __init__(self, site: Site, verbs: Verbs, *, seed: int = 1) -> None:
        self.site = site
        self.verbs = verbs
        self._dice = random.Random(seed)
        self._count = 0
        self.expected: dict[str, bytes] = {}
        self.pair = self._make()
        self.watch = Watch(self)
        self.watch.start()

    # --- places -----------------------------------------------------------------------------------------------------

    @property
    def source(self) -> AgentProcess:
        """Beside the replica."""
        return self.site.agents["dr"]

    @property
    def target(self) -> AgentProcess:
        """Beside the original."""
        return self.site.agents["prod"]

    def runs(self, vm: LabVm) -> bool:
        """Whether a QEMU of that VM lives."""
        file = vm.host.folder / "run/libvirt/qemu" / f"{vm.name}.pid"
        try:
            pid = int(file.read_text())
        except (FileNotFoundError, ValueError):
            return False
        return vm.host.has_process(pid, "qemu-system")

    def state(self) -> str:
        """The pair's state, from the database."""
        return str(self._database("select state from pairs where name = ?", self.pair.name)[0][0])

    def exits(self) -> str:
        """What *Needs operator* says, as JSON; empty in another state."""
        return str(self._database("select operator from pairs where name = ?", self.pair.name)[0][0] or "")

    def journal(self) -> list[tuple[str, str, str, str]]:
        """Phase, kind, step and sentence of every entry of the pair, oldest first."""
        return self._database(
            "select phase, kind, step, sentence from journal where pair = ? order by seq", self.pair.name
        )

    def _database(self, question: str, *values: str) -> list[Any]:
        (file,) = (self.site.folder / "coordinator/state").glob("registry.sqlite")
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=WAIT_S)) as connection:
            return list(connection.execute(question, values))

    # --- the pair ---------------------------------------------------------------------------------------------------

    def renew(self) -> None:
        """Another pair, after one that a fault has left in an unknown condition."""
        for vm in (self.pair.original, self.pair.replica):
            vm.host.run(["virsh", "-c", "qemu:///system", "destroy", vm.name])
        self.pair = self._make()

    def _make(self) -> LabPair:
        self._count += 1
        name = f"web{self._count}"
        vms: list[LabVm] = []
        for host, suffix, writes in ((self.site.production, "", False), (self.site.dr, "-replica", True)):
            folder = host.images / name
            folder.mkdir()
            folder.chmod(0o777)
            images = _images(folder, seed=self._count)
            kernel = host.images / f"kernel-{writes}"
            kernel.write_bytes(tiny_kernel(writes=writes))
            log = host.images / f"{name}{suffix}.console"
            xml = tiny_domain_xml(f"{name}{suffix}", str(uuid.uuid4()), images, kernel, log, monitor_of(images))
            host.define(xml)
            vms.append(LabVm(host, f"{name}{suffix}", images, log))
        pair = LabPair(name, *vms)
        self.verbs.must("register", name, "--original", f"prod/{name}", "--replica", f"dr/{name}-replica")
        pair.replica.start()
        self.verbs.must("failover", name)
        return pair

    def is_fenced(self, vm: LabVm) -> bool:
        """Whether the journal says that its fence was taken and not lifted since."""
        replica = vm is self.pair.replica
        taken = "fence_replica" if replica else "fence_original"
        lifts = (
            {("do", "release_replica"), ("undo", taken)}
            if replica
            else {("do", "lift_original_fence"), ("undo", taken)}
        )
        fenced = False
        for phase, kind, step, _ in self.journal():
            if (phase, step) == ("do", taken) or (not replica and (phase, step) == ("undo", "lift_original_fence")):
                fenced = kind == "done"
            elif (phase, step) in lifts:
                fenced = False
        return fenced

    def serve(self) -> None:
        """Start the replica where it is off: a run that found it so leaves it so."""
        if not self.runs(self.pair.replica):
            self.pair.replica.start()

    def write(self) -> None:
        """Write to the serving replica here and there, as its guest would, and remember what it holds now."""
        replica = self.pair.replica
        with replica.monitor() as monitor:
            for number, disk in enumerate(replica.disks):
                for _ in range(WRITES):
                    offset = self._dice.randrange(2 * MIB, SIZES[disk.target] - WRITE_BYTES, 4096)
                    monitor.write(number, offset, WRITE_BYTES, pattern=self._dice.randrange(1, 256))
                monitor.flush(number)
        self.expected = self.contents(replica)

    def contents(self, vm: LabVm) -> dict[str, bytes]:
        """What its disks hold outside the guest's own part."""
        sources = vm.sources()
        return {disk.target: _outside(sources[disk.target], vm.host.folder) for disk in vm.disks}

    def last_count(self, vm: LabVm) -> int:
        """The last count that the guest ever said was written, in any boot."""
        lines = console.read(vm.log).splitlines()
        return max((int(line.split()[3]) for line in lines if line.startswith("FAILBACK WROTE")), default=0)

    def failover_again(self) -> None:
        """From *Ready* to *Failover*: the next disaster."""
        self.pair.original.host.virsh("destroy", self.pair.original.name)
        self.pair.replica.start()
        self.verbs.must("failover", self.pair.name)

    # --- judging ----------------------------------------------------------------------------------------------------

    def wait_until(self, true: Callable[[], bool], what: str) -> None:
        """Wait for it; an `AssertionError` says what never came."""
        deadline = time.monotonic() + WAIT_S
        while not true():
            assert time.monotonic() < deadline, what
            time.sleep(WATCH_S)

    def judge(self, state: str) -> None:
        """Everything that must be true of a pair at rest in that state; raises `AssertionError`."""
        original, replica = self.pair.original, self.pair.replica
        assert self.watch.both == 0, "I1: original and replica ran at the same time"
        newest = replica if state == "Failover" else original
        other = original if newest is replica else replica
        self.wait_until(lambda: self.runs(newest), f"{newest.name} holds the newest data and does not run")
        assert not self.runs(other), f"{other.name} runs"
        self._judge_history(newest)
        held = self.contents(newest)
        for target, wanted in self.expected.items():
            assert held[target] == wanted, f"{target} of {newest.name} is not what was written"
        if state == "Failback":
            self.pair.assert_same_disks()
        self.assert_nothing_left(state)

    def _judge_history(self, newest: LabVm) -> None:
        """No boot ever found less than was acknowledged before it, and the present one serves.

        A count is said of ``vda`` before it is written to ``vdb``: one less is no loss there.
        """
        if newest is self.pair.replica:
            console.wait_for_writes(newest.log, "vda", 1, WAIT_S)
        else:
            wanted = self.last_count(self.pair.replica)
            self.wait_until(lambda: _least(console.found(newest.log)) + 1 >= wanted, f"{newest.name} lacks a write")
        acknowledged = 0
        for line in console.read(self.pair.replica.log).splitlines():
            match line.split():
                case ["FAILBACK", "WROTE", _, count]:
                    acknowledged = max(acknowledged, int(count))
                case ["FAILBACK", "FOUND", _, count, _]:
                    assert int(count) + 1 >= acknowledged, f"a boot found {count}, {acknowledged} was acknowledged"

    def assert_nothing_left(self, state: str) -> None:
        """No process, job, checkpoint, snapshot, bitmap, scratch file or socket of ours."""
        replica = self.pair.replica
        assert replica.host.virsh("checkpoint-list", replica.name, "--name").split() == [], "checkpoints are left"
        if state != "Failback":
            assert replica.host.virsh("snapshot-list", replica.name, "--name").split() == [], "a snapshot is left"
            assert replica.sources() == {disk.target: disk.path for disk in replica.disks}, "an overlay is left"
            assert not _bitmaps(replica.disks[0].path), "bitmaps are left"
            left = [p.name for p in replica.disks[0].path.parent.iterdir() if "failback" in p.name]
            assert left == [], f"beside the replica's disks: {left}"
        if self.runs(replica):
            job = replica.host.virsh("domjobinfo", replica.name).split()
            assert job == ["Job", "type:", "None"], job
        for host in (self.site.production, self.site.dr):
            servers = host.run(["pgrep", "-a", "qemu-nbd"]).stdout
            assert servers == "", f"on {host.name}: {servers}"
        for agent in self.site.agents.values():
            files = [path.name for path in (agent.config.parent / "run").iterdir() if path.name not in OF_AGENTS]
            assert files == [], f"{agent.name} keeps {files}"


def _least(found: dict[str, console.Record]) -> int:
    return min((record.sequence for record in found.values()), default=-1)


def _images(folder: Path, *, seed: int) -> tuple[LabDisk, ...]:
    """Equal images for the same `seed`; allocated where the guest writes, which flushes nothing."""
    made: list[LabDisk] = []
    for number, (target, size) in enumerate(SIZES.items()):
        raw = folder / f"{target}.raw"
        dice = random.Random(seed * 10 + number)
        with raw.open("wb") as file:
            file.truncate(size)
            file.seek(GUEST_OFFSET)
            file.write(bytes(512) + dice.randbytes(GUEST_BYTES - 512))
            file.seek(4 * MIB)
            file.write(dice.randbytes(MIB))
        path = raw
        if FORMATS[target] == "qcow2":
            path = folder / f"{target}.qcow2"
            disks.copy(raw, "raw", path, "qcow2")
            raw.unlink()
        made.append(LabDisk(target, path, FORMATS[target]))
    return tuple(made)


def _outside(image: Path, scratch: Path) -> bytes:
    """The disk's bytes outside the guest's own part, read whatever locks are held."""
    form = "qcow2" if image.suffix != ".raw" else "raw"
    name = str(image).replace(",", ",,")
    options = f"driver={form},file.driver=file,file.filename={name},file.locking=off"
    out = scratch / "contents"
    words = ["qemu-img", "convert", "-U", "--image-opts", options, "-O", "raw", str(out)]
    if form == "qcow2":
        options += ",backing.file.locking=off" if _has_backing(image) else ""
        words[4] = options
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data = out.read_bytes()
    out.unlink()
    return data[:GUEST_OFFSET] + data[GUEST_OFFSET + GUEST_BYTES :]


def _has_backing(image: Path) -> bool:
    words = ["qemu-img", "info", "-U", str(image)]
    return "backing file" in subprocess.run(words, capture_output=True, text=True, check=True).stdout


def _bitmaps(image: Path) -> bool:
    words = ["qemu-img", "info", "-U", str(image)]
    return "bitmaps:" in subprocess.run(words, capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def open_rig(folder: Path, cache_dir: Path, *, seed: int = 1) -> Iterator[Rig]:
    """Bring a rig up, and take it down whole."""
    with (
        open_site(folder, Guest(Path(), Path()), cache_dir) as site,
        Verbs(site.coordinator, folder / "verbs") as verbs,
    ):
        rig = Rig(site, verbs, seed=seed)
        try:
            yield rig
        finally:
            rig.watch.end()
