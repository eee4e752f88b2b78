"""Frozen views: a pull-mode backup job, opened and ended.

A view is recognised by its tag alone (name of the socket, names of the scratch files), so that an agent that was
restarted, or whose QEMU died, still ends its own job and never another's. The socket lies in the domain's own
directory, where AppArmor and SELinux let QEMU create it; scratch files lie beside the disks, made and labelled by
libvirt (https://libvirt.org/formatbackup.html).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import libvirt

from agent.errors import HypervisorError
from agent.virt import checkpoints, images
from agent.virt.connection import errors_of
from agent.virt.domain_xml import DiskFacts, DomainFacts, backup_xml, dirty_bitmap_name, parse_backup
from agent.virt.inspection import facts_now, power_state, running_job
from agent.virt.names import SOCKET_PATH_LIMIT_BYTES, check_tag, scratch_name, socket_name
from agent.virt.places import Places
from agent.virt.seam import NO_EARLIER_VIEW, EarlierView, Image, PowerState, View

_END_TIMEOUT_S = 60.0
_END_POLL_S = 0.005
_BITMAP_CONTEXT = "qemu:dirty-bitmap:"


def open_view(
    domain: Any,
    targets: Sequence[str],
    tag: str,
    places: Places,
    *,
    checkpoint: bool = False,
    since: Mapping[str, EarlierView] = NO_EARLIER_VIEW,
) -> View:
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
    wanted = _Wanted(domain, facts, tag, {target: _top(facts, target, places) for target in targets})
    if checkpoint:
        wanted.track()
    wanted.know(since)
    leftovers = [socket, *scratch.values()]
    _remove(leftovers)
    try:
        wanted.begin(socket, scratch)
    except HypervisorError:
        if not _is_running(domain, facts, tag):
            _remove(leftovers)
        raise
    return View(
        domain_uuid=facts.uuid,
        socket=socket,
        exports={target: target for target in targets},
        images=wanted.images,
        scratch=scratch,
        tracked=frozenset(wanted.tracked),
        checkpoint_is_new=wanted.makes_checkpoint,
        since=wanted.since,
        dirty_contexts={target: f"{_BITMAP_CONTEXT}{dirty_bitmap_name(target)}" for target in wanted.since},
        why_not={target: "; ".join(reasons) for target, reasons in wanted.why_not.items()},
    )


class _Wanted:
    """What a view that is about to be opened shall record and know; less, with the reasons, than was asked for.

    Attributes:
        tracked: targets whose writes are recorded from this view on.
        since: the tag of the earlier view, by target.
        why_not: reasons by target.
        makes_checkpoint: a new checkpoint is part of it.
    """

    def __init__(self, domain: Any, facts: DomainFacts, tag: str, images_by_target: dict[str, Image]) -> None:
        self.images = images_by_target
        self.tracked: list[str] = []
        self.since: dict[str, str] = {}
        self.why_not: dict[str, list[str]] = {}
        self._domain, self._facts, self._tag = domain, facts, tag
        self._known = checkpoints.ours(domain)
        self.makes_checkpoint = False

    def _tell(self, target: str, reason: str) -> None:
        self.why_not.setdefault(target, []).append(reason)

    def track(self) -> None:
        """Record what is written from this view on, where that is possible."""
        checkpoints.require_not_foreign(self._domain, self._tag, self._facts.name)
        before = self._known.get(self._tag)
        for target, image in self.images.items():
            reason = checkpoints.why_untracked(self._facts, target, image)
            if reason is None and before is not None and target not in before.tracked:
                reason = f"the disk {target} has no part in the checkpoint that this view has already"
            if reason is None:
                self.tracked.append(target)
            else:
                self._tell(target, reason)
        self.makes_checkpoint = before is None and bool(self.tracked)

    def know(self, since: Mapping[str, EarlierView]) -> None:
        """Know what was written since those views, as far as metadata does not speak against it."""
        for target, earlier in since.items():
            if target not in self.images:
                continue
            reason = checkpoints.why_unknown(target, self.images[target], earlier, self._known)
            if reason is None:
                self.since[target] = earlier.tag
            else:
                self._tell(target, reason)

    def begin(self, socket: Path, scratch: Mapping[str, Path]) -> None:
        """Begin the job and the checkpoint in one call; without what libvirt finds it cannot know after all."""
        excluded = [drive for drive in self._facts.drives if drive not in scratch]
        new = checkpoints.new_xml(self._tag, self.tracked, self._facts) if self.makes_checkpoint else None
        while True:
            try:
                with errors_of("opening a view", self._facts.name):
                    self._domain.backupBegin(backup_xml(socket, scratch, excluded, self.since), new, 0)
                return
            except HypervisorError as error:
                refused = checkpoints.refused_disk(error, tuple(self.since))
                if not refused:
                    raise
                _remove([socket, *scratch.values()])
                for target in refused:
                    del self.since[target]
                    self._tell(target, f"libvirt finds the record of the disk {target} lost: {error.__cause__}")


def _top(facts: DomainFacts, target: str, places: Places) -> Image:
    """The image that the guest writes to; what cannot be read about it is taken as least favourable."""
    disk = facts.disk(target)
    assert disk is not None  # it has a scratch path by now
    assert disk.image is not None
    try:
        return images.backing_chain(disk.image.path, disk.image.format, qemu_img=places.qemu_img)[0]
    except images.UnreadableChain:
        return Image(path=disk.image.path, format=disk.image.format, identity="", virtual_size_bytes=0)


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


def serves_view(domain: Any, tag: str) -> bool:
    """Whether the job is running; see `agent.virt.seam.Hypervisor.serves_view`."""
    check_tag(tag)
    return power_state(domain) is not PowerState.OFF and _is_running(domain, facts_now(domain), tag)


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
    if asked:
        resume_stalled(domain, facts.name)
    _remove(_files_of(facts, tag, places, other_ids))


def _abort(domain: Any, name: str) -> None:
    with errors_of("ending a view", name):
        try:
            domain.abortJob()
        except libvirt.libvirtError as error:
            # The job, or the whole domain, ended by itself since we looked.
            if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
                raise


def has_stalled(domain: Any) -> bool:
    """Whether the guest is paused by an I/O error."""
    return bool(domain.isActive()) and domain.state() == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]


def resume_stalled(domain: Any, name: str) -> None:
    """Let a guest go on that was paused by an I/O error while our job ran: a scratch file that is full does that. The
    write that failed is then tried again (QEMU's werror), so an error of the disk itself pauses it again."""
    with errors_of("resuming it", name):
        try:
            if has_stalled(domain):
                domain.resume()
        except libvirt.libvirtError as error:
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
