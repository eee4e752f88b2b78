"""`FakeHypervisor`: a hypervisor in memory that passes the contract tests of the real one.

Domains, their power and jobs are plain values on a `FakeMachine`; only the images are real files (of plain bytes,
whatever format they claim), so that what opens, locks or compares them works as ever. Time is virtual: nothing sleeps,
a guest that needs ten seconds to power off has taken them when `wait_off` returns.
"""

from __future__ import annotations

import enum
import itertools
import shutil
import threading
import uuid as uuids
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from agent.errors import GuestAgentMissing, HypervisorError, NoSuchDomain
from agent.virt import images
from agent.virt.domain_xml import parse_domain
from agent.virt.names import (
    ImageRef,
    check_snapshot,
    check_tag,
    is_our_bitmap,
    is_ours,
    marked,
    overlay_paths,
    scratch_name,
    socket_name,
    track_overlay_path,
)
from agent.virt.seam import (
    NO_EARLIER_VIEW,
    Domain,
    DomainDisk,
    EarlierView,
    HostFacts,
    Image,
    Overlay,
    PowerState,
    Snapshot,
    SourceKind,
    StatePlace,
    StateRole,
    TrackOverlay,
    View,
)
from tests.fakes.provider import FakeProvider, FakeStorage


class GuestBehaviour(enum.Enum):
    """What a guest does with a shutdown request."""

    OBEYS = "obeys"  # powers off half a second later
    SLOW = "slow"  # powers off `FakeDomain.slow_s` later
    IGNORES = "ignores"


OBEYS_WITHIN_S = 0.5


@dataclass(slots=True)
class FakeImage:
    """An image: `backing` is the one below it, or None; `bitmaps`: by name, the ranges written since, or None for one
    that was not saved."""

    path: Path
    format: str
    backing: FakeImage | None = None
    bitmaps: dict[str, list[tuple[int, int]] | None] = field(default_factory=dict)

    def chain(self) -> Iterator[FakeImage]:
        """This image and everything below it."""
        image: FakeImage | None = self
        while image is not None:
            yield image
            image = image.backing


@dataclass(slots=True)
class FakeSnapshot:
    """A snapshot's metadata."""

    name: str
    description: str
    overlays: tuple[Overlay, ...]


@dataclass(slots=True)
class FakeView:
    """A running pull-mode backup: its tag and the frozen bytes by target. A foreign one has the tag None."""

    tag: str | None
    frozen: dict[str, bytes]


@dataclass(slots=True)
class FakeDomain:
    """A domain; tests set its fields at will."""

    uuid: str
    name: str
    disks: dict[str, FakeImage]
    guest: GuestBehaviour = GuestBehaviour.OBEYS
    slow_s: float = 30.0
    state: PowerState = PowerState.OFF
    persistent: bool = True
    autostart: bool = False
    managed_save: bool = False
    on_poweroff: str = "destroy"
    firmware: str = "bios"
    has_tpm: bool = False
    qemu_hangs: bool = False
    off_at_s: float | None = None
    view: FakeView | None = None
    snapshots: list[FakeSnapshot] = field(default_factory=list)
    checkpoints: dict[str, frozenset[str]] = field(default_factory=dict)
    foreign_checkpoints: tuple[str, ...] = ()
    has_agent: bool = False
    agent_hangs: bool = False
    frozen: bool = False
    stalled: bool = False
    hardware: str = '<memory unit="KiB">131072</memory><vcpu>1</vcpu>'  # of its definition, beside disks and NICs
    nics: str = ""
    password: str = ""  # of its console: told only with the secrets
    state_places: tuple[StatePlace, ...] = ()

    def end(self, *, killed: bool = False) -> None:
        """The process is gone, and its jobs with it; killed, it has saved no bitmap."""
        self.state, self.off_at_s, self.view = PowerState.OFF, None, None
        self.frozen = self.stalled = False
        if killed:
            for top in self.disks.values():
                top.bitmaps = dict.fromkeys(top.bitmaps)


class FakeMachine:
    """What outlives an agent: domains, the clock, the hypervisor's own folder.

    Args:
        folder: a folder for sockets; exists.
        hostname: what the host calls itself.
    """

    def __init__(self, folder: Path, hostname: str = "fake") -> None:
        self.folder = folder
        self.hostname = hostname
        self.now_s = 0.0
        self.lock = threading.RLock()
        self.domains: dict[str, FakeDomain] = {}
        self.networks: tuple[str, ...] = ("network:default",)
        self.volumes = FakeStorage()

    def define(
        self,
        name: str,
        disks: Mapping[str, tuple[Path, str]],
        *,
        uuid: str | None = None,
        guest: GuestBehaviour = GuestBehaviour.OBEYS,
    ) -> FakeDomain:
        """A new domain, off; `disks` maps targets to existing files and formats."""
        chains = {target: FakeImage(path, image_format) for target, (path, image_format) in disks.items()}
        domain = FakeDomain(uuid=uuid or str(uuids.uuid4()), name=name, disks=chains, guest=guest)
        self.domains[domain.uuid] = domain
        return domain

    def guest_writes(self, uuid: str, target: str, offset_bytes: int, data: bytes) -> None:
        """The running guest of that domain writes to its disk."""
        domain = self.domains[uuid]
        assert domain.state is PowerState.RUNNING
        with domain.disks[target].path.open("r+b") as image:
            image.seek(offset_bytes)
            image.write(data)
        for ranges in domain.disks[target].bitmaps.values():
            if ranges is not None:
                ranges.append((offset_bytes, len(data)))

    def dirty(self, view: View, target: str) -> list[tuple[int, int]]:
        """What an NBD client would read of the view's dirty context: (offset, length) in bytes."""
        assert view.dirty_contexts[target]
        ranges = self.domains[view.domain_uuid].disks[target].bitmaps[view.since[target]]
        assert ranges is not None
        return sorted(ranges)

    def read_view(self, view: View, target: str) -> bytes:
        """What an NBD client would read of an open view."""
        job = self.domains[view.domain_uuid].view
        assert job is not None
        assert view.socket.exists()
        return job.frozen[view.exports[target]]


class FakeHypervisor(FakeProvider):
    """`agent.virt.seam.Hypervisor` on a `FakeMachine`; several on one machine are an agent's successive lives."""

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine
        super().__init__(machine.volumes)

    def facts(self) -> HostFacts:
        return HostFacts(
            hostname=self.machine.hostname, uri="fake:///memory", libvirt_version="9.0.0", qemu_version="7.2.0"
        )

    def find(self, name_or_uuid: str) -> str:
        with self.machine.lock:
            for domain in self.machine.domains.values():
                if name_or_uuid in (domain.uuid, domain.name):
                    return domain.uuid
        raise NoSuchDomain(f"This host knows no VM {name_or_uuid}.", vm=name_or_uuid)

    @contextmanager
    def _domain(self, uuid: str) -> Iterator[FakeDomain]:
        with self.machine.lock:
            domain = self.machine.domains[self.find(uuid)]
            if domain.off_at_s is not None and domain.off_at_s <= self.machine.now_s:
                domain.end()
            yield domain

    def inspect(self, uuid: str) -> Domain:
        with self._domain(uuid) as domain:
            return Domain(
                uuid=domain.uuid,
                name=domain.name,
                state=domain.state,
                persistent=domain.persistent,
                autostart=domain.autostart,
                managed_save=domain.managed_save,
                on_poweroff=domain.on_poweroff,
                machine="pc-i440fx-7.2",
                firmware=domain.firmware,
                has_tpm=domain.has_tpm,
                passthrough=(),
                disks=tuple(_describe(target, top) for target, top in domain.disks.items()),
                snapshots=tuple(
                    Snapshot(name=s.name, ours=is_ours(s.name, s.description), external=True) for s in domain.snapshots
                ),
                checkpoints=domain.foreign_checkpoints,
                job=None if domain.view is None else "backup",
            )

    def state(self, uuid: str) -> PowerState:
        with self._domain(uuid) as domain:
            return domain.state

    def power_on(self, uuid: str) -> None:
        with self._domain(uuid) as domain:
            if domain.state is PowerState.RUNNING:
                return
            if domain.state is not PowerState.OFF:
                raise HypervisorError(f"VM {domain.name} is {domain.state.value}.", vm=domain.name)
            if domain.managed_save:
                raise HypervisorError(f"VM {domain.name} has saved memory.", vm=domain.name)
            missing = [image.path for top in domain.disks.values() for image in top.chain() if not image.path.exists()]
            if missing:
                raise HypervisorError(f"VM {domain.name}: {missing[0]} is missing.", vm=domain.name)
            domain.state = PowerState.RUNNING

    def request_shutdown(self, uuid: str) -> None:
        with self._domain(uuid) as domain:
            if domain.state is PowerState.OFF:
                return
            if domain.state is not PowerState.RUNNING:
                raise HypervisorError(f"VM {domain.name} is {domain.state.value}, it cannot answer.", vm=domain.name)
            if domain.guest is not GuestBehaviour.IGNORES and domain.off_at_s is None:
                takes_s = OBEYS_WITHIN_S if domain.guest is GuestBehaviour.OBEYS else domain.slow_s
                domain.off_at_s = self.machine.now_s + takes_s

    def wait_off(self, uuid: str, timeout_s: float) -> bool:
        with self._domain(uuid) as domain:
            if domain.state is PowerState.OFF:
                return True
            deadline_s = self.machine.now_s + timeout_s
            is_off = domain.off_at_s is not None and domain.off_at_s <= deadline_s
            self.machine.now_s = domain.off_at_s if is_off and domain.off_at_s is not None else deadline_s
            if is_off:
                domain.end()
            return is_off

    def force_off(self, uuid: str, *, graceful: bool) -> None:
        with self._domain(uuid) as domain:
            if graceful and domain.qemu_hangs:
                raise HypervisorError(f"VM {domain.name}: QEMU does not end.", vm=domain.name)
            domain.end(killed=not graceful)

    def set_autostart(self, uuid: str, enabled: bool) -> bool:
        with self._domain(uuid) as domain:
            before, domain.autostart = domain.autostart, enabled
            return before

    def open_view(
        self,
        uuid: str,
        targets: Sequence[str],
        tag: str,
        *,
        checkpoint: bool = False,
        since: Mapping[str, EarlierView] = NO_EARLIER_VIEW,
    ) -> View:
        check_tag(tag)
        with self._domain(uuid) as domain:
            if domain.state is PowerState.OFF:
                raise HypervisorError(f"VM {domain.name} is off.", vm=domain.name)
            if domain.view is not None:
                raise HypervisorError(f"VM {domain.name} has a backup running already.", vm=domain.name)
            tops = {target: _disk(domain, target) for target in targets}
            domain.view = FakeView(tag, {target: top.path.read_bytes() for target, top in tops.items()})
            for target, top in tops.items():
                (top.path.parent / scratch_name(domain.uuid, target, tag)).touch()
            socket = self.machine.folder / f"{domain.uuid}-{socket_name(tag)}"
            socket.touch()
            known, why_not = _known(domain, since)
            tracked: frozenset[str] = frozenset()
            is_new = False
            if checkpoint:
                able = frozenset(target for target, top in tops.items() if top.format == "qcow2")
                why_not |= {t: f"the format of the disk {t} holds no bitmap" for t in tops if t not in able}
                is_new = bool(able) and tag not in domain.checkpoints
                tracked = domain.checkpoints.setdefault(tag, able) & able if able else able
                for target in tracked if is_new else ():
                    tops[target].bitmaps[tag] = []
            return View(
                domain_uuid=domain.uuid,
                socket=socket,
                exports={target: target for target in targets},
                images={target: _image(top) for target, top in tops.items()},
                scratch={t: top.path.parent / scratch_name(domain.uuid, t, tag) for t, top in tops.items()},
                tracked=tracked,
                checkpoint_is_new=is_new,
                since=known,
                dirty_contexts={target: f"qemu:dirty-bitmap:since-{target}" for target in known},
                why_not=why_not,
            )

    def has_stalled(self, uuid: str) -> bool:
        with self._domain(uuid) as domain:
            return domain.stalled

    def written_since(self, uuid: str, tag: str) -> dict[str, int]:
        with self._domain(uuid) as domain:
            if domain.state is PowerState.OFF:
                return {}
            found = {target: domain.disks[target].bitmaps.get(tag) for target in domain.checkpoints.get(tag, ())}
            return {target: _blocks(ranges) for target, ranges in found.items() if ranges is not None}

    def drop_checkpoints(self, uuid: str, keep: Sequence[str] = ()) -> None:
        with self._domain(uuid) as domain:
            for tag in [tag for tag in domain.checkpoints if tag not in keep]:
                targets = domain.checkpoints.pop(tag)
                for target in targets if domain.state is not PowerState.OFF else ():
                    domain.disks[target].bitmaps.pop(tag, None)

    def drop_bitmaps(self, uuid: str) -> None:
        self.drop_checkpoints(uuid)
        with self._domain(uuid) as domain:
            for top in domain.disks.values() if domain.state is not PowerState.OFF else ():
                top.bitmaps = {name: ranges for name, ranges in top.bitmaps.items() if not is_our_bitmap(name)}

    def freeze_guest(self, uuid: str) -> None:
        with self._domain(uuid) as domain:
            if not domain.has_agent:
                raise GuestAgentMissing(f"No guest agent listens in the VM {domain.name}.", vm=domain.name)
            domain.frozen = True

    def thaw_guest(self, uuid: str) -> None:
        with self._domain(uuid) as domain:
            if domain.state is not PowerState.OFF and domain.has_agent:
                if domain.agent_hangs:
                    raise HypervisorError(f"VM {domain.name}: its agent does not answer.", vm=domain.name)
                domain.frozen = False

    def serves_view(self, uuid: str, tag: str) -> bool:
        with self._domain(uuid) as domain:
            return domain.view is not None and domain.view.tag == tag

    def close_view(self, uuid: str, tag: str) -> None:
        check_tag(tag)
        with self._domain(uuid) as domain:
            if domain.view is not None and domain.view.tag == tag:
                domain.view, domain.stalled = None, False
            for target, top in domain.disks.items():
                for image in top.chain():
                    (image.path.parent / scratch_name(domain.uuid, target, tag)).unlink(missing_ok=True)
            (self.machine.folder / f"{domain.uuid}-{socket_name(tag)}").unlink(missing_ok=True)

    def protect(self, uuid: str, targets: Sequence[str], snapshot: str, description: str) -> tuple[Overlay, ...]:
        check_snapshot(snapshot)
        with self._domain(uuid) as domain:
            _require_off(domain)
            for known in domain.snapshots:
                if known.name == snapshot:
                    return known.overlays
            bases = {target: _disk(domain, target) for target in targets}
            refs = {target: ImageRef(path=base.path, format=base.format) for target, base in bases.items()}
            paths = overlay_paths(refs, snapshot, self.machine.folder)
            for target, base in bases.items():
                shutil.copyfile(base.path, paths[target])
                domain.disks[target] = FakeImage(paths[target], "qcow2", base)
            overlays = tuple(
                Overlay(target=target, base=base.path, base_format=base.format, overlay=paths[target])
                for target, base in bases.items()
            )
            domain.snapshots.append(FakeSnapshot(snapshot, marked(description), overlays))
            return overlays

    def unprotect(self, uuid: str, snapshot: str, overlays: Sequence[Overlay]) -> None:
        with self._domain(uuid) as domain:
            _require_off(domain)
            metadata = [known for known in domain.snapshots if known.name == snapshot]
            known = {o.target: o for o in itertools.chain(overlays, *(s.overlays for s in metadata))}
            tops = {target: top for target, top in domain.disks.items() if target in known}
            for target, top in tops.items():
                if known[target].overlay in [image.path for image in top.chain()][1:]:
                    raise HypervisorError(f"VM {domain.name}: {top.path} stands on {snapshot}.", vm=domain.name)
            for target, top in tops.items():
                if top.path == known[target].overlay and top.backing is not None:
                    domain.disks[target] = top.backing
            domain.snapshots = [s for s in domain.snapshots if s.name != snapshot]
            for overlay in known.values():
                overlay.overlay.unlink(missing_ok=True)

    def plan_protection(self, uuid: str, targets: Sequence[str], snapshot: str) -> tuple[Overlay, ...]:
        check_snapshot(snapshot)
        with self._domain(uuid) as domain:
            _require_off(domain)
            known = {o.target: o for s in domain.snapshots if s.name == snapshot for o in s.overlays}
            bases = {target: _disk(domain, target) for target in targets if target not in known}
            refs = {target: ImageRef(path=base.path, format=base.format) for target, base in bases.items()}
            paths = overlay_paths(refs, snapshot, self.machine.folder)
            fresh = {
                target: Overlay(target=target, base=base.path, base_format=base.format, overlay=paths[target])
                for target, base in bases.items()
            }
            return tuple((known | fresh)[target] for target in targets)

    def merge_protection(self, uuid: str, snapshot: str, overlays: Sequence[Overlay], *, timeout_s: float) -> None:
        with self._domain(uuid) as domain:
            if domain.state is PowerState.OFF:
                raise HypervisorError(f"VM {domain.name} is off.", vm=domain.name)
            for overlay in overlays:
                top = _disk(domain, overlay.target)
                if top.path == overlay.overlay and top.backing is not None:
                    shutil.copyfile(overlay.overlay, overlay.base)
                    domain.disks[overlay.target] = top.backing
                overlay.overlay.unlink(missing_ok=True)
            domain.snapshots = [s for s in domain.snapshots if s.name != snapshot]

    def plan_overlays(self, uuid: str, targets: Sequence[str], tag: str) -> tuple[TrackOverlay, ...]:
        check_tag(tag)
        with self._domain(uuid) as domain:
            if domain.state is PowerState.OFF:
                raise HypervisorError(f"VM {domain.name} is off.", vm=domain.name)
            return tuple(_plan_overlay(domain, target, tag, self.machine.folder) for target in targets)

    def begin_overlays(self, uuid: str, planned: Sequence[TrackOverlay]) -> None:
        with self._domain(uuid) as domain:
            for overlay in planned:
                top = _disk(domain, overlay.target)
                if overlay.overlay in [image.path for image in top.chain()]:
                    continue
                if domain.view is not None:
                    raise HypervisorError(f"VM {domain.name} has a backup running already.", vm=domain.name)
                shutil.copyfile(top.path, overlay.overlay)
                domain.disks[overlay.target] = FakeImage(overlay.overlay, "qcow2", top)

    def merge_overlays(
        self, uuid: str, paths: Sequence[Path], into: Path, disk: TrackOverlay, *, timeout_s: float
    ) -> None:
        with self._domain(uuid) as domain:
            left = [image for image in _disk(domain, disk.target).chain() if image.path in paths]
            if left:
                shutil.copyfile(left[0].path, into)
            _unlink(domain, disk.target, paths)

    def forget_overlays(self, uuid: str, paths: Sequence[Path], into: Path, disk: TrackOverlay) -> None:
        with self._domain(uuid) as domain:
            _require_off(domain)
            _unlink(domain, disk.target, paths)
            for snapshot in domain.snapshots:
                snapshot.overlays = tuple(
                    replace(o, base=into, base_format=disk.base_format) if o.base in paths else o
                    for o in snapshot.overlays
                )

    def definition(self, uuid: str, *, secrets: bool = False) -> str:
        with self._domain(uuid) as domain:
            return write_definition(domain, secrets=secrets)

    def define(self, uuid: str, xml: str) -> str:
        with self._domain(uuid) as domain:
            _require_off(domain)
            read_definition(domain, xml)
            return write_definition(domain, secrets=True)

    def state_places(self, uuid: str) -> tuple[StatePlace, ...]:
        with self._domain(uuid) as domain:
            return domain.state_places

    def networks(self) -> tuple[str, ...]:
        return self.machine.networks

    def define_new(self, uuid: str, name: str, xml: str) -> None:
        with self.machine.lock:
            taken = [d for d in self.machine.domains.values() if uuid == d.uuid or name == d.name]
            if taken:
                raise HypervisorError(f"This host has a VM {taken[0].name} already.", vm=name)
            read_definition(self.machine.define(name, {}, uuid=uuid), xml)

    def undefine(self, uuid: str, *, keep_nvram: bool) -> None:
        with self.machine.lock:
            domain = self.machine.domains.get(uuid)
            if domain is None:
                return
            _require_off(domain)
            for place in domain.state_places:
                if place.role is StateRole.NVRAM and not keep_nvram:
                    place.path.unlink(missing_ok=True)
            del self.machine.domains[uuid]

    def close(self) -> None:
        return


def write_definition(domain: FakeDomain, *, secrets: bool) -> str:
    """The domain as libvirt would write it down."""
    disks = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='{top.format}'/><source file='{top.path}'/>"
        f"<target dev='{target}' bus='virtio'/></disk>"
        for target, top in domain.disks.items()
    )
    secret = f" passwd='{domain.password}'" if secrets and domain.password else ""
    console = f"<graphics type='vnc'{secret}/>" if domain.password else ""
    return (
        f"<domain type='qemu'><name>{domain.name}</name><uuid>{domain.uuid}</uuid>{domain.hardware}"
        f"<os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type></os>"
        f"<devices>{disks}{domain.nics}{console}</devices></domain>"
    )


def read_definition(domain: FakeDomain, xml: str) -> None:
    """Let the domain be what that says: memory, vCPUs, disks, NICs; of a graphics console the password."""
    root = ET.fromstring(xml)
    if root.findtext("uuid") != domain.uuid:
        raise HypervisorError(f"VM {domain.name}: that is another VM's definition.", vm=domain.name)
    facts = parse_domain(xml)
    images = {disk.target: disk.image for disk in facts.disks if disk.image is not None}
    kept = {target: top for target, top in domain.disks.items() if target in images}
    for target, image in images.items():
        if target not in kept or kept[target].path != image.path:
            kept[target] = FakeImage(image.path, image.format)
    domain.disks = kept
    parts = [child for tag in ("memory", "currentMemory", "vcpu", "cpu") for child in root.findall(tag)]
    domain.hardware = "".join(ET.tostring(part, encoding="unicode").strip() for part in parts)
    domain.nics = "".join(ET.tostring(nic, encoding="unicode").strip() for nic in root.findall("devices/interface"))
    console = root.find("devices/graphics")
    domain.password = "" if console is None else console.get("passwd", "")


def _known(domain: FakeDomain, since: Mapping[str, EarlierView]) -> tuple[dict[str, str], dict[str, str]]:
    known: dict[str, str] = {}
    why_not: dict[str, str] = {}
    for target, earlier in since.items():
        top = _disk(domain, target)
        if (top.path, images.identity(top.path)) != (earlier.path, earlier.identity):
            why_not[target] = f"the image of the disk {target} is not the one of then any more"
        elif target not in domain.checkpoints.get(earlier.tag, ()):
            why_not[target] = f"there is no checkpoint of the disk {target} from then any more"
        elif top.bitmaps.get(earlier.tag) is None:
            why_not[target] = f"the record of the disk {target} is lost"
        else:
            known[target] = earlier.tag
    return known, why_not


def _disk(domain: FakeDomain, target: str) -> FakeImage:
    if target not in domain.disks:
        raise HypervisorError(f"VM {domain.name} has no disk {target}.", vm=domain.name)
    return domain.disks[target]


def _plan_overlay(domain: FakeDomain, target: str, tag: str, scratch_dir: Path) -> TrackOverlay:
    *overlays, base = _disk(domain, target).chain()
    if base.format != "raw":
        raise HypervisorError(f"VM {domain.name}: its disk {target} is no raw image.", vm=domain.name)
    path = track_overlay_path(ImageRef(path=base.path, format="raw"), domain.uuid, target, tag, scratch_dir)
    paths = [image.path for image in (*overlays, base)]
    below = paths[paths.index(path) + 1] if path in paths else paths[0]
    return TrackOverlay(
        target=target, below=below, base=base.path, base_format="raw", overlay=path, definition=f"<disk {target}/>"
    )


def _unlink(domain: FakeDomain, target: str, paths: Sequence[Path]) -> None:
    """Take these images out of the disk's chain."""
    below: FakeImage | None = None
    for image in reversed(list(_disk(domain, target).chain())):
        if image.path not in paths:
            image.backing, below = below, image
    assert below is not None
    domain.disks[target] = below


def _require_off(domain: FakeDomain) -> None:
    if domain.state is not PowerState.OFF:
        raise HypervisorError(f"VM {domain.name} is {domain.state.value}: power it off.", vm=domain.name)


def _image(image: FakeImage) -> Image:
    return Image(
        path=image.path,
        format=image.format,
        identity=images.identity(image.path),
        virtual_size_bytes=image.path.stat().st_size,
        bitmaps=tuple(image.bitmaps),
        keeps_bitmaps=image.format == "qcow2",
        modified_s=images.modified_s(image.path),
        allocated_bytes=image.path.stat().st_blocks * 512,
    )


def _describe(target: str, top: FakeImage) -> DomainDisk:
    disk = DomainDisk(target=target, kind=SourceKind.FILE, chain=(), free_bytes=images.free_bytes(top.path.parent))
    try:
        return replace(
            disk,
            chain=tuple(_image(image) for image in top.chain()),
        )
    except images.UnreadableChain as error:
        return replace(disk, problem=error.sentence)


def _blocks(ranges: list[tuple[int, int]]) -> int:
    """Bytes of the blocks of 64 KiB that the ranges touch."""
    touched = {block for offset, length in ranges for block in range(offset >> 16, (offset + length - 1 >> 16) + 1)}
    return len(touched) << 16
