"""The one folder that the demo leaves behind: what is in it, who may use it, and what goes at the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.lab import embed
from tests.lab.leftovers import Leftovers

REPOSITORY = Path(__file__).parents[2]
HOSTS = ("prod1", "dr1")
CACHE = "lab"
XDG = "xdg"
XDG_VARIABLES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR")
"""Where libvirt keeps what is an ordinary user's own; it does so beside an embedded root, too."""

LONGEST = 30
"""Characters of the folder's path. A view's socket lies 70 below it, and a unix socket's path has 107 (unix(7))."""


class DemoBusy(Exception):
    """Another demo uses the folder."""


class RunFolder:
    """The folder, emptied of what an earlier demo left, locked for this one.

    Attributes:
        path: the folder by a name that is short and free of characters libvirt's URIs mind: its own, or a link to it.
        real: the folder by its own name.
        cache: where the lab keeps its guest.
    """

    def __init__(self, real: Path, path: Path, cache: Path) -> None:
        self.real = real
        self.path = path
        self.cache = cache

    def tidy(self) -> None:
        """Remove what only running hosts need: their roots, disks and sockets. Logs, settings and reports stay."""
        for host in HOSTS:
            for name in ("root", "disks", "run", "scratch"):
                shutil.rmtree(self.real / host / name, ignore_errors=True)
        shutil.rmtree(self.real / XDG, ignore_errors=True)

    def catch_user_files(self) -> None:
        """Let what processes of the demo write into the user's home, by way of libvirt, go into the folder."""
        place = self.path / XDG
        place.mkdir(mode=0o700)
        os.environ.update(dict.fromkeys(XDG_VARIABLES, str(place)))

    def remove_sockets(self) -> None:
        """Remove what QEMUs that are gone listened on."""
        for path in self.real.rglob("*"):
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()


@contextlib.contextmanager
def open_folder(real: Path) -> Iterator[RunFolder]:
    """Make the folder and take it.

    Raises:
        DemoBusy: another demo has it.
    """
    real.mkdir(exist_ok=True)
    with (real / "lock").open("w") as lock, contextlib.ExitStack() as stack:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoBusy(f"another demo is running in {real}: wait for its end or stop it") from None
        _empty(real)
        path = real
        if len(str(real)) > LONGEST or not re.fullmatch(r"[\w./-]+", str(real), re.ASCII):
            path = Path(tempfile.mkdtemp(prefix=Leftovers.FOLDER_PREFIX, dir="/tmp"))
            stack.callback(shutil.rmtree, path)
            path = path / "d"
            path.symlink_to(real)
        folder = RunFolder(real, path, _cache(real))
        folder.catch_user_files()
        yield folder


def _empty(real: Path) -> None:
    """Guests first: a demo that was killed together with its reaper may have left some."""
    for host in HOSTS:
        embed.end_guests(real / host / "root")
    for entry in real.iterdir():
        if entry.name in ("lock", CACHE):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _cache(real: Path) -> Path:
    """The tests' own cache where there is one, so that the guest is not built twice."""
    if named := os.environ.get("FAILBACK_LAB_DIR"):
        return Path(named)
    shared = REPOSITORY / ".lab"
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else real / CACHE


def free_network(ports: tuple[int, ...]) -> str:
    """The first three numbers of a loopback network (127.0.0.0/8 is all this machine's) whose hosts 1 and 2 have
    those TCP ports free: two demos at once, or an agent of this machine, are not in each other's way."""
    for number in range(1, 255):
        network = f"127.86.{number}"
        with contextlib.ExitStack() as stack:
            try:
                for host in (1, 2):
                    for port in ports:
                        probe = stack.enter_context(socket.socket())
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        probe.bind((f"{network}.{host}", port))
                        probe.listen()
            except OSError:
                continue
            return network
    raise DemoBusy(f"no loopback network has TCP ports {ports} free: end what listens on all addresses there")
