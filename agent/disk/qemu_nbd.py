"""`QemuNbd`: the qemu-nbd processes we own, each serving one image whose VM is off on a unix socket."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import stat
import struct
import subprocess
import time
from pathlib import Path

from agent.disk.direct import direct_works
from agent.disk.gate import storage_error
from agent.disk.image_options import image_options
from agent.disk.lock import HeldImage
from agent.disk.processes import start_bound
from agent.errors import DiskError

EXPORT = "disk"
CONNECTIONS = 4
"""How many connections our own clients make; the server takes one more, for the question whether it is ready."""

_READY_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 60.0  # it flushes what it holds before it ends
_POLL_S = 0.005
_SOCKET_PATH_BYTES = 107  # unix(7): sun_path, without its final zero

# NBD protocol, "Fixed newstyle negotiation": the server's greeting (magic, option magic, 16 bits of flags), and a
# client that takes its leave at once (flags, option magic, NBD_OPT_ABORT, no data); qemu-nbd complains of one that just
# hangs up.
_GREETING = b"NBDMAGICIHAVEOPT"
_GREETING_BYTES = 18
_LEAVE = struct.pack(">I8sII", 1, b"IHAVEOPT", 2, 0)

_numbers = itertools.count(1)


class QemuNbd:
    """A running qemu-nbd; start it with `QemuNbd.start`.

    Attributes:
        socket: its unix socket; the export is called `EXPORT`.
        past_cache: it reads and writes past the page cache (``cache=none``).
    """

    def __init__(self, name: str, image: Path, path: Path, *, past_cache: bool, writable: bool) -> None:
        self.socket = path
        self.past_cache = past_cache
        self._name = name
        self._image = image
        self._writable = writable
        self._messages = os.memfd_create("qemu-nbd-messages", os.MFD_CLOEXEC)
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def socket_path(name: str, socket_dir: Path) -> Path:
        """A socket for a server that is to be started now or later; raises `DiskError` where none could be."""
        path = socket_dir / f"nbd-{os.getpid()}-{next(_numbers)}"
        if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
            raise DiskError(
                f"Disk {name}: the socket path {path} is longer than the {_SOCKET_PATH_BYTES} bytes a unix socket "
                "may have; set a shorter runtime folder in the agent's configuration.",
                disk=name,
            )
        if shutil.which("qemu-nbd") is None:
            raise DiskError(
                f"Disk {name}: qemu-nbd is not installed; install the package that has it "
                "(qemu-utils on Debian and Ubuntu, qemu-img on Fedora and RHEL).",
                disk=name,
            )
        return path

    @classmethod
    def start(
        cls,
        name: str,
        image: Path,
        image_format: str,
        socket_dir: Path,
        *,
        held: HeldImage | None = None,
        idle: bool = False,
        bitmap: str | None = None,
        shared: bool = False,
        writable: bool = True,
    ) -> QemuNbd:
        """Serve an image that no VM is using.

        Args:
            name: the disk's name, for messages.
            image: file or block device; any name the file system allows.
            image_format: QEMU's name of the format; never guessed from the content.
            socket_dir: where the socket is made.
            held: the exclusive lock under which the image is served; the process inherits it, so it lives until the
                last writer is gone. None serves for reading only, under QEMU's own locks.
            idle: it works under idle I/O priority (see `agent.disk.priority`).
            bitmap: a persistent bitmap of the image to export as well (context ``qemu:dirty-bitmap:NAME``).
            shared: read an image that others may be writing to, without a lock (see `image_options`).
            writable: under `held`, serve it for writing; else nothing of the file changes.

        Raises:
            DiskError: qemu-nbd is missing, refuses the image, or is not ready in time.
        """
        path = cls.socket_path(name, socket_dir)
        try:
            is_device = stat.S_ISBLK(image.stat().st_mode)
            past_cache = direct_works(image)
        except OSError as error:
            raise storage_error(name, str(image), "opening", error.errno or 0) from error
        server = cls(name, image, path, past_cache=past_cache, writable=writable and held is not None)
        try:
            options = image_options(
                image, image_format, is_device=is_device, locked_by_us=held is not None, shared=shared
            )
            server._launch(_command(server, options, bitmap), held, idle=idle)
            server._await_ready()
        except BaseException:
            server._end()
            raise
        return server

    def _launch(self, command: list[str], held: HeldImage | None, *, idle: bool) -> None:
        inherited = [] if held is None else [held.fd]
        try:
            self._process = start_bound(command, pass_fds=inherited, stderr=self._messages, idle=idle)
        except OSError as error:
            raise storage_error(self._name, str(self._image), "starting qemu-nbd", error.errno or 0) from error

    def _await_ready(self) -> None:
        """Wait until the server greets: by then it has opened the image."""
        assert self._process is not None
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not self._greets(deadline - time.monotonic()):
            if self._process.poll() is not None:
                raise self._refusal(self.last_words() or f"qemu-nbd ended with status {self._process.returncode}")
            if time.monotonic() > deadline:
                raise self._refusal(f"qemu-nbd was not ready within {_READY_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)

    def _greets(self, timeout_s: float) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(max(timeout_s, _POLL_S))
            try:
                probe.connect(str(self.socket))
                if not probe.recv(_GREETING_BYTES, socket.MSG_WAITALL).startswith(_GREETING):
                    return False
                probe.sendall(_LEAVE)
                while probe.recv(64):
                    pass  # it answers the leave, then it closes
                return True
            except OSError:
                return False  # not there yet, or it closed on us because it is ending

    def _refusal(self, cause: str) -> DiskError:
        return DiskError(
            f"Disk {self._name}: qemu-nbd cannot serve {self._image}: {cause}; "
            "look at the image (qemu-img info, qemu-img check) and at what else uses it.",
            disk=self._name,
        )

    def last_words(self) -> str:
        """The last line qemu-nbd wrote to its standard error, without its name; empty when there is none."""
        size = os.fstat(self._messages).st_size
        text = os.pread(self._messages, 4096, max(0, size - 4096)).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1].removeprefix("qemu-nbd: ") if lines else ""

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """End the server: it is asked to (and flushes), and killed when it does not; harmless when repeated.

        Raises:
            DiskError: a server that wrote did not end in order, so what it had not flushed may be lost.
        """
        if self._process is None:
            return
        words = ""
        try:
            status = self._ask_to_end(self._process)
            words = self.last_words()
        finally:
            self._end()
        if self._writable and status != 0:
            raise DiskError(
                f"Disk {self._name}: qemu-nbd did not end in order on {self._image} "
                f"({words or f'status {status}'}); what was not flushed may be lost, so run the pass again.",
                disk=self._name,
            )

    @staticmethod
    def _ask_to_end(process: subprocess.Popen[bytes]) -> int:
        process.terminate()
        try:
            return process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _end(self) -> None:
        """Whatever state it is in: no process, no socket, no descriptor stays."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        self.socket.unlink(missing_ok=True)
        if self._messages >= 0:
            os.close(self._messages)
            self._messages = -1


def _command(server: QemuNbd, options: str, bitmap: str | None) -> list[str]:
    return [
        "qemu-nbd",
        "--persistent",
        f"--shared={CONNECTIONS + 1}",
        f"--socket={server.socket}",
        f"--export-name={EXPORT}",
        f"--cache={'none' if server.past_cache else 'writeback'}",
        "--discard=unmap",
        "--detect-zeroes=off",
        *([] if server._writable else ["--read-only"]),
        *([] if bitmap is None else [f"--bitmap={bitmap}"]),
        "--image-opts",
        options,
    ]
