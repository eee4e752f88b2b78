"""A libvirt domain, looked at: power state, jobs, disks with their chains. Reads only."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import libvirt

from agent.virt import images
from agent.virt.domain_xml import (
    CheckpointFacts,
    DiskFacts,
    DomainFacts,
    parse_checkpoint,
    parse_domain,
    parse_snapshot,
)
from agent.virt.lifetime import lifetime
from agent.virt.names import is_ours
from agent.virt.places import Places
from agent.virt.seam import Domain, DomainDisk, Image, PowerState, Snapshot, SourceKind

_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: PowerState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: PowerState.SHUTTING_DOWN,
    libvirt.VIR_DOMAIN_CRASHED: PowerState.CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: PowerState.SUSPENDED,
}
_OPERATIONS = {
    libvirt.VIR_DOMAIN_JOB_OPERATION_START: "start",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: "save",
    libvirt.VIR_DOMAIN_JOB_OPERATION_RESTORE: "restore",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "incoming migration",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "migration",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: "snapshot",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_REVERT: "snapshot revert",
    libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: "dump",
    libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP: "backup",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_DELETE: "snapshot deletion",
}
_BLOCK_JOBS = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL: "block pull",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY: "block copy",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT: "block commit",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT: "block commit",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_BACKUP: "block backup",
}


def power_state(domain: Any) -> PowerState:
    """The power state; OFF if and only if the domain has no process."""
    if not domain.isActive():
        return PowerState.OFF
    return _STATES.get(domain.state()[0], PowerState.RUNNING)


def running_job(domain: Any, targets: tuple[str, ...]) -> str | None:
    """The job or block job that occupies the domain, in words, or None."""
    try:
        stats = domain.jobStats()
        if stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) != libvirt.VIR_DOMAIN_JOB_NONE:
            return _OPERATIONS.get(stats.get("operation"), "a job of unknown kind")
        for target in targets:
            block_job = domain.blockJobInfo(target, 0)
            if block_job:
                return f"{_BLOCK_JOBS.get(block_job.get('type'), 'block job')} of {target}"
    except libvirt.libvirtError as error:
        # A domain that is off has no jobs; libvirt calls the question invalid.
        if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
            raise
    return None


def inspect(domain: Any, places: Places) -> Domain:
    """Everything a plan needs. What runs is read from the live XML, which is the inactive one when nothing runs."""
    facts = parse_domain(domain.XMLDesc(0))
    persistent = bool(domain.isPersistent())
    lived = lifetime(facts.name, places.log_dir, places.run_dir)
    return Domain(
        uuid=facts.uuid,
        name=facts.name,
        state=power_state(domain),
        persistent=persistent,
        autostart=persistent and bool(domain.autostart()),
        managed_save=persistent and bool(domain.hasManagedSaveImage(0)),
        on_poweroff=facts.on_poweroff,
        machine=facts.machine,
        firmware=facts.firmware,
        has_tpm=facts.has_tpm,
        passthrough=facts.passthrough,
        disks=tuple(_disk(disk, places.scratch_dir, places.qemu_img) for disk in facts.disks),
        snapshots=tuple(_snapshot(snapshot) for snapshot in domain.listAllSnapshots(0)),
        checkpoints=tuple(c.name for c in all_checkpoints(domain) if not is_ours(c.name, c.description)),
        job=running_job(domain, facts.drives),
        running_since_s=lived.running_since_s,
        last_started_s=lived.started_s,
        last_stopped_s=lived.stopped_s,
    )


def _snapshot(snapshot: Any) -> Snapshot:
    facts = parse_snapshot(snapshot.getXMLDesc(0))
    return Snapshot(name=facts.name, ours=is_ours(facts.name, facts.description), external=facts.external)


def all_checkpoints(domain: Any) -> list[CheckpointFacts]:
    """Every checkpoint of the domain."""
    flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
    return [parse_checkpoint(found.getXMLDesc(flags)) for found in domain.listAllCheckpoints(0)]


def _disk(disk: DiskFacts, scratch_dir: Path, qemu_img: str) -> DomainDisk:
    chain: tuple[Image, ...] = ()
    problem, free_bytes = None, 0
    if disk.image is not None:
        try:
            chain = images.backing_chain(disk.image.path, disk.image.format, qemu_img=qemu_img)
        except images.UnreadableChain as error:
            problem = error.sentence
        folder = scratch_dir if disk.image.block else disk.image.path.parent
        with contextlib.suppress(OSError):
            free_bytes = images.free_bytes(folder)
    elif disk.kind in (SourceKind.FILE, SourceKind.BLOCK):
        problem = f"Disk {disk.target} has no source."
    return DomainDisk(
        target=disk.target,
        kind=disk.kind,
        chain=chain,
        sector_bytes=disk.sector_bytes,
        shareable=disk.shareable,
        readonly=disk.readonly,
        problem=problem,
        free_bytes=free_bytes,
    )


def facts_now(domain: Any) -> DomainFacts:
    """What the live XML says (the inactive one when the domain is off)."""
    return parse_domain(domain.XMLDesc(0))
