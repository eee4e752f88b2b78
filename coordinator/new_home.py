"""An entirely new location: what its host has for the VM, which pools its volumes go to, and how the plan sees it.

Asks agents and changes nothing; `coordinator.relocation` makes the definition.
"""

from __future__ import annotations

import uuid as uuids
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from coordinator.agents import QUESTION_TIMEOUT_S, Agent, AgentDirectory, ask
from coordinator.errors import AgentRefused, CoordinatorError, HostUnreachable
from coordinator.findings import NO_VM, SideFindings, clause
from coordinator.machine import definition_of, describe
from coordinator.model import DiskPair, Pair, Refusal, RunOptions, VmRef
from coordinator.place_mapping import draft
from coordinator.relocation import NewVm, Relocated, files_of, kind_of, networks_of, relocate
from protocol.messages import (
    DescribeHost,
    DescribeProvisions,
    DiskDescription,
    HostDescription,
    ImageDescription,
    InspectVm,
    MachineDescription,
    NewVolume,
    Power,
    Provisions,
    StoragePool,
    VmDescription,
)

FILE_POOLS = ("dir", "fs", "netfs")
"""Kinds of pools in which an agent makes volumes."""
FORMATS = ("raw", "qcow2")
PLAIN_SECTOR_BYTES = 512
"""Of a disk that is a file, where its definition says nothing else."""
PIECE_CHARACTERS = 16 * 1024
NEW_HOME_FORBIDS = ("apply_config", "create_missing")
"""Options that speak of a definition and disks that are there already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was told of the replica and of the new host."""

    host: HostDescription
    replica: VmDescription
    machine: MachineDescription
    here: Provisions
    there: Provisions

    @property
    def definition(self) -> str:
        """The replica's."""
        return definition_of(self.machine)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewHome:
    """The VM as it would be made.

    Attributes:
        vm: its name, UUID and host.
        disks: of the pair.
        relocated: its definition, and what speaks against it.
        volumes: what is to be made for it.
        refusals: everything that speaks against it.
        notes: what a person should know of it.
        asked: what it is made of.
    """

    vm: VmRef
    disks: tuple[DiskPair, ...]
    relocated: Relocated
    volumes: tuple[NewVolume, ...]
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]
    asked: Asked

    @property
    def pieces(self) -> tuple[str, ...]:
        """The definition, as the wire takes it."""
        text = self.relocated.definition
        return tuple(text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS))

    @property
    def side(self) -> SideFindings:
        """How a plan sees the VM: as it will be once it is made, with nothing on its disks."""
        replica, machine = self.asked.replica, self.asked.machine
        theirs = {disk.target: disk for disk in replica.disks}
        pools = {pool.name: pool for pool in self.asked.there.pools}
        vm = replace(
            replica,
            uuid=self.vm.uuid,
            name=self.vm.name,
            power=Power.OFF,
            persistent=True,
            autostart=False,
            managed_save=False,
            passthrough=(),
            disks=tuple(
                _planned(self.vm.name, theirs[volume.target], volume, pools[volume.pool]) for volume in self.volumes
            ),
            snapshots=(),
            checkpoints=(),
            job=None,
            job_is_ours=False,
            fence=None,
            lifted=None,
            running_since_s=0.0,
            last_started_s=0.0,
            last_stopped_s=0.0,
        )
        seen = replace(
            machine,
            vm_uuid=self.vm.uuid,
            definition=self.pieces,
            parts=tuple(replace(part, path="", size_bytes=0, present=False) for part in machine.parts),
            networks=self.asked.there.networks,
            missing_tools=(),
        )
        return SideFindings(host=self.asked.host, vm=vm, machine=seen)

    def draft(self) -> str:
        """A mapping for a person to complete, TOML."""
        definition, there = self.asked.definition, self.asked.there
        names = {network.partition(":")[2]: network for network in there.networks}
        pools = {volume.target: volume.pool for volume in self.volumes}
        tables: dict[str, Mapping[str, str]] = {
            "network": {name: names.get(name, "") for name in networks_of(definition)},
            "pool": {disk.original: pools.get(disk.original, "") for disk in self.disks},
            "firmware": {path: path if path in there.files else "" for path in files_of(definition)},
        }
        choices = {
            "network": there.networks,
            "pool": tuple(pool.name for pool in usable(there)),
            "firmware": there.files,
        }
        return draft(self.vm.name, tables, choices)


async def look(agents: AgentDirectory, pair: Pair, options: RunOptions, vm: VmRef | None = None) -> NewHome | Refusal:
    """The VM as it would be made now; a refusal where not enough was told to say.

    Args:
        agents: how they are reached.
        pair: as the registry has it; with `vm`, that of the run.
        options: where to, and the mapping.
        vm: what it is to be, in a run that has begun; None: chosen here, and looked for whether it is taken.
    """
    try:
        asked = await _ask(agents, pair, options.to.host)
        refusals = list(_not_with(options))
        if vm is None:
            vm = _chosen(pair, options, asked)
            refusals += await _taken(agents.agent(vm.host), vm)
        return _made(pair, options, asked, vm, refusals)
    except (HostUnreachable, AgentRefused) as error:
        return _unreadable(options, error)
    except CoordinatorError as error:
        return Refusal(code=error.code, about=pair.replica.name, sentence=f"{clause(error.sentence)}.")


async def _ask(agents: AgentDirectory, pair: Pair, host: str) -> Asked:
    source, target = agents.agent(pair.replica.host), agents.agent(host)
    told = await ask(target, DescribeHost(), HostDescription, timeout_s=QUESTION_TIMEOUT_S)
    replica = await ask(source, InspectVm(vm=pair.replica.uuid), VmDescription, timeout_s=QUESTION_TIMEOUT_S)
    machine = await describe(source, pair.replica.uuid)
    definition = definition_of(machine)
    if not definition:
        raise CoordinatorError(
            f"the definition of the replica {pair.replica.name} is not told ({machine.problem}), so that none can be "
            "made of it",
            code="no-definition",
        )
    arch, virt_type, kind = kind_of(definition)
    question = DescribeProvisions(arch=arch, virt_type=virt_type, machine=kind)
    return Asked(
        host=told,
        replica=replica,
        machine=machine,
        here=await ask(source, question, Provisions, timeout_s=QUESTION_TIMEOUT_S),
        there=await ask(target, question, Provisions, timeout_s=QUESTION_TIMEOUT_S),
    )


def _unreadable(options: RunOptions, error: CoordinatorError) -> Refusal:
    host = options.to.host
    sentence = f"A VM cannot be made on {host}: {clause(error.sentence)}."
    if error.code == "forbidden":
        sentence = (
            f"An agent does not know how a VM is made anew ({clause(error.sentence)}): install this release on {host} "
            "and on the replica's host."
        )
    return Refusal(code="new-location", about=host, sentence=sentence)


def _not_with(options: RunOptions) -> Iterator[Refusal]:
    for name in NEW_HOME_FORBIDS:
        if getattr(options, name):
            option = "--" + name.replace("_", "-")
            yield Refusal(
                code="not-with-new-location",
                about=options.to.host,
                sentence=(
                    f"{option} is not for --to host: the new VM is made of the replica's definition; leave it out."
                ),
            )
    if options.protect_original:
        yield Refusal(
            code="not-with-new-location",
            about=options.to.host,
            sentence="--protect-original is not for --to host: there is nothing on the new disks; leave it out.",
        )


def _chosen(pair: Pair, options: RunOptions, asked: Asked) -> VmRef:
    """The original's identity only where it never comes back, and not on its own host, where it would be taken for the
    one of before."""
    to, original = options.to, pair.original
    takes_over = options.former_original_gone and original.host != to.host
    uuid = original.uuid if takes_over else str(uuids.uuid4())
    return VmRef(host=to.host, name=options.mapping.name or original.name, uuid=uuid)


async def _taken(agent: Agent, vm: VmRef) -> list[Refusal]:
    found: list[Refusal] = []
    for code, what, said in (("name-clash", vm.name, "of that name"), ("uuid-clash", vm.uuid, "with that UUID")):
        try:
            there = await ask(agent, InspectVm(vm=what), VmDescription, timeout_s=QUESTION_TIMEOUT_S)
        except AgentRefused as error:
            if error.code != NO_VM:
                raise
            continue
        cure = "--map name=NEW" if code == "name-clash" else "leave --former-original-gone out"
        sentence = (
            f"Host {vm.host} has a VM {said} already ({there.name}, {there.uuid}): choose another for the new one, "
            f"{cure}, or `virsh undefine` that one if nobody needs it."
        )
        found.append(Refusal(code=code, about=vm.name, sentence=sentence))
    return found


def _made(pair: Pair, options: RunOptions, asked: Asked, vm: VmRef, refusals: list[Refusal]) -> NewHome:
    targets = tuple(disk.replica for disk in pair.disks)
    new = NewVm(
        name=vm.name,
        uuid=vm.uuid,
        disks=targets,
        mapping=options.mapping,
        keep_identity=options.former_original_gone,
    )
    relocated = relocate(asked.definition, vm.host, new, asked.there)
    volumes, missing = _volumes(asked, vm, targets, options)
    notes = list(relocated.notes)
    if options.former_original_gone and vm.uuid != pair.original.uuid and pair.former is None:
        notes.append(
            f"{vm.name} keeps the MAC addresses and gets a UUID of its own: on {vm.host} the old one is remembered as "
            "the former original's."
        )
    return NewHome(
        vm=vm,
        disks=tuple(DiskPair(original=target, replica=target) for target in targets),
        relocated=relocated,
        volumes=volumes,
        refusals=(*refusals, *relocated.refusals, *missing, *_without_room(asked, vm, volumes)),
        notes=tuple(notes),
        asked=asked,
    )


# --- volumes --------------------------------------------------------------------------------------------------------


def usable(has: Provisions) -> tuple[StoragePool, ...]:
    """The pools in which volumes can be made."""
    return tuple(pool for pool in has.pools if pool.active and pool.kind in FILE_POOLS)


def _volumes(
    asked: Asked, vm: VmRef, targets: tuple[str, ...], options: RunOptions
) -> tuple[tuple[NewVolume, ...], list[Refusal]]:
    volumes: list[NewVolume] = []
    refusals: list[Refusal] = []
    theirs = {disk.target: disk for disk in asked.replica.disks}
    for target in targets:
        disk = theirs.get(target)
        if disk is None or not disk.chain:
            continue  # that it cannot be read is said already
        top = disk.chain[0]
        if top.format not in FORMATS:
            sentence = (
                f"Disk {target} of the replica is in format {top.format}, in which no volume can be made: convert it "
                "with `qemu-img convert`."
            )
            refusals.append(Refusal(code="format-not-supported", about=target, sentence=sentence))
            continue
        pool = _pool_for(asked, disk, options)
        if isinstance(pool, str):
            refusals.append(_pool_missing(asked, vm, target, pool))
            continue
        volumes.append(NewVolume(target=target, pool=pool.name, format=top.format, size_bytes=top.virtual_size_bytes))
    return tuple(volumes), refusals


def _pool_for(asked: Asked, disk: DiskDescription, options: RunOptions) -> StoragePool | str:
    """The pool for that disk: mapped by its target, by the replica's pool, of the same name, or the only one; else the
    name of the one that is missing."""
    folder = disk.chain[-1].path.rpartition("/")[0]
    old = next((pool.name for pool in asked.here.pools if pool.path.rstrip("/") == folder), "")
    known = dict(options.mapping.pools)
    wanted = known.get(disk.target) or known.get(old)
    pools = {pool.name: pool for pool in usable(asked.there)}
    if wanted:
        return pools.get(wanted, wanted)
    if old in pools:
        return pools[old]
    if "default" in pools:
        return pools["default"]
    return next(iter(pools.values())) if len(pools) == 1 else old or "default"


def _pool_missing(asked: Asked, vm: VmRef, target: str, pool: str) -> Refusal:
    has = ", ".join(found.name for found in usable(asked.there)) or "none"
    other = next((found for found in asked.there.pools if found.name == pool), None)
    why = f"has no storage pool {pool}"
    if other is not None:
        why = f"cannot make a volume in the pool {pool}, which is of the type {other.kind}"
        why = why if other.active else f"has the pool {pool}, but it is not active"
    problem = f" {asked.there.problem}" if asked.there.problem else ""
    return Refusal(
        code="pool-missing",
        about=target,
        sentence=(
            f"Host {vm.host} {why}, for the disk {target} (it can use: {has}); make or start it there, or map another: "
            f"--map pool:{target}=POOL.{problem}"
        ),
    )


def _without_room(asked: Asked, vm: VmRef, volumes: tuple[NewVolume, ...]) -> Iterator[Refusal]:
    theirs = {disk.target: sum(image.allocated_bytes for image in disk.chain) for disk in asked.replica.disks}
    for pool in usable(asked.there):
        needed = sum(theirs[volume.target] for volume in volumes if volume.pool == pool.name)
        if needed > pool.free_bytes:
            yield Refusal(
                code="pool-full",
                about=pool.name,
                sentence=(
                    f"The new disks hold {needed} bytes, and the pool {pool.name} on {vm.host} has {pool.free_bytes} "
                    "bytes free: make room there, or map another pool."
                ),
            )


def _planned(name: str, replica: DiskDescription, volume: NewVolume, pool: StoragePool) -> DiskDescription:
    path = f"{pool.path}/{name}-{volume.target}.{volume.format}"
    image = ImageDescription(
        path=path,
        format=volume.format,
        identity=f"to be made: {path}",
        virtual_size_bytes=volume.size_bytes,
        internal_snapshots=0,
        bitmaps=(),
        dirty=False,
        corrupt=False,
        encrypted=False,
        external_data=False,
    )
    return replace(
        replica,
        kind="file",
        chain=(image,),
        sector_bytes=replica.sector_bytes if replica.kind == "file" else PLAIN_SECTOR_BYTES,
        shareable=False,
        readonly=False,
        problem=None,
        free_bytes=pool.free_bytes,
    )
