"""Frozen views: a pull-mode backup job, opened and ended.

A view is recognised by its tag alone (name of the socket, names of the scratch files), so that an agent that was
restarted, or whose QEMU died, still ends its own job and never another's. The socket lies in the domain's own
directory, where AppArmor and SELinux let QEMU create it; scratch files lie beside the disks, made and labelled by
libvirt (https://libvirt.org/formatbackup.html).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import libvirt

from agent.errors import HypervisorError
from agent.virt import images
from agent.virt.connection import errors_of
from agent.virt.domain_xml import DiskFacts, DomainFacts, backup_xml, parse_backup
from agent.virt.inspection import facts_now, power_state, running_job
from agent.virt.names import SOCKET_PATH_LIMIT_BYTES, check_tag, scratch_name, socket_name
from agent.virt.seam import PowerState, View

_END_TIMEOUT_S = 60.0
_END_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where this host keeps what a view needs.

    Attributes:
        lib_dir: the QEMU driver's folder, in which each running domain has its own ``domain-ID-NAME``.
        scratch_dir: for scratch files (and overlays) of disks that are block devices.
        qemu_img: the program to call.
    """

    lib_dir: Path
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


def open_view(domain: Any, targets: Sequence[str], tag: str, places: Places) -> View:
    """Begin the backup job; see `agent.virt.seam.Hypervisor.open_view`."""
    check_tag(tag)
    facts = facts_now(domain)
    _require_free(domain, facts)
    scratch = {target: _scratch_path(facts, target, tag, places) for target in targets}
    socket = domain_dir(domain, facts.name, places.lib_dir) / socket_name(tag)
    if len(os.fsencode(socket)) > SOCKET_PATH_LIMIT_BYTES:
        raise HypervisorError(
            f"VM {facts.name}: the socket path {socket} is longer than the {SOCKET_PATH_LIMIT_BYTES} bytes a unix "
            "socket may have: use a shorter embed root or view name.",
            vm=facts.name,
            path=str(socket),
        )
    leftovers = [socket, *scratch.values()]
    _remove(leftovers)
    excluded = [drive for drive in facts.drives if drive not in scratch]
    try:
        with errors_of("opening a view", facts.name):
            domain.backupBegin(backup_xml(socket, scratch, excluded), None, 0)
    except HypervisorError:
        if not _is_running(domain, facts, tag):
            _remove(leftovers)
        raise
    return View(domain_uuid=facts.uuid, socket=socket, exports={target: target for target in targets})


def _require_free(domain: Any, facts: DomainFacts) -> None:
    if power_state(domain) is PowerState.OFF:
        raise HypervisorError(f"VM {facts.name} is off: a view of it is its images themselves.", vm=facts.name)
    job = running_job(domain, facts.drives)
    if job is not None:
        raise HypervisorError(
            f"VM {facts.name} has a {job} running already: wait for it or end it before a view is opened.",
            vm=facts.name,
            job=job,
        )


def _scratch_path(facts: DomainFacts, target: str, tag: str, places: Places) -> Path:
    disk = facts.disk(target)
    if disk is None or disk.image is None:
        raise HypervisorError(f"VM {facts.name} has no disk {target} that is a file or a block device.", vm=facts.name)
    folder = places.scratch_dir if disk.image.block else disk.image.path.parent
    return folder / scratch_name(facts.uuid, target, tag)


def domain_dir(domain: Any, name: str, lib_dir: Path) -> Path:
    """The running domain's own directory, ``domain-ID-NAME`` with the name shortened by libvirt."""
    with errors_of("finding its directory", name):
        domain_id = domain.ID()
    prefix = f"domain-{domain_id}-"
    # After a power cut a directory of an older domain with the same number may still be there.
    found = [path for path in lib_dir.glob(f"{prefix}*") if name.startswith(path.name.removeprefix(prefix))]
    if len(found) == 1:
        return found[0]
    with_monitor = [path for path in lib_dir.glob(f"{prefix}*") if (path / "monitor.sock").exists()]
    if len(with_monitor) == 1:
        return with_monitor[0]
    raise HypervisorError(
        f"VM {name}: its directory {lib_dir}/{prefix}… was not found: the agent must run on the VM's host, as root, "
        "with libvirt's folder for QEMU domains configured.",
        vm=name,
        lib_dir=str(lib_dir),
    )


def close_view(domain: Any, tag: str, places: Places, other_ids: Iterable[int]) -> None:
    """End the job of that tag and remove its files; see `agent.virt.seam.Hypervisor.close_view`."""
    check_tag(tag)
    facts = facts_now(domain)
    deadline = time.monotonic() + _END_TIMEOUT_S
    asked = False
    while _is_running(domain, facts, tag):
        if not asked:
            _abort(domain, facts.name)
            asked = True
        if time.monotonic() > deadline:
            raise HypervisorError(
                f"VM {facts.name}: its backup job did not end within {_END_TIMEOUT_S:.0f} s: `virsh domjobabort` it.",
                vm=facts.name,
            )
        time.sleep(_END_POLL_S)
    _remove(_files_of(facts, tag, places, other_ids))


def _abort(domain: Any, name: str) -> None:
    with errors_of("ending a view", name):
        try:
            domain.abortJob()
        except libvirt.libvirtError as error:
            # The job, or the whole domain, ended by itself since we looked.
            if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
                raise


def _is_running(domain: Any, facts: DomainFacts, tag: str) -> bool:
    """Whether the domain's running job is the view of that tag."""
    with errors_of("asking for its backup job", facts.name):
        try:
            backup = parse_backup(domain.backupGetXMLDesc(0))
        except libvirt.libvirtError as error:
            if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_OPERATION_INVALID):
                return False
            raise
    names = {scratch_name(facts.uuid, drive, tag) for drive in facts.drives}
    has_our_socket = backup.socket is not None and backup.socket.name == socket_name(tag)
    return has_our_socket and all(path.name in names for path in backup.scratch)


def _files_of(facts: DomainFacts, tag: str, places: Places, other_ids: Iterable[int]) -> Iterable[Path]:
    folders = {places.scratch_dir}
    for disk in facts.disks:
        folders.update(_folders(disk, places.qemu_img))
    yield from (folder / scratch_name(facts.uuid, drive, tag) for folder in folders for drive in facts.drives)
    # The socket of a QEMU that died may remain; directories of other running domains are none of ours.
    others = {f"domain-{number}-" for number in other_ids}
    for path in places.lib_dir.glob(f"domain-*/{socket_name(tag)}"):
        folder = path.parent.name
        of_this_name = facts.name.startswith(folder.split("-", 2)[2])
        if of_this_name and not any(folder.startswith(prefix) for prefix in others):
            yield path


def _folders(disk: DiskFacts, qemu_img: str) -> set[Path]:
    """Every folder the disk's images lie in: a protective snapshot may have moved its top since."""
    if disk.image is None or disk.image.block:
        return set()
    try:
        chain = images.backing_chain(disk.image.path, disk.image.format, qemu_img=qemu_img)
    except images.UnreadableChain:
        return {disk.image.path.parent}
    return {disk.image.path.parent, *(image.path.parent for image in chain)}


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            continue
        except OSError as error:
            raise HypervisorError(f"{path} cannot be removed: {error.strerror}.", path=str(path)) from error
