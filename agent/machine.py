"""What of a VM is no disk, carried home: orders about its definition, its firmware's variables, its TPM's state.

Everything that is replaced is kept, and written into the book before it is touched (`agent.machine_book`), so that each
share of it can be given back by itself. State is read of a replica and written to an original, both off and fenced.
All methods block; the pair's orders take turns.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from agent import machine_files as files
from agent.errors import Forbidden, HypervisorError
from agent.fences import Fenced, FenceKeeper
from agent.machine_book import KeptState, MachineBook, MachineRecord, MadeDisk
from agent.machine_files import StateError
from agent.maps import MapDesk
from agent.sync.map_file import remove_map
from agent.virt.definition_edit import add_disk, apply_changes, remove_disk
from agent.virt.names import ImageRef
from agent.virt.seam import Domain, Hypervisor, PowerState, SourceKind, StatePlace, StateRole
from protocol.messages import (
    ChangeDefinition,
    CreateDisk,
    DiskCreated,
    Done,
    KeepMachine,
    ListState,
    MachineDescription,
    MachineOrder,
    MachineShare,
    Order,
    PlaceState,
    ReadState,
    Reply,
    RestoreMachine,
    Side,
    StateChunk,
    StateFile,
    StateFiles,
    StateKind,
    StatePart,
    WriteState,
)

log = structlog.get_logger("failback.agent")

CHUNK_BYTES = 48 * 1024
"""Of a file in one answer: with its message around it, well inside what one byte string may be on the wire."""
PIECE_CHARACTERS = 16 * 1024
MAX_PIECES = 40
"""640 Ki characters, so that four bytes for each still leave room in a frame; a definition has some ten."""
TPM_TOOLS = {"swtpm": "swtpm", "swtpm_setup": "swtpm-tools"}
CREATE_TIMEOUT_S = 60.0
FORMATS = ("raw", "qcow2")


@dataclass(frozen=True, slots=True)
class MachineDesk:
    """What one agent does to VMs beside their disks. `staging`: a folder of its state for what is on its way."""

    hypervisor: Hypervisor
    fences: FenceKeeper
    book: MachineBook
    maps: MapDesk
    staging: Path

    def describe(self, vm_uuid: str) -> MachineDescription:
        """Answer to `DescribeMachine`; a VM that runs is described as it will be started next."""
        xml = self.hypervisor.definition(vm_uuid)
        pieces = tuple(xml[start : start + PIECE_CHARACTERS] for start in range(0, len(xml), PIECE_CHARACTERS))
        fits = len(pieces) <= MAX_PIECES
        places = self.hypervisor.state_places(vm_uuid)
        wanted = TPM_TOOLS if any(place.role is StateRole.TPM for place in places) else {}
        return MachineDescription(
            vm_uuid=vm_uuid,
            definition=pieces if fits else (),
            parts=tuple(_part(place) for place in places),
            networks=self.hypervisor.networks(),
            missing_tools=tuple(f"{tool} ({package})" for tool, package in wanted.items() if not shutil.which(tool)),
            problem="" if fits else f"its definition has {len(xml)} characters, more than are compared here",
        )

    def obey(self, request: MachineOrder) -> Reply:
        """Carry out one order."""
        match request:
            case ListState():
                self._check_fenced(request.order, request.vm_uuid)
                return StateFiles(files=self._listed(request.vm_uuid))
            case ReadState():
                return self._read(request)
            case WriteState():
                return self._write(request)
            case PlaceState():
                return self._place(request)
            case ChangeDefinition():
                return self._change(request)
            case CreateDisk():
                return self._create(request)
            case RestoreMachine():
                self._restore(request.order, request.vm_uuid, request.share)
                return Done()
            case KeepMachine():
                self._keep(request.order, request.vm_uuid)
                return Done()
            case _:
                raise Forbidden(f"this agent does not take the order {type(request).__name__}")

    # --- state ----------------------------------------------------------------------------------------------------

    def _listed(self, vm_uuid: str) -> tuple[StateFile, ...]:
        listed: list[StateFile] = []
        for place in self.hypervisor.state_places(vm_uuid):
            found = files.files_of(place)
            files.check_total(sum(f.size_bytes for f in listed) + files.size_of(found), vm_uuid)
            for name, path in found.items():
                data = files.read_stored(path)
                kind = StateKind(place.role.value)
                listed.append(StateFile(kind=kind, name=name, size_bytes=len(data), digest=files.digest_of(data)))
        return tuple(listed)

    def _read(self, request: ReadState) -> StateChunk:
        self.fences.required(request.vm_uuid, Side.REPLICA.value, request.order.pair)
        path = files.files_of(self._place_of(request.vm_uuid, request.kind)).get(request.name)
        if path is None:
            raise StateError(f"the VM {request.vm_uuid} has no {request.kind.value} state {request.name} any more")
        return StateChunk(data=files.read_from(path, max(0, request.offset_bytes), CHUNK_BYTES))

    def _write(self, request: WriteState) -> Done:
        self.fences.required(request.vm_uuid, Side.ORIGINAL.value, request.order.pair)
        files.check_name(StateRole(request.kind.value), request.name)
        path = self._staged(request.vm_uuid, request.kind, request.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with path.open("ab" if request.offset_bytes else "wb") as file:
                if file.tell() < request.offset_bytes or request.offset_bytes < 0:
                    raise StateError(f"{request.name} came with a gap at {request.offset_bytes}: begin it anew")
                file.truncate(request.offset_bytes)
                file.seek(request.offset_bytes)
                file.write(request.data)
                files.check_total(file.tell(), request.vm_uuid)
        except OSError as error:
            raise StateError(f"{path} cannot be written: {error.strerror}; make room there") from error
        return Done()

    def _place(self, request: PlaceState) -> StateFiles:
        uuid, order = request.vm_uuid, request.order
        self.fences.required(uuid, Side.ORIGINAL.value, order.pair)
        self._check_off(uuid)
        contents = {kind: self._staged_whole(request, kind) for kind in {file.kind for file in request.files}}
        for kind, by_name in contents.items():
            self._place_kind(order, uuid, kind, by_name)
        self._drop_staged(uuid)
        placed = tuple(file for file in self._listed(uuid) if file.kind in contents)
        if set(placed) != set(request.files):
            raise StateError(
                f"what was put in place for the VM {uuid} reads back as something else: look at its storage"
            )
        return StateFiles(files=placed)

    def _place_kind(self, order: Order, uuid: str, kind: StateKind, contents: dict[str, bytes]) -> None:
        place = self._place_of(uuid, kind)
        record = self._record(order, uuid)
        known = record.state(place.role)
        if known is None:
            known = KeptState(
                role=place.role,
                path=place.path,
                kept=place.path.with_name(f"{place.path.name}.failback-{order.run}"),
                existed=place.path.exists(),
                placed=(),
            )
        placed = tuple((name, files.digest_of(data).hex()) for name, data in sorted(contents.items()))
        state = replace(known, placed=placed)
        self.book.put(record.with_state(state))
        files.keep_aside(state)
        files.put_in_place(state, contents)

    def _staged_whole(self, request: PlaceState, kind: StateKind) -> dict[str, bytes]:
        contents: dict[str, bytes] = {}
        for file in request.files:
            if file.kind is kind:
                files.check_name(StateRole(kind.value), file.name)
                path = self._staged(request.vm_uuid, kind, file.name)
                data = files.read_stored(path) if path.exists() else b""
                if files.digest_of(data) != file.digest:
                    raise StateError(f"{kind.value} state {file.name} did not arrive whole: it has to be sent again")
                contents[file.name] = data
        return contents

    def _staged(self, vm_uuid: str, kind: StateKind, name: str) -> Path:
        return self.staging / vm_uuid / kind.value / name

    def _drop_staged(self, vm_uuid: str) -> None:
        shutil.rmtree(self.staging / vm_uuid, ignore_errors=True)

    def _place_of(self, vm_uuid: str, kind: StateKind) -> StatePlace:
        for place in self.hypervisor.state_places(vm_uuid):
            if place.role.value == kind.value:
                if place.problem:
                    raise StateError(f"the VM {vm_uuid}: {place.problem}; it is not carried")
                return place
        raise StateError(
            f"the VM {vm_uuid} has no {kind.value} state by its definition: give both VMs the same hardware"
        )

    # --- definition and disks -------------------------------------------------------------------------------------

    def _change(self, request: ChangeDefinition) -> Done:
        uuid = request.vm_uuid
        self.fences.required(uuid, Side.ORIGINAL.value, request.order.pair)
        record = self._record(request.order, uuid)
        before = record.definition_before
        if before is None:
            before = self.hypervisor.definition(uuid, secrets=True)
            record = replace(record, definition_before=before)
            self.book.put(record)
        after = self.hypervisor.define(uuid, apply_changes(before, [change.element for change in request.changes]))
        self.book.put(replace(record, definition_after=after))
        return Done()

    def _create(self, request: CreateDisk) -> DiskCreated:
        uuid, target = request.vm_uuid, request.target
        self.settle(request.order, uuid)
        domain = self._check_off(uuid)
        self._check_not_foreign(request.order, uuid)
        if request.format not in FORMATS or not 0 < request.size_bytes < 1 << 63:
            raise HypervisorError(f"A disk of {request.size_bytes} bytes in {request.format} cannot be created here.")
        record = self._record(request.order, uuid)
        made = next((disk for disk in record.disks if disk.target == target), None)
        if made is None:
            beside = _first_file(domain)
            name = f"{domain.name}-{target}-{request.order.run}.{request.format}"
            made = MadeDisk(target=target, path=beside.with_name(name.replace("/", "_")), format=request.format)
            if made.path.exists():
                raise HypervisorError(f"{made.path} is in the way of a new disk: move it away.", path=str(made.path))
            self.book.put(replace(record, disks=(*record.disks, made)))
        if not any(disk.target == target for disk in domain.disks):
            _make_image(made, request.size_bytes, like=_first_file(domain))
            xml = self.hypervisor.definition(uuid, secrets=True)
            image = ImageRef(path=made.path, format=made.format)
            self.hypervisor.define(uuid, add_disk(xml, target, image, request.element))
        return DiskCreated(path=str(made.path))

    # --- giving back, and keeping -----------------------------------------------------------------------------------

    def settle(self, order: Order, vm_uuid: str) -> None:
        """Another run begins: what an earlier one has changed and could not give back is given back, where nobody has
        changed it since; else it stays, and what was kept is dropped."""
        record = self.book.find(vm_uuid)
        if record is None or record.run == order.run:
            return
        self._check_off(vm_uuid)
        for state in record.states:
            present = files.files_of(StatePlace(role=state.role, path=state.path, format=""))
            now = tuple(
                (name, files.digest_of(files.read_stored(path)).hex()) for name, path in sorted(present.items())
            )
            is_ours = now == state.placed or not state.path.exists()  # or nothing: it was cut short
            act = files.give_back if is_ours else files.drop_kept
            act(state)
        before = record.definition_before
        if before is not None and self.hypervisor.definition(vm_uuid, secrets=True) == record.definition_after:
            self.hypervisor.define(vm_uuid, before)
        if record.disks:
            log.warning("disks that a run made and did not remove stay", vm=vm_uuid, run=record.run)
        self.book.put(MachineRecord(vm_uuid=vm_uuid, pair=record.pair, run=record.run))

    def _restore(self, order: Order, vm_uuid: str, share: MachineShare) -> None:
        record = self.book.find(vm_uuid)
        if record is None or record.run != order.run:
            return
        self._check_off(vm_uuid)
        self._check_not_foreign(order, vm_uuid)
        restore: dict[MachineShare, Callable[[MachineRecord], MachineRecord]] = {
            MachineShare.STATE: self._restore_state,
            MachineShare.DEFINITION: self._restore_definition,
            MachineShare.DISKS: self._remove_disks,
        }
        self.book.put(restore[share](record))

    def _restore_state(self, record: MachineRecord) -> MachineRecord:
        for state in record.states:
            files.give_back(state)
        self._drop_staged(record.vm_uuid)
        return replace(record, states=())

    def _restore_definition(self, record: MachineRecord) -> MachineRecord:
        if record.definition_before is not None:
            self.hypervisor.define(record.vm_uuid, record.definition_before)
        return replace(record, definition_before=None, definition_after="")

    def _remove_disks(self, record: MachineRecord) -> MachineRecord:
        self.fences.forget_disks(record.vm_uuid, [disk.target for disk in record.disks])
        for disk in record.disks:
            without = remove_disk(self.hypervisor.definition(record.vm_uuid, secrets=True), disk.target, disk.path)
            if without is not None:
                self.hypervisor.define(record.vm_uuid, without)
            try:
                disk.path.unlink(missing_ok=True)
                remove_map(self.maps.path_of(record.vm_uuid, disk.target))
            except OSError as error:
                raise HypervisorError(
                    f"{disk.path} cannot be removed: {error.strerror}.", path=str(disk.path)
                ) from error
        return replace(record, disks=())

    def _keep(self, order: Order, vm_uuid: str) -> None:
        record = self.book.find(vm_uuid)
        if record is None or record.run != order.run:
            return
        for state in record.states:
            files.drop_kept(state)
        self._drop_staged(vm_uuid)
        self.book.put(MachineRecord(vm_uuid=vm_uuid, pair=record.pair, run=record.run))

    # --- checks -----------------------------------------------------------------------------------------------------

    def _record(self, order: Order, vm_uuid: str) -> MachineRecord:
        self.settle(order, vm_uuid)
        return self.book.find(vm_uuid) or MachineRecord(vm_uuid=vm_uuid, pair=order.pair, run=order.run)

    def _check_off(self, vm_uuid: str) -> Domain:
        domain = self.hypervisor.inspect(vm_uuid)
        if domain.state is not PowerState.OFF:
            raise HypervisorError(f"The VM {domain.name} is {domain.state.value}: power it off first.", vm=domain.name)
        return domain

    def _check_fenced(self, order: Order, vm_uuid: str) -> None:
        fence = self.fences.fence_of(vm_uuid)
        side = Side.REPLICA if fence is not None and fence.side == Side.REPLICA.value else Side.ORIGINAL
        self.fences.required(vm_uuid, side.value, order.pair)

    def _check_not_foreign(self, order: Order, vm_uuid: str) -> None:
        fence = self.fences.fence_of(vm_uuid)
        if fence is not None and fence.pair != order.pair:
            raise Fenced(f"the VM {vm_uuid} is fenced for the pair {fence.pair}: end that run first")


def _part(place: StatePlace) -> StatePart:
    kind, problem, size_bytes, present = StateKind(place.role.value), place.problem, 0, False
    if not problem:
        try:
            found = files.files_of(place)
            size_bytes, present = files.size_of(found), bool(found)
            files.check_total(size_bytes, str(place.path))
        except StateError as error:
            problem = error.sentence
    return StatePart(
        kind=kind, path=str(place.path), format=place.format, size_bytes=size_bytes, present=present, problem=problem
    )


def _first_file(domain: Domain) -> Path:
    for disk in domain.disks:
        if disk.kind is SourceKind.FILE and disk.chain:
            return disk.chain[0].path
    raise HypervisorError(
        f"VM {domain.name} has no disk that is a file, so there is no folder for a new one: attach one by hand.",
        vm=domain.name,
    )


def _make_image(made: MadeDisk, size_bytes: int, *, like: Path) -> None:
    """The image, durably; one that an interrupted attempt left is made anew, for nothing can be in it yet."""
    made.path.unlink(missing_ok=True)
    command = ["qemu-img", "create", "-q", "-f", made.format, "--", str(made.path), str(size_bytes)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=CREATE_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        why = str(getattr(error, "stderr", "") or error).strip()
        made.path.unlink(missing_ok=True)
        raise HypervisorError(f"The disk {made.path} cannot be created: {why}.", path=str(made.path)) from error
    files.make_like(made.path, like)
