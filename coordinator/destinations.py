"""Looks at where a run is to go: the destination, and the original it moves away from; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Connection

from coordinator import exclusions, registry
from coordinator.agents import QUESTION_TIMEOUT_S, AgentDirectory, ask
from coordinator.errors import AgentRefused, HostUnreachable, is_silent
from coordinator.exclusions import Why
from coordinator.findings import NO_VM, Problem, clause
from coordinator.model import Home, Pair, Refusal, RunOptions, VmRef
from coordinator.moving import map_destination, moved
from coordinator.new_home import NewHome, look
from coordinator.store import Store
from protocol.messages import InspectVm, Power, VmDescription


@dataclass(frozen=True, slots=True, kw_only=True)
class Sought:
    """What was found. `pair`: as the run would make it; None where there is no destination that could be planned for.
    `notes`: what a person should know of the move before it. `home`: the VM that the run would make anew."""

    pair: Pair | None
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    home: NewHome | None = None


async def seek(agents: AgentDirectory, store: Store, pair: Pair, options: RunOptions) -> Sought:
    """The pair as a run with these options would make it, and everything that speaks against that.

    Raises:
        UsageError: the destination's host is not configured, or our own certificates cannot be read.
    """
    to = options.to
    if not to.moves:
        return Sought(pair=pair)
    if to.home is Home.HOST:
        return await _new_home(agents, store, pair, options)
    found = await _inspect(agents, to.host, to.vm)
    if isinstance(found, Problem):
        return Sought(pair=None, refusals=(_not_there(options, found),))
    ref = VmRef(host=to.host, name=found.name, uuid=found.uuid)
    refusals = [*_same(pair, ref), *await store.read(lambda connection: _taken(connection, pair, ref))]
    disks = map_destination(pair, {disk.target for disk in found.disks})
    if disks is None:
        refusals.append(_unmapped(pair, ref, found))
    if refusals or disks is None:
        return Sought(pair=None, refusals=tuple(refusals))
    former = await _inspect(agents, pair.original.host, pair.original.uuid)
    return Sought(
        pair=moved(pair, ref, disks),
        refusals=(*_on(ref, found), *_former_on(pair, former, options)),
        notes=tuple(_notes(pair, ref, former)),
    )


async def _new_home(agents: AgentDirectory, store: Store, pair: Pair, options: RunOptions) -> Sought:
    home = await look(agents, pair, options)
    if isinstance(home, Refusal):
        return Sought(pair=None, refusals=(home,))
    ref = home.vm
    taken = await store.read(lambda connection: _taken(connection, pair, ref))
    former = await _inspect(agents, pair.original.host, pair.original.uuid)
    if home.refusals or taken:
        return Sought(
            pair=None,
            refusals=(*home.refusals, *taken, *_former_on(pair, former, options)),
            notes=home.notes,
            home=home,
        )
    return Sought(
        pair=moved(pair, ref, home.disks),
        refusals=tuple(_former_on(pair, former, options)),
        notes=(*_home_notes(pair, home), *_former_notes(pair, former), *home.notes),
        home=home,
    )


async def _inspect(agents: AgentDirectory, host: str, vm: str) -> VmDescription | Problem:
    try:
        return await ask(agents.agent(host), InspectVm(vm=vm), VmDescription, timeout_s=QUESTION_TIMEOUT_S)
    except (HostUnreachable, AgentRefused) as error:
        code = "silent" if is_silent(error) else error.code
        return Problem(code=code, sentence=error.sentence)


def _not_there(options: RunOptions, problem: Problem) -> Refusal:
    to = options.to
    if problem.code == NO_VM:
        sentence = (
            f"Host {to.host} knows no VM {to.vm}: restore it there from a backup first, or name it as `virsh list "
            "--all` does."
        )
        return Refusal(code="destination-gone", about=to.vm, sentence=sentence)
    sentence = f"The destination {to.vm} on {to.host} cannot be looked at: {clause(problem.sentence)}."
    return Refusal(code="destination-unreadable", about=to.vm, sentence=sentence)


def _same(pair: Pair, ref: VmRef) -> Iterator[Refusal]:
    for role, vm, cure in (
        ("original", pair.original, f"`failback start {pair.name}` brings the data there in place"),
        ("replica", pair.replica, "name another VM, restored from a backup of the original"),
    ):
        if (vm.host, vm.uuid) == (ref.host, ref.uuid):
            sentence = f"The destination {ref.name} on {ref.host} is the {role} of {pair.name} itself: {cure}."
            yield Refusal(code="destination-is-pair", about=ref.name, sentence=sentence)


def _taken(connection: Connection, pair: Pair, ref: VmRef) -> tuple[Refusal, ...]:
    found = list(exclusions.refusals(connection, ref, allowed=frozenset({Why.OVERWRITTEN})))
    for other in registry.list_pairs(connection):
        vms = [other.original, other.replica, *([] if other.former is None else [other.former.vm])]
        if other.name != pair.name and (ref.host, ref.uuid) in {(vm.host, vm.uuid) for vm in vms}:
            sentence = (
                f"The destination {ref.name} on {ref.host} belongs to the pair {other.name}: name another VM, or "
                f"`failback forget {other.name}` first."
            )
            found.append(Refusal(code="vm-taken", about=ref.name, sentence=sentence))
    return tuple(found)


def _unmapped(pair: Pair, ref: VmRef, found: VmDescription) -> Refusal:
    wanted = ", ".join(disk.original for disk in pair.disks)
    has = ", ".join(disk.target for disk in found.disks) or "none"
    sentence = (
        f"The destination {ref.name} on {ref.host} has the disks {has}, and {wanted} are needed: restore all of them "
        "there, under the target names of the original or of the replica."
    )
    return Refusal(code="destination-disks", about=ref.name, sentence=sentence)


def _on(ref: VmRef, found: VmDescription) -> Iterator[Refusal]:
    if found.power is not Power.OFF:
        sentence = (
            f"The destination {ref.name} on {ref.host} is {found.power.value}, and its disks would be overwritten "
            f"under it: see that nobody needs it, then `virsh shutdown {ref.name}` there (--power-off-original is "
            "not about it)."
        )
        yield Refusal(code="destination-runs", about=ref.name, sentence=sentence)


def _former_on(pair: Pair, former: VmDescription | Problem, options: RunOptions) -> Iterator[Refusal]:
    vm = pair.original
    if isinstance(former, Problem):
        if former.code not in (NO_VM, "silent"):
            sentence = (
                f"The original {vm.name} on {vm.host}, which the pair moves away from, cannot be proven off: "
                f"{clause(former.sentence)}."
            )
            yield Refusal(code="former-unproven", about=vm.name, sentence=sentence)
        return
    if former.power is Power.OFF or (former.power is Power.RUNNING and options.power_off_original):
        return
    sentence = (
        f"The original {vm.name} on {vm.host}, which the pair moves away from, is {former.power.value}: it would run "
        "beside the VM that takes its place; save what you need of it, then power it off or start with "
        "--power-off-original (--yes does not imply it)."
    )
    yield Refusal(code="former-runs", about=vm.name, sentence=sentence)


def _home_notes(pair: Pair, home: NewHome) -> Iterator[str]:
    vm, ref = pair.original, home.vm
    volumes = ", ".join(f"{volume.target} ({volume.format}) in {volume.pool}" for volume in home.volumes)
    yield (
        f"The pair moves: {ref.name} is made anew on {ref.host}, with the volumes {volumes}, and becomes its original. "
        f"Undo and cancel remove what was made, and nothing else, and give {vm.name} on {vm.host} back to the pair."
    )


def _notes(pair: Pair, ref: VmRef, former: VmDescription | Problem) -> Iterator[str]:
    vm = pair.original
    yield (
        f"The pair moves: {ref.name} on {ref.host} becomes its original, and its disks are overwritten. Undo and "
        f"cancel give {vm.name} on {vm.host} back to the pair untouched, and leave {ref.name} off, fenced and marked "
        "overwritten."
    )
    yield from _former_notes(pair, former)


def _former_notes(pair: Pair, former: VmDescription | Problem) -> Iterator[str]:
    vm = pair.original
    if isinstance(former, VmDescription):
        yield f"The original {vm.name} on {vm.host} stays off and fenced; commit puts it on the exclusion list."
    elif former.code == NO_VM:
        yield f"{vm.host} no longer knows the original {vm.name}: there is nothing to fence."
    else:
        yield (
            f"{vm.host} does not answer, so the fence of the original {vm.name} is PENDING: it is powered off and "
            "fenced there at the first contact. Until then nobody proves that it is off; do not start it."
        )
