"""`failback-agent check`: is this host fit for failback, and which fences are in place? One result a line."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from agent import fence_install, hand, local
from agent.config import Config
from agent.disk.lock import hold_exclusive, image_in_use
from agent.errors import AgentError
from agent.hand import Listing
from agent.ledger import LedgerBusy
from agent.service import TOOLS
from agent.virt.libvirt_host import LibvirtHost
from protocol.messages import HookState

EXPIRES_SOON = timedelta(days=30)
VOLATILE = frozenset({"tmpfs", "ramfs", "devtmpfs"})
REMOTE = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "fuse.glusterfs", "fuse.sshfs"}
)


@dataclass(frozen=True, slots=True)
class Result:
    """One line: what was found, and, where it is not well, its cure."""

    well: bool
    what: str


def check_host(config: Config) -> tuple[Result, ...]:
    """Look at everything; changes nothing but for a probe of libvirt's hook that never runs."""
    host = LibvirtHost(config.libvirt.uri, scratch_dir=config.libvirt.scratch_dir)
    try:
        libvirt = _libvirt(host, config)
        listed, fenced = _fences(config)
        results = [libvirt, *_tools(), *_certificates(config), _state(config), _locks(config)]
        results.append(_hook(config, libvirt_answers=libvirt.well))
        results += fenced
        if libvirt.well and listed is not None:
            results += _autostart(host, listed)
        return tuple(results)
    finally:
        host.close()


def _libvirt(host: LibvirtHost, config: Config) -> Result:
    try:
        facts = host.facts()
    except AgentError as error:
        return Result(False, f"libvirt: {error.sentence}")
    return Result(
        True, f"libvirt {facts.libvirt_version} with QEMU {facts.qemu_version} answers at {config.libvirt.uri}"
    )


def _tools() -> Iterator[Result]:
    for tool, package in TOOLS.items():
        found = shutil.which(tool)
        yield Result(bool(found), f"{tool}: {found}" if found else f"{tool} is missing: install the package {package}")


def _certificates(config: Config) -> Iterator[Result]:
    for path in (config.tls.ca, config.tls.certificate):
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError) as error:
            yield Result(False, f"the certificate {path} cannot be read ({error}): copy it there again")
            continue
        yield _expiry(
            path, certificate.not_valid_after_utc, datetime.now(UTC), config.name, is_ca=path == config.tls.ca
        )


def _expiry(path: Path, ends: datetime, now: datetime, name: str, *, is_ca: bool) -> Result:
    day = ends.strftime("%Y-%m-%d")
    cure = "`failback pki init` makes a new authority" if is_ca else f"`failback pki issue {name}` makes a new one"
    if now >= ends:
        return Result(False, f"the certificate {path} expired on {day}: {cure}")
    if now + EXPIRES_SOON >= ends:
        return Result(False, f"the certificate {path} expires on {day}, soon: {cure}")
    return Result(True, f"the certificate {path} is good until {day}")


def _state(config: Config) -> Result:
    folder = config.state_dir
    if not folder.is_dir():
        return Result(False, f"the state folder {folder} is missing: start the agent once, it makes it")
    kind = file_system_of(folder.resolve(), Path("/proc/self/mountinfo").read_text(encoding="utf-8"))
    cure = "put state_dir on a local disk"
    if kind in VOLATILE:
        return Result(False, f"the state folder {folder} is on {kind}, which a restart of the host empties: {cure}")
    if kind in REMOTE:
        return Result(False, f"the state folder {folder} is on {kind}, a network file system: {cure}")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"failback")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Result(False, f"the state folder {folder} cannot be written durably: {error.strerror}; {cure}")
    return Result(True, f"the state folder {folder} is on {kind} and durable")


def file_system_of(path: Path, mountinfo: str) -> str:
    """The kind of file system that `path` (resolved) is on, by the text of ``/proc/self/mountinfo`` (proc(5))."""
    best, kind = -1, "unknown"
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        words = before.split()
        if len(words) < 5 or not after:
            continue
        point = Path(words[4].replace("\\040", " "))
        # Later lines lie over earlier ones of the same place.
        if (path == point or point in path.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split()[0]
    return kind


def _locks(config: Config) -> Result:
    folder = config.libvirt.scratch_dir
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="failback-check-") as file:
            file.truncate(1 << 20)
            held = hold_exclusive(Path(file.name))
            try:
                works = image_in_use(Path(file.name))
            finally:
                held.close()
    except (OSError, AgentError) as error:
        reason = error.sentence if isinstance(error, AgentError) else error.strerror
        return Result(False, f"image locks cannot be tried in {folder}: {reason}; set libvirt.scratch_dir")
    if not works:
        return Result(False, f"image locks have no effect in {folder}: keep images on a file system that has them")
    return Result(True, f"image locks work in {folder}")


def _hook(config: Config, *, libvirt_answers: bool) -> Result:
    why = fence_install.why_impossible(config)
    if why:
        return Result(True, f"fence hook: none, {why}")
    state, path = fence_install.hook_state(config), fence_install.hook_path(config)
    if state is HookState.MISSING:
        return Result(False, "fence hook: not installed; `failback-agent fence install`")
    if state is HookState.OUTDATED:
        return Result(False, f"fence hook: {path} is not what this agent installs; `failback-agent fence install`")
    wrong = fence_install.unlisted(config)
    if wrong:
        return Result(False, f"fence hook: {wrong}; restart the agent, which writes it anew")
    if not libvirt_answers:
        return Result(False, f"fence hook: {path} is there, and cannot be proven while libvirt does not answer")
    return _told(lambda: f"fence hook: {path}; {fence_install.prove(config)}", "fence hook")


def _told(work: Callable[[], str], about: str) -> Result:
    try:
        return Result(True, work())
    except AgentError as error:
        return Result(False, f"{about}: {error.sentence}")


def _fences(config: Config) -> tuple[Listing | None, list[Result]]:
    """What is fenced, and whether its images are locked."""
    try:
        listed = local.asked_listing(config.runtime_dir)
    except local.NoAgent:
        try:
            with hand.without_agent(config) as (keeper, _):
                listed = hand.listing(keeper, agent_runs=False)
        except LedgerBusy:
            return None, [Result(False, "the agent is starting, ending or hangs: check again, look at its log")]
        except AgentError as error:
            return None, [Result(False, error.sentence)]
    except AgentError as error:
        return None, [Result(False, error.sentence)]
    if not listed.agent_runs:
        cure = "`systemctl start failback-agent`"
        return listed, [
            Result(False, f"the agent does not run, fenced VMs ({len(listed.fences)}) are not locked: {cure}")
        ]
    results = [Result(True, f"the agent runs, {len(listed.fences)} VMs are fenced")]
    results += [
        Result(
            False,
            f"the fenced VM {fence.vm_name or fence.vm_uuid} is not locked on {', '.join(fence.unlocked)}: end "
            "whatever uses the image; the agent takes the lock within seconds",
        )
        for fence in listed.fences
        if fence.unlocked
    ]
    return listed, results


def _autostart(host: LibvirtHost, listed: Listing) -> Iterator[Result]:
    for fence in listed.fences:
        name = fence.vm_name or fence.vm_uuid
        try:
            on = host.inspect(fence.vm_uuid).autostart
        except AgentError as error:
            yield Result(False, f"autostart of the fenced VM {name} cannot be looked at: {error.sentence}")
            continue
        if on:
            yield Result(False, f"autostart of the fenced VM {name} is on: `virsh autostart --disable {name}`")
        else:
            yield Result(True, f"autostart of the fenced VM {name} is off")
