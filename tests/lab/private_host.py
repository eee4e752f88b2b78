"""Private hypervisor hosts: a libvirtd of its own in namespaces of its own, as production runs it. Needs root.

A host is a PID, mount, UTS and network namespace. Its PID 1 is ``tini``, which reaps orphans; when it is killed, the
kernel ends everything in the namespace, and the mounts and links go with the last process. libvirt's hard-coded
folders are bind mounts of the host's own, so inside it everything is where it is on any machine, and
``qemu:///system`` means this host.

Hosts are joined by a bridge in a third network namespace, where the coordinator runs (`PrivateNetwork`). Nothing is
set up in the machine's own network namespace.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.lab import reaper
from tests.lab.guest import Guest

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 20.0
COMMAND_TIMEOUT_S = 120.0
POLL_S = 0.02

# Where libvirt and QEMU keep things on any machine; each host has its own.
OWN_FOLDERS = {
    "etc": "/etc/libvirt",
    "run": "/run",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
}
CAPABILITIES = Path("cache/qemu/capabilities")
LIBVIRTD_CONF = 'auth_unix_rw = "none"\nauth_unix_ro = "none"\nlog_outputs = "2:stderr"\n'
QEMU_CONF = 'security_driver = "none"\ncgroup_controllers = []\nstdio_handler = "file"\nremember_owner = 0\n'
QEMU_CONF_ROOT = 'user = "root"\ngroup = "root"\nnamespaces = []\n'

# PID 1 of a host, after its namespaces exist: $1 is the host's folder, $2 its name, $3 whether to hide /dev/kvm,
# the rest pairs of own folder and machine folder. Nothing here outlives the mount namespace.
# Where QEMU's user may not open /dev/kvm but root may, libvirt finds what it knows of QEMU out of date each time it
# looks, and probes anew for ten seconds; no guest of ours uses KVM, so such a host has a /dev without it. (Mounting
# over the node won't do: libvirt moves mounts in /dev to the private one it gives QEMU.)
HOST_INIT = """
set -e
folder=$1; hostname "$2"; kvm=$3; shift 3
mount --make-rprivate /
if [ "$kvm" = hide ] && [ -e /dev/kvm ]; then
    mkdir "$folder/dev"
    mount -t tmpfs -o mode=755 dev "$folder/dev"
    cp -a -x /dev/. "$folder/dev/"
    rm "$folder/dev/kvm"
    mount --bind /dev/pts "$folder/dev/pts"
    mount -t tmpfs shm "$folder/dev/shm"
    umount -l -R /dev
    mount --move "$folder/dev" /dev
fi
while [ $# -gt 0 ]; do
    mount --bind "$folder/$1" "$2"
    shift 2
done
mount -t proc proc /proc
ip link set lo up
: > "$folder/up"
exec tini -- sleep infinity
"""


class HostError(AssertionError):
    """A private host did not come up, or did not go away completely."""


class NamespacedProcess(subprocess.Popen[Any]):
    """A process inside a host. Signals go to the process itself, not to the ``nsenter`` that waits for it."""

    @property
    def inner_pid(self) -> int:
        """PID of the process itself as seen from outside."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.poll() is None and time.monotonic() < deadline:
            if pids := reaper.children(self.pid):
                return pids[0]
            time.sleep(POLL_S)
        raise ProcessLookupError(f"{self.args!r} has ended")

    def send_signal(self, sig: int) -> None:
        """Send `sig` to the process; does nothing when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.inner_pid, sig)


class _Namespaces:
    """Namespaces held by one process, PID 1 of them where they include a PID namespace."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = argv
        self._unshare: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def hold(self, up: Path, log: IO[bytes]) -> None:
        """Make them; returns when the file `up` appears."""
        self._unshare = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not up.exists():
            if self._unshare.poll() is not None or time.monotonic() > deadline:
                raise HostError(f"`{' '.join(self._argv[:8])} …` failed; see {log.name}")
            time.sleep(POLL_S)
        (self.pid,) = reaper.children(self._unshare.pid)

    def release(self) -> None:
        """End everything inside; raises `HostError` when something is still there at the deadline."""
        if self._unshare is None:
            return
        namespace = str(Path(f"/proc/{self.pid}/ns/net").readlink()) if self.pid else ""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        else:
            self._unshare.kill()
        self._unshare.wait(END_TIMEOUT_S)
        self._unshare, self.pid = None, 0
        deadline = time.monotonic() + END_TIMEOUT_S
        while left := processes_in(namespace):
            if time.monotonic() > deadline:
                raise HostError(f"processes {left} outlived their namespace {namespace}")
            time.sleep(POLL_S)


def processes_in(namespace: str) -> list[int]:
    """PIDs of the processes in a network namespace, named as its link in ``/proc/PID/ns/net`` reads."""
    found = []
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if str(link.readlink()) == namespace:
                found.append(int(link.parts[2]))
    return found


class PrivateNetwork:
    """The bridge that joins hosts, in a network namespace of its own; the coordinator runs there with `run`.

    Args:
        folder: an existing folder for its log.
        address: the coordinator's address on the bridge, with prefix length.
    """

    def __init__(self, folder: Path, address: str = "10.77.0.254/24") -> None:
        self._folder = folder
        self.address, _, self.prefix = address.partition("/")
        up = folder / "network.up"
        script = 'ip link set lo up; : > "$1"; exec tini -- sleep infinity'
        self._namespaces = _Namespaces(
            ["unshare", "--net", "--pid", "--fork", "--kill-child", "sh", "-ec", script, "network", str(up)]
        )
        self._ports: dict[str, str] = {}

    def __enter__(self) -> Self:
        try:
            with (self._folder / "network.log").open("wb") as log:
                self._namespaces.hold(self._folder / "network.up", log)
            self._ip("link", "add", "bridge0", "type", "bridge")
            self._ip("addr", "add", f"{self.address}/{self.prefix}", "dev", "bridge0")
            self._ip("link", "set", "bridge0", "up")
        except BaseException:
            self._namespaces.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._namespaces.release()

    def argv(self, argv: Sequence[str]) -> list[str]:
        """`argv` as it must be started from outside to run in the coordinator's network namespace.

        Only the network differs: signals, files and exit code are the process's own.
        """
        return ["nsenter", f"--net=/proc/{self._namespaces.pid}/ns/net", "--", *argv]

    def run(self, argv: Sequence[str], *, timeout_s: float = COMMAND_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Run a command beside the bridge; output captured, exit code not checked."""
        return subprocess.run(self.argv(argv), capture_output=True, text=True, timeout=timeout_s, check=False)

    def join(self, name: str, pid: int, address: str) -> None:
        """Join the network namespace of process `pid` to the bridge, as host `name` with `address`."""
        port = self._ports.setdefault(name, f"port{len(self._ports)}")
        self._ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._ip("link", "set", port, "master", "bridge0", "up")
        inside = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip"]
        _checked([*inside, "addr", "add", f"{address}/{self.prefix}", "dev", "eth0"])
        _checked([*inside, "link", "set", "eth0", "up"])

    def cut_link(self, host: PrivateHost) -> None:
        """Pull the host's cable: nothing arrives, nobody is told."""
        self._ip("link", "set", self._ports[host.name], "down")

    def restore_link(self, host: PrivateHost) -> None:
        """Plug the host's cable in again."""
        self._ip("link", "set", self._ports[host.name], "up")

    def _ip(self, *arguments: str) -> None:
        _checked(self.argv(["ip", *arguments]))


class PrivateHost:
    """One host: libvirtd, its guests, and whatever `run` and `spawn` start in it.

    Args:
        name: its host name.
        folder: made by the host and removed with it; short (a unix socket's path has 107 bytes) and such that
            `qemu_user` may traverse it.
        address: on `network`.
        network: joined when given.
        qemu_user: the user QEMU runs as, with libvirt's default namespaces and dynamic ownership; None for root.
        cache_dir: keeps what libvirt learned about QEMU, so that the next host's first start is seconds quicker.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        address: str,
        network: PrivateNetwork | None = None,
        *,
        qemu_user: str | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.name = name
        self.folder = folder.absolute()
        self.address = address
        self.network = network
        self.qemu_user = qemu_user
        self._known = cache_dir / f"capabilities-{qemu_user or 'root'}" if cache_dir else None
        mounts = [word for pair in OWN_FOLDERS.items() for word in pair]
        arguments = ["host", str(self.folder), name, "hide" if qemu_user else "keep", *mounts]
        flags = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        self._namespaces = _Namespaces(["unshare", *flags, "sh", "-c", HOST_INIT, *arguments])
        self._libvirtd: NamespacedProcess | None = None

    @property
    def images(self) -> Path:
        """Folder for disk images and console logs that QEMU's user may write to through libvirt."""
        return self.folder / "images"

    @property
    def uri(self) -> str:
        """URI that reaches this host's libvirtd from outside its namespaces."""
        return f"qemu+unix:///system?socket={self.folder}/run/libvirt/libvirt-sock"

    def __enter__(self) -> Self:
        try:
            self._lay_out()
            with (self.folder / "host.log").open("wb") as log:
                self._namespaces.hold(self.folder / "up", log)
            if self.network is not None:
                self.network.join(self.name, self._namespaces.pid, self.address)
            self.start_libvirtd()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def start_libvirtd(self) -> None:
        """Start libvirtd (again); returns when it answers."""
        with (self.folder / "libvirtd.log").open("ab") as log:
            self._libvirtd = self.spawn(["libvirtd"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._libvirtd.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "libvirtd.log").read_text(errors="replace")[-2000:]
                raise HostError(f"libvirtd of {self.name} does not answer:\n{tail}")
            time.sleep(POLL_S)

    def stop_libvirtd(self, *, kill: bool = False) -> None:
        """End libvirtd, by SIGKILL if `kill`. Its guests go on."""
        if self._libvirtd is not None:
            self._libvirtd.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            self._libvirtd.wait(END_TIMEOUT_S)
            self._libvirtd = None

    def adopt(self, guest: Guest) -> Guest:
        """A copy of `guest` in this host's folder, so that libvirt may change its owner."""
        copy = Guest(self.images / "kernel", self.images / "initrd")
        for source, target in ((guest.kernel, copy.kernel), (guest.initrd, copy.initrd)):
            if not target.exists():
                shutil.copyfile(source, target)
        return copy

    def spawn(self, argv: Sequence[str], **options: Any) -> NamespacedProcess:
        """Start a process inside all of the host's namespaces; `options` as for `subprocess.Popen`."""
        return NamespacedProcess(self._argv(argv), **options)

    def run(self, argv: Sequence[str], *, timeout_s: float = COMMAND_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Run a command inside all of the host's namespaces; output captured, exit code not checked."""
        return subprocess.run(self._argv(argv), capture_output=True, text=True, timeout=timeout_s, check=False)

    def virsh(self, *arguments: str) -> str:
        """Output of ``virsh`` inside the host; raises `HostError` when it fails."""
        done = self.run(["virsh", "-c", "qemu:///system", *arguments])
        if done.returncode:
            raise HostError(f"virsh {' '.join(arguments)} on {self.name}: {done.stderr.strip()}")
        return done.stdout.strip()

    def define(self, xml: str) -> None:
        """Define a persistent domain."""
        file = self.folder / "domain.xml"
        file.write_text(xml)
        self.virsh("define", "--validate", str(file))

    def kill_qemu(self, name: str) -> None:
        """SIGKILL for the QEMU of that running domain, as a power cut would end it."""
        done = self.run(["sh", "-ec", 'kill -9 "$(cat "/run/libvirt/qemu/$1.pid")"', "sh", name])
        if done.returncode:
            raise HostError(f"the QEMU of {name} on {self.name} cannot be killed: {done.stderr.strip()}")

    def has_process(self, pid: int, name: str) -> bool:
        """Whether the process with that PID inside the host lives and has `name` in its command line."""
        try:
            line = Path(f"/proc/{self._namespaces.pid}/root/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return name.encode() in line

    def _argv(self, argv: Sequence[str]) -> list[str]:
        return ["nsenter", f"--target={self._namespaces.pid}", "--net", "--mount", "--uts", "--ipc", "--pid", *argv]

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.folder / "run/libvirt/libvirt-sock"))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
        return True

    def _lay_out(self) -> None:
        self.folder.mkdir(mode=0o755)
        self.folder.chmod(0o755)
        for own in (*OWN_FOLDERS, "images", "lib/images"):
            (self.folder / own).mkdir(mode=0o755)
        if self._known is not None and self._known.is_dir():
            shutil.copytree(self._known, self.folder / CAPABILITIES)
        configuration = f'user = "{self.qemu_user}"\ndynamic_ownership = 1\n' if self.qemu_user else QEMU_CONF_ROOT
        (self.folder / "etc/qemu.conf").write_text(QEMU_CONF + configuration)
        (self.folder / "etc/libvirtd.conf").write_text(LIBVIRTD_CONF)

    def _leave(self) -> None:
        self._namespaces.release()
        if self._libvirtd is not None:
            self._libvirtd.wait(END_TIMEOUT_S)
            self._libvirtd = None
        self._remember_capabilities()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            raise HostError(f"{self.folder} cannot be removed: is something still mounted there?")

    def _remember_capabilities(self) -> None:
        """Keep them for the next host, unless somebody has; a rename makes it all or nothing."""
        learned = self.folder / CAPABILITIES
        if self._known is None or self._known.exists() or not any(learned.glob("*.xml")):
            return
        copy = Path(tempfile.mkdtemp(prefix="capabilities-", dir=self._known.parent))
        shutil.copytree(learned, copy, dirs_exist_ok=True)
        try:
            copy.rename(self._known)
        except OSError:  # another process was quicker
            shutil.rmtree(copy)


def _checked(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode:
        raise HostError(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")
