"""What administrators use today, each told to have its data durable before it says done."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.placement import Image
from tests.lab.pki import LabPki

START_TIMEOUT_S = 20.0
CONNECTIONS = 4  # nbdcopy's own default, so that qemu-nbd lets as many in


def rsync_s(source: Path, target: Path) -> float:
    """Seconds of a local rsync, without ssh, of `source` onto `target`.

    ``--ignore-times``: a change within the second of the last run would be skipped by size and time alone.
    """
    words = ["rsync", "--inplace", "--no-whole-file", "--fsync", "--ignore-times", str(source), str(target)]
    return _timed(words)


def qemu_img_s(source: Image, target: Path) -> float:
    """Seconds of ``qemu-img convert -n`` onto an existing raw `target`, in full, and flushing it."""
    words = ["qemu-img", "convert", "-n", "-U", "-f", source.format, "-O", "raw", str(source.path), str(target)]
    started = time.monotonic()
    _timed(words)
    flush(target)
    return time.monotonic() - started


def nbdcopy_s(source: str, target: str, *, target_is_empty: bool) -> float:
    """Seconds of ``nbdcopy --flush`` between two NBD URIs; `target_is_empty` lets it leave zeroes out."""
    words = ["nbdcopy", "--flush", f"--connections={CONNECTIONS}"]
    if target_is_empty:
        words.append("--destination-is-zero")
    return _timed([*words, source, target])


def flush(path: Path) -> None:
    """Make a file durable."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(file)
    finally:
        os.close(file)


@dataclass(frozen=True, slots=True)
class NbdTls:
    """A folder of certificates as QEMU and libnbd name them, good for ``localhost``."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> NbdTls:
        """Make them in `folder`, which is made."""
        identity = LabPki(folder).agent("localhost")
        shutil.copyfile(identity.ca, folder / "ca-cert.pem")
        for end in ("server", "client"):
            shutil.copyfile(identity.certificate, folder / f"{end}-cert.pem")
            shutil.copyfile(identity.key, folder / f"{end}-key.pem")
        return cls(folder)

    def server_words(self) -> list[str]:
        """Options of qemu-nbd that ask for a certificate from whoever connects."""
        creds = f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=on,dir={self.folder}"
        return ["--object", creds, "--tls-creds", "tls0", "--bind", "127.0.0.1"]


@contextlib.contextmanager
def served(image: Path, image_format: str, *, port: int, writable: bool, tls: NbdTls) -> Iterator[str]:
    """qemu-nbd over TLS on loopback with `image`; yields the NBD URI."""
    words = ["qemu-nbd", "--persistent", f"--shared={CONNECTIONS * 2}", "--format", image_format]
    words += [*tls.server_words(), "--port", str(port), "--discard=unmap"]
    if not writable:
        words.append("--read-only")
    with _serving([*words, str(image)], tls.folder / f"{port}.pid"):
        yield f"nbds://localhost:{port}/?tls-certificates={tls.folder}"


@contextlib.contextmanager
def served_locally(image: Path, image_format: str, path: Path, *, writable: bool) -> Iterator[str]:
    """qemu-nbd on the unix socket `path` with `image`; yields the NBD URI."""
    words = ["qemu-nbd", "--persistent", f"--shared={CONNECTIONS * 2}", "--format", image_format, "--socket", str(path)]
    if not writable:
        words.append("--read-only")
    with _serving([*words, "--discard=unmap", str(image)], path.with_suffix(".pid")):
        yield f"nbd+unix:///?socket={path}"


@contextlib.contextmanager
def _serving(words: Sequence[str], pid_file: Path) -> Iterator[None]:
    """qemu-nbd, once it listens: it writes its PID file only then (qemu-nbd(8))."""
    pid_file.unlink(missing_ok=True)
    process = subprocess.Popen([*words, "--pid-file", str(pid_file)], stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not pid_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("qemu-nbd did not start; its reason stands above")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait()


def _timed(words: Sequence[str]) -> float:
    started = time.monotonic()
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.monotonic() - started
