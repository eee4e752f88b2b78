"""A VM made anew on this host for a run, kept for good at its commit, or removed again: exactly that VM.

All methods block; the pair's orders take turns. The record of what is made (`agent.home_book`) is ahead of every act.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from agent.errors import AgentError, Forbidden, HypervisorError, HypervisorUnreachable, NoSuchDomain
from agent.evidence import EvidenceDesk
from agent.fences import Fenced, FenceKeeper
from agent.home_book import HomeBook, HomeRecord, MadeVolume
from agent.maps import MapDesk
from agent.progress import ProgressDesk
from agent.sync.map_file import remove_map
from agent.virt.names import ImageRef
from agent.virt.new_definition import kind_of, on_volumes
from agent.virt.seam import Hypervisor, PowerState
from protocol.messages import (
    CreateVm,
    DescribeProvisions,
    Done,
    HomeOrder,
    KeepCreated,
    NewVolume,
    Order,
    Provisions,
    RemoveCreated,
    Reply,
    StoragePool,
    VmCreated,
)

log = structlog.get_logger("failback.agent")

FORMATS = ("raw", "qcow2")
_NOWHERE = Path("/nonexistent")
MAX_CHARACTERS = 640 * 1024
"""Of a definition: as many as an agent tells of one."""


@dataclass(frozen=True, slots=True)
class HomeDesk:
    """What one agent makes for runs to an entirely new location."""

    hypervisor: Hypervisor
    fences: FenceKeeper
    book: HomeBook
    maps: MapDesk
    evidence: EvidenceDesk
    progress: ProgressDesk

    def describe(self, request: DescribeProvisions) -> Provisions:
        """Answer to `DescribeProvisions`."""
        found = self.hypervisor.provisions(request.arch, request.virt_type, request.machine)
        return Provisions(
            machines=found.machines,
            cpu_modes=found.cpu_modes,
            cpu_models=found.cpu_models,
            firmware=found.firmware,
            files=found.files,
            tpm_models=found.tpm_models,
            networks=self.hypervisor.networks(),
            pools=tuple(
                StoragePool(
                    name=pool.name,
                    kind=pool.kind,
                    path=str(pool.path),
                    active=pool.active,
                    free_bytes=pool.free_bytes,
                )
                for pool in found.pools
            ),
            problem=found.problem,
        )

    def obey(self, request: HomeOrder) -> Reply:
        """Carry out one order."""
        match request:
            case CreateVm():
                return self._create(request)
            case RemoveCreated():
                record = self._of(request.order, request.vm_uuid)
                if record is not None:
                    self._check_removable(request.order, record)
                    self._remove(record)
            case KeepCreated():
                if self._of(request.order, request.vm_uuid) is not None:
                    self.book.drop(request.vm_uuid)
            case _:
                raise Forbidden(f"this agent does not take the order {type(request).__name__}")
        return Done()

    def _of(self, order: Order, vm_uuid: str) -> HomeRecord | None:
        """The record of that VM, if it was made for that very run."""
        record = self.book.find(vm_uuid)
        return record if record is not None and (record.pair, record.run) == (order.pair, order.run) else None

    # --- making -----------------------------------------------------------------------------------------------------

    def _create(self, request: CreateVm) -> VmCreated:
        uuid = request.vm_uuid
        record = self.book.find(uuid)
        if record is not None and self._of(request.order, uuid) is None:
            raise HypervisorError(
                f"The VM {record.name} was made here for the run {record.run} of {record.pair}, which has not removed "
                "it: end that run first.",
                vm=record.name,
            )
        if record is None or not (record.defined and self._is_known(uuid)):
            self._check(request)
            record = record or self._begin(request)
            try:
                record = self._define(request, self._make_volumes(record))
            except HypervisorUnreachable:
                raise  # what was done is unknown; the record names what may have been
            except AgentError:
                self._tidy(record)
                raise
        return VmCreated(paths=tuple(str(volume.path) for volume in record.volumes))

    def _check(self, request: CreateVm) -> None:
        """Everything that can be known to be wrong before anything is made."""
        for volume in request.volumes:
            if volume.format not in FORMATS or not 0 < volume.size_bytes < 1 << 63:
                raise HypervisorError(
                    f"A disk of {volume.size_bytes} bytes in {volume.format} cannot be made here.", disk=volume.target
                )
        places = {volume.target: ImageRef(path=_NOWHERE, format=volume.format) for volume in request.volumes}
        if len(places) != len(request.volumes):
            raise HypervisorError(f"The new VM {request.name} has two disks of one name.", vm=request.name)
        self._on(request, places)

    def _on(self, request: CreateVm, volumes: dict[str, ImageRef]) -> str:
        xml = "".join(request.definition)
        if len(xml) > MAX_CHARACTERS:
            raise HypervisorError(f"The definition of the new VM {request.name} is too long.", vm=request.name)
        files = self.hypervisor.provisions(*kind_of(xml)).files
        return on_volumes(xml, request.vm_uuid, request.name, volumes, files)

    def _begin(self, request: CreateVm) -> HomeRecord:
        """What is to be made, written down once it is sure that nothing is there by these names."""
        for find, what in ((self.hypervisor.find, request.vm_uuid), (self.hypervisor.find, request.name)):
            if _finds(find, what):
                raise HypervisorError(f"This host has a VM {what} already: choose another name.", vm=what)
        volumes = tuple(_planned(request, volume) for volume in request.volumes)
        for made in volumes:
            found = self.hypervisor.find_volume(made.pool, made.name)
            if found is not None:
                raise HypervisorError(
                    f"{found.path} is in the way of a new volume: move it away.", path=str(found.path)
                )
        record = HomeRecord(
            vm_uuid=request.vm_uuid,
            name=request.name,
            pair=request.order.pair,
            run=request.order.run,
            volumes=volumes,
        )
        self.book.put(record)
        return record

    def _make_volumes(self, record: HomeRecord) -> HomeRecord:
        for volume in record.volumes:
            if volume.path is None:
                # One that an interrupted attempt has left is made anew: nothing can be in it yet.
                self.hypervisor.remove_volume(volume.pool, volume.name)
                made = self.hypervisor.create_volume(volume.pool, volume.name, volume.format, volume.size_bytes)
                record = record.with_volume(replace(volume, path=made.path))
                self.book.put(record)
        return record

    def _define(self, request: CreateVm, record: HomeRecord) -> HomeRecord:
        images = {v.target: ImageRef(path=v.path or _NOWHERE, format=v.format) for v in record.volumes}
        if not record.defining:
            record = replace(record, defining=True)
            self.book.put(record)
        if not self._is_known(record.vm_uuid):
            self.hypervisor.define_new(record.vm_uuid, record.name, self._on(request, images))
        places = self.hypervisor.state_places(record.vm_uuid)  # it has never run: what is there is none of its own
        record = replace(record, defined=True, keep_nvram=any(place.path.exists() for place in places))
        self.book.put(record)
        return record

    def _tidy(self, record: HomeRecord) -> None:
        """After a failure: what it was is told, whatever becomes of this."""
        try:
            self._remove(self.book.find(record.vm_uuid) or record)
        except AgentError as error:
            log.warning("what was made of a new VM is not all removed", vm=record.name, why=error.sentence)

    # --- removing ---------------------------------------------------------------------------------------------------

    def _check_removable(self, order: Order, record: HomeRecord) -> None:
        uuid = record.vm_uuid
        if self._is_known(uuid) and self.hypervisor.state(uuid) is not PowerState.OFF:
            raise HypervisorError(f"The VM {record.name} must be off to be removed: power it off.", vm=record.name)
        fence = self.fences.fence_of(uuid)
        if fence is not None and fence.pair != order.pair:
            raise Fenced(f"the VM {record.name} is fenced for the pair {fence.pair}: end that run first")

    def _remove(self, record: HomeRecord) -> None:
        """The definition first, while the fence stands: what is half removed cannot be started."""
        uuid = record.vm_uuid
        if record.defining:
            self.hypervisor.undefine(uuid, keep_nvram=record.keep_nvram)
        for volume in record.volumes:
            self.hypervisor.remove_volume(volume.pool, volume.name)
        self.fences.forget_vm(uuid)
        self.evidence.forget(uuid)
        self.progress.forget(uuid)
        for volume in record.volumes:
            path = self.maps.path_of(uuid, volume.target)
            try:
                remove_map(path)
            except OSError as error:
                raise HypervisorError(f"{path} cannot be removed: {error.strerror}.", path=str(path)) from error
        self.book.drop(uuid)

    def _is_known(self, uuid: str) -> bool:
        return _finds(self.hypervisor.find, uuid)


def _finds(find: Callable[[str], str], what: str) -> bool:
    try:
        find(what)
    except NoSuchDomain:
        return False
    return True


def _planned(request: CreateVm, volume: NewVolume) -> MadeVolume:
    """Its name has the run's in it, so that no other one can have made it."""
    name = f"{request.name}-{volume.target}-{request.order.run}.{volume.format}".replace("/", "_")
    return MadeVolume(
        target=volume.target, pool=volume.pool, name=name, format=volume.format, size_bytes=volume.size_bytes
    )
