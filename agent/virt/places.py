"""Where a hypervisor host keeps what views need."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where this host keeps what a view needs.

    Attributes:
        lib_dir: the QEMU driver's folder, in which each running domain has its own ``domain-ID-NAME``.
        log_dir, run_dir: where it keeps each domain's log and PID file.
        scratch_dir: for scratch files (and overlays) of disks that are block devices.
        qemu_img: the program to call.
    """

    lib_dir: Path
    log_dir: Path
    run_dir: Path
    scratch_dir: Path
    qemu_img: str


def lib_dir_of(uri: str) -> Path:
    """The QEMU driver's folder for domains, by connection URI (https://libvirt.org/drvqemu.html)."""
    parts = urlsplit(uri)
    if parts.path == "/embed":
        return Path(parse_qs(parts.query).get("root", ["/"])[0], "lib", "qemu")
    if parts.path == "/session":
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "libvirt", "qemu", "lib")
    return Path("/var/lib/libvirt/qemu")


def log_and_run_dir_of(uri: str) -> tuple[Path, Path]:
    """The QEMU driver's folders for the logs and the PID files of its domains, by connection URI."""
    parts = urlsplit(uri)
    if parts.path == "/embed":
        root = Path(parse_qs(parts.query).get("root", ["/"])[0])
        return root / "log" / "qemu", root / "run" / "qemu"
    if parts.path == "/session":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or cache)
        return cache / "libvirt" / "qemu" / "log", runtime / "libvirt" / "qemu" / "run"
    return Path("/var/log/libvirt/qemu"), Path("/run/libvirt/qemu")
