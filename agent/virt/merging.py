"""Merging the overlays of a snapshot of ours into their bases while their VM runs: the guest writes on meanwhile.

Block commit with pivot (https://libvirt.org/kbase/merging_disk_image_chains.html), a disk at a time. The snapshot's
metadata stay until every disk is done, for they say what there was before; what is in force is read from the disks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import libvirt

from agent.virt.domain_xml import disk_xml, point_disks_at
from agent.virt.inspection import facts_now
from agent.virt.overlays import merge_overlays
from agent.virt.places import Places
from agent.virt.protection import base_of, forget, known_overlays, metadata_xml, remove
from agent.virt.seam import Overlay, TrackOverlay


def merge_protection(
    domain: Any, snapshot: str, overlays: Sequence[Overlay], places: Places, *, timeout_s: float
) -> None:
    """See `agent.virt.seam.Hypervisor.merge_protection`."""
    facts = facts_now(domain)
    known = {overlay.target: overlay for overlay in overlays} | known_overlays(domain, facts, snapshot, places)
    before = metadata_xml(domain, facts, snapshot)
    for overlay in known.values():
        track = TrackOverlay(
            target=overlay.target,
            below=overlay.base,
            base=overlay.base,
            base_format=overlay.base_format,
            overlay=overlay.overlay,
            definition="" if before is None else disk_xml(before, overlay.target),
        )
        merge_overlays(domain, [overlay.overlay], overlay.base, track, places, timeout_s=timeout_s)
    if before is not None:
        _define_as_before(domain, list(known.values()), before)
    forget(domain, facts, snapshot)
    remove([overlay.overlay for overlay in known.values()])


def _define_as_before(domain: Any, overlays: Sequence[Overlay], before: str) -> None:
    """libvirt names the bases again when it pivots, but with elements that the definition did not have."""
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    bases = {overlay.target: base_of(overlay, before) for overlay in overlays}
    domain.connect().defineXML(point_disks_at(xml, bases, like=before))
