"""The lab's guest: a distribution kernel and an initramfs of about a megabyte whose init keeps a journal on its disks.

What the guest prints and obeys is described in ``tests/lab/README.md``; its init is ``guest-init.sh`` beside this file.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import lzma
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zstandard

INIT = Path(__file__).with_name("guest-init.sh")
RECIPE = "1"  # raise it when the way the guest is built changes: an older cached guest is then not used

# What the guest needs to see its disks and its power button; dependencies are looked up, built-in ones left out.
MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4", "button", "evdev")
METAPACKAGES = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}
COMMAND_TIMEOUT_S = 300.0


class GuestError(Exception):
    """The guest cannot be built on this machine; the sentence says why and what helps."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A bootable guest: what `tests.lab.domain.domain_xml` needs for a direct kernel boot."""

    kernel: Path
    initrd: Path


def build_guest(cache_dir: Path) -> Guest:
    """The guest, built on first use and kept in `cache_dir`.

    Works as an ordinary user. Processes that ask at the same time wait for the one that builds. The first build
    downloads a kernel package (about 30 to 80 MB) with the distribution's ``apt-get``.

    Raises:
        GuestError: a tool, the package lists or the network are missing.
    """
    cache_dir = cache_dir.absolute()
    cache_dir.mkdir(parents=True, exist_ok=True)
    home = cache_dir / f"guest-{_recipe_key()}"
    guest = Guest(home / "kernel", home / "initrd")
    with _locked(cache_dir / "guest.lock"):
        if not home.exists():
            with tempfile.TemporaryDirectory(prefix="building-", dir=cache_dir) as scratch:
                _build(Path(scratch), home)
    return guest


def _recipe_key() -> str:
    recipe = hashlib.sha256()
    for part in (RECIPE, INIT.read_text(), *MODULES):
        recipe.update(part.encode() + b"\0")
    return recipe.hexdigest()[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(scratch: Path, home: Path) -> None:
    root = scratch / "packages"
    root.mkdir()
    for package in _kernel_packages():
        _run(["apt-get", "download", package], cwd=scratch)
        (archive,) = scratch.glob(f"{package}_*.deb")
        _run(["dpkg", "-x", str(archive), str(root)])
    kernels = sorted(root.glob("boot/vmlinuz-*"))
    if not kernels:
        raise GuestError("The kernel package holds no /boot/vmlinuz-*: report this distribution.")
    version = kernels[-1].name.removeprefix("vmlinuz-")
    built = scratch / "built"
    built.mkdir(mode=0o755)
    shutil.copyfile(kernels[-1], built / "kernel")
    _initramfs(_modules(root, version), scratch / "initramfs", built / "initrd")
    for file in built.iterdir():
        file.chmod(0o644)
    built.chmod(0o755)
    built.rename(home)


def _kernel_packages() -> list[str]:
    """Concrete packages of the distribution's smallest virtual-machine kernel."""
    distribution = platform.freedesktop_os_release().get("ID", "")
    if distribution not in METAPACKAGES or platform.machine() != "x86_64":
        raise GuestError("The lab's guest is built on x86-64 Debian and Ubuntu only: run the lab on one of those.")
    depends = _run(["apt-cache", "depends", METAPACKAGES[distribution]])
    images = re.findall(r"Depends: (linux-image-\d\S*)", depends)
    if not images:
        raise GuestError(f"apt knows no {METAPACKAGES[distribution]}: run `apt-get update` first.")
    modules = images[0].replace("linux-image-", "linux-modules-")
    return [images[0], modules] if distribution == "ubuntu" else [images[0]]


def _modules(root: Path, version: str) -> list[Path]:
    """Module files in the order they must be inserted."""
    top = next(path for path in (root / "lib/modules", root / "usr/lib/modules") if path.exists())
    _run(["depmod", "-b", str(top.parent.parent), version])
    folder = top / version
    built_in = {Path(line).stem for line in (folder / "modules.builtin").read_text().split()}
    lines = (line.split(":") for line in (folder / "modules.dep").read_text().splitlines())
    needs = {_module_name(name): (name, after.split()) for name, after in lines}
    order: list[Path] = []
    for wanted in MODULES:
        if wanted in built_in:
            continue
        if wanted not in needs:
            raise GuestError(f"Kernel {version} has no module {wanted}: report this distribution's kernel.")
        name, after = needs[wanted]
        order += [folder / file for file in [*reversed(after), name] if folder / file not in order]
    return order


def _module_name(file: str) -> str:
    return Path(file).name.split(".ko")[0].replace("-", "_")


def _module_bytes(path: Path) -> bytes:
    packed = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(packed)
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    return packed


def _initramfs(modules: list[Path], tree: Path, initrd: Path) -> None:
    busybox = shutil.which("busybox", path=_search_path())
    if busybox is None:
        raise GuestError("busybox is missing: install the package busybox-static (`make setup` does it).")
    for folder in ("bin", "dev", "proc", "sys", "mnt", "modules", "etc/acpi/PWRF"):
        (tree / folder).mkdir(parents=True)
    _executable(tree / "bin/busybox", Path(busybox).read_bytes())
    (tree / "bin/sh").symlink_to("busybox")
    _executable(tree / "init", INIT.read_bytes())
    _executable(tree / "etc/acpi/PWRF/00000080", b"#!/bin/sh\nkill -USR1 1\n")
    names = [f"{_module_name(path.name)}.ko" for path in modules]
    for name, path in zip(names, modules, strict=True):
        (tree / "modules" / name).write_bytes(_module_bytes(path))
    (tree / "modules/order").write_text("".join(f"{name}\n" for name in names))
    files = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    archive = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc", "-R", "+0:+0"],
        input="\n".join(files).encode(),
        cwd=tree,
        capture_output=True,
        check=True,
        timeout=COMMAND_TIMEOUT_S,
    ).stdout
    initrd.write_bytes(gzip.compress(archive, mtime=0))


def _executable(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o755)


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _run(argv: list[str], cwd: Path | None = None) -> str:
    program = shutil.which(argv[0], path=_search_path())
    if program is None:
        raise GuestError(f"{argv[0]} is missing: `make setup` installs what the lab needs.")
    done = subprocess.run(
        [program, *argv[1:]], cwd=cwd, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise GuestError(f"`{' '.join(argv)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
