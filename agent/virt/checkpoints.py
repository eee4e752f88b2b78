"""Checkpoints of our views: persistent dirty bitmaps that record what the guest writes from a view on.

A checkpoint has the name of its view's tag, and so has its bitmap, so that both are known as ours after any crash. A
bitmap records from its view on, whatever later checkpoints begin or end; only its presence and consistency have to be
looked at, which libvirt does when an incremental view is opened. What libvirt's metadata says proves nothing: after a
QEMU that was killed it lists checkpoints whose bitmaps are gone (https://libvirt.org/kbase/internals/incremental-backup.html).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import libvirt

from agent.errors import HypervisorError
from agent.virt import images
from agent.virt.connection import errors_of
from agent.virt.domain_xml import CheckpointFacts, DomainFacts, checkpoint_sizes, checkpoint_xml
from agent.virt.inspection import all_checkpoints, facts_now, power_state
from agent.virt.names import SNAPSHOT_MARK, is_our_bitmap, is_ours
from agent.virt.places import Places
from agent.virt.seam import EarlierView, Image, PowerState

_METADATA_ONLY = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
_NOT_INCREMENTAL = frozenset({libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT, libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT})
_DISK_IN_MESSAGE = re.compile(r"disk '([^']+)'")


def ours(domain: Any) -> dict[str, CheckpointFacts]:
    """The domain's checkpoints that our views made, by name."""
    return {facts.name: facts for facts in all_checkpoints(domain) if is_ours(facts.name, facts.description)}


def others(domain: Any) -> tuple[str, ...]:
    """The names of those that somebody else made."""
    return tuple(facts.name for facts in all_checkpoints(domain) if not is_ours(facts.name, facts.description))


def why_untracked(facts: DomainFacts, target: str, image: Image) -> str | None:
    """Why no bitmap can record what is written to that disk; None when one can."""
    disk = facts.disk(target)
    if disk is not None and disk.readonly:
        return f"the disk {target} is read-only"
    if not image.keeps_bitmaps:
        kind = "qcow2 of version 2" if image.format == "qcow2" else image.format
        return f"the format {kind} of the disk {target} holds no persistent dirty bitmap"
    return None


def why_unknown(target: str, image: Image, earlier: EarlierView, known: Mapping[str, CheckpointFacts]) -> str | None:
    """Why it cannot be known what was written since the earlier view, as far as metadata tells; None when it may be."""
    if image.path != earlier.path or image.identity != earlier.identity:
        return f"the image of the disk {target} is not the one of then any more"
    checkpoint = known.get(earlier.tag)
    if checkpoint is None or target not in checkpoint.tracked:
        return f"there is no checkpoint of the disk {target} from then any more"
    return None


def refused_disk(error: HypervisorError, asked: Sequence[str]) -> list[str] | None:
    """The disks whose incremental view libvirt has just refused: all of `asked` where it does not say which one; None
    when it refused something else."""
    cause = error.__cause__
    if not isinstance(cause, libvirt.libvirtError) or cause.get_error_code() not in _NOT_INCREMENTAL:
        return None
    named = _DISK_IN_MESSAGE.search(cause.get_error_message() or "")
    return [named[1]] if named is not None and named[1] in asked else list(asked)


def new_xml(tag: str, tracked: Sequence[str], facts: DomainFacts) -> str:
    """The checkpoint of a view that is about to be opened."""
    return checkpoint_xml(tag, SNAPSHOT_MARK, tracked, [drive for drive in facts.drives if drive not in tracked])


def require_not_foreign(domain: Any, tag: str, name: str) -> None:
    """Refuse to open a view whose checkpoint would meet another's."""
    if tag in others(domain):
        raise HypervisorError(
            f"VM {name} has a checkpoint {tag} that failback did not make: rename or delete it.", vm=name
        )


def written_since(domain: Any, tag: str) -> dict[str, int]:
    """See `agent.virt.seam.Hypervisor.written_since`; https://libvirt.org/formatcheckpoint.html, "size"."""
    with errors_of("asking what it has written", domain.name()):
        if power_state(domain) is PowerState.OFF or tag not in ours(domain):
            return {}
        checkpoint = _unless_gone(lambda: domain.checkpointLookupByName(tag))
        if checkpoint is None:
            return {}
        try:
            xml = checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE)
        except libvirt.libvirtError as error:
            if _bitmap_is_lost(error, domain):
                return {}
            raise
    return checkpoint_sizes(xml)


def drop(domain: Any, keep: Sequence[str]) -> None:
    """See `agent.virt.seam.Hypervisor.drop_checkpoints`."""
    name = domain.name()
    with errors_of("dropping its checkpoints", name):
        for tag in ours(domain):
            if tag not in keep:
                _delete(domain, tag, for_real=power_state(domain) is not PowerState.OFF)


def _delete(domain: Any, tag: str, *, for_real: bool) -> None:
    """Delete one checkpoint; by metadata where libvirt does not find its bitmap."""
    checkpoint = _unless_gone(lambda: domain.checkpointLookupByName(tag))
    if checkpoint is None:
        return
    if for_real:
        try:
            checkpoint.delete(0)
            return
        except libvirt.libvirtError as error:
            if not _bitmap_is_lost(error, domain):
                raise
    _unless_gone(lambda: checkpoint.delete(_METADATA_ONLY))


def _bitmap_is_lost(error: libvirt.libvirtError, domain: Any) -> bool:
    """Whether that is why libvirt does not delete a checkpoint: it says so in words alone ("bitmap … not found in
    backing chain", an internal error), or the domain went off meanwhile."""
    said = error.get_error_message() or ""
    return (
        "bitmap" in said
        or error.get_error_code() == libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT
        or (power_state(domain) is PowerState.OFF)
    )


def _unless_gone(act: Callable[[], Any]) -> Any:
    """What `act` returns; None when the checkpoint was deleted meanwhile."""
    try:
        return act()
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
            raise
        return None


def drop_bitmaps(domain: Any, places: Places) -> None:
    """See `agent.virt.seam.Hypervisor.drop_bitmaps`.

    libvirt deletes bitmaps only together with checkpoints; so one that lost its checkpoint (which had to be forgotten
    for a snapshot) gets one again for this purpose. That the bitmap is inconsistent does not matter.
    """
    drop(domain, ())
    facts = facts_now(domain)
    if power_state(domain) is PowerState.OFF:
        return
    for tag, targets in _strays(facts, places).items():
        with errors_of(f"removing its bitmap {tag}", facts.name):
            left_out = [drive for drive in facts.drives if drive not in targets]
            xml = checkpoint_xml(tag, SNAPSHOT_MARK, targets, left_out, created_s=0)
            domain.checkpointCreateXML(xml, libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)
            _delete(domain, tag, for_real=True)


def _strays(facts: DomainFacts, places: Places) -> dict[str, list[str]]:
    """Our bitmaps in the images that the domain writes to, with the targets that have them. A bitmap made since the
    domain started is not in its image yet; but such a one has its checkpoint."""
    found: dict[str, list[str]] = {}
    for disk in facts.disks:
        if disk.image is None or disk.image.format != "qcow2":
            continue
        try:
            top = images.backing_chain(disk.image.path, disk.image.format, qemu_img=places.qemu_img)[0]
        except images.UnreadableChain:
            continue  # it runs on it all the same, and the bitmap does no harm until its name is wanted again
        for bitmap in filter(is_our_bitmap, top.bitmaps):
            found.setdefault(bitmap, []).append(disk.target)
    return found
