"""Embedded hypervisor roots: libvirt's QEMU driver inside the calling process (``qemu:///embed?root=…``), no libvirtd.

One root per process; each process with a root of its own is a host of its own. As an ordinary user everything
works as well. See https://libvirt.org/drvqemu.html#embedded-driver.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

# What an embedded driver must not expect from the machine: no security driver, no namespaces or control groups of its
# own, no virtlogd, no ownership to remember in extended attributes.
QEMU_CONF = """\
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
remember_owner = 0
"""
AS_ROOT = 'user = "root"\ngroup = "root"\n'
CAPABILITIES = Path("cache/qemu/capabilities")


def embed_root(folder: Path) -> str:
    """Make `folder` the root of an embedded hypervisor; returns the URI to open. Harmless when repeated."""
    folder = folder.absolute()
    (folder / "etc").mkdir(parents=True, exist_ok=True)
    (folder / "etc/qemu.conf").write_text(QEMU_CONF + (AS_ROOT if os.geteuid() == 0 else ""))
    return f"qemu:///embed?root={folder}"


def share_capabilities(source: Path, target: Path) -> bool:
    """Copy what root `source` learned about QEMU to root `target`, whose first start is then seconds quicker.

    Returns whether there was anything to copy. libvirt checks what it finds there and probes anew if it must.
    """
    known = source / CAPABILITIES
    if not known.is_dir() or not any(known.iterdir()):
        return False
    shutil.copytree(known, target / CAPABILITIES, dirs_exist_ok=True)
    return True


def guests(folder: Path) -> list[int]:
    """PIDs of the QEMUs that an embedded root started and that still run, also when their starter is gone."""
    mark = f"{folder.absolute()}/lib/".encode()
    found = []
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            words = command_line.read_bytes().split(b"\0")
            if Path(os.fsdecode(words[0])).name.startswith("qemu-system-") and any(mark in word for word in words):
                found.append(int(command_line.parts[2]))
    return found


def end_guests(folder: Path, timeout_s: float = 20.0) -> None:
    """Kill what `guests` lists and wait until it is gone."""
    deadline = time.monotonic() + timeout_s
    while left := guests(folder):
        assert time.monotonic() < deadline, f"QEMU processes {left} of {folder} do not end"
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
